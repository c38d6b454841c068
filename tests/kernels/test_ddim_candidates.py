"""DDIM candidates by the kernel against the definition in float64,
and its noise against Philox in Python's integers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import Unsupported

from lpo_fast.kernels.ddim_candidates import BLOCK, _op, ddim_candidates, ddim_candidates_reference
from lpo_fast.method import noise, schedule
from lpo_fast.method.noise import Counter
from lpo_fast.method.schedule import Schedule
from lpo_fast.system import launch
from lpo_fast.verify.vectors import Golden
from tests.helpers.models import CONFIGS, DEVICE
from tests.helpers.philox import ONES, apart, philox_python
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")
KINDS, DTYPES = ["epsilon", "v_prediction", "sample"], [torch.float32, torch.float16, torch.bfloat16]
# the third: two blocks, not full
SHAPES = [(2, 1, 1, 1), (3, 1, 1, 7), (2, 3, 33, 7), (1, 4, 16, 16), (2, 2, 1, 33)]
TIMES = [951, 1, 501, 0, 999, 51]


def schedules(kind: str = "epsilon", clip: float | None = None) -> Schedule:
    alphas = schedule.from_config(CONFIGS["scheduler"], 20).alphas_cumprod
    return schedule.ddim(alphas, torch.arange(951, 0, -50), 20, 1.0, kind, clip).to(DEVICE)


def only_noise() -> Schedule:
    """x_p is z."""
    table = torch.zeros(1000, 7, device=DEVICE)
    table[:, schedule.SIGMA] = 1
    return Schedule(torch.arange(1000, device=DEVICE), table, torch.ones(1000, device=DEVICE))


def counter(items: list[int], seed: int = 42, epoch: int = 0, step: int = 0) -> Counter:
    return Counter(*(torch.tensor(value, dtype=torch.int64, device=DEVICE)
                     for value in ([seed, epoch], step, items)))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, last: bool = False, scale: float = 1.0,
           seed: int = 0, k: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, outputs, t and z [k, B, C, H, W]; scale is that of x_t and the outputs."""
    random, b = torch.Generator().manual_seed(seed), shape[0]
    x_t, outputs = (torch.randn(n, *shape[1:], generator=random) * scale for n in (b, 2 * b))
    z = torch.randn(k, *shape, generator=random)
    t = torch.tensor([TIMES[(i + seed) % len(TIMES)] for i in range(b)], dtype=torch.int64)
    memory = torch.channels_last if last else torch.contiguous_format
    outputs = outputs.to(dtype).to(DEVICE).contiguous(memory_format=memory)
    return x_t.to(DEVICE), outputs, t.to(DEVICE), z.to(DEVICE)


def magnitude(sched: Schedule, x_t: Tensor, outputs: Tensor, t: Tensor, z: Tensor, guidance: float) -> Tensor:
    """Sum of the magnitudes of everything that is added up to give x_p."""
    x0_x, x0_m, e_x, e_m, sqrt_a_p, direction, sigma = sched.table.double()[t].abs().T[..., None, None, None]
    null, text = outputs.double().abs().chunk(2)
    m, x_t = null + abs(guidance) * (text + null), x_t.double().abs()
    return sqrt_a_p * (x0_x * x_t + x0_m * m) + direction * (e_x * x_t + e_m * m) + sigma * z.double().abs()


def check(what: str, got: Tensor, sched: Schedule, x_t: Tensor, outputs: Tensor, t: Tensor, guidance: float,
          z: Tensor) -> None:
    """``got`` is what float64 makes of the given z."""
    exact = ddim_candidates_reference(sched.to(torch.float64), x_t.double(), outputs.double(), t,
                                      guidance=guidance, noise=z.double(), candidates=len(z))
    assert got.dtype == torch.float32 and got.is_contiguous() and got.device == x_t.device
    assert_close(what, got, exact, magnitude(sched, x_t, outputs, t, z, guidance), terms=16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    sched, (x_t, outputs, t, z) = schedules(), inputs(shape, dtype, last)
    got = ddim_candidates(sched, x_t, outputs, t, guidance=7.5, noise=z, candidates=2)
    check("given", got, sched, x_t, outputs, t, 7.5, z)
    at = counter(list(range(3, 3 + shape[0])), step=7)
    got = ddim_candidates(sched, x_t, outputs, t, guidance=7.5, noise=at, candidates=2)
    check("drawn", got, sched, x_t, outputs, t, 7.5, noise.normal(42, 0, at.items, 7, 2, shape[1:]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 1.0, 0.25])
@pytest.mark.parametrize("guidance", [0, 1, 7.5, -2.0])
def test_prediction_types_clip_and_guidance(kind: str, clip: float | None, guidance: float) -> None:
    sched, (x_t, outputs, t, z) = schedules(kind, clip), inputs((6, 2, 3, 5))
    got = ddim_candidates(sched, x_t, outputs, t, guidance=guidance, noise=z, candidates=2)
    check(f"{kind} {clip}", got, sched, x_t, outputs, t, guidance, z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", ["0.5", "1.0"])
def test_golden(golden: Golden, kind: str, eta: str) -> None:
    """The official code's candidates, through the kernel:
    the text pass holds its output, the null pass anything."""
    io = golden.tensors("ddim")
    sched = schedule.ddim(io[f"{kind}/alphas_cumprod"], io[f"{kind}/timesteps"], 20, float(eta),
                          kind).to(torch.float32)
    x_t, out, z = (io[f"{kind}/{name}"].float().to(DEVICE) for name in ("sample", "model_output", "noise"))
    sched, outputs, t = sched.to(DEVICE), torch.cat([out.roll(1, 0), out]), io[f"{kind}/timesteps"].to(DEVICE)
    got = ddim_candidates(sched, x_t, outputs, t, guidance=1.0, noise=z, candidates=len(z))
    exact = io[f"{kind}/eta{eta}/candidates"].to(DEVICE)
    assert_close("golden", got, exact, magnitude(sched, x_t, outputs, t, z, 1.0), terms=16)


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
       st.sampled_from(DTYPES), st.booleans(), st.sampled_from([1e-4, 1.0, 1e4]), st.sampled_from(KINDS),
       st.sampled_from([None, 2.0]), st.floats(-10, 10), st.integers(1, 3), st.integers(0, 99))
def test_any_input(shape, dtype, last, scale, kind, clip, guidance, k, seed) -> None:
    sched, (x_t, outputs, t, z) = schedules(kind, clip), inputs(shape, dtype, last, scale, seed, k)
    got = ddim_candidates(sched, x_t, outputs, t, guidance=guidance, noise=z, candidates=k)
    check("any", got, sched, x_t, outputs, t, guidance, z)


@pytest.mark.parametrize("seed, epoch, step, items", [
    (0, 0, 0, [0, 1]), (42, 1, 19, [5, 4095]), (2**40 + 7, 3, 999, [2**33 + 5, 2**32 - 1]),
    (2**63 - 1, ONES, 1, [7]), (-5, 2**32 + 2, noise.INITIAL, [3, 0, 2]), (2**32, 0, noise.ORDER, [2**31]),
])
def test_normals_are_those_of_the_documented_counter(seed: int, epoch: int, step: int,
                                                     items: list[int]) -> None:
    at, shape, b = counter(items, seed, epoch, step), (3, 1, 15), len(items)
    blank = torch.zeros(b, *shape, device=DEVICE)
    z = ddim_candidates(only_noise(), blank, torch.cat([blank, blank]), torch.full_like(at.items, 9),
                        guidance=1.0, noise=at, candidates=3)
    assert apart(z, noise.normal(seed, epoch, at.items, step, 3, shape)) <= 2
    expected = []
    for k in range(3):
        for item in items:
            row = []
            for element in range(12):
                words = philox_python(seed, [element, step << 16 | k, item & ONES, epoch & ONES])
                u = [(word >> 8) / 2**24 for word in words]
                for radius, angle in ((u[0], u[1]), (u[2], u[3])):
                    length = math.sqrt(-2 * math.log(radius + 2**-24))
                    row += [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
            expected.append(row[:45])
    assert apart(z.flatten(), torch.tensor(expected, dtype=torch.float64).float().flatten()) <= 2


def test_independent_of_batches_and_of_the_number_of_candidates() -> None:
    sched, (x_t, outputs, t, _) = schedules(), inputs((5, 3, 8, 29), torch.float16)
    assert x_t[0].numel() > BLOCK
    # sigma(0) = 0
    at, null_text, t = counter([7, 1, 2**33, 0, 4], 1, 2, 3), outputs.unflatten(0, (2, 5)), t.clamp(min=1)

    def draw(rows: slice, candidates: int) -> Tensor:
        return ddim_candidates(sched, x_t[rows], null_text[:, rows].flatten(0, 1), t[rows], guidance=3.0,
                               noise=at._replace(items=at.items[rows]), candidates=candidates)
    whole = draw(slice(None), 4)
    for size in (1, 2):
        assert torch.equal(torch.cat([draw(slice(i, i + size), 4) for i in range(0, 5, size)], 1), whole)
    for candidates in (1, 2, 3):
        assert torch.equal(draw(slice(None), candidates), whole[:candidates])
    assert len({row.sum().item() for row in whole.flatten(0, 1)}) == 20  # all draws differ


def test_strides_and_forms() -> None:
    """An expanded t, latents and outputs with gaps, a step of shape [1],
    tensors that want a gradient under no_grad."""
    sched, (x_t, outputs, _, _) = schedules(), inputs((2, 3, 7, 5))
    at, t = counter([3, 9], step=4), torch.tensor(501, device=DEVICE).expand(2)
    expected = ddim_candidates(sched, x_t, outputs, t.contiguous(), guidance=2.0, noise=at, candidates=2)
    wide = [torch.stack([x, x + 1], -1)[..., 0] for x in (x_t, outputs)]
    items = torch.stack([at.items, at.items + 1], 1)[:, 0]
    assert not any(x.is_contiguous() for x in (t, *wide, items))
    with torch.no_grad():
        got = ddim_candidates(sched, wide[0].requires_grad_(), wide[1].requires_grad_(), t, guidance=2,
                              noise=Counter(at.run, at.step[None], items), candidates=2)
    assert torch.equal(got, expected) and not got.requires_grad


def test_float64_takes_the_reference() -> None:
    sched, (x_t, outputs, t, z) = schedules().to(torch.float64), inputs((3, 2, 3, 3))
    with launch.recording() as launches:
        got = ddim_candidates(sched, x_t.double(), outputs.double(), t, guidance=7.5, noise=z.double(),
                              candidates=2)
    x0_x, x0_m, e_x, e_m, sqrt_a_p, direction, sigma = sched.table[t].T[..., None, None, None]
    null, text = outputs.double().chunk(2)
    m = null + 7.5 * (text - null)
    expected = sqrt_a_p * (x0_x * x_t + x0_m * m) + direction * (e_x * x_t + e_m * m) + sigma * z
    assert (not launches and got.dtype == torch.float64
            and torch.allclose(got, expected, rtol=1e-12, atol=1e-12))


@pytest.mark.parametrize("last", [False, True])
def test_references_output(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels the result has the same dtype and layout, and both kinds of noise give the same."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    sched, (x_t, outputs, t, _) = schedules(), inputs((2, 4, 3, 3), torch.float16, last)
    sched, x_t, outputs, t = sched.to("cpu"), x_t.cpu(), outputs.cpu(), t.cpu()
    at = Counter(*(x.cpu() for x in counter([1, 2], 3, 4, 5)))
    z = noise.normal(3, 4, at.items, 5, 2, x_t.shape[1:])
    drawn, handed = (ddim_candidates(sched, x_t, outputs, t, guidance=2.0, noise=n, candidates=2)
                     for n in (at, z))
    assert torch.equal(drawn, handed)
    check("reference", drawn, sched, x_t, outputs, t, 2.0, z)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_is(clip: float | None, bad: float) -> None:
    sched, (x_t, outputs, t, z) = schedules("v_prediction", clip), inputs((6, 1, 3, 5))
    x_t[0, 0, 1, 2] = outputs[1, 0, 2, 0] = outputs[9, 0, 0, 1] = z[1, 5, 0, 2, 4] = bad
    got = ddim_candidates(sched, x_t, outputs, t, guidance=7.5, noise=z, candidates=2)
    assert not got.isfinite().all() and got.isfinite().sum() >= got.numel() - 7
    finite = [torch.where(x.isfinite(), x, 0.0) for x in (x_t, outputs, z)]
    exact = ddim_candidates_reference(sched.to(torch.float64), x_t.double(), outputs.double(), t,
                                      guidance=7.5, noise=z.double(), candidates=2)
    keep = exact.isfinite()
    assert torch.equal(got.nan_to_num(0).sign()[~keep], exact.nan_to_num(0).float().sign()[~keep])  # NaN → 0
    assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isfinite(), keep)
    assert_close("finite", got[keep], exact[keep],
                 magnitude(sched, finite[0], finite[1], t, finite[2], 7.5)[keep], terms=16)


def arguments(drawn: bool) -> tuple:
    sched, (x_t, outputs, t, z) = schedules(clip=1.0), inputs((2, 3, 3, 3), torch.float16)
    return sched.table, x_t, outputs, t, list(counter([3, 4])) if drawn else [z], 2, 7.5, sched.clip


@pytest.mark.parametrize("drawn", [False, True])
def test_opcheck(drawn: bool) -> None:
    torch.library.opcheck(_op, arguments(drawn))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_and_replayed_with_another_counter(backend: str) -> None:
    sched, (x_t, outputs, t, z) = schedules(), inputs((2, 3, 5, 5), torch.float16, last=True)

    def step(x_t: Tensor, outputs: Tensor, t: Tensor, n: Tensor | Counter) -> Tensor:
        return 2 * ddim_candidates(sched, x_t, outputs, t, guidance=7.5, noise=n, candidates=2)
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=False)
    for n, others in ((counter([3, 4]), [counter([8, 2**40], 2**50, 3, 17), counter([0, 1], -1, 0, 2)]),
                      (z, [z + 1, -z])):
        assert torch.equal(compiled(x_t, outputs, t, n), step(x_t, outputs, t, n))
        with torch.compiler.set_stance("fail_on_recompile"):
            for other in others:
                got = compiled(x_t - 1, outputs, t.flip(0), other)
                assert torch.equal(got, step(x_t - 1, outputs, t.flip(0), other))


def test_compiled_code_takes_other_numbers_of_candidates() -> None:
    """As one graph, also where torch.compile makes the number a symbol after its second value."""
    torch._dynamo.reset()
    sched, (x_t, outputs, t, _) = schedules(), inputs((2, 3, 5, 5))

    def call(k: int) -> Tensor:
        return ddim_candidates(sched, x_t, outputs, t, guidance=7.5, noise=counter([3, 4]), candidates=k)
    compiled, most = torch.compile(call, fullgraph=True, backend="aot_eager"), call(5)
    for k in (2, 3, 5, 4, 1):
        assert torch.equal(compiled(k), most[:k])
    with pytest.raises(Unsupported, match="candidates is 65536, expected 1 to 65535"):
        compiled(65536)


def test_one_launch() -> None:
    sched, (x_t, outputs, t, z) = schedules(), inputs((2, 3, 33, 7))
    for n in (z, counter([1, 2])):
        with launch.recording() as launches:
            ddim_candidates(sched, x_t, outputs, t, guidance=7.5, noise=n, candidates=2)
        assert len(launches) == 1 and launches[0].grid == (4, 2)


@pytest.mark.parametrize("drawn", [False, True])
def test_empty_batch(drawn: bool) -> None:
    x_t, outputs, t, z = inputs((0, 4, 8, 8))
    got = ddim_candidates(schedules(), x_t, outputs, t, guidance=7.5, noise=counter([]) if drawn else z,
                          candidates=2)
    assert got.shape == (2, 0, 4, 8, 8) and got.dtype == torch.float32


def refused(message: str, sched: Schedule | None = None, **changes) -> None:
    x_t, outputs, t, z = inputs((2, 3, 4, 4))
    arguments = ({"x_t": x_t, "outputs": outputs, "t": t, "guidance": 7.5, "noise": z, "candidates": 2}
                 | changes)
    with pytest.raises(ValueError, match=message):
        ddim_candidates(sched or schedules(), **arguments)


def test_rejected_inputs() -> None:
    x_t, outputs, t, z = inputs((2, 3, 4, 4))
    at = counter([1, 2])
    refused(r"x_t has shape \(3, 4, 4\), expected \(B, C, H, W\)", x_t=x_t[0])
    refused("x_t is torch.float16, expected torch.float32 or torch.float64", x_t=x_t.half())
    refused(r"outputs has shape \(2, 3, 4, 4\), expected \(4, 3, 4, 4\)", outputs=outputs[:2])
    refused("outputs is torch.float64, expected torch.float32 or torch.float16 or torch.bfloat16$",
            outputs=outputs.double())
    refused("outputs is of type tuple, expected Tensor", outputs=outputs.chunk(2))
    refused("x_t is of type NoneType, expected Tensor", x_t=None)
    refused("outputs is on meta, expected", outputs=outputs.to("meta"))
    refused(r"t has shape \(1,\), expected \(2,\)", t=t[:1])
    refused("t is torch.int32, expected torch.int64", t=t.int())
    refused(r"sched.table is torch.float64, expected torch.float32", sched=schedules().to(torch.float64))
    refused("sched.table is on meta", sched=schedules().to("meta"))
    refused("candidates is 0, expected 1 to 65535", candidates=0)
    refused("candidates is 65536", candidates=65536)
    refused("candidates is of type float, expected int", candidates=2.0)
    refused("candidates is of type bool, expected int", candidates=True)
    refused("guidance is of type Tensor, expected int or float", guidance=torch.tensor(7.5))
    refused(r"sched.table has shape \(0, 7\): no timesteps",
            replace(schedules(), table=schedules().table[:0]))
    refused("noise is of type tuple, expected Tensor", noise=tuple(at))
    refused("noise.step is of type int, expected Tensor", noise=at._replace(step=3))
    for guidance in (math.nan, math.inf, -math.inf):
        refused(f"guidance is {guidance}, expected a finite number", guidance=guidance)
    refused(r"noise has shape \(2, 2, 3, 4, 4\), expected \(3, 2, 3, 4, 4\)", candidates=3)
    refused("noise is torch.float64", noise=z.double())
    refused(r"noise.run has shape \(3,\), expected \(2,\)",
            noise=at._replace(run=torch.zeros(3, dtype=torch.int64)))
    refused("noise.run is torch.int32", noise=at._replace(run=at.run.int()))
    refused(r"noise.items has shape \(1,\), expected \(2,\)", noise=at._replace(items=at.items[:1]))
    refused("noise.items is torch.float32", noise=at._replace(items=at.items.float()))
    refused(r"noise.step has shape \(2,\), expected \[\] or \[1\]", noise=at._replace(step=at.items))
    refused("noise.step is torch.int32", noise=at._replace(step=at.step.int()))
    refused("noise.step is on meta", noise=at._replace(step=at.step.to("meta")))
    for name, value in (("x_t", x_t), ("outputs", outputs), ("noise", z)):
        refused(fr"{name} requires a gradient, but the operator has none: .* torch.no_grad\(\)",
                **{name: value.requires_grad_()})
