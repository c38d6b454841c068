"""The wheel runs away from the repository, and a missing optional part is a sentence;
``environments.py`` has more variants."""

from pathlib import Path

import pytest

from tests.tools import environments


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environments.wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize("variant", environments.SHORT)
def test_environment(variant: str, package: Path, tmp_path: Path) -> None:
    assert environments.check(variant, tmp_path, package).problems == []
