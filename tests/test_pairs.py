"""Pairs from parquet and datasets, by any column names; which of them a run uses; the score table joined to them."""

import io
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_data import BLUE, HEADER, RED, columns, plain, scores, table
from torch.utils.data import DataLoader

from lpo_fast import data, pairs
from lpo_fast.config import LRM, Columns
from lpo_fast.errors import InputError

GREEN = plain((0, 255, 0))


def dataset(path: Path, chosen: np.ndarray | None = None, columns: Columns | None = None) -> pairs.PairDataset:
    table = pairs.read(str(path), columns=columns)
    if chosen is not None:
        table = pairs.replace(table, rows=chosen, pictures=table.pictures[chosen], compare=table.compare[chosen])
    return pairs.PairDataset(table, 8)


def used(path: Path, scores: Path | None = None, training: bool = True, **options) -> pairs.Pairs:
    """The pairs that a run with these options uses."""
    return pairs.choose(pairs.read(str(path)), LRM(**options), scores and data.read_scores(str(scores)), training)


def colours(item: dict) -> str:
    """The two pictures of an item as letters."""
    names = {(1, -1, -1): "r", (-1, 1, -1): "g", (-1, -1, 1): "b", (0, 0, 0): "-"}
    return "".join(names[tuple(picture[:, 4, 4].int().tolist())] for picture in item["pixels"])


def test_pairs(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "a", "a", "c"]))
    assert len(made) == 5 and [made[i]["count"] for i in range(5)] == [3, 1, 3, 3, 1]
    item = made[1]
    assert (item["row"], item["caption"], item["labels"].tolist()) == (1, "b", [0.0, 1.0])
    assert item["pixels"].shape == (2, 3, 8, 8) and item["pixels"].dtype == torch.float32
    assert item["pixels"][0, :, 3, 3].tolist() == [1, -1, -1] and item["pixels"][1, :, 0, 0].tolist() == [-1, -1, 1]
    assert item["corrupt"] is False and item["compare"] is False


def test_kept_rows_keep_the_counts_of_all(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "a", "a", "c"]), np.array([2, 4]))
    assert len(made) == 2
    assert [(made[i]["row"], made[i]["caption"], made[i]["count"]) for i in range(2)] == [(2, "a", 3), (4, "c", 1)]
    assert made[0]["labels"].tolist() == [0.5, 0.5]


def test_integer_labels(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b"], label_0=[1, 0], label_1=[0, 1])
    assert dataset(path)[0]["labels"].tolist() == [1.0, 0.0]


def test_a_directory_is_one_table(tmp_path: Path) -> None:
    table(tmp_path / "part-00001.parquet", ["c", "a"])
    table(tmp_path / "part-00000.parquet", ["a", "b"], jpg_0=[GREEN, GREEN])
    (tmp_path / "notes.txt").write_text("no pairs")
    made = dataset(tmp_path)
    assert made.pairs.captions == ["a", "b", "c", "a"] and [made[i]["count"] for i in range(4)] == [2, 1, 1, 2]
    assert made[3]["labels"].tolist() == [0.0, 1.0]  # the second row of the second file
    assert [colours(made[i]) for i in range(4)] == ["gb", "gb", "rb", "rb"]


@pytest.mark.parametrize("folder", ["", "data"])
def test_a_directory_as_on_the_hub_has_splits(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, captions in (("train-00000-of-00002-f39d", ["a"]), ("train-00001-of-00002-0b1e", ["b"]),
                           ("validation_unique-00000-of-00001", ["c"])):
        table(tmp_path / folder / f"{name}.parquet", captions)
    assert pairs.read(str(tmp_path), split="train").captions == ["a", "b"]
    assert pairs.read(str(tmp_path), split="validation_unique").captions == ["c"]
    with pytest.raises(InputError, match="no split of .*, which has train, validation_unique") as caught:
        pairs.read(str(tmp_path), "--validation-pairs", split="test")
    assert caught.value.key == "--validation-split" and caught.value.value == "test"


@pytest.mark.parametrize("names", [("train", "validation_unique"), ("train-a", "train-b", "validation_unique-00000-of-00001"),
                                   ("train", "test")])
def test_files_are_named_for_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        table(tmp_path / f"{name}.parquet", [name])
    assert pairs.read(str(tmp_path), split="train").captions == [name for name in names if name.startswith("train")]
    assert pairs.read(str(tmp_path), split=names[-1].partition("-")[0]).captions == [names[-1]]


@pytest.mark.parametrize("names, stray", [
    (("train", "more"), "more.parquet"), (("validation-00000-of-00001", "x"), "x.parquet"),
])
def test_a_stray_file_among_splits(tmp_path: Path, names: tuple[str, str], stray: str) -> None:
    for name in names:
        table(tmp_path / f"{name}.parquet", [name])
    for split in ("train", "validation"):
        with pytest.raises(InputError, match=f"named for splits .*, others are not: {stray}"):
            pairs.read(str(tmp_path), split=split)
    assert len(pairs.read(str(tmp_path))) == 2  # no split is asked for


def test_a_directory_without_the_split(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", ["a"])
    with pytest.raises(InputError, match="--validation-split validation_unique: no split of .*, which has train"):
        pairs.read(str(tmp_path), "--validation-pairs", split="validation_unique")


def test_names_with_the_signs_of_patterns(tmp_path: Path) -> None:
    """[1] and * are no patterns: it is this file that is read."""
    for folder, colour in (("set[1]", RED), ("set1", GREEN), ("set*", BLUE)):
        (tmp_path / folder).mkdir()
        table(tmp_path / folder / "p.parquet", ["a"], jpg_0=[colour])
    assert [colours(dataset(tmp_path / f / "p.parquet")[0])[0] for f in ("set[1]", "set1", "set*")] == ["r", "g", "b"]


def test_a_file_changed_within_its_time_is_read_anew(tmp_path: Path) -> None:
    for colour, name in ((RED, "r"), (GREEN, "g"), (BLUE, "b")):
        file = table(tmp_path / "p.parquet", ["a"], jpg_0=[colour])
        os.utime(file, (1, 1))
        assert colours(dataset(file)[0])[0] == name


def test_a_conversion_that_lost_rows(tmp_path: Path) -> None:
    file = table(tmp_path / "p.parquet", ["a", "b"])
    pairs.read(str(file), cache_dir=str(tmp_path / "c")).source.open("jpg_0")
    (made,) = (tmp_path / "c" / "lpo_fast").glob("[!.]*.arrow")
    column = pa.ipc.open_stream(made.read_bytes()).read_all()
    with pa.OSFile(str(made), "wb") as out, pa.ipc.new_stream(out, column.schema) as stream:
        stream.write_table(column[:1])
    with pytest.raises(InputError, match="has 1 rows, not 2: remove it"):
        pairs.read(str(file), cache_dir=str(tmp_path / "c")).source.open("jpg_0")


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
    (made if kind == "plain" else datasets.DatasetDict({"train": made, "held": made.select([1])})).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["plain", "splits", "images"])
def test_a_directory_of_datasets(tmp_path: Path, kind: str) -> None:
    rows = columns(["a", "b", "a"], jpg_0=[RED, GREEN, BLUE]) | {"extra": [0, 1, 2]}
    path = stored(tmp_path / "d", kind, rows)
    made = pairs.PairDataset(pairs.read(path, split="train"), 8)
    assert made.pairs.captions == ["a", "b", "a"] and [colours(made[i]) for i in range(3)] == ["rb", "gb", "bb"]
    pairs.check_pictures(made.pairs)
    copy = pickle.loads(pickle.dumps(made))  # as worker processes get it
    assert colours(copy[1]) == "gb" and len(pickle.dumps(made)) < 20_000
    if kind != "plain":
        held = pairs.PairDataset(pairs.read(path, split="held"), 8)
        assert held.pairs.captions == ["b"] and colours(held[0]) == "gb"
        with pytest.raises(InputError, match="--train-split .*no split of .*, which has train, held"):
            pairs.read(path, split="validation_unique")


def test_worker_processes_give_the_same(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "a"], jpg_0=[RED, GREEN, b"?"]))
    whole, apart = (list(DataLoader(made, 2, num_workers=n, collate_fn=pairs.collate)) for n in (0, 2))
    for one, other in zip(whole, apart, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                   for a, b in zip(one.values(), other.values(), strict=True))


def test_a_name_that_is_no_path_is_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = datasets.Dataset.from_dict(columns(["a", "b"]) | {"extra": [0, 1]}), []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append((name, options)) or made)
    assert pairs.read("owner/name", split="train", cache_dir="c").captions == ["a", "b"]
    assert asked == [("owner/name", {"split": "train", "cache_dir": "c"})]
    monkeypatch.undo()
    with pytest.raises(InputError, match="is no file or directory, and cannot be loaded as a data set") as caught:
        pairs.read("owner/name", cache_dir=str(tmp_path))  # the tests are offline
    assert caught.value.key == "--pairs" and caught.value.remedy


# Columns


def test_columns_by_other_names(tmp_path: Path) -> None:
    """HPDv2's lists, and plain prompt, chosen, rejected."""
    pq.write_table(pa.table({"prompt": ["a", "b"], "human_preference": [[0, 1], [1, 0]],
                             "images": [[{"bytes": RED, "path": None}, {"bytes": GREEN, "path": "g.png"}]] * 2}),
                   tmp_path / "hpd.parquet")
    hpd = Columns(caption="prompt", jpg_0="images[0]", jpg_1="images[1]", label_0="human_preference[0]",
                  label_1="human_preference[1]")
    made = dataset(tmp_path / "hpd.parquet", columns=hpd)
    assert [made[i]["labels"].tolist() for i in (0, 1)] == [[0, 1], [1, 0]] and colours(made[1]) == "rg"
    pairs.check_pictures(made.pairs)
    pq.write_table(pa.table({"prompt": ["a"], "chosen": [BLUE], "rejected": [RED]}), tmp_path / "plain.parquet")
    made = dataset(tmp_path / "plain.parquet", columns=Columns("prompt", "chosen", "rejected", "", ""))
    assert made[0]["labels"].tolist() == [1, 0] and colours(made[0]) == "br" and made.pairs.different.tolist() == [True]


def test_one_label_is_enough(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b", "c"])
    for name in ("label_0", "label_1"):
        assert pairs.read(str(path), columns=Columns(**{name: ""})).labels.tolist() == [[1, 0], [0, 1], [0.5, 0.5]]


def test_pictures_by_file_name(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "g.png").write_bytes(GREEN)
    path = table(tmp_path / "p.parquet", ["a", "b"], jpg_0=["pictures/g.png", "gone.png"])
    assert [colours(dataset(path)[i]) for i in (0, 1)] == ["gb", "--"]
    rows = [{"bytes": None, "path": "pictures/g.png"}, {"bytes": RED, "path": "gone.png"}]
    assert [colours(dataset(table(tmp_path / "q.parquet", ["a", "b"], jpg_0=rows))[i]) for i in (0, 1)] == ["gb", "rb"]


@pytest.mark.parametrize("key", ["caption", "jpg_0", "jpg_1", "label_0", "label_1"])
def test_missing_column(tmp_path: Path, key: str) -> None:
    pq.write_table(pa.table({k: v for k, v in columns(["a"]).items() if k != key}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="no column of .*p.parquet, which has ") as caught:
        pairs.read(str(tmp_path / "p.parquet"))
    assert caught.value.key == f"--columns.{key.replace('_', '-')}" and caught.value.value == key
    assert all(name in caught.value.problem for name in columns(["a"]) if name != key)


@pytest.mark.parametrize("columns, flag, message", [
    (Columns(has_label="judged"), "--columns.has-label", "no column of"),
    (Columns(image_1_uid="uid"), "--columns.image-1-uid", "no column of"),
    (Columns(caption=""), "--columns.caption", "no column of"),
    (Columns(jpg_1="jpg_1[x]"), "--columns.jpg-1", "no column of"),
    (Columns(label_0="label_0[0]"), "--columns.label-0", "cannot be read from"),
    (Columns(label_0="short[1]"), "--columns.label-0", "cannot be read from"),
])
def test_wrong_columns(tmp_path: Path, columns: Columns, flag: str, message: str) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b"], short=[[1, 0], [1]])
    with pytest.raises(InputError, match=message) as caught:
        pairs.read(str(path), columns=columns)
    assert caught.value.key == flag and caught.value.value in (*vars(columns).values(), "(none)")


def test_wrong_pairs(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.parquet", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no .parquet there"):
            pairs.read(str(path))
    (tmp_path / "text.parquet").write_text("caption,jpg_0")
    with pytest.raises(InputError, match="is not parquet"):
        pairs.read(str(tmp_path / "text.parquet"))
    pq.write_table(pa.table(columns(["a"])).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="holds no pair"):
        pairs.check_pictures(pairs.read(str(tmp_path / "empty.parquet")))


@pytest.mark.parametrize("changed, message", [
    ({"caption": pa.array(["a", None])}, "row 1: the caption is None"),
    ({"caption": pa.array([1, 2])}, "row 0: the caption is 1"),
    ({"label_0": pa.array(["one", "two"])}, "a label is no number"),
    ({"label_0": [1.0, 1.0]}, r"row 1: labels \[1.0, 1.0\]"),
    ({"label_0": [1.0, 0.3], "label_1": [0.0, 0.7]}, r"row 1: labels \[0.3"),
    ({"label_1": pa.array([0.0, None])}, r"row 1: labels \[0.0, nan\]"),
    ({"label_0": [2.0, 0.0], "label_1": [-1.0, 1.0]}, r"row 0: labels \[2.0, -1.0\]"),
    ({"num_example_per_prompt": [1, 0]}, "row 1: num_example_per_prompt is below 1"),
    ({"num_example_per_prompt": pa.array([None, 1])}, "row 0: num_example_per_prompt is below 1"),
    ({"num_example_per_prompt": ["x", "y"]}, "is no number"),
])
def test_wrong_records(tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pairs.read(str(table(tmp_path / "p.parquet", ["a", "b"], **changed)))


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    table(tmp_path / "0.parquet", ["a"])
    table(tmp_path / "1.parquet", ["b"], label_0=["one"])
    with pytest.raises(InputError, match="cannot be read"):
        pairs.read(str(tmp_path))
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match="no column of"):
        pairs.read(str(tmp_path))
    table(tmp_path / "1.parquet", ["b"], jpg_0=[7])
    with pytest.raises(InputError, match="cannot be converted to Arrow"):
        dataset(tmp_path)


def test_counts_of_the_table_go_before_our_own(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "a"], num_example_per_prompt=[5, 7])
    assert pairs.read(str(path)).counts.tolist() == [5, 7]
    assert pairs.read(str(path), columns=Columns(num_example_per_prompt="")).counts.tolist() == [2, 2]


# Pictures that do not decode


def test_a_broken_picture_is_marked(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "c"], jpg_1=pa.array([RED, b"no picture", None])))
    assert [made[i]["corrupt"] for i in range(3)] == [False, True, True]
    assert made[1]["pixels"].shape == (2, 3, 8, 8) and (made[1]["pixels"] == 0).all()
    assert made[1]["caption"] == "b" and made[1]["labels"].tolist() == [0, 1]  # all else is its own


def test_a_table_without_any_picture_is_refused_at_once(tmp_path: Path) -> None:
    pairs.check_pictures(pairs.read(str(table(tmp_path / "p.parquet", ["a", "b"], jpg_0=[b"", RED]))))
    for kind, bad in (("none", [b"", b""]), ("cut", [RED[:40]] * 2), ("null", pa.array([None, None], pa.binary()))):
        path = table(tmp_path / f"{kind}.parquet", ["a", "b"], jpg_1=bad)
        with pytest.raises(InputError, match="a picture of row 0 does not decode") as caught:
            pairs.check_pictures(pairs.read(str(path), "--test-pairs"))
        assert caught.value.key == "--test-pairs"


@pytest.mark.parametrize("key", ["jpg_0", "jpg_1"])
def test_a_named_column_without_pictures_is_refused_by_its_flag(key: str, tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b"])
    with pytest.raises(InputError, match="a picture of row 0 does not decode .* in .*p.parquet; name a column") as caught:
        pairs.check_pictures(pairs.read(str(path), columns=Columns(**{key: "caption"})))
    assert (caught.value.key, caught.value.value) == (f"--columns.{key.replace('_', '-')}", "caption")


def test_the_count_of_broken_pictures_stops_a_run(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", list("abcdefgh"), jpg_0=[RED, b"", RED, b"", RED, b"", RED, RED]))
    corrupt = pairs.Corrupt(made.pairs, 2)
    batch = pairs.collate([made[i] for i in range(4)])
    for _ in range(3):  # epochs: a pair counts once
        corrupt.count(batch)
        corrupt.share()
    assert corrupt.rows == {1, 3}
    corrupt.count(pairs.collate([made[5]]))
    with pytest.raises(InputError, match="pictures of 3 pairs do not decode, the first: rows 1, 3, 5") as caught:
        corrupt.share()
    assert "--max-corrupt" in caught.value.remedy


def test_collate(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "a"]))
    batch = pairs.collate([made[2], made[0]])
    assert batch["rows"].tolist() == [2, 0] and batch["captions"] == ["a", "a"] and batch["counts"].tolist() == [2, 2]
    assert batch["pixels"].shape == (2, 2, 3, 8, 8) and batch["labels"].tolist() == [[0.5, 1.0], [0.5, 0.0]]
    assert torch.equal(batch["pixels"][0, 1], made[0]["pixels"][0])
    assert batch["compare"].tolist() == batch["corrupt"].tolist() == [False, False]


# Which pairs are used


def test_ties_and_pairs_without_a_label(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", list("abcdef"), has_label=[True, True, True, False, True, False],
                 label_0=[1, 0, 0.5, 0, 1, None], label_1=[0, 1, 0.5, 0, 0, None])
    everything = pairs.read(str(path))
    assert everything.labels.tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0, 0], [1, 0], [0, 0]]
    assert used(path).rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert used(path, training=False).rows.tolist() == [0, 1, 2, 4]
    assert used(path, training=False, keep_only_with_label_in_validation=False).rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert used(path, keep_only_with_label=True).rows.tolist() == [0, 1, 2, 4]
    for training in (True, False):
        assert used(path, training=training, keep_only_different=True).rows.tolist() == [0, 1, 4]
    other = table(tmp_path / "q.parquet", list("abc"), are_different=[False, True, True])
    assert used(other, keep_only_different=True).rows.tolist() == [1, 2]  # the column goes before the labels
    with pytest.raises(InputError, match="no pair is left to use"):
        used(table(tmp_path / "r.parquet", ["a"], has_label=[False]), keep_only_with_label=True)


@pytest.mark.parametrize("limit, expected", [(0, range(7)), (1, [0, 1, 5]), (2, [0, 1, 2, 4, 5]), (9, range(7))])
def test_limit_of_a_prompt(tmp_path: Path, limit: int, expected: list) -> None:
    path = table(tmp_path / "p.parquet", list("abaabca"))
    assert used(path, limit_examples_per_prompt=limit).rows.tolist() == list(expected)


def test_the_limit_counts_pairs_that_other_options_leave(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a"] * 6)  # rows 2 and 5 are ties
    assert used(path, limit_examples_per_prompt=3, keep_only_different=True).rows.tolist() == [0, 1, 3]


def chain(tmp_path: Path, judgements: list[tuple[str, str]], name: str = "p.parquet") -> Path:
    """Pairs (uid_0, uid_1): a capital letter won; the picture of uid x has a red channel of its own."""
    uids = [[pair[i].lower() for pair in judgements] for i in (0, 1)]
    labels = [[1.0 if pair[i].isupper() else 0.0 if pair[1 - i].isupper() else 0.5 for pair in judgements] for i in (0, 1)]
    pictures = [[plain((ord(uid), 0, 0)) for uid in side] for side in uids]
    return table(tmp_path / name, ["p"] * len(judgements), jpg_0=pictures[0], jpg_1=pictures[1], label_0=labels[0],
                 label_1=labels[1], image_0_uid=uids[0], image_1_uid=uids[1])


def shown(chosen: pairs.Pairs) -> list[str]:
    made = pairs.PairDataset(chosen, 8)
    return ["".join(chr(round((p[0, 0, 0].item() + 1) * 127.5)) for p in made[i]["pixels"]) for i in range(len(made))]


def test_only_on_best(tmp_path: Path) -> None:
    """a < b < c < d: the winner of every pair becomes d, the end of the loser's chain; a tie keeps its pictures."""
    path = chain(tmp_path, [("a", "B"), ("C", "b"), ("c", "D"), ("x", "y"), ("E", "f")])
    chosen = used(path, only_on_best=True)
    assert shown(chosen) == ["ad", "db", "cd", "xy", "ef"] and chosen.rows.tolist() == [0, 1, 2, 3, 4]
    assert shown(used(path)) == ["ab", "cb", "cd", "xy", "ef"] == shown(used(path, only_on_best=True, training=False))


def test_only_on_best_leaves_out_circles(tmp_path: Path) -> None:
    path = chain(tmp_path, [("a", "B"), ("b", "C"), ("c", "A"), ("d", "E")])
    assert shown(used(path, only_on_best=True)) == ["de"]
    with pytest.raises(InputError, match="has no keys of pictures") as caught:
        used(table(tmp_path / "q.parquet", ["a"]), only_on_best=True)
    assert caught.value.key == "--only-on-best"


def official_best(judgements: list[tuple[str, str]]) -> tuple[dict, set]:
    """What the official data set does with pandas, for judgements without ties: the best of each loser, circular ones."""
    worse = {a.lower(): b.lower() for a, b in judgements if b.isupper()}
    worse |= {b.lower(): a.lower() for a, b in judgements if a.isupper()}
    circular = set()
    for bad in list(worse):
        good, passed = worse[bad], [bad]
        while good in worse:
            if good in passed:
                circular.add(bad)
                break
            passed.append(good)
            good = worse[good]
        worse[bad] = good
    return worse, circular


@pytest.mark.parametrize("seed", range(20))
def test_only_on_best_as_official(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    judgements = []
    for _ in range(8):
        a, b = draw.choice(list("abcdefgh"), 2, replace=False)
        judgements.append((a.upper(), b) if draw.random() < 0.5 else (a, b.upper()))
    best, circular = official_best(judgements)
    expected = []
    for a, b in judgements:
        if {a.lower(), b.lower()} & circular:
            continue
        expected.append(best[b] + b if a.isupper() else a + best[a])
    path = chain(tmp_path, judgements)
    if expected:
        assert shown(used(path, only_on_best=True)) == expected
    else:
        with pytest.raises(InputError, match="no pair is left"):
            used(path, only_on_best=True)


def test_compare_between_timestep_adds_the_preferred_pictures(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", list("abcd"), jpg_0=[RED, GREEN, RED, GREEN])  # 1/0, 0/1, a tie, 1/0
    chosen = used(path, scores(tmp_path / "s.csv", [(1, 1, 1, 1), (1, 1, 1, 1), (0, 0, 0, 0), (1, -9, 1, 1)]),
                  compare_between_timestep=True)
    assert chosen.rows.tolist() == [0, 1, 2, 0, 1] and chosen.compare.tolist() == [False] * 3 + [True] * 2
    made = pairs.PairDataset(chosen, 8)
    assert [colours(made[i]) for i in range(5)] == ["rb", "gb", "rb", "rr", "bb"]
    assert [made[i]["row"] for i in range(5)] == [0, 1, 2, 4, 5]  # keys of randomness are their own
    assert len(used(path, training=False, compare_between_timestep=True)) == 4


# The score table


KEYED = ["image_0_uid", "image_1_uid", *HEADER]


def test_scores_by_position(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b", "c"])  # 1/0, 0/1, a tie
    good = [(1, 1, 1, 1), (1, -9, 1, 1), (0, 0, 0, 0)]
    assert used(path, scores(tmp_path / "s.csv", good)).rows.tolist() == [0, 2]
    assert used(path, scores(tmp_path / "s.csv", good), filter_strategy=0).rows.tolist() == [0, 1, 2]
    for rows in (good[:2], good * 2):
        with pytest.raises(InputError, match=f"t.csv: has {len(rows)} rows, .*p.parquet 3 pairs") as caught:
            used(path, scores(tmp_path / "t.csv", rows))
        assert caught.value.key == "--scores"
    with pytest.raises(InputError, match="different_flag is not what the labels say in 2 of 3 pairs, the first: rows 0, 2 "):
        used(path, scores(tmp_path / "t.csv", good[::-1]))
    with pytest.raises(InputError, match="the filter keeps none of its 3 rows"):
        used(path, scores(tmp_path / "t.csv", [(1, -9, 1, 1), (1, -9, 1, 1), (0, 9, 9, 9)]))


def test_scores_by_key(tmp_path: Path) -> None:
    """Shuffled, the two keys in either order, rows of other pairs among them."""
    path = table(tmp_path / "p.parquet", ["a", "b", "c"], image_0_uid=["x", "y", "x"], image_1_uid=["y", "z", "w"])
    rows = [("w", "x", 0, 0, 0, 0), ("q", "q", 1, 1, 1, 1), ("y", "x", 1, -9, 1, 1), ("y", "z", 1, 1, 1, 1)]
    assert used(path, scores(tmp_path / "s.csv", rows, KEYED)).rows.tolist() == [1, 2]
    with pytest.raises(InputError, match="has no row for 2 of the 3 pairs, the first of them row 0 .from 0.") as caught:
        used(path, scores(tmp_path / "s.csv", [rows[0], rows[1]], KEYED))
    assert caught.value.key == "--scores"
    with pytest.raises(InputError, match="different_flag is not what the labels say in 1 of 3 pairs"):
        used(path, scores(tmp_path / "s.csv", [("w", "x", 1, 1, 1, 1), *rows[1:]], KEYED))


def test_a_pair_judged_twice_takes_the_rows_in_turn(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b"], image_0_uid=["x", "x"], image_1_uid=["y", "y"])
    rows = [("x", "y", 1, -9, 1, 1), ("x", "y", 1, 9, 1, 1)]
    assert used(path, scores(tmp_path / "s.csv", rows, KEYED)).rows.tolist() == [1]
    with pytest.raises(InputError, match="has no row for 1 of the 2 pairs, the first of them row 1"):
        used(path, scores(tmp_path / "s.csv", rows[:1], KEYED))


def test_host_memory_stays_flat(tmp_path: Path) -> None:
    """200 pairs of 1 MB of noise: reading all of them one after the other holds no more than a few."""
    path, draw = tmp_path / "p.parquet", np.random.default_rng(0)
    schema = pa.schema([(name, pa.string() if name == "caption" else pa.binary() if name.startswith("jpg") else pa.float64())
                        for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(20):
            cells = [Image.fromarray(draw.integers(0, 256, (418, 418, 3), np.uint8)) for _ in range(2)]
            noise = []
            for cell in cells:
                out = io.BytesIO()
                cell.save(out, "BMP")
                noise.append(out.getvalue())
            writer.write_table(pa.table({"caption": ["a"] * 10, "jpg_0": noise[:1] * 10, "jpg_1": noise[1:] * 10,
                                         "label_0": [1.0] * 10, "label_1": [0.0] * 10}, schema=schema))
    assert path.stat().st_size > 150e6
    table = pairs.read(str(path))
    made = pairs.PairDataset(table, 8)
    assert not made[0]["corrupt"]
    private = memory()
    for i in range(len(made)):
        assert not made[i]["corrupt"]
    assert memory() - private < 30e6


def memory() -> float:
    """Bytes of this process that are its own, not files' pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
