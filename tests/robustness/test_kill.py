"""The short form of kill.py: a few kills of both stages, and the end is as if there had been none."""

from pathlib import Path

import pytest

from tests.tools import kill


@pytest.mark.parametrize("stage", ["lpo", "lrm"])
def test_a_killed_run_ends_as_if_nothing_had_happened(stage: str, tiny_sd: Path, tmp_path: Path) -> None:
    """From a kill before the first state on; no more than a save interval is lost,
    and nothing is left lying around."""
    (trial,) = kill.trials(tmp_path, tiny_sd, (stage,))
    assert trial.run("killed", [".config.json", ".state.pt", ".checkpoint"]) == 3 == len(trial.lost)
    assert ("holds no saved state: the run starts from the beginning"
            in (trial.folder / "killed.out").read_text())
