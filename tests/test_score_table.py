"""The score table made from three scorers: gaps, resumption, and that the filter reads it."""

import csv
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lpo_fast import score_table
from lpo_fast.config import LRM
from lpo_fast.data import mpcf, preferences
from lpo_fast.errors import InputError
from lpo_fast.score_table import ScoreTable
from tests.helpers.pairs import BLUE, RED, plain, table

# red channels of the pictures; labels 1/0, 0/1, a tie, 1/0, 0/1
GREYS = [[10, 200, 60, 90, 0], [50, 100, 60, 20, 7]]


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A module of scorers that count what they are given, and may be told to fail."""
    seen = types.SimpleNamespace(calls=[], fail=None)

    def red(pictures, prompts):
        seen.calls.append(len(pictures))
        assert len(pictures) == len(prompts) and all(picture.mode == "RGB" for picture in pictures)
        if seen.fail is not None and len(seen.calls) > seen.fail:
            raise RuntimeError("out of memory")
        return [picture.getpixel((0, 0))[0] / 100 for picture in pictures]
    module = types.ModuleType("my_scorers")
    module.red, module.seven = red, 7
    module.minus = lambda pictures, prompts: np.array([-score for score in red(pictures, prompts)],
                                                      np.float32)
    module.words = lambda pictures, prompts: [len(prompt) for prompt in prompts]
    module.short = lambda pictures, prompts: [1.0]
    module.infinite = lambda pictures, prompts: [float("inf") if i == 1 else 0.0
                                                 for i in range(len(pictures))]
    monkeypatch.setitem(sys.modules, "my_scorers", module)
    return seen


@pytest.fixture
def config(tmp_path: Path) -> ScoreTable:
    columns = {f"jpg_{i}": [plain((grey, 0, 0)) for grey in side] for i, side in enumerate(GREYS)}
    path = table(tmp_path / "p.parquet", list("abcde"), **columns)
    return ScoreTable(str(path), "my_scorers:red", "my_scorers:minus", "my_scorers:words",
                      str(tmp_path / "out" / "s.csv"), batch_size=2)


def rows(file: Path) -> list[dict]:
    return list(csv.DictReader(file.open()))


def test_gaps(config: ScoreTable, scorers) -> None:
    made = rows(score_table.make(config))
    assert list(made[0]) == ["different_flag", "aesthetic_gap", "clipscore_gap", "vqascore_gap"]
    assert [int(row["different_flag"]) for row in made] == [1, 1, 0, 1, 1]
    expected = [(10 - 50) / 100, (100 - 200) / 100, 0, (90 - 20) / 100, (7 - 0) / 100]
    assert [float(row["aesthetic_gap"]) for row in made] == pytest.approx(expected, abs=1e-5)
    assert [float(row["clipscore_gap"]) for row in made] == pytest.approx([-x for x in expected], abs=1e-5)
    assert {float(row["vqascore_gap"]) for row in made} == {0.0}
    assert sorted(scorers.calls) == [2, 2, 4, 4, 4, 4]
    assert [p.name for p in Path(config.out).parent.iterdir()] == ["s.csv"]


def test_ties_have_absolute_gaps(config: ScoreTable, scorers, tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", ["a", "b"], jpg_0=[plain((9, 0, 0)), plain((99, 0, 0))],
                 jpg_1=[plain((99, 0, 0)), plain((9, 0, 0))], label_0=[0.5, 0.5], label_1=[0.5, 0.5])
    made = rows(score_table.make(replace(config, pairs=str(path))))
    assert ([float(row[gap]) for row in made for gap in ("aesthetic_gap", "clipscore_gap")]
            == pytest.approx([0.9] * 4))


@pytest.mark.parametrize("keyed", [False, True])
def test_the_filter_takes_the_table(config: ScoreTable, scorers, tmp_path: Path, keyed: bool) -> None:
    keys = {"image_0_uid": list("pqrst"), "image_1_uid": list("uvwxy")} if keyed else {}
    columns = {f"jpg_{i}": [plain((grey, 0, 0)) for grey in side] for i, side in enumerate(GREYS)}
    path = table(tmp_path / "k.parquet", list("abcde"), **columns, **keys)
    out = score_table.make(replace(config, pairs=str(path), clipscore="my_scorers:red",
                                   vqascore="my_scorers:red"))
    scores = mpcf.read_scores(str(out))
    assert (scores.keys is not None) == keyed
    assert preferences.choose(preferences.read(str(path)), LRM(), scores).rows.tolist() == [2, 3, 4]


def test_a_stopped_run_goes_on_after_its_last_row(config: ScoreTable, scorers) -> None:
    whole = score_table.make(replace(config, out=config.out + ".whole.csv")).read_bytes()
    scorers.calls.clear()
    scorers.fail = 3  # in the second batch: each is scored twice by what counts
    with pytest.raises(InputError, match="--clipscore my_scorers:minus: at rows 2 to 3 failed .RuntimeError: "
                       "out of memory"):
        score_table.make(config)
    assert not Path(config.out).exists()
    part = next(Path(config.out).parent.glob(".*.part"))
    assert part.read_text().count("\n") == 3  # the head and the first batch
    part.write_bytes(part.read_bytes() + b"1,0.5")  # killed within a line
    scorers.calls.clear()
    scorers.fail = None
    assert score_table.make(config).read_bytes() == whole
    assert sorted(scorers.calls) == [2, 2, 4, 4]  # the first batch is not scored again
    assert not list(Path(config.out).parent.glob(".*.part"))


def test_pictures_that_do_not_decode_and_pairs_not_judged_have_no_gaps(
        config: ScoreTable, scorers, tmp_path: Path) -> None:
    path = table(tmp_path / "c.parquet", list("abc"), jpg_0=[b"?", RED, RED], jpg_1=[BLUE] * 3,
                 label_0=[1, 1, 0], label_1=[0, 0, 0], has_label=[True, True, False])
    made = score_table.make(replace(config, pairs=str(path)))
    assert [row["aesthetic_gap"] for row in rows(made)] == ["nan", "2.55", "nan"]
    assert mpcf.mpcf(made, 3)[0].tolist() == []
    with pytest.raises(InputError, match="pictures of 1 pairs cannot be decoded, the first: rows 0"):
        score_table.make(replace(config, pairs=str(path), out=config.out + "2", max_corrupt=0))


@pytest.mark.parametrize("changes, flag, message", [
    ({"aesthetic": ""}, "--aesthetic", "is not module:function"),
    ({"aesthetic": "json"}, "--aesthetic", "is not module:function"),
    ({"clipscore": "no_such_module:f"}, "--clipscore", "cannot be imported"),
    ({"clipscore": "my_scorers:f"}, "--clipscore", "cannot be imported"),
    ({"vqascore": "my_scorers:seven"}, "--vqascore", "is int, not a function"),
    ({"vqascore": "my_scorers:short"}, "--vqascore", "at rows 0 to 1 gave 1 scores for 4 pictures"),
    ({"vqascore": "my_scorers:infinite"}, "--vqascore", "a score of row 1 (from 0) is not finite"),
    ({"pairs": "nowhere.parquet"}, "--pairs", "no .parquet there"),
    ({"batch_size": 0}, "--batch-size", "below 1"),
])
def test_bad_input(config: ScoreTable, scorers, changes: dict, flag: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        score_table.make(replace(config, **changes))
    assert caught.value.key == flag and message in caught.value.problem and caught.value.remedy


def test_the_command(config: ScoreTable, scorers, capsys) -> None:
    keys = ("pairs", "aesthetic", "clipscore", "vqascore", "out")
    argv = [word for key in keys for word in (f"--{key}", getattr(config, key))]
    assert score_table.main([*argv, "--columns.has-label", ""]) == 0 and config.out in capsys.readouterr().out
    assert score_table.main(argv) == 2
    assert capsys.readouterr().err.startswith("error: --out ")
