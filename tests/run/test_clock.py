"""What the clock advises."""

import os

import pytest

from lpo_fast.run import clock


def test_more_workers_than_cores(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    clock.Clock(2)
    assert not capsys.readouterr().out
    clock.Clock(3)
    told = capsys.readouterr().out
    assert ("warning: --num-workers 3 in each of 4 processes, but this machine has 8 cores: use at most 2"
            in told)
