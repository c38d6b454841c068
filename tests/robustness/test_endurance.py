"""The short form of endurance.py: open files, threads and worker processes stay as many;
and what it calls flat."""

from pathlib import Path

import pytest

from tests.tools import endurance


@pytest.mark.parametrize("stage", endurance.FLAGS)
def test_a_run_holds_no_more_at_its_end(stage: str, tiny_sd: Path, tmp_path: Path) -> None:
    """60 steps, with states, checkpoints and pictures;
    memory has not settled yet, so only a leak of 1 MiB a step is seen."""
    samples = endurance.watch(stage, tmp_path, tiny_sd, steps=60, every=5)
    assert [sample.step for sample in samples] == [*range(5, 61, 5)]
    assert [line for line in endurance.judge(samples).wrong if "→" in line] == []
    assert samples[-1].memory - samples[2].memory < 60 * 1024
    assert samples[-1].children == (2 if stage == "lrm" else 0)  # of training and of validation
    assert (tmp_path / "run" / "state.pt").is_file()


def test_what_is_not_flat() -> None:
    def samples(growth: int, files: int = 8) -> list[endurance.Sample]:
        return [endurance.Sample(step, 500_000 + growth * step + 90_000 * (step < 300), 0, files, 5, 0)
                for step in range(50, 5001, 50)]
    assert (endurance.judge(samples(0)).wrong == endurance.judge(samples(1)).wrong
            == endurance.judge(samples(-9)).wrong == [])
    found = endurance.judge(samples(2))
    assert (found.wrong == ["memory grows"] and found.slope == pytest.approx(2000)
            and 7500 < found.growth < 8100)
    more = [*samples(0)[:-1], samples(0, files=9)[-1]]
    assert endurance.judge(more).wrong == ["files 8 → 9"]
