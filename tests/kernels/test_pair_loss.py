"""The pair loss kernel against the definition in float64, on the GPU or under Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpo_fast.kernels import pair_loss as module
from lpo_fast.kernels.pair_loss import pair_loss, pair_loss_reference
from lpo_fast.method import schedule
from lpo_fast.method.loss import StepDPO
from lpo_fast.method.schedule import Schedule
from lpo_fast.system import launch
from lpo_fast.verify.vectors import Golden
from tests.helpers.models import DEVICE
from tests.helpers.pair_loss import SETTINGS, Batch, batch, schedules
from tests.helpers.tolerance import EPS, allowed, assert_close

pytestmark = pytest.mark.usefixtures("kernels")
KINDS = ["epsilon", "v_prediction", "sample"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sizes(sched: Schedule, b: Batch, guidance: float, cast: bool = False) -> dict[str, Tensor]:
    """Magnitudes of what is added up to give mean, x_p − mean, mean − mean_ref [N, C, H, W],
    Δ [2, N], ∂mean/∂m.

    cast: the inputs themselves were rounded to fp32, so differences of them are off by their own magnitudes.
    """
    table = sched.table.double()[b.t].abs().T[..., None, None, None]
    x0_x, x0_m, e_x, e_m, sqrt_a_p, direction, sigma = table

    def output(m: Tensor) -> Tensor:
        null, text = m.detach().double().chunk(2)
        return null.abs() + guidance * (text.abs() + null.abs())
    m, m_ref = output(b.policy), output(b.reference)
    slope = sqrt_a_p * x0_m + direction * e_m
    x = b.x_t.double().abs()
    mean, mean_ref = (sqrt_a_p * (x0_x * x + x0_m * k) + direction * (e_x * x + e_m * k) for k in (m, m_ref))
    apart = slope * (m + m_ref if cast else output(b.policy.detach().double() - b.reference.double()))
    # where exactly one x0 is clipped, or rounding decides whether, x0 − x0_ref is rounded
    if sched.clip is not None:
        sides = []
        for outputs, k in ((b.policy, m), (b.reference, m_ref)):
            null, text = outputs.detach().double().chunk(2)
            signed = sched.table.double()[b.t].T[..., None, None, None]
            x0, rounding = (signed[0] * b.x_t + signed[1] * (null + guidance * (text - null)),
                            8 * EPS * (x0_x * x + x0_m * k))
            sides.append(torch.where(x0 > sched.clip + rounding, 1,
                                     torch.where(x0 < -sched.clip - rounding, -1, 0)))
            sides.append(torch.where(x0 > sched.clip - rounding, 1,
                                     torch.where(x0 < -sched.clip + rounding, -1, 0)))
        same = (sides[0] == sides[1]) & (sides[1] == sides[2]) & (sides[2] == sides[3])
        apart = apart + torch.where(same, 0.0, sqrt_a_p * (2 * x0_x * x + x0_m * (m + m_ref)))
    # the definition, in fp64, subtracts these
    apart = apart + torch.finfo(torch.float64).eps / EPS * (mean + mean_ref)
    away = torch.stack([x_p.double().abs() + mean + mean_ref for x_p in (b.winner, b.loser)])
    ratio = (apart * 2 * away).flatten(2).mean(2) / (2 * sigma.flatten() ** 2)
    return {"away": away, "ratio": ratio, "slope": slope,
            "density": away.square().flatten(2).mean(2) / sigma.flatten() ** 2}


def check(sched: Schedule, b: Batch, out: StepDPO, grad: Tensor, *, guidance: float, beta: float, eps: float,
          exact: StepDPO | None = None, exact_grad: Tensor | None = None) -> None:
    """Loss, metrics and gradient of 3·loss against float64,
    up to pairs whose ratio is at a bound within rounding."""
    cast = exact is not None
    wide = replace(sched, table=sched.table.double())
    if exact is None:
        policy = b.policy.detach().double().requires_grad_()
        exact = pair_loss_reference(wide, *b.double()._replace(policy=policy), guidance=guidance, beta=beta,
                                    eps=eps)
        exact_grad = torch.autograd.grad(3 * exact.loss, policy)[0]
    size, terms, n = sizes(sched, b, guidance, cast), b.x_t[0].numel(), len(b.t)
    exact = StepDPO(*(x.detach() for x in exact))
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in out[1:])
    r_win, r_lose = size["ratio"]
    for name, scale in (("ratio_win", r_win), ("ratio_lose", r_lose)):
        assert_close(name, getattr(out, name), getattr(exact, name), (1 + eps) * (1 + scale), terms)
    for name, scale in (("win_policy", 0), ("win_ref", 0), ("lose_policy", 1), ("lose_ref", 1)):
        assert_close(name, getattr(out, name), getattr(exact, name), 10 + size["density"][scale], terms)
    slack = 1 + beta * (r_win + r_lose + 2 * abs(math.log1p(eps)))
    assert_close("pair loss", out.pair_loss, exact.pair_loss, slack, terms)
    assert_close("loss", out.loss, exact.loss, (b.weight * slack).sum(), terms)
    assert_close("totals", out.totals[:3], exact.totals[:3],
                 torch.stack([slack, (1 + eps) * (1 + r_win), (1 + eps) * (1 + r_lose)]) @ b.weight.double(),
                 terms)

    error = allowed(torch.float32, torch.zeros(n), size["ratio"].cpu(), terms)
    bounds = torch.tensor([math.log1p(-eps) if eps < 1 else -math.inf, math.log1p(eps)], dtype=torch.float64)
    wide_values = _log_ratios(wide, b.double(), guidance).cpu()
    decided = ((wide_values[..., None] - bounds).abs() > error[..., None]).all(-1).all(0)
    assert decided.any() or n < 3
    sure = torch.cat([decided, decided]).to(DEVICE)
    # the slope beta·sigmoid(·) is off by as much as its argument,
    # and every element by the rounding of x_p − mean
    sigma = sched.table[b.t, schedule.SIGMA].double()[:, None, None, None]
    slope = 3 * b.weight.double()[:, None, None, None] * beta / (sigma**2 * terms) * size["slope"]
    each = slope * size["away"].sum(0)
    each = (torch.cat([each * abs(1 - guidance), each * guidance])
            * (1 + torch.cat([slack, slack])[:, None, None, None]))
    assert grad.dtype == b.policy.dtype and grad.stride() == b.policy.stride()
    assert_close("gradient", grad[sure], exact_grad[sure], each[sure], terms)


def _log_ratios(wide: Schedule, b: Batch, guidance: float) -> Tensor:
    """Both log ratios before the clamp, [2, N]: those of a bound that nothing reaches."""
    out = pair_loss_reference(wide, *b, guidance=guidance, beta=1.0, eps=1e300)
    return torch.stack([out.win_policy - out.win_ref, out.lose_policy - out.lose_ref]).detach()


def run(sched: Schedule, b: Batch, function=pair_loss, **settings: float) -> tuple[StepDPO, Tensor]:
    out = function(sched, *b, **settings)
    return out, torch.autograd.grad(3 * out.loss, b.policy)[0]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, clip", [(kind, clip) for kind in KINDS for clip in (None, 1.0)])
def test_equals_the_definition(kind: str, clip: float | None, dtype: torch.dtype, last: bool) -> None:
    sched, b = schedules(kind, clip), batch((7, 4, 33, 9), dtype, last)
    check(sched, b, *run(sched, b, **SETTINGS), **SETTINGS)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 4, 7]), st.sampled_from([(1, 1), (7, 33), (33, 1), (16, 16)]),
       st.sampled_from(DTYPES), st.booleans(), st.sampled_from(KINDS), st.sampled_from([1e-4, 1.0, 1e4]),
       st.sampled_from([1e-4, 1.0, 1e3]), st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
       st.sampled_from([0.0, 1.0, 5.0, 7.5]),
       st.sampled_from([0.01, 10.0, 5000.0]), st.sampled_from([1e-3, 0.1, 1.0, 3.0]), st.integers(0, 1000))
def test_any_shape_and_value(n, c, hw, dtype, last, kind, latent, output, apart, guidance, beta, eps,
                             seed) -> None:
    sched, b = schedules(kind), batch((n, c, *hw), dtype, last, latent, output, apart, seed)
    chosen = {"guidance": guidance, "beta": beta, "eps": eps}
    check(sched, b, *run(sched, b, **chosen), **chosen)


def test_the_last_program_adds_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUMMED", 8)  # one pair of 5 blocks at a time
    sched, b = schedules("epsilon"), batch((3, 4, 33, 33))
    check(sched, b, *run(sched, b, **SETTINGS), **SETTINGS)


def test_before_the_first_update_the_ratio_is_exactly_one() -> None:
    sched, b = schedules("epsilon"), batch((4, 4, 7, 7), torch.float16, apart=0.0)
    out, grad = run(sched, b, **SETTINGS)
    assert (out.ratio_win == 1).all() and (out.ratio_lose == 1).all() and out.totals[7] == 0
    assert torch.equal(out.win_policy, out.win_ref) and torch.equal(out.lose_policy, out.lose_ref)
    assert out.pair_loss.tolist() == pytest.approx([math.log(2)] * 4, rel=2 * EPS)
    x0_m, e_m, sqrt_a_p, direction, sigma = sched.table[b.t][:, [1, 3, 4, 5, 6]].double().T
    coefficient = 3 * b.weight * 500 / 2 / (sigma**2 * 196) * (sqrt_a_p * x0_m + direction * e_m)
    expected = -coefficient[:, None, None, None] * (b.winner.double() - b.loser.double())
    limit = torch.finfo(torch.float16).eps * expected.abs().max() * 5
    assert (grad.double() - torch.cat([-4 * expected, 5 * expected])).abs().max() < limit


def test_what_nearly_cancels_is_subtracted_first() -> None:
    """Outputs that differ in their last bits: Δ is right to rounding of itself, not of the outputs."""
    sched, b, beta = schedules("epsilon"), batch((8, 4, 7, 7), apart=1e-6), 1e7
    exact = pair_loss_reference(replace(sched, table=sched.table.double()), *b.double(), guidance=5.0,
                                beta=beta, eps=0.5)
    out = pair_loss(sched, *b, guidance=5.0, beta=beta, eps=0.5)
    assert_close("pair loss", out.pair_loss, exact.pair_loss, 1 + beta * sizes(sched, b, 5.0)["ratio"].sum(0),
                 4 * 7 * 7)


def test_metrics_are_weighted_sums() -> None:
    sched, b = schedules("v_prediction"), batch((6, 4, 7, 7), apart=3e-2, output=0.3)
    out = pair_loss(sched, *b, **SETTINGS)
    assert ((out.ratio_win > out.ratio_lose) != (out.ratio_win < out.ratio_lose)).any()
    metrics = torch.stack([out.pair_loss, out.ratio_win, out.ratio_lose, *(d.exp() for d in out[4:8]),
                           (out.ratio_win > out.ratio_lose).float(), out.ratio_win - out.ratio_lose])
    for got, expected in zip(out.totals.tolist(), (metrics.double() @ b.weight.double()).tolist(),
                             strict=True):
        assert got == pytest.approx(expected, rel=16 * EPS, abs=16 * EPS * b.weight.sum().item())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_as_one_graph(backend: str) -> None:
    compiled = torch.compile(pair_loss, fullgraph=True, dynamic=False, backend=backend)
    for last in (False, True):
        sched, b = schedules("epsilon"), batch((3, 4, 7, 33), torch.float16, last)
        check(sched, b, *run(sched, b, compiled, **SETTINGS), **SETTINGS)


def test_is_a_torch_op() -> None:
    for shape in ((3, 4, 7, 5), (0, 4, 7, 5)):
        sched, b = schedules("epsilon"), batch(shape, torch.float16, last=True)
        torch.library.opcheck(module._op, (sched.table, *b, 5.0, 500.0, 0.1, math.inf))


def test_one_launch_each_way() -> None:
    sched, b = schedules("epsilon"), batch((3, 4, 7, 5), torch.float16)
    with launch.recording() as launches:
        loss = pair_loss(sched, *b, **SETTINGS).loss
        assert [record.kernel for record in launches] == [module._forward_kernel]
        loss.backward()
    assert [record.kernel for record in launches] == [module._forward_kernel, module._backward_kernel]


def test_the_same_bits_in_every_run() -> None:
    sched, b = schedules("epsilon"), batch((5, 4, 33, 33))
    first, second = (run(sched, b, **SETTINGS) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip((*first[0], first[1]), (*second[0], second[1]), strict=True))


def test_empty_batch() -> None:
    sched, b = schedules("epsilon"), batch((0, 4, 7, 5))
    out, grad = run(sched, b, **SETTINGS)
    assert (out.loss == 0 and not out.totals.any() and out.pair_loss.shape == (0,)
            and grad.shape == (0, 4, 7, 5))


@pytest.mark.parametrize("name", ["policy", "reference", "winner", "x_t"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stays_so(name: str, value: float) -> None:
    """As in the definition: in the loss (an infinite ratio is clamped),
    in that pair's gradient and in no other's."""
    sched, b = schedules("epsilon"), batch((3, 4, 7, 5))
    with torch.no_grad():
        getattr(b, name)[1, 2, 3, 4] = value
    out, grad = run(sched, b, **SETTINGS)
    exact, exact_grad = run(sched, b, pair_loss_reference, **SETTINGS)
    assert torch.equal(out.pair_loss.isfinite(), exact.pair_loss.isfinite())
    assert out.loss.isfinite() == exact.loss.isfinite() == (name == "winner" and value == math.inf)
    finite, expected = (g.view(2, 3, -1).isfinite().all(2) for g in (grad, exact_grad))
    assert torch.equal(finite, expected) and expected.tolist() == [[True, False, True]] * 2


def test_strided_inputs() -> None:
    sched, b = schedules("epsilon"), batch((3, 4, 7, 33))
    holes = b._replace(
        x_t=torch.stack([b.x_t, b.x_t], -1)[..., 0],
        winner=b.winner.contiguous(memory_format=torch.channels_last),
        t=b.t[:1].expand(3), weight=torch.stack([b.weight, b.weight], -1)[:, 0],
        reference=b.reference.contiguous(memory_format=torch.channels_last),
        policy=torch.stack([b.policy, b.policy], -1).detach()[..., 0].requires_grad_())
    out, grad = run(sched, holes, **SETTINGS)
    same = b._replace(t=b.t[:1].repeat(3))
    check(sched, same, out, grad.contiguous(), **SETTINGS)
    wide = torch.cat([sched.table, sched.table], 1)
    for table in (sched.table.T.contiguous().T, wide[:, :7]):
        out, grad = run(replace(sched, table=table), same, **SETTINGS)
        check(sched, same, out, grad, **SETTINGS)
    with pytest.raises(ValueError, match=r"sched.table has shape \(\d+, 14\), expected \(N, 7\)"):
        run(replace(sched, table=wide), same, **SETTINGS)


def test_gradcheck_of_the_reference() -> None:
    for kind in KINDS:
        b = batch((2, 2, 3, 3), apart=1e-4, output=0.1).double()
        sched = replace(schedules(kind), table=schedules(kind).table.double())
        policy = b.policy.detach().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda m, s=sched, b=b: pair_loss(s, *b._replace(policy=m), **SETTINGS).loss, policy)


def test_golden_vectors(golden: Golden) -> None:
    """The official code's recording, cast to the dtypes of training."""
    io, meta = golden.tensors("pairwise_loss"), golden.metadata("pairwise_loss")
    for setting in sorted({name.rpartition("/")[0] for name in io if "/eps" in name}):
        kind, _, eps = setting.partition("/eps")
        got = {name.partition("/")[2]: x.to(DEVICE) for name, x in io.items()
               if name.startswith((f"{kind}/", f"{setting}/"))}
        own = {name.rpartition("/")[2]: x.to(DEVICE) for name, x in io.items()
               if name.startswith(f"{setting}/")}
        t = got["timesteps"]
        wide = schedule.ddim(got["alphas_cumprod"], t, 20, float(meta["eta"]), kind)
        weight = torch.full((len(t),), 1 / len(t), device=DEVICE)
        chosen = {"guidance": float(meta["guidance_scale"]), "beta": float(meta["beta"]), "eps": float(eps)}
        b = Batch(*(got[name].float() for name in ("x_t", "x_win", "x_lose")), t,
                  torch.cat([got["noise_uncond"], got["noise_cond"]]).float().requires_grad_(),
                  torch.cat([got["ref_uncond"], got["ref_cond"]]).float(), weight)
        exact = StepDPO(
            own["loss"], own["per_pair_loss"], own["ratio_win"], own["ratio_lose"], got["log_prob_win"],
            got["ref_log_prob_win"], got["log_prob_lose"], got["ref_log_prob_lose"],
            torch.stack([own[name].mean() for name in ("per_pair_loss", "ratio_win", "ratio_lose")]))
        sched = wide.to(torch.float32)
        check(sched, b, *run(sched, b, **chosen), **chosen, exact=exact,
              exact_grad=3 * torch.cat([own["grad_uncond"], own["grad_cond"]]))
