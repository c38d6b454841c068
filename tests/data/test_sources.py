"""Where preference pairs lie: parquet files, directories with and without splits, datasets' directories,
the hub."""

import os
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from lpo_fast.data import dataset as data_dataset
from lpo_fast.data import preferences
from lpo_fast.errors import InputError
from tests.helpers.pairs import BLUE, GREEN, RED, colours, columns, dataset, table


def test_a_directory_is_one_table(tmp_path: Path) -> None:
    table(tmp_path / "part-00001.parquet", ["c", "a"])
    table(tmp_path / "part-00000.parquet", ["a", "b"], jpg_0=[GREEN, GREEN])
    (tmp_path / "notes.txt").write_text("no pairs")
    made = dataset(tmp_path)
    assert (made.pairs.captions == ["a", "b", "c", "a"]
            and [made[i]["count"] for i in range(4)] == [2, 1, 1, 2])
    assert made[3]["labels"].tolist() == [0.0, 1.0]  # the second row of the second file
    assert [colours(made[i]) for i in range(4)] == ["gb", "gb", "rb", "rb"]


@pytest.mark.parametrize("folder", ["", "data"])
def test_a_directory_as_on_the_hub_has_splits(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, captions in (("train-00000-of-00002-f39d", ["a"]), ("train-00001-of-00002-0b1e", ["b"]),
                           ("validation_unique-00000-of-00001", ["c"])):
        table(tmp_path / folder / f"{name}.parquet", captions)
    assert preferences.read(str(tmp_path), split="train").captions == ["a", "b"]
    assert preferences.read(str(tmp_path), split="validation_unique").captions == ["c"]
    with pytest.raises(InputError,
                       match="is not a split of .*, which has train, validation_unique") as caught:
        preferences.read(str(tmp_path), "--validation-pairs", split="test")
    assert caught.value.key == "--validation-split" and caught.value.value == "test"


@pytest.mark.parametrize("names", [("train", "validation_unique"),
                                   ("train-a", "train-b", "validation_unique-00000-of-00001"),
                                   ("train", "test")])
def test_files_are_named_for_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        table(tmp_path / f"{name}.parquet", [name])
    assert (preferences.read(str(tmp_path), split="train").captions
            == [name for name in names if name.startswith("train")])
    assert preferences.read(str(tmp_path), split=names[-1].partition("-")[0]).captions == [names[-1]]


@pytest.mark.parametrize("names, stray", [
    (("train", "more"), "more.parquet"), (("validation-00000-of-00001", "x"), "x.parquet"),
])
def test_a_stray_file_among_splits(tmp_path: Path, names: tuple[str, str], stray: str) -> None:
    for name in names:
        table(tmp_path / f"{name}.parquet", [name])
    for split in ("train", "validation"):
        with pytest.raises(InputError, match=f"named for splits .*, others are not: {stray}"):
            preferences.read(str(tmp_path), split=split)
    assert len(preferences.read(str(tmp_path))) == 2  # no split is asked for


def test_a_directory_without_the_split(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", ["a"])
    with pytest.raises(InputError,
                       match="--validation-split validation_unique: is not a split of .*, which has train"):
        preferences.read(str(tmp_path), "--validation-pairs", split="validation_unique")


def test_names_with_the_signs_of_patterns(tmp_path: Path) -> None:
    """[1] and * are no patterns: it is this file that is read."""
    for folder, colour in (("set[1]", RED), ("set1", GREEN), ("set*", BLUE)):
        (tmp_path / folder).mkdir()
        table(tmp_path / folder / "p.parquet", ["a"], jpg_0=[colour])
    assert ([colours(dataset(tmp_path / f / "p.parquet")[0])[0] for f in ("set[1]", "set1", "set*")]
            == ["r", "g", "b"])


def test_a_file_changed_within_its_time_is_read_anew(tmp_path: Path) -> None:
    for colour, name in ((RED, "r"), (GREEN, "g"), (BLUE, "b")):
        file = table(tmp_path / "p.parquet", ["a"], jpg_0=[colour])
        os.utime(file, (1, 1))
        assert colours(dataset(file)[0])[0] == name


def test_a_conversion_that_lost_rows(tmp_path: Path) -> None:
    file = table(tmp_path / "p.parquet", ["a", "b"])
    preferences.read(str(file), cache_dir=str(tmp_path / "c")).source.open("jpg_0")
    (made,) = (tmp_path / "c" / "lpo_fast").glob("[!.]*.arrow")
    column = pa.ipc.open_stream(made.read_bytes()).read_all()
    with pa.OSFile(str(made), "wb") as out, pa.ipc.new_stream(out, column.schema) as stream:
        stream.write_table(column[:1])
    with pytest.raises(InputError, match="has 1 rows, not 2: remove it"):
        preferences.read(str(file), cache_dir=str(tmp_path / "c")).source.open("jpg_0")


def test_many_files_in_their_order(tmp_path: Path) -> None:
    for i in range(12):
        table(tmp_path / f"p{i}.parquet", [str(i)], jpg_0=[(RED, GREEN, BLUE)[i % 3]])
    made = dataset(tmp_path)
    assert all(colours(made[i])[0] == "rgb"[int(made.pairs.captions[i]) % 3] for i in range(12))


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    assert colours(dataset(table(tmp_path / "p.parquet", ["a"]))[0]) == "rb"
    table(tmp_path / "p.parquet", ["a"], jpg_0=[GREEN])
    os.utime(tmp_path / "p.parquet", (1, 1))
    assert colours(dataset(tmp_path / "p.parquet")[0]) == "gb"


def stored(path: Path, kind: str, rows: dict) -> str:
    """The rows as a datasets directory, with and without splits, with bytes or Image features."""
    made = datasets.Dataset.from_dict(rows)
    if kind == "images":
        for name in ("jpg_0", "jpg_1"):
            made = made.cast_column(name, datasets.Image())
    (made if kind == "plain" else
     datasets.DatasetDict({"train": made, "held": made.select([1])})).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["plain", "splits", "images"])
def test_a_directory_of_datasets(tmp_path: Path, kind: str) -> None:
    rows = columns(["a", "b", "a"], jpg_0=[RED, GREEN, BLUE]) | {"extra": [0, 1, 2]}
    path = stored(tmp_path / "d", kind, rows)
    made = data_dataset.PairDataset(preferences.read(path, split="train"), 8)
    assert (made.pairs.captions == ["a", "b", "a"]
            and [colours(made[i]) for i in range(3)] == ["rb", "gb", "bb"])
    data_dataset.check_pictures(made.pairs)
    copy = pickle.loads(pickle.dumps(made))  # as worker processes get it
    assert colours(copy[1]) == "gb" and len(pickle.dumps(made)) < 20_000
    if kind != "plain":
        held = data_dataset.PairDataset(preferences.read(path, split="held"), 8)
        assert held.pairs.captions == ["b"] and colours(held[0]) == "gb"
        with pytest.raises(InputError, match="--train-split .*is not a split of .*, which has train, held"):
            preferences.read(path, split="validation_unique")


def test_a_name_that_is_no_path_is_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = datasets.Dataset.from_dict(columns(["a", "b"]) | {"extra": [0, 1]}), []
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda name, **options: asked.append((name, options)) or made)
    assert preferences.read("owner/name", split="train", cache_dir="c").captions == ["a", "b"]
    assert asked == [("owner/name", {"split": "train", "cache_dir": "c"})]
    monkeypatch.undo()
    with pytest.raises(InputError,
                       match="is not a file or directory, and cannot be loaded as a data set") as caught:
        preferences.read("owner/name", cache_dir=str(tmp_path))  # the tests are offline
    assert caught.value.key == "--pairs" and caught.value.remedy
