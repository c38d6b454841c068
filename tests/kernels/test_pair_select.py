"""Pair selection by the kernel against its definition in Python,
and its draw against Philox in Python's integers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpo_fast.kernels.pair_select import BLOCK, Selection, _op, pair_select, pair_select_reference
from lpo_fast.method import noise, schedule, select
from lpo_fast.method.noise import Counter
from lpo_fast.system import launch
from lpo_fast.verify.vectors import Golden
from tests.helpers.models import CONFIGS, DEVICE
from tests.helpers.philox import ONES, philox_python

pytestmark = pytest.mark.usefixtures("kernels")
GAP = torch.linspace(0, 3, 50, device=DEVICE)


def tensor(values, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def counter(items: list[int], seed: int = 42, epoch: int = 0, step: int = 0) -> Counter:
    return Counter(tensor([seed, epoch]), tensor(step), tensor(items))


def inputs(k: int, b: int, shape: tuple[int, ...] = (2, 3, 3),
           seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores, x_p, gap, t, choice."""
    random = torch.Generator().manual_seed(seed)
    scores, x_p = torch.randn(k, b, generator=random), torch.randn(k, b, *shape, generator=random)
    t, choice = torch.randint(50, (b,), generator=random), torch.randint(k, (b,), generator=random)
    return scores.to(DEVICE), x_p.to(DEVICE), GAP, t.to(DEVICE), choice.to(DEVICE)


def check(got: Selection, scores: Tensor, x_p: Tensor, gap: Tensor, t: Tensor, choice: list[int]) -> None:
    """``got`` is what the definition says, one item at a time; nothing is rounded but the margin."""
    for i, column in enumerate(scores.T.tolist()):
        nan = [k for k, score in enumerate(column) if math.isnan(score)]
        best, worst = (nan[0], nan[0]) if nan else (column.index(max(column)), column.index(min(column)))
        margin = (scores[best, i] - scores[worst, i]).item()
        assert (got.best[i].item(), got.worst[i].item()) == (best, worst)
        assert got.margin[i].item() == margin or math.isnan(margin) and got.margin[i].isnan()
        assert got.valid[i].item() == (margin > gap[t[i]].item())
        for latent, k in ((got.winner, best), (got.loser, worst), (got.next, choice[i])):
            assert torch.equal(latent[i], x_p[k, i])
    assert all(x.dtype == torch.int64 for x in got[:2]) and got.valid.dtype == torch.bool
    assert got.margin.dtype == x_p.dtype and all(x.dtype == x_p.dtype and x.is_contiguous() for x in got[4:])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 16])
# the last: two blocks, not full
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (2, 3, 11), (3, 33, 7)])
def test_equals_the_definition(k: int, shape: tuple[int, ...]) -> None:
    scores, x_p, gap, t, choice = inputs(k, 3, shape, seed=k)
    check(pair_select(scores, x_p, gap, t, choice), scores, x_p, gap, t, choice.tolist())
    at = counter([3, 2**33 + 1, 12], step=k)
    drawn = noise.integers(42, 0, at.items, k, k).tolist()
    check(pair_select(scores, x_p, gap, t, at), scores, x_p, gap, t, drawn)


numbers = st.floats(-50, 50, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e4, -1e-4, math.inf, -math.inf,
                                                          math.nan])
columns = st.integers(2, 16).flatmap(
    lambda k: st.lists(st.lists(numbers, min_size=k, max_size=k), min_size=1, max_size=4))


@settings(max_examples=25, deadline=None)
@given(columns, st.lists(st.sampled_from([0.0, 1e-4, 1.0, math.inf]), min_size=4, max_size=4),
       st.integers(0, 99))
def test_any_scores(prompts: list[list[float]], gaps: list[float], seed: int) -> None:
    """Ties, infinities and NaN among them."""
    scores = tensor(prompts, torch.float32).T
    _, x_p, _, t, choice = inputs(*scores.shape, (1, 2, 3), seed)
    gap = tensor(gaps, torch.float32)
    got = pair_select(scores, x_p, gap, t % 4, choice)
    check(got, scores, x_p, gap, t % 4, choice.tolist())
    reference = pair_select_reference(scores, x_p, gap, t % 4, choice)
    for name, a, b in zip(Selection._fields, got, reference, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), name


def test_a_margin_that_equals_the_gap_is_not_enough() -> None:
    scores, (_, x_p, _, _, choice) = tensor([[1.0, 1.5, 2.0], [0.0, 0.0, 0.0]], torch.float32), inputs(2, 3)
    got = pair_select(scores, x_p, tensor([9.0, 1.0, 1.5, 1.9], torch.float32), tensor([1, 2, 3]), choice)
    assert got.valid.tolist() == [False, False, True] and got.margin.tolist() == [1.0, 1.5, 2.0]


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("shape", ["None", "linear", "sigma", "variance"])
def test_golden(golden: Golden, count: int, shape: str) -> None:
    """The official code's choices, through the kernel."""
    io, meta = golden.tensors("pair_selection"), golden.metadata("pair_selection")
    sched = schedule.from_config(CONFIGS["scheduler"], 20)
    low, high = (float(meta["threshold" if shape == "None" else f"threshold_{end}"])
                 for end in ("min", "max"))
    gap = select.gaps(sched, shape.lower(), low, high).to(DEVICE)
    scores, t = io[f"K{count}/scores"].to(DEVICE), io[f"K{count}/timesteps"].to(DEVICE)
    x_p = torch.arange(scores.numel(), dtype=torch.float32, device=DEVICE).view(*scores.shape, 1, 1, 1)
    got = pair_select(scores, x_p, gap, t, torch.zeros_like(t))
    best, worst = io[f"K{count}/{shape}/indices"].to(DEVICE)
    assert torch.equal(got.best, best) and torch.equal(got.worst, worst)
    assert torch.equal(got.valid.cpu(), io[f"K{count}/{shape}/valid"].bool())
    rows = torch.arange(len(t), device=DEVICE)
    assert torch.equal(got.winner.flatten(), (best * len(t) + rows).float())
    assert torch.equal(got.loser.flatten(), (worst * len(t) + rows).float()) and torch.equal(got.next, x_p[0])


@pytest.mark.parametrize("k", [2, 4, 7, 16])
@pytest.mark.parametrize("seed, epoch, step", [(0, 0, 0), (42, 1, 19), (2**40 + 7, 2**32 + 3, 999),
                                               (-5, ONES, 7), (2**63 - 1, 2, 65535)])
def test_draws_are_those_of_the_documented_counter(k: int, seed: int, epoch: int, step: int) -> None:
    items = [*range(20), 4095, 70000, 2**31, 2**32 - 1, 2**32, 2**33 + 5]
    _, _, gap, t, _ = inputs(k, len(items), (1, 1, 1))
    x_p = torch.arange(k, device=DEVICE).float()[:, None, None, None, None].expand(k, len(items), 1, 1, 1)
    at = counter(items, seed, epoch, step)
    drawn = pair_select(torch.zeros(k, len(items), device=DEVICE), x_p, gap, t, at).next.flatten().long()
    assert torch.equal(drawn, noise.integers(seed, epoch, at.items, step, k))
    assert drawn.tolist() == [philox_python(seed, [0, step << 16 | 0xFFFF, i & ONES, epoch & ONES])[0] % k
                              for i in items]
    assert len(set(drawn.tolist())) > 1


def test_independent_of_batches() -> None:
    scores, x_p, gap, t, _ = inputs(4, 5, (3, 33, 7))
    assert x_p[0, 0].numel() > BLOCK
    at = counter([9, 4, 2**32, 0, 7], 1, 2, 3)
    whole = pair_select(scores, x_p, gap, t, at)
    for size in (1, 2):
        parts = [pair_select(scores[:, i:i + size], x_p[:, i:i + size], gap, t[i:i + size],
                             at._replace(items=at.items[i:i + size])) for i in range(0, 5, size)]
        for name in Selection._fields:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_strides_and_forms() -> None:
    """An expanded t, scores and latents with gaps, a step of shape [1],
    tensors that want a gradient under no_grad."""
    scores, x_p, gap, _, _ = inputs(4, 2)
    at, t = counter([3, 9], step=4), tensor(25).expand(2)
    expected = pair_select(scores, x_p, gap, t.contiguous(), at)
    wide = [torch.stack([x, x + 1], -1)[..., 0] for x in (scores, x_p, gap, at.items)]
    assert not any(x.is_contiguous() for x in (t, *wide))
    with torch.no_grad():
        got = pair_select(wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2], t,
                          Counter(at.run, at.step[None], wide[3]))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, expected, strict=True))


def test_choice_out_of_range() -> None:
    """Nothing is read outside of x_p (on a GPU that would end the process):
    NaN, of the kernel and of the reference."""
    scores, x_p, gap, t, _ = inputs(4, 4)
    for function in (pair_select, pair_select_reference):
        good = function(scores, x_p, gap, t, tensor([0, 1, 2, 3]))
        bad = function(scores, x_p, gap, t, tensor([-1, 1, 4, 2**62]))
        assert all(torch.equal(a, b) for a, b in zip(good[:6], bad[:6], strict=True))
        assert torch.equal(bad.next[1], x_p[1, 1]) and bad.next[[0, 2, 3]].isnan().all()
        assert torch.equal(good.next, torch.stack([x_p[i, i] for i in range(4)]))


def test_float64_takes_the_reference() -> None:
    scores, x_p, gap, t, choice = inputs(4, 3)
    with launch.recording() as launches:
        got = pair_select(scores.double(), x_p.double(), gap.double(), t, choice)
        mixed = pair_select(scores, x_p.double(), gap, t, choice)
    check(got, scores.double(), x_p.double(), gap.double(), t, choice.tolist())
    assert not launches and torch.equal(mixed.best, got.best) and mixed.margin.dtype == torch.float32


def test_reference_draws_and_chooses_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, x_p, gap, t, _ = inputs(4, 3)
    at = counter([5, 6, 7], 1, 2, 3)
    kernel = pair_select(scores, x_p, gap, t, at)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    reference = pair_select(*(x.cpu() for x in (scores, x_p, gap, t)), Counter(*(x.cpu() for x in at)))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(kernel, reference, strict=True))


@pytest.mark.parametrize("drawn", [False, True])
def test_opcheck(drawn: bool) -> None:
    *rest, choice = inputs(4, 2)
    torch.library.opcheck(_op, (*rest, list(counter([3, 4])) if drawn else [choice]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_and_replayed_with_another_counter(backend: str) -> None:
    scores, x_p, gap, t, choice = inputs(4, 2)

    def step(scores: Tensor, x_p: Tensor, choice: Tensor | Counter) -> Selection:
        got = pair_select(scores, x_p, gap, t, choice)
        return got._replace(next=got.next * 2)
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=False)
    cases = ((counter([3, 4]), [counter([8, 2**40], 2**50, 3, 17), counter([0, 1], -1, 0, 2)]),
             (choice, [(choice + 1) % 4]))
    for n, others in cases:
        assert all(torch.equal(a, b)
                   for a, b in zip(compiled(scores, x_p, n), step(scores, x_p, n), strict=True))
        with torch.compiler.set_stance("fail_on_recompile"):
            for other in others:
                got, expected = compiled(-scores, x_p + 1, other), step(-scores, x_p + 1, other)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_launch() -> None:
    scores, x_p, gap, t, choice = inputs(4, 2, (3, 33, 7))
    for n in (choice, counter([1, 2])):
        with launch.recording() as launches:
            pair_select(scores, x_p, gap, t, n)
        assert len(launches) == 1 and launches[0].grid == (2, 2)


@pytest.mark.parametrize("drawn", [False, True])
def test_empty_batch(drawn: bool) -> None:
    *rest, choice = inputs(4, 0)
    got = pair_select(*rest, counter([]) if drawn else choice)
    assert [tuple(x.shape) for x in got] == [(0,)] * 4 + [(0, 2, 3, 3)] * 3
    assert [x.dtype for x in got] == [torch.int64] * 2 + [torch.float32, torch.bool] + [torch.float32] * 3


def test_rejected_inputs() -> None:
    scores, x_p, gap, t, choice = inputs(4, 2)
    at = counter([1, 2])

    def refused(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            pair_select(**{"scores": scores, "x_p": x_p, "gap": gap, "t": t, "choice": choice} | changes)
    refused(r"x_p has shape \(2, 2, 3, 3\), expected \(K, B, C, H, W\)", x_p=x_p[0])
    refused("x_p holds no candidates", x_p=x_p[:0], scores=scores[:0])
    refused("x_p is torch.bfloat16, expected torch.float32 or torch.float64", x_p=x_p.bfloat16())
    refused(r"scores has shape \(3, 2\), expected \(4, 2\)", scores=scores[:3])
    refused("scores is torch.float64, expected torch.float32", scores=scores.double())
    refused("scores is torch.float16, expected torch.float32", scores=scores.half())
    refused("scores is on meta", scores=scores.to("meta"))
    refused(r"gap has shape \(5, 10\), expected \(N,\)", gap=gap.view(5, 10))
    refused("gap is torch.float64, expected torch.float32", gap=gap.double())
    refused("gap is on meta", gap=gap.to("meta"))
    refused(r"t has shape \(1,\), expected \(2,\)", t=t[:1])
    refused("t is torch.int32, expected torch.int64", t=t.int())
    refused(r"choice has shape \(1,\), expected \(2,\)", choice=choice[:1])
    refused("choice is torch.int32, expected torch.int64", choice=choice.int())
    refused("choice is on meta", choice=choice.to("meta"))
    refused(r"choice.run has shape \(1,\), expected \(2,\)", choice=at._replace(run=at.run[:1]))
    refused(r"choice.items has shape \(1,\), expected \(2,\)", choice=at._replace(items=at.items[:1]))
    refused(r"choice.step has shape \(2,\), expected \[\] or \[1\]", choice=at._replace(step=at.items))
    refused(r"gap has shape \(0,\): no timesteps", gap=gap[:0])
    refused("gap is of type float, expected Tensor", gap=0.5)
    refused("x_p is of type list, expected Tensor", x_p=list(x_p))
    refused("choice is of type int, expected Tensor", choice=1)
    refused("choice.step is of type int, expected Tensor", choice=at._replace(step=3))
    for name, value in (("x_p", x_p), ("scores", scores)):
        wanting = {name: value.clone().requires_grad_()}
        refused(rf"{name} requires a gradient, but the operator has none: .* torch.no_grad\(\)", **wanting)
