"""Every mutation of tests/tools/mutations.py can be tried: its text occurs once, and its tests are there."""

from pathlib import Path

import lpo_fast
from tests.helpers.models import TESTS
from tests.tools.mutations import MUTATIONS

PACKAGE = Path(lpo_fast.__file__).parent


def test_every_mutation_applies_once() -> None:
    sources = {name: (PACKAGE / name).read_text(encoding="utf-8") for name in {m.file for m in MUTATIONS}}
    assert not [m.name for m in MUTATIONS if sources[m.file].count(m.old) != 1]
    assert not [m.name for m in MUTATIONS if m.old == m.new]


def test_every_mutation_names_tests_that_exist() -> None:
    for test in {test for m in MUTATIONS for test in m.tests}:
        file, _, name = test.partition("::")
        assert f"def {name.split('[')[0]}" in (TESTS / file).read_text(encoding="utf-8"), test
