"""Pair selection against its definition: the softmax of the extreme scores in float64,
thresholds in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpo_fast.method import schedule, select
from tests.helpers.models import CONFIGS

CONFIG = CONFIGS["scheduler"]
STEPS = [20, 7, 50, 3]
SHAPES = ["none", "linear", "sigma", "variance"]


def thresholds(sched: schedule.Schedule, steps: int, shape: str, low: float, high: float) -> dict[int, float]:
    """th_t of every timestep of the trajectory, by the formula."""
    a = sched.alphas_cumprod.double().tolist()

    def curve(t: int) -> float:
        p = max(t - 1000 // steps, 0)
        variance = (1 - a[p]) / (1 - a[t]) * (1 - a[t] / a[p])
        return {"none": 0.0, "linear": t, "sigma": math.sqrt(variance), "variance": variance}[shape]

    times = sched.timesteps.tolist()
    values = {t: curve(t) for t in times}
    bottom, top = min(values.values()), max(values.values())
    return {t: low + (values[t] - bottom) / ((top - bottom) or 1) * (high - low) for t in times}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("low, high", [(0.35, 0.5), (0.45, 0.6), (0.0, 0.9)])
def test_gap_is_the_softmax_threshold(shape: str, steps: int, low: float, high: float) -> None:
    sched = schedule.from_config(CONFIG, steps)
    gap = select.gaps(sched, shape, low, high)
    assert gap.dtype == sched.table.dtype and gap.shape == (1000,)
    expected = thresholds(sched, steps, shape, low, high)
    for t, threshold in expected.items():
        assert gap[t].item() == pytest.approx(math.log((1 + threshold) / (1 - threshold)), rel=1e-3, abs=1e-6)
        for margin in (max(gap[t].item() * 0.999 - 1e-4, 0), gap[t].item() * 1.001 + 1e-4):
            first, second = torch.tensor([margin, 0.0], dtype=torch.float64).softmax(0)
            pair = select.pairs(torch.tensor([[margin + 3], [3.0]]), gap[[t]])
            assert pair.valid.item() == (first - second > threshold)


@pytest.mark.parametrize("shape", ["linear", "sigma", "variance"])
@pytest.mark.parametrize("steps", [*STEPS, 999])
@pytest.mark.parametrize("eta", [1.0, 0.2])
def test_thresholds_run_from_low_to_high(shape: str, steps: int, eta: float) -> None:
    sched = schedule.from_config(CONFIG, steps, eta)
    along = (select.gaps(sched, shape, 0.35, 0.5)[sched.timesteps].double() / 2).tanh()
    assert (along[0].item() == pytest.approx(0.5, abs=1e-6)
            and along[-1].item() == pytest.approx(0.35, abs=1e-6))
    if steps <= 50:  # the deviation of many small steps is not monotone at the noiseless end
        assert (along.diff() < 0).all()
    assert torch.allclose(along, (select.gaps(schedule.from_config(CONFIG, steps), shape, 0.35, 0.5)
                                  [sched.timesteps].double() / 2).tanh(), atol=1e-5)  # eta drops out


def test_none_is_constant_and_one_step_takes_low() -> None:
    sched = schedule.from_config(CONFIG, 20)
    assert torch.allclose(select.gaps(sched, "none", 0.3, 0.9), torch.tensor(math.log(1.3 / 0.7)))
    for shape in SHAPES:
        single = schedule.from_config(CONFIG, 1)
        gap = select.gaps(single, shape, 0.3, 0.5)[single.timesteps]
        assert gap.item() == pytest.approx(math.log(1.3 / 0.7), rel=1e-5)


def test_extreme_thresholds() -> None:
    sched = schedule.from_config(CONFIG, 20)
    assert not select.pairs(torch.tensor([[1e30], [-1e30]]), select.gaps(sched, "none", 1.0, 1.0)[[1]]).valid
    zero = select.gaps(sched, "none", 0.0, 0.0)[[1]]
    assert select.pairs(torch.tensor([[1e-30], [0.0]]), zero).valid
    assert not select.pairs(torch.tensor([[2.0], [2.0]]), zero).valid  # a tie is never a pair


def test_unknown_shape() -> None:
    with pytest.raises(ValueError, match="'cosine' is not one of none, linear, sigma, variance"):
        select.gaps(schedule.from_config(CONFIG, 20), "cosine", 0.3, 0.5)


numbers = st.floats(-50, 50, width=32)
columns = st.integers(2, 8).flatmap(lambda k: st.lists(
    st.lists(numbers | st.sampled_from([0.0, 1.0]), min_size=k, max_size=k), min_size=1, max_size=5))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(columns, st.floats(0.01, 0.9))
def test_best_worst_and_valid_by_definition(prompts: list[list[float]], threshold: float) -> None:
    gap = torch.full((len(prompts),), math.log((1 + threshold) / (1 - threshold)))
    pair = select.pairs(torch.tensor(prompts).T, gap)
    for i, scores in enumerate(prompts):
        best, worst = scores.index(max(scores)), scores.index(min(scores))  # the first of equals
        assert (pair.best[i].item(), pair.worst[i].item()) == (best, worst)
        assert pair.margin[i].item() == pytest.approx(scores[best] - scores[worst], abs=1e-5)
        first, second = torch.tensor([scores[best], scores[worst]], dtype=torch.float64).softmax(0).tolist()
        if abs(first - second - threshold) > 1e-5:
            assert pair.valid[i].item() == (first - second > threshold)


def test_two_candidates_and_ties() -> None:
    pair = select.pairs(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]]), torch.tensor([0.5, 1.0, 0.0]))
    assert pair.best.tolist() == [0, 1, 0] and pair.worst.tolist() == [1, 0, 0]
    assert pair.margin.tolist() == [1, 1, 0] and pair.valid.tolist() == [True, False, False]
    pair = select.pairs(torch.tensor([[1.0], [3.0], [1.0], [3.0]]), torch.tensor([0.1]))
    assert (pair.best.item(), pair.worst.item(), pair.valid.item()) == (1, 0, True)
