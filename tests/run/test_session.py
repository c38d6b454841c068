"""Run: rows are read in order, and too many skipped steps end a run even if a later step is fine."""

from pathlib import Path

import pytest
import torch

from lpo_fast.config import LRM, renamed
from lpo_fast.errors import InputError
from lpo_fast.run import monitor, session, states

COLUMNS = ("loss", "grad_norm")


def run_in(folder: Path) -> session.Run:
    """Return an open run without parts to save."""
    out = folder / "run"
    return session.Run(LRM(out=str(out)), session.Progress(), {}, COLUMNS,
                       skips=monitor.SkippedSteps(out, None))


def test_too_many_skipped_steps_are_not_forgotten_by_a_later_good_one(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for _ in range(monitor.IN_A_ROW):
        run.queue(torch.tensor([1.0, torch.inf]), None)
    run.queue(torch.tensor([0.5, 1.0]), None, lr=0.1)
    rows = run.flush(check=False)
    assert [row["loss"] for row in rows] == [1.0] * monitor.IN_A_ROW + [0.5] and rows[-1]["lr"] == 0.1
    with pytest.raises(InputError, match="optimizer steps in a row"):
        run.check()
    assert (run.out / states.STATE).is_file()  # saved first


def test_the_last_steps_stay_queued(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for loss in (1.0, 2.0, 3.0):
        run.queue(torch.tensor([loss, 1.0]), None)
    assert [row["loss"] for row in run.flush(keep=1)] == [1.0, 2.0]
    assert [row["loss"] for row in run.flush()] == [3.0] and run.flush() == [] and run.at.step == 3


def test_a_loop_that_does_nothing_saves_nothing(tmp_path: Path) -> None:
    """A run that was resumed at its end leaves its state alone."""
    run = run_in(tmp_path)
    run.save()
    before = (run.out / states.STATE).stat().st_mtime_ns
    with run.going("LRM", "step", 0):
        pass
    assert ((run.out / states.STATE).stat().st_mtime_ns == before
            and not (run.out / states.STATE_BEFORE).exists())


def test_settings_saved_under_an_earlier_name() -> None:
    assert renamed({"handed_on": "last", "seed": 1}) == {"final_checkpoint": "last", "seed": 1}
    assert renamed({"final_checkpoint": "best"}) == {"final_checkpoint": "best"}
