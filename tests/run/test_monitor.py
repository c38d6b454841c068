"""Warn about a collapse once, also after a resumption."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from lpo_fast.run import monitor


def batch(valid: int, score: float = 1.0) -> dict[str, float]:
    return {"preference_scores_mean": score, "total_valid_samples_num": valid, "pairs_possible": 100}


def step(win: float = 1.0, lose: float = 1.0) -> dict[str, float]:
    return {"train_ratio_win": win, "train_ratio_lose": lose}


def test_watch() -> None:
    """Each sign once; none in a run that goes well."""
    watch = monitor.CollapseMonitor(0.1)
    assert not [line for _ in range(30) for line in watch.batch(batch(50), [step(1.01, 0.99)])]
    for _ in range(4):
        assert not watch.batch(batch(20), [step()])
    said = [line for _ in range(10) for line in watch.batch(batch(5), [step()])]
    assert len(said) == 1 and "valid pairs fell from 50% to" in said[0]
    assert "ratios are at their clip bounds (0.9 … 1.1)" in watch.batch(batch(50), [step(1.1, 0.905)])[0]
    assert not watch.batch(batch(50), [step(1.1, 0.9)])
    assert "scores that are not finite" in watch.batch(batch(50, math.nan), [step(math.nan, math.nan)])[0]


def test_watch_goes_on_after_a_resumption() -> None:
    """What was good is known from the saved state."""
    before, after = monitor.CollapseMonitor(0.1), monitor.CollapseMonitor(0.1)
    for _ in range(5):
        before.batch(batch(50), [step()])
    after.state = json.loads(json.dumps(before.state))
    assert ([line for _ in range(5) for line in after.batch(batch(5), [step()])][0]
            .startswith("warning: valid pairs fell"))


def test_watch_of_pictures() -> None:
    """Two prompts, two pictures each, of levels that differ by 0.5, then by 0.3, then by 0.2;
    other prompts do not count."""
    def grid(difference: float) -> list[Image.Image]:
        levels = (0.0, difference, 1.0, 1.0 - difference)
        return [Image.fromarray(np.full((4, 4, 3), round(255 * level), np.uint8)) for level in levels]
    watch = monitor.CollapseMonitor(0.1)
    assert not watch.pictures(grid(0.5), 2) and not watch.pictures(grid(0.3), 2)
    assert watch.state["spread"] == pytest.approx(0.5, abs=0.01)
    told, = watch.pictures(grid(0.2), 2)
    assert "differ by 0.200, less than half of the first validation's 0.500" in told
    assert not watch.pictures(grid(0.2), 2) and not watch.pictures([], 2) and not watch.pictures(grid(0.2), 1)
