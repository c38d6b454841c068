"""Pairs by any column names, and their pictures.
Where tables lie: test_sources.py; which pairs are used: test_choose.py."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lpo_fast.config import Columns
from lpo_fast.data import dataset as data_dataset
from lpo_fast.data import preferences
from lpo_fast.errors import InputError
from tests.helpers.pairs import BLUE, GREEN, RED, colours, columns, dataset, table


def test_pairs(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "a", "a", "c"]))
    assert len(made) == 5 and [made[i]["count"] for i in range(5)] == [3, 1, 3, 3, 1]
    item = made[1]
    assert (item["row"], item["caption"], item["labels"].tolist()) == (1, "b", [0.0, 1.0])
    assert item["pixels"].shape == (2, 3, 8, 8) and item["pixels"].dtype == torch.float32
    assert (item["pixels"][0, :, 3, 3].tolist() == [1, -1, -1]
            and item["pixels"][1, :, 0, 0].tolist() == [-1, -1, 1])
    assert item["corrupt"] is False and item["compare"] is False


def test_kept_rows_keep_the_counts_of_all(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "a", "a", "c"]), np.array([2, 4]))
    assert len(made) == 2
    assert ([(made[i]["row"], made[i]["caption"], made[i]["count"]) for i in range(2)]
            == [(2, "a", 3), (4, "c", 1)])
    assert made[0]["labels"].tolist() == [0.5, 0.5]


def test_integer_labels(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b"], label_0=[1, 0], label_1=[0, 1])
    assert dataset(path)[0]["labels"].tolist() == [1.0, 0.0]


# Columns


def test_columns_by_other_names(tmp_path: Path) -> None:
    """HPDv2's lists, and plain prompt, chosen, rejected."""
    pq.write_table(pa.table({"prompt": ["a", "b"], "human_preference": [[0, 1], [1, 0]], "images": [[
        {"bytes": RED, "path": None}, {"bytes": GREEN, "path": "g.png"}]] * 2}), tmp_path / "hpd.parquet")
    hpd = Columns(caption="prompt", jpg_0="images[0]", jpg_1="images[1]", label_0="human_preference[0]",
                  label_1="human_preference[1]")
    made = dataset(tmp_path / "hpd.parquet", columns=hpd)
    assert [made[i]["labels"].tolist() for i in (0, 1)] == [[0, 1], [1, 0]] and colours(made[1]) == "rg"
    data_dataset.check_pictures(made.pairs)
    pq.write_table(pa.table({"prompt": ["a"], "chosen": [BLUE], "rejected": [RED]}),
                   tmp_path / "plain.parquet")
    made = dataset(tmp_path / "plain.parquet", columns=Columns("prompt", "chosen", "rejected", "", ""))
    assert (made[0]["labels"].tolist() == [1, 0] and colours(made[0]) == "br"
            and made.pairs.different.tolist() == [True])


def test_one_label_is_enough(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b", "c"])
    for name in ("label_0", "label_1"):
        assert (preferences.read(str(path), columns=Columns(**{name: ""})).labels.tolist()
                == [[1, 0], [0, 1], [0.5, 0.5]])


def test_pictures_by_file_name(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "g.png").write_bytes(GREEN)
    path = table(tmp_path / "p.parquet", ["a", "b"], jpg_0=["pictures/g.png", "gone.png"])
    assert [colours(dataset(path)[i]) for i in (0, 1)] == ["gb", "--"]
    rows = [{"bytes": None, "path": "pictures/g.png"}, {"bytes": RED, "path": "gone.png"}]
    assert ([colours(dataset(table(tmp_path / "q.parquet", ["a", "b"], jpg_0=rows))[i]) for i in (0, 1)]
            == ["gb", "rb"])


@pytest.mark.parametrize("key", ["caption", "jpg_0", "jpg_1", "label_0", "label_1"])
def test_missing_column(tmp_path: Path, key: str) -> None:
    pq.write_table(pa.table({k: v for k, v in columns(["a"]).items() if k != key}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="is not a column of .*p.parquet, which has ") as caught:
        preferences.read(str(tmp_path / "p.parquet"))
    assert caught.value.key == f"--columns.{key.replace('_', '-')}" and caught.value.value == key
    assert all(name in caught.value.problem for name in columns(["a"]) if name != key)


@pytest.mark.parametrize("columns, flag, message", [
    (Columns(has_label="judged"), "--columns.has-label", "is not a column of"),
    (Columns(image_1_uid="uid"), "--columns.image-1-uid", "is not a column of"),
    (Columns(caption=""), "--columns.caption", "is not a column of"),
    (Columns(jpg_1="jpg_1[x]"), "--columns.jpg-1", "is not a column of"),
    (Columns(label_0="label_0[0]"), "--columns.label-0", "cannot be read from"),
    (Columns(label_0="short[1]"), "--columns.label-0", "cannot be read from"),
])
def test_wrong_columns(tmp_path: Path, columns: Columns, flag: str, message: str) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b"], short=[[1, 0], [1]])
    with pytest.raises(InputError, match=message) as caught:
        preferences.read(str(path), columns=columns)
    assert caught.value.key == flag and caught.value.value in (*vars(columns).values(), "(none)")


def test_wrong_pairs(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.parquet", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no .parquet there"):
            preferences.read(str(path))
    (tmp_path / "text.parquet").write_text("caption,jpg_0")
    with pytest.raises(InputError, match="is not a parquet file"):
        preferences.read(str(tmp_path / "text.parquet"))
    pq.write_table(pa.table(columns(["a"])).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="holds no pair"):
        data_dataset.check_pictures(preferences.read(str(tmp_path / "empty.parquet")))


@pytest.mark.parametrize("changed, message", [
    ({"caption": pa.array(["a", None])}, "row 1: the caption is None"),
    ({"caption": pa.array([1, 2])}, "row 0: the caption is 1"),
    ({"label_0": pa.array(["one", "two"])}, "a label is not a number"),
    ({"label_0": [1.0, 1.0]}, r"row 1: labels \[1.0, 1.0\]"),
    ({"label_0": [1.0, 0.3], "label_1": [0.0, 0.7]}, r"row 1: labels \[0.3"),
    ({"label_1": pa.array([0.0, None])}, r"row 1: labels \[0.0, nan\]"),
    ({"label_0": [2.0, 0.0], "label_1": [-1.0, 1.0]}, r"row 0: labels \[2.0, -1.0\]"),
    ({"num_example_per_prompt": [1, 0]}, "row 1: num_example_per_prompt is below 1"),
    ({"num_example_per_prompt": pa.array([None, 1])}, "row 0: num_example_per_prompt is below 1"),
    ({"num_example_per_prompt": ["x", "y"]}, "is not a number"),
])
def test_wrong_records(tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        preferences.read(str(table(tmp_path / "p.parquet", ["a", "b"], **changed)))


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    table(tmp_path / "0.parquet", ["a"])
    table(tmp_path / "1.parquet", ["b"], label_0=["one"])
    with pytest.raises(InputError, match="cannot be read"):
        preferences.read(str(tmp_path))
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match="is not a column of"):
        preferences.read(str(tmp_path))
    table(tmp_path / "1.parquet", ["b"], jpg_0=[7])
    with pytest.raises(InputError, match="cannot be converted to Arrow"):
        dataset(tmp_path)


def test_counts_of_the_table_go_before_our_own(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "a"], num_example_per_prompt=[5, 7])
    assert preferences.read(str(path)).counts.tolist() == [5, 7]
    assert preferences.read(str(path), columns=Columns(num_example_per_prompt="")).counts.tolist() == [2, 2]


# Pictures that do not decode


def test_a_broken_picture_is_marked(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "c"], jpg_1=pa.array([RED, b"no picture", None])))
    assert [made[i]["corrupt"] for i in range(3)] == [False, True, True]
    assert made[1]["pixels"].shape == (2, 3, 8, 8) and (made[1]["pixels"] == 0).all()
    assert made[1]["caption"] == "b" and made[1]["labels"].tolist() == [0, 1]  # all else is its own


def test_a_table_without_any_picture_is_refused_at_once(tmp_path: Path) -> None:
    data_dataset.check_pictures(preferences.read(str(table(tmp_path / "p.parquet", ["a", "b"],
                                                           jpg_0=[b"", RED]))))
    for kind, bad in (("none", [b"", b""]), ("cut", [RED[:40]] * 2),
                      ("null", pa.array([None, None], pa.binary()))):
        path = table(tmp_path / f"{kind}.parquet", ["a", "b"], jpg_1=bad)
        with pytest.raises(InputError, match="a picture of row 0 cannot be decoded") as caught:
            data_dataset.check_pictures(preferences.read(str(path), "--test-pairs"))
        assert caught.value.key == "--test-pairs"


@pytest.mark.parametrize("key", ["jpg_0", "jpg_1"])
def test_a_named_column_without_pictures_is_refused_by_its_flag(key: str, tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", ["a", "b"])
    with pytest.raises(InputError, match="a picture of row 0 cannot be decoded .* in .*p.parquet; "
                       "name a column") as caught:
        data_dataset.check_pictures(preferences.read(str(path), columns=Columns(**{key: "caption"})))
    assert (caught.value.key, caught.value.value) == (f"--columns.{key.replace('_', '-')}", "caption")


def test_the_count_of_broken_pictures_stops_a_run(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", list("abcdefgh"),
                         jpg_0=[RED, b"", RED, b"", RED, b"", RED, RED]))
    corrupt = data_dataset.Corrupt(made.pairs, 2)
    batch = data_dataset.collate([made[i] for i in range(4)])
    for _ in range(3):  # epochs: a pair counts once
        corrupt.count(batch)
        corrupt.share()
    assert corrupt.rows == {1, 3}
    corrupt.count(data_dataset.collate([made[5]]))
    with pytest.raises(InputError,
                       match="pictures of 3 pairs cannot be decoded, the first: rows 1, 3, 5") as caught:
        corrupt.share()
    assert "--max-corrupt" in caught.value.remedy


def test_collate(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "a"]))
    batch = data_dataset.collate([made[2], made[0]])
    assert (batch["rows"].tolist() == [2, 0] and batch["captions"] == ["a", "a"]
            and batch["counts"].tolist() == [2, 2])
    assert batch["pixels"].shape == (2, 2, 3, 8, 8) and batch["labels"].tolist() == [[0.5, 1.0], [0.5, 0.0]]
    assert torch.equal(batch["pixels"][0, 1], made[0]["pixels"][0])
    assert batch["compare"].tolist() == batch["corrupt"].tolist() == [False, False]


def test_worker_processes_give_the_same(tmp_path: Path) -> None:
    made = dataset(table(tmp_path / "p.parquet", ["a", "b", "a"], jpg_0=[RED, GREEN, b"?"]))
    whole, apart = (list(DataLoader(made, 2, num_workers=n, collate_fn=data_dataset.collate)) for n in (0, 2))
    for one, other in zip(whole, apart, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                   for a, b in zip(one.values(), other.values(), strict=True))


def test_host_memory_stays_flat(tmp_path: Path) -> None:
    """200 pairs of 1 MB of noise: reading all of them one after the other holds no more than a few."""
    path, draw = tmp_path / "p.parquet", np.random.default_rng(0)
    schema = pa.schema([(name, pa.string() if name == "caption" else pa.binary() if name.startswith("jpg")
                         else pa.float64()) for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(20):
            cells = [Image.fromarray(draw.integers(0, 256, (418, 418, 3), np.uint8)) for _ in range(2)]
            noise = []
            for cell in cells:
                out = io.BytesIO()
                cell.save(out, "BMP")
                noise.append(out.getvalue())
            writer.write_table(pa.table({"caption": ["a"] * 10, "jpg_0": noise[:1] * 10,
                                         "jpg_1": noise[1:] * 10,
                                         "label_0": [1.0] * 10, "label_1": [0.0] * 10}, schema=schema))
    assert path.stat().st_size > 150e6
    table = preferences.read(str(path))
    made = data_dataset.PairDataset(table, 8)
    assert not made[0]["corrupt"]
    private = memory()
    for i in range(len(made)):
        assert not made[i]["corrupt"]
    assert memory() - private < 30e6


def memory() -> float:
    """Bytes of this process that are its own, not files' pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
