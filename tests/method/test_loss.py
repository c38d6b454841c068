"""Both objectives against straightforward statements: float64, torch.distributions, and loops over pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpo_fast.config import LPO
from lpo_fast.lpo import steps
from lpo_fast.lpo.sampling import LatentPairs
from lpo_fast.method import loss, schedule
from lpo_fast.method.schedule import Schedule
from tests.helpers.models import CONFIGS
from tests.helpers.models import update as update_of

KINDS = ["epsilon", "v_prediction", "sample"]
GUIDANCE, STEPS = 5.0, 20


def fine(kind: str = "epsilon", eta: float = 1.0, clip: float | None = None) -> Schedule:
    """The sampler's schedule in float64."""
    rough = schedule.from_config(CONFIGS["scheduler"], STEPS)
    return schedule.ddim(rough.alphas_cumprod.double(), rough.timesteps, STEPS, eta, kind, clip)


def gaussian(a: Tensor, kind: str, x_t: Tensor, m: Tensor, t: int, eta: float) -> torch.distributions.Normal:
    """p(x_p | x_t) of one latent, by the formula."""
    a_t, a_p = a[t], a[max(t - 1000 // STEPS, 0)]
    x0, e = {"epsilon": lambda: ((x_t - (1 - a_t).sqrt() * m) / a_t.sqrt(), m),
             "v_prediction": lambda: (a_t.sqrt() * x_t - (1 - a_t).sqrt() * m,
                                      a_t.sqrt() * m + (1 - a_t).sqrt() * x_t),
             "sample": lambda: (m, (x_t - a_t.sqrt() * m) / (1 - a_t).sqrt())}[kind]()
    variance = eta**2 * (1 - a_p) / (1 - a_t) * (1 - a_t / a_p)
    return torch.distributions.Normal(a_p.sqrt() * x0 + (1 - a_p - variance).sqrt() * e, variance.sqrt())


def slow(sched: Schedule, kind: str, batch: dict[str, Tensor], *, beta: float, eps: float,
         eta: float = 1.0) -> tuple:
    """The step DPO loss pair by pair: (losses, winner's ratios, loser's ratios, four log densities)."""
    losses, ratios, densities = [], [], []
    for i, t in enumerate(batch["t"].tolist()):
        p = [gaussian(sched.alphas_cumprod, kind, batch["x_t"][i], null[i] + GUIDANCE * (text[i] - null[i]),
                      t, eta) for null, text in (batch["policy"], batch["reference"])]
        logs = [[q.log_prob(batch[who][i]).sum() / batch["x_t"][i].numel() for q in p]
                for who in ("winner", "loser")]
        r = [(policy - reference).exp().clamp(1 - eps, 1 + eps) for policy, reference in logs]
        losses.append(-torch.sigmoid(beta * (r[0].log() - r[1].log())).log())
        ratios.append(torch.stack(r))
        densities.append(torch.stack([density for pair in logs for density in pair]))
    return torch.stack(losses), torch.stack(ratios), torch.stack(densities)


def batch_of(sched: Schedule, kind: str = "epsilon", n: int = 5, apart: float = 0.01, spread: float = 1.0,
             shape: tuple = (4, 3, 3)) -> dict[str, Tensor]:
    """N pairs near the reference's mean, and a policy that differs from the reference by about ``apart``."""
    torch.manual_seed(3)
    draw = {name: torch.randn(n, *shape, dtype=torch.float64) for name in ("x_t", "null", "text", "d0", "d1")}
    t = sched.timesteps[torch.arange(n) * (STEPS - 1) // max(n - 1, 1)]
    reference = draw["null"], draw["text"]
    policy = tuple((m + apart * d).requires_grad_()
                   for m, d in zip(reference, (draw["d0"], draw["d1"]), strict=True))
    members = []
    for _ in range(2):
        q = [gaussian(sched.alphas_cumprod, kind, draw["x_t"][i],
                      loss.guide(*(m[i] for m in reference), GUIDANCE), int(t[i]), 1.0) for i in range(n)]
        members.append(torch.stack([d.mean + spread * d.stddev * torch.randn(*shape, dtype=torch.float64)
                                    for d in q]))
    return {"x_t": draw["x_t"], "t": t, "policy": policy, "reference": reference, "winner": members[0],
            "loser": members[1]}


def fast(sched: Schedule, batch: dict, *, beta: float, eps: float,
         weight: Tensor | None = None) -> loss.StepDPO:
    n = len(batch["t"])
    weight = torch.full((n,), 1 / n, dtype=torch.float64) if weight is None else weight
    return loss.step_dpo(sched, batch["x_t"], batch["winner"], batch["loser"], batch["t"], batch["policy"],
                         batch["reference"], guidance=GUIDANCE, beta=beta, eps=eps, weight=weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart, beta, eps, eta",
                         [(0.01, 500, 0.1, 1.0), (0.1, 30, 0.1, 1.0), (0.02, 10, 0.5, 0.4)])
def test_step_dpo_equals_the_slow_statement(kind: str, apart: float, beta: float, eps: float,
                                            eta: float) -> None:
    sched = fine(kind, eta)
    batch = batch_of(sched, kind, apart=apart)
    got = fast(sched, batch, beta=beta, eps=eps)
    losses, ratios, densities = slow(sched, kind, batch, beta=beta, eps=eps, eta=eta)
    assert torch.allclose(got.loss, losses.mean(), rtol=1e-9)
    assert torch.allclose(got.pair_loss, losses, rtol=1e-8, atol=1e-12)
    assert torch.allclose(torch.stack([got.ratio_win, got.ratio_lose], 1), ratios, rtol=1e-9)
    assert torch.allclose(torch.stack(got[4:8], 1), densities, rtol=1e-7, atol=1e-7)
    assert not any(field.requires_grad for field in got[1:])
    own = torch.autograd.grad(got.loss, batch["policy"])
    expected = torch.autograd.grad(losses.mean(), batch["policy"])
    for a, b in zip(own, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-10 * b.abs().max())


def test_both_clamped_and_free_members_are_among_the_cases() -> None:
    ratios = slow(fine(), "epsilon", batch_of(fine(), apart=0.1), beta=30, eps=0.1)[1]
    assert ((ratios - 1).abs() > 0.0999).any() and ((ratios - 1).abs() < 0.0999).any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    sched = fine(kind)
    batch = batch_of(sched, kind, n=2, apart=0.003, shape=(1, 2, 2))
    assert ((slow(sched, kind, batch, beta=20, eps=0.5)[1] - 1).abs() < 0.4).all()

    def value(null: Tensor, text: Tensor) -> Tensor:
        return fast(sched, batch | {"policy": (null, text)}, beta=20, eps=0.5).loss
    assert torch.autograd.gradcheck(value, batch["policy"])


def both(sched: Schedule, batch: dict, i: int) -> list[torch.distributions.Normal]:
    """p(x_p | x_t) of the policy and of the reference for pair i, epsilon prediction."""
    return [gaussian(sched.alphas_cumprod, "epsilon", batch["x_t"][i], loss.guide(null[i], text[i], GUIDANCE),
                     int(batch["t"][i]), 1.0) for null, text in (batch["policy"], batch["reference"])]


def clamped(win: float, lose: float, eps: float = 0.1) -> tuple[Schedule, dict[str, Tensor]]:
    """Pairs whose members have exactly these log ratios (before the clamp)."""
    sched = fine()
    batch = batch_of(sched, n=3, apart=0.05)
    for name, ratio in (("winner", win), ("loser", lose)):
        members = []
        for i in range(3):
            p, q = both(sched, batch, i)
            d = (p.mean - q.mean).detach()
            scale = ratio * p.stddev**2 / d.square().mean()  # Δ = mean(d (2x − m_p − m_q)) / 2σ²
            members.append(((p.mean + q.mean).detach() / 2) + scale * d)
        batch[name] = torch.stack(members)
    return sched, batch


def test_a_clamped_member_has_no_gradient() -> None:
    sched, batch = clamped(0.5, 0.02)
    got = fast(sched, batch, beta=10, eps=0.1)
    assert torch.allclose(got.ratio_win, torch.tensor(1.1, dtype=torch.float64))
    assert torch.allclose(got.ratio_lose, torch.tensor(0.02, dtype=torch.float64).exp())
    own = torch.autograd.grad(got.loss, batch["policy"])
    logs = []  # the loser's log ratio, with gradient; the winner is a constant
    for i in range(3):
        p, q = both(sched, batch, i)
        logs.append((p.log_prob(batch["loser"][i]) - q.log_prob(batch["loser"][i])).mean())
    alone = -F.logsigmoid(10 * (math.log(1.1) - torch.stack(logs))).mean()
    for a, b in zip(own, torch.autograd.grad(alone, batch["policy"]), strict=True):
        assert b.abs().max() > 0 and torch.allclose(a, b, rtol=1e-8, atol=1e-12)
    for win, lose in ((0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)):
        sched, batch = clamped(win, lose)
        got = fast(sched, batch, beta=10, eps=0.1)
        assert all(not g.any() for g in torch.autograd.grad(got.loss, batch["policy"]))


def test_ratio_is_exactly_one_when_the_policy_is_the_reference() -> None:
    for dtype in (torch.float64, torch.float32):
        sched = fine().to(dtype)
        batch = {name: tuple(v.detach().to(dtype) for v in value) if isinstance(value, tuple) else
                 value if name == "t" else value.to(dtype) for name, value in batch_of(fine()).items()}
        batch["policy"] = tuple(m.clone().requires_grad_() for m in batch["reference"])
        got = fast(sched, batch, beta=500, eps=0.1, weight=torch.full((5,), 0.2, dtype=dtype))
        assert (got.ratio_win == 1).all() and (got.ratio_lose == 1).all()
        assert torch.equal(got.win_policy, got.win_ref) and torch.equal(got.lose_policy, got.lose_ref)
        assert got.loss.item() == pytest.approx(math.log(2), rel=1e-6)
        got.loss.backward()
        assert all(m.grad.abs().max() > 0 for m in batch["policy"])


def test_no_overflow() -> None:
    for win, lose in ((-1.0, 1.0), (1.0, -1.0)):
        sched, batch = clamped(win, lose)
        got = fast(sched, batch, beta=5e4, eps=0.1)
        gap = 5e4 * (math.log(1.1) - math.log(0.9))  # about 1e4
        assert got.loss.item() == pytest.approx(gap if win < lose else 0.0, rel=1e-9)
        sched, batch = clamped(win / 25, lose / 25)  # not clamped
        got = fast(sched, batch, beta=1.25e5, eps=0.1)
        assert got.loss.item() == pytest.approx(1e4 if win < lose else 0.0, rel=1e-6)
        assert all(g.isfinite().all() for g in torch.autograd.grad(got.loss, batch["policy"]))


@pytest.mark.parametrize("eps, highest", [(1.0, math.log(2)), (3.0, math.log(4))])
def test_wide_clips(eps: float, highest: float) -> None:
    """1 − eps ≤ 0 is no bound from below."""
    sched, batch = clamped(-5.0, 0.1)
    got = fast(sched, batch, beta=1, eps=eps)
    assert torch.allclose(got.ratio_win.log(), torch.tensor(-5.0, dtype=torch.float64))
    assert got.loss.item() == pytest.approx(math.log1p(math.exp(5.1)), rel=1e-9)
    assert all(g.any() and g.isfinite().all() for g in torch.autograd.grad(got.loss, batch["policy"]))
    sched, batch = clamped(5.0, 0.0)
    assert fast(sched, batch, beta=1, eps=eps).ratio_win.log()[0].item() == pytest.approx(highest)


def test_padding_contributes_nothing() -> None:
    sched = fine()
    batch = batch_of(sched, n=5)
    weight = torch.tensor([1 / 3, 0, 1 / 3, 0, 1 / 3], dtype=torch.float64)
    whole = fast(sched, batch, beta=50, eps=0.1, weight=weight)
    index = torch.tensor([0, 2, 4])
    part = {name: tuple(m[index] for m in v) if isinstance(v, tuple) else v[index]
            for name, v in batch.items()}
    alone = fast(sched, part, beta=50, eps=0.1)
    assert whole.loss.item() == pytest.approx(alone.loss.item(), rel=1e-12)
    grads = torch.autograd.grad(whole.loss, batch["policy"])
    for a, b in zip(grads, torch.autograd.grad(alone.loss, batch["policy"]), strict=True):
        assert not a[[1, 3]].any() and torch.allclose(a, b, rtol=1e-12)


def test_accumulated_parts_sum_to_the_whole() -> None:
    sched = fine()
    batch = batch_of(sched, n=5)
    whole = fast(sched, batch, beta=50, eps=0.1)
    total, grads = 0.0, [torch.zeros_like(m) for m in batch["policy"]]
    for rows in ([0, 1], [2, 3], [4]):
        part = {name: tuple(m[rows] for m in v) if isinstance(v, tuple) else v[rows]
                for name, v in batch.items()}
        out = fast(sched, part, beta=50, eps=0.1, weight=torch.full((len(rows),), 0.2, dtype=torch.float64))
        total += out.loss.item()
        grads = [g + h for g, h in zip(grads, torch.autograd.grad(out.loss, batch["policy"]), strict=True)]
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    for a, b in zip(grads, torch.autograd.grad(whole.loss, batch["policy"]), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


class Line:
    """A policy of two parameters, its reference, and how often each was evaluated."""

    def __init__(self, scale: float = 0.53, shift: float = 0.02):
        self.unet = nn.ParameterDict({"scale": torch.tensor(scale, dtype=torch.float64),
                                      "shift": torch.tensor([shift], dtype=torch.float64)})
        self.calls = 0

    def predict(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([0.5 * x_t,
                          self.unet["scale"] * x_t + self.unet["shift"] * prompts[:, None, None, None]])

    train = predict

    @torch.no_grad()
    def reference(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([0.5 * x_t, 0.5 * x_t])


def pairs_of(batch: dict) -> LatentPairs:
    n = len(batch["t"])
    valid = torch.ones(n, dtype=torch.bool)
    return LatentPairs(batch["x_t"], batch["winner"], batch["loser"], batch["t"], torch.arange(n), valid)


@pytest.mark.parametrize("size", [5, 2, 1, 8, 3])
@pytest.mark.parametrize("max_norm", [1e9, 0.01])
def test_train_step_is_one_step_of_the_mean_loss(size: int, max_norm: float) -> None:
    """However the pairs are split into passes, the last of which is padded."""
    sched, policy = fine(), Line()
    drawn = batch_of(sched, n=5)
    pairs = pairs_of(drawn)._replace(winner=torch.cat([drawn["loser"][:1], drawn["winner"][1:]]),
                                     loser=torch.cat([drawn["winner"][:1], drawn["loser"][1:]]))
    at = pairs.x_t, pairs.t, pairs.prompt
    batch = pairs._asdict() | {"policy": policy.predict(*at).chunk(2),
                               "reference": policy.reference(*at).chunk(2)}
    losses, ratios, densities = slow(sched, "epsilon", batch, beta=20, eps=0.1)
    expected = torch.autograd.grad(losses.mean(), list(policy.unet.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in expected))
    start = [p.detach().clone() for p in policy.unet.parameters()]
    policy.calls = 0
    config = LPO(guidance_scale=GUIDANCE, beta=20, clip_eps=0.1)
    update = update_of(torch.optim.SGD(policy.unet.parameters(), lr=0.1), size, max_norm)
    row = steps.train_step(policy, sched, pairs, update, config)
    row = dict(zip(steps.STEP, row.tolist(), strict=True))
    assert policy.calls == 2 * -(-5 // size)
    for before, parameter, g in zip(start, policy.unet.parameters(), expected, strict=True):
        change = 0.1 * g * min(1, max_norm / norm)
        assert torch.allclose(before - parameter.detach(), change, rtol=1e-5, atol=1e-12)
        assert parameter.grad is None
    win, lose = ratios.detach().T
    win_policy, win_ref, lose_policy, lose_ref = densities.detach().exp().mean(0)
    assert (win > lose).sum() != (win < lose).sum() and ((win > 1.0999) | (lose < 0.9001)).any()
    wanted = {"train_loss": losses.detach().mean(), "train_ratio_win": win.mean(),
              "train_ratio_lose": lose.mean(), "train_win_prob_policy": win_policy,
              "train_win_prob_ref": win_ref, "train_lose_prob_policy": lose_policy,
              "train_lose_prob_ref": lose_ref, "implicit_acc": (win > lose).double().mean(),
              "train_margin": (win - lose).mean(), "grad_norm": norm}
    assert row == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-5)


def test_padded() -> None:
    pairs = pairs_of(batch_of(fine(), n=3))
    full, same = steps.padded(pairs, 5), steps.padded(pairs, 3)
    assert full.valid.tolist() == [True] * 3 + [False] * 2 and full.prompt.tolist() == [0, 1, 2, 0, 0]
    assert torch.equal(full.x_t[:3], pairs.x_t) and same.valid.all() and torch.equal(same.x_t, pairs.x_t)


def test_half_precision_outputs_are_combined_in_single() -> None:
    sched = fine().to(torch.float32)
    batch = {name: value if isinstance(value, tuple) or name == "t" else value.float()
             for name, value in batch_of(fine()).items()}
    half = {name: tuple(m.detach().half() for m in batch[name]) for name in ("policy", "reference")}
    single = {name: tuple(m.float() for m in value) for name, value in half.items()}
    weight = torch.full((5,), 0.2)
    a, b = (fast(sched, batch | outputs, beta=500, eps=0.1, weight=weight) for outputs in (half, single))
    assert a.loss.dtype == torch.float32 and torch.equal(a.loss, b.loss)


def test_guide() -> None:
    null, text = torch.tensor([1.0]), torch.tensor([3.0])
    assert [loss.guide(null, text, g).item() for g in (0.0, 1.0, 7.5)] == [1.0, 3.0, 16.0]


# The reward model's loss
