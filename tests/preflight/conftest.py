"""Settings that pass the checks before a run."""

from pathlib import Path

import pytest

from lpo_fast.config import LPO, LRM
from tests.helpers.preflight import Bench


@pytest.fixture
def bench(tmp_path: Path, tiny_sd: Path, tiny_lrm: Path, copied) -> Bench:
    return Bench(tmp_path, tiny_sd, tiny_lrm, copied)


@pytest.fixture
def lpo(bench: Bench) -> LPO:
    """An LPO run that could start."""
    return LPO(model=str(bench.sd), lrm=str(bench.lrm),
               prompts=bench.file("prompts.txt", "a red circle\ntwo\n"),
               out=str(bench.tmp / "runs" / "out"), pictures=0, max_batches=1)


@pytest.fixture
def lrm(bench: Bench) -> LRM:
    """An LRM run that could start."""
    return LRM(model=str(bench.sd), pairs=bench.pairs("pairs.parquet"), out=str(bench.tmp / "runs" / "out"),
               max_steps=1, warmup_steps=0)
