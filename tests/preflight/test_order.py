"""Refuse bad input within seconds, and without touching what is there."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lpo_fast import errors, train_lpo
from lpo_fast.shapes import PIPELINE


def test_preflight_is_quick(lpo):
    """Refusals come before models are loaded: no parameter is read for a bad prompt file."""
    start = time.perf_counter()
    with pytest.raises(errors.InputError):
        train_lpo.train(replace(lpo, prompts="nowhere.json"))
    assert time.perf_counter() - start < 5 and not Path(lpo.out).exists()


def test_a_directory_with_something_else_is_refused(lpo, tmp_path):
    model = Path(shutil.copytree(PIPELINE, tmp_path / "model"))
    with pytest.raises(errors.InputError, match="--out .*: holds files that are not a run's"):
        train_lpo.train(replace(lpo, model=str(model), out=str(model)))
