"""The examples in the docstrings of method/ hold."""

import doctest
import importlib
import pkgutil

import pytest

from lpo_fast import method


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(method.__path__)])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"lpo_fast.method.{name}"))
    assert found.attempted and not found.failed
