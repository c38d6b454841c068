"""The trajectory against a slow statement, one prompt at a time in float64,
with a linear denoiser and scorer."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lpo_fast.config import LPO
from lpo_fast.lpo import batches as lpo_batches
from lpo_fast.lpo import sampling
from lpo_fast.method import noise, schedule, select
from tests.helpers.models import CONFIGS

SHAPE, GUIDANCE, SEED, EPOCH = (2, 3, 3), 3.0, 5, 2
CONFIG = CONFIGS["scheduler"]


class Fake:
    """A denoiser and a scorer that are linear in the latent, and what they were asked."""

    def __init__(self):
        torch.manual_seed(0)
        self.direction = torch.randn(8, *SHAPE)
        self.predicted: list[Tensor] = []
        self.scored: list[Tensor] = []

    @staticmethod
    def outputs(x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        t, prompts = (v.to(x.dtype)[:, None, None, None] for v in (t, prompts))
        return torch.cat([0.5 * x + 1e-4 * t, 0.6 * x - 0.05 * prompts])

    def predict(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        assert len(x) == len(t) == len(prompts) and not torch.is_grad_enabled()
        self.predicted.append(t)
        return self.outputs(x, t, prompts)

    def values(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        return (x * self.direction[prompts % 8].to(x.dtype)).flatten(1).sum(1) * (1 + t.to(x.dtype) / 500)

    def score(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        assert len(x) == len(t) == len(prompts)
        self.scored.append(t)
        return self.values(x, t, prompts)


def run(prompts: list[int], steps: int = 6, k: int = 4, threshold: float = 0.9, fake: Fake | None = None,
        start: int = 0, stop: int = 0):
    fake = fake or Fake()
    sched = schedule.from_config(CONFIG, steps)
    index = torch.tensor(prompts)
    draw = sampling.CounterNoise(SEED, EPOCH, index, SHAPE)
    gap = select.gaps(sched, "sigma", threshold / 2, threshold)
    return sampling.trajectory(fake.predict, fake.score, sched, gap, draw, index, guidance=GUIDANCE,
                               num_candidates=k, window=(start, stop or steps))


def slow(prompt: int, steps: int = 6, k: int = 4, threshold: float = 0.9, start: int = 0,
         stop: int = 0) -> list[dict]:
    """One prompt's trajectory in float64, by the formulas; a dict a step that makes a pair."""
    a = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2,
                      0).tolist()
    times = [1 + (1000 // steps) * i for i in reversed(range(steps))]
    fake, item = Fake(), torch.tensor([prompt])
    deviations = []
    for t in times:
        p = max(t - 1000 // steps, 0)
        deviations.append(math.sqrt((1 - a[p]) / (1 - a[t]) * (1 - a[t] / a[p])))
    x = noise.normal(SEED, EPOCH, item, 0xFFFF, 1, SHAPE)[0, 0].double()
    rows = []
    for step, t in enumerate(times[:stop or None]):
        p, sigma = max(t - 1000 // steps, 0), deviations[step]
        null, text = fake.outputs(x[None], torch.tensor([t]), item)
        e = null + GUIDANCE * (text - null)
        x0 = (x - math.sqrt(1 - a[t]) * e) / math.sqrt(a[t])
        mean = math.sqrt(a[p]) * x0 + math.sqrt(1 - a[p] - sigma**2) * e
        z = noise.normal(SEED, EPOCH, item, step, k if step >= start else 1, SHAPE)[:, 0].double()
        x_p = [mean + sigma * one for one in z]
        if step < start:
            x = x_p[0]
            continue
        scores = [fake.values(one[None], torch.tensor([t]), item).item() for one in x_p]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        share = (sigma - deviations[-1]) / (deviations[0] - deviations[-1])
        limit = threshold / 2 + share * (threshold - threshold / 2)
        difference = 2 / (1 + math.exp(scores[worst] - scores[best])) - 1
        choice = noise.integers(SEED, EPOCH, item, step, k).item()
        rows.append({"x_t": x, "winner": x_p[best], "loser": x_p[worst], "t": t, "valid": difference > limit,
                     "scores": scores, "clear": abs(difference - limit) > 1e-3})
        x = x_p[choice]
    return rows


@pytest.mark.parametrize("window", [{}, {"start": 2}, {"stop": 3}, {"start": 1, "stop": 4}])
@pytest.mark.parametrize("k", [2, 4])
def test_trajectory_equals_the_slow_statement(k: int, window: dict) -> None:
    prompts = [3, 0, 12]
    pairs, scores = run(prompts, k=k, **window)
    expected = [slow(prompt, k=k, **window) for prompt in prompts]
    steps = len(expected[0])
    assert steps == (window.get("stop") or 6) - window.get("start", 0)
    assert scores.shape == (steps, k, 3) and pairs.x_t.shape == (steps * 3, *SHAPE)
    for step in range(steps):
        for b, prompt in enumerate(prompts):
            row, i = expected[b][step], step * 3 + b  # step-major
            assert (pairs.t[i].item(), pairs.prompt[i].item()) == (row["t"], prompt)
            for name in ("x_t", "winner", "loser"):
                got = getattr(pairs, name)[i].double()
                assert torch.allclose(got, row[name], rtol=1e-3, atol=1e-3), (step, b, name)
            assert scores[step, :, b].tolist() == pytest.approx(row["scores"], rel=1e-2, abs=1e-2)
            if row["clear"]:
                assert pairs.valid[i].item() == row["valid"]


def test_valid_and_not_valid_are_among_the_cases() -> None:
    rows = [row for prompt in (3, 0, 12) for row in slow(prompt)]
    assert {row["valid"] for row in rows if row["clear"]} == {True, False}


def test_winner_and_loser_have_the_extreme_scores() -> None:
    fake = Fake()
    pairs, scores = run([0, 1, 2, 3], fake=fake)
    best = fake.values(pairs.winner, pairs.t, pairs.prompt).view(6, 4)
    worst = fake.values(pairs.loser, pairs.t, pairs.prompt).view(6, 4)
    assert torch.allclose(best, scores.amax(1)) and torch.allclose(worst, scores.amin(1))
    assert not pairs.valid.requires_grad and pairs.valid.dtype == torch.bool


def test_goes_on_from_the_drawn_candidate() -> None:
    """The best, the worst, the first and others are all gone on from, as the draw says."""
    class Draw(sampling.CounterNoise):
        def steps(self, count: int) -> Iterator[tuple[noise.Counter, Tensor]]:
            for step, (counter, _) in enumerate(super().steps(count)):
                yield counter, torch.tensor([step % 3, (step + 1) % 3])
    fake, sched, index = Fake(), schedule.from_config(CONFIG, 6), torch.tensor([0, 1])
    draw = Draw(SEED, EPOCH, index, SHAPE)
    pairs, _ = sampling.trajectory(fake.predict, fake.score, sched, torch.zeros(1000), draw, index,
                                   guidance=GUIDANCE, num_candidates=3)
    x_t, t = pairs.x_t.view(6, 2, *SHAPE), pairs.t.view(6, 2)
    for step, (_, choice) in zip(range(5), draw.steps(5), strict=True):
        null, text = fake.outputs(x_t[step], t[step], index).chunk(2)
        z = noise.normal(SEED, EPOCH, index, step, 3, SHAPE)
        sigma = sched.table[t[step], schedule.SIGMA][:, None, None, None]
        x_p = schedule.mean(sched, x_t[step], null + GUIDANCE * (text - null), t[step]) + sigma * z
        assert torch.allclose(x_t[step + 1], x_p[choice, torch.arange(2)], atol=1e-5)


def test_calls() -> None:
    """One denoiser call a step, and one of the scorer for all candidates, at the current step's t."""
    fake = Fake()
    run([0, 1, 2], steps=20, k=4, fake=fake, start=3, stop=9)
    times = list(range(951, 0, -50))
    assert [set(t.tolist()) for t in fake.predicted] == [{t} for t in times[:9]]
    assert [set(t.tolist()) for t in fake.scored] == [{t} for t in times[3:9]]
    assert all(len(t) == 3 for t in fake.predicted) and all(len(t) == 12 for t in fake.scored)


def test_independent_of_the_batch() -> None:
    prompts = [7, 1, 5, 0, 4, 2]
    whole, scores = run(prompts)
    for size in (3, 1):
        parts = [run(prompts[i:i + size]) for i in range(0, 6, size)]
        assert torch.allclose(torch.cat([s for _, s in parts], 2), scores, rtol=1e-5, atol=1e-5)
        for name in sampling.LatentPairs._fields:
            field = torch.cat([getattr(p, name).view(6, size, *getattr(p, name).shape[1:]) for p, _ in parts],
                              1)
            assert torch.allclose(field.flatten(0, 1).double(), getattr(whole, name).double(), rtol=1e-5,
                                  atol=1e-5)


def test_seed_and_epoch_change_the_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run([1])[0].winner
    assert torch.equal(first, run([1])[0].winner)
    monkeypatch.setitem(globals(), "EPOCH", EPOCH + 1)
    assert not torch.allclose(first, run([1])[0].winner)


def test_take() -> None:
    pairs, _ = run([0, 1])
    some = pairs.take(torch.tensor([3, 0]))
    assert torch.equal(some.x_t, pairs.x_t[[3, 0]]) and torch.equal(some.valid, pairs.valid[[3, 0]])
    assert len(pairs.take(pairs.valid).t) == pairs.valid.sum()


def test_valid_pairs_are_shuffled_and_none_is_lost() -> None:
    pairs, _ = run([0, 1, 2, 3])
    index = [i for i, valid in enumerate(pairs.valid.tolist()) if valid]
    assert 10 < len(index) < 24
    orders = []
    for seed, epoch, batch in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        some = lpo_batches.shuffled(pairs, LPO(seed=seed), epoch, batch)
        keys = [next(i for i in index if torch.equal(pairs.winner[i], winner)) for winner in some.winner]
        assert sorted(keys) == index and torch.equal(some.t, pairs.t[keys])
        orders.append(keys)
    none = lpo_batches.shuffled(pairs._replace(valid=torch.zeros(24, dtype=torch.bool)), LPO(), 0, 0)
    assert len(none.t) == 0
    assert orders[0] == orders[1] and len({tuple(keys) for keys in [index, *orders]}) == 5


def test_order_of_the_prompts() -> None:
    orders = [lpo_batches.order(LPO(seed=seed, batch_size=4), epoch, 10)
              for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert [len(batch) for batch in orders[0]] == [4, 4, 2]
    flat = [torch.cat(batches).tolist() for batches in orders]
    assert all(sorted(numbers) == list(range(10)) for numbers in flat)
    assert flat[0] == flat[1] and len({tuple(numbers) for numbers in flat}) == 3


def test_batch_metrics() -> None:
    times = [951, 751, 501, 251, 51, 1]
    t = torch.tensor(times).repeat_interleave(2)
    valid = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    blank = torch.zeros(12, *SHAPE)
    scores = torch.arange(6 * 3 * 2.0).view(6, 3, 2)
    pairs = sampling.LatentPairs(blank, blank, blank, t, t, valid)
    row = lpo_batches.batch_metrics(pairs, scores)
    n = scores.numel()
    assert row == {
        "preference_scores_mean": (n - 1) / 2,
        "preference_scores_std": pytest.approx(math.sqrt(n * (n + 1) / 12)),
        "total_valid_samples_num": 8, "even_large_noise_samples_num": 2, "large_noise_samples_num": 1,
        "mid_noise_samples_num": 3, "small_noise_samples_num": 0,  # t = 1 is in no band
        "timesteps": times, "valid_by_timestep": [2, 1, 2, 1, 0, 2], "pairs_possible": 12}


def test_generate() -> None:
    fake, sched, index = Fake(), schedule.from_config(CONFIG, 6), torch.tensor([4, 9])
    draw = sampling.CounterNoise(SEED, EPOCH, index, SHAPE)
    got = sampling.generate(fake.predict, sched, draw, index, guidance=GUIDANCE)
    assert len(fake.predicted) == 6 and got.shape == (2, *SHAPE)
    # Up to the last step it is a trajectory whose first candidate is always gone on from.
    expected = [slow(prompt, start=5, k=1)[0]["winner"] for prompt in (4, 9)]
    assert torch.allclose(got.double(), torch.stack(expected), rtol=1e-3, atol=1e-3)
