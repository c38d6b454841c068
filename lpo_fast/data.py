"""Prompts, preference pairs in Pick-a-Pic layout, and the multi-preference consistent filter (MPCF)."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from lpo_fast.errors import InputError

PAIR_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
COUNT_COLUMN = "num_example_per_prompt"


def read_prompts(path: str, caption_key: str = "caption") -> list[str]:
    """Prompts of a .json, .jsonl, .txt, .csv or .parquet file. Raises InputError naming the file and the record."""
    file = Path(path)
    if not path or not file.is_file():
        problem = "is a directory" if path and file.is_dir() else "no such file" if path else "is required"
        raise InputError(path or "(none)", problem, "name a file of prompts", "--prompts")
    readers = {".json": _json, ".jsonl": _jsonl, ".txt": _txt, ".csv": _csv, ".parquet": _parquet}
    if file.suffix not in readers:
        raise InputError(path, f"unknown kind {file.suffix!r}", f"use {', '.join(readers)}", "--prompts")
    try:
        records = readers[file.suffix](file, caption_key)
    except UnicodeDecodeError as error:
        raise InputError(path, f"byte {error.start} is not UTF-8", "save it as UTF-8", "--prompts") from error
    except RecursionError as error:
        raise InputError(path, "is nested too deeply", "use a list of objects", "--prompts") from error
    except (ValueError, csv.Error) as error:  # a number of 5,000 digits, a field of 200 kB
        if isinstance(error, InputError):
            raise
        raise InputError(path, f"cannot be read ({error})", "mend it", "--prompts") from error
    prompts = [_caption(path, place, record, caption_key) for place, record in records]
    if not prompts:
        raise InputError(path, "holds no prompt", "add prompts", "--prompts")
    return prompts


def _caption(path: str, place: str, record: object, key: str) -> str:
    """The prompt of a record: the record itself if it is a string, else its caption."""
    if isinstance(record, dict):
        if key not in record:
            raise InputError(path, f"{place} has no {key!r}", "add it, or name another key with --caption-key", "--prompts")
        record = record[key]
    if not isinstance(record, str):
        raise InputError(path, f"{place} is {type(record).__name__}, not text", "make every prompt a string", "--prompts")
    if not record.strip():
        raise InputError(path, f"{place} is blank", "drop it", "--prompts")
    try:
        record.encode()
    except UnicodeEncodeError as error:
        raise InputError(path, f"{place} holds a lone surrogate", "mend its encoding", "--prompts") from error
    return record


def _json(file: Path, _: str) -> list[tuple[str, object]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(str(file), f"line {error.lineno} is not JSON ({error.msg})", "mend it", "--prompts") from error
    if not isinstance(records, list):
        raise InputError(str(file), "is not a list", "use a list of strings or of objects", "--prompts")
    return [(f"record {i}", record) for i, record in enumerate(records)]


def _jsonl(file: Path, _: str) -> list[tuple[str, object]]:
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise InputError(str(file), f"line {number} is not JSON ({error.msg})", "mend it", "--prompts") from error
    return records


def _txt(file: Path, _: str) -> list[tuple[str, object]]:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return [(f"line {n}", line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]


def _csv(file: Path, key: str) -> list[tuple[str, object]]:
    with open(file, encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f)
        if key not in (rows.fieldnames or []):
            raise InputError(str(file), f"has no column {key!r}", "name its column with --caption-key", "--prompts")
        return [(f"line {rows.line_num}", row) for row in rows]


def _parquet(file: Path, key: str) -> list[tuple[str, object]]:
    table = read_table(file, (key,), "--prompts")
    return [(f"row {i}", caption) for i, caption in enumerate(table[key].to_pylist())]


def parquet_files(path: Path, flag: str) -> list[Path]:
    """A .parquet file, or all such files of a directory."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(str(path) if str(path) != "." else "(none)", "no .parquet there",
                         "name a .parquet file or a directory of them", flag)
    return files


def column_names(path: Path, flag: str) -> list[str]:
    """The columns that every file has."""
    names = []
    for file in parquet_files(path, flag):
        try:
            names.append(pq.read_schema(file).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(str(file), "is not parquet", "name a .parquet file", flag) from error
    return [name for name in names[0] if all(name in other for other in names)]


def require_columns(path: Path, columns: Sequence[str], flag: str) -> None:
    """Refuse parquet files that lack a column."""
    names = column_names(path, flag)
    if missing := [c for c in columns if c not in names]:
        raise InputError(str(path), f"has no column {missing[0]!r}, only {', '.join(names)}", "rename its columns", flag)


def read_table(path: Path, columns: Sequence[str], flag: str) -> pa.Table:
    """Some columns of a .parquet file or of all such files in a directory."""
    require_columns(path, columns, flag)
    try:
        tables = [pq.read_table(file, columns=list(columns)) for file in parquet_files(path, flag)]
        return pa.concat_tables(tables, promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise InputError(str(path), f"cannot be read ({error})", "write it again", flag) from error


class PairDataset(Dataset):
    """Preference pairs in Pick-a-Pic layout, held in memory; an item decodes two pictures.

    path: .parquet file or directory with caption, jpg_0, jpg_1 (encoded bytes), label_0, label_1 (1/0, ½/½ a tie) and,
    if present, num_example_per_prompt (else the pairs of each caption are counted). keep: row numbers to use.
    resolution: pictures become [3, r, r] in [−1, 1].
    """

    def __init__(self, path: Path, resolution: int, keep: np.ndarray | None = None, flag: str = "--pairs"):
        self.path, self.resolution, self.flag = path, resolution, flag
        self.captions, self.labels, self.counts = read_pairs(path, flag)
        table = read_table(path, ("jpg_0", "jpg_1"), flag)
        self.images = table["jpg_0"], table["jpg_1"]
        self.rows = np.arange(len(table)) if keep is None else keep

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        """row: int; caption: str; pixels: fp32 [2, 3, r, r]; labels: fp32 [2]; count: pairs of that caption."""
        row = int(self.rows[i])
        encoded = [column[row].as_py() for column in self.images]
        return {"row": row, "caption": self.captions[row], "pixels": decode_pair(encoded, self.resolution, self.path, row,
                                                                                 self.flag),
                "labels": torch.from_numpy(self.labels[row]), "count": int(self.counts[row])}


def read_pairs(path: Path, flag: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, labels fp32 [N, 2] and pairs a caption [N], all of them checked; no picture is read."""
    names = [*PAIR_COLUMNS, *([COUNT_COLUMN] if COUNT_COLUMN in column_names(path, flag) else [])]
    table = read_table(path, [n for n in names if not n.startswith("jpg")], flag)
    captions = table["caption"].to_pylist()
    bad = next((i for i, caption in enumerate(captions) if not isinstance(caption, str)), None)
    if bad is not None:
        raise InputError(str(path), f"row {bad}: the caption is {captions[bad]!r}", "make every caption text", flag)
    try:
        labels = np.array([table[f"label_{i}"].to_pylist() for i in (0, 1)], np.float32).T
    except (TypeError, ValueError) as error:
        raise InputError(str(path), f"a label is no number ({error})", "use 1/0, 0/1 or 0.5/0.5", flag) from error
    wrong = ~(np.isin(labels, (0.0, 0.5, 1.0)).all(1) & (labels.sum(1) == 1))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(str(path), f"row {row}: labels {labels[row].tolist()}", "use 1/0, 0/1 or 0.5/0.5", flag)
    if COUNT_COLUMN in names:
        counts = np.array(table[COUNT_COLUMN].to_pylist(), np.float32)
        if not (counts >= 1).all():
            raise InputError(str(path), f"row {int((~(counts >= 1)).argmax())}: {COUNT_COLUMN} is below 1",
                             "mend it, or drop the column", flag)
        return captions, labels, counts.astype(np.int64)
    _, codes = np.unique(np.array(captions, dtype=object), return_inverse=True)
    return captions, labels, np.bincount(codes)[codes] if captions else np.zeros(0, np.int64)


def check_pairs(path: Path, flag: str, scored: int | None = None) -> None:
    """Columns, captions, labels, the first pair's pictures, and that a score table has a row a pair (scored rows)."""
    require_columns(path, PAIR_COLUMNS, flag)
    count = len(read_pairs(path, flag)[0])
    if count == 0:
        raise InputError(str(path), "holds no pair", "add pairs", flag)
    if scored is not None and scored != count:
        raise InputError(str(path), f"holds {count} pairs, the score table has {scored} rows",
                         "use the table made from these pairs", "--scores")
    file = parquet_files(path, flag)[0]
    first = next(pq.ParquetFile(file).iter_batches(batch_size=1, columns=["jpg_0", "jpg_1"])).to_pylist()[0]
    decode_pair([first["jpg_0"], first["jpg_1"]], 8, path, 0, flag)


def decode_pair(encoded: Sequence[bytes], resolution: int, path: Path, row: int, flag: str) -> Tensor:
    """fp32 [2, 3, r, r]. Raises InputError naming the row whose picture is none."""
    try:
        return torch.stack([decode(picture, resolution) for picture in encoded])
    except Exception as error:  # Pillow raises many kinds for what is no picture
        raise InputError(str(path), f"a picture of row {row} does not decode ({type(error).__name__}: {error})",
                         "store encoded JPEG or PNG bytes", flag) from error


def collate(items: list[dict]) -> dict:
    """A batch: rows int64 [B], captions, pixels [2, B, 3, r, r], labels [2, B], counts int64 [B]."""
    return {"rows": torch.tensor([item["row"] for item in items]), "captions": [item["caption"] for item in items],
            "pixels": torch.stack([item["pixels"] for item in items], 1),
            "labels": torch.stack([item["labels"] for item in items], 1),
            "counts": torch.tensor([item["count"] for item in items])}


def decode(encoded: bytes, resolution: int) -> Tensor:
    """Encoded picture → fp32 [3, r, r] in [−1, 1], upright and resized to the square."""
    return pixels(Image.open(io.BytesIO(encoded)), resolution)


def pixels(picture: Image.Image, resolution: int) -> Tensor:
    """What ``decode`` makes of a picture: fp32 [3, r, r]."""
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    if picture.size != (resolution, resolution):
        picture = picture.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def mpcf(scores: Path, strategy: int) -> tuple[np.ndarray, int]:
    """Row numbers of a score table (.csv) that the filter keeps, ascending, and how many rows there are.

    Win–lose rows (different_flag 1) whose gaps all favour the preferred picture, the aesthetic one down to 0, −0.5 or −1
    by strategy; tie rows whose gaps are all below 0.2 (aesthetic), 0.03 (CLIP score) and 0.07 (VQA score). As in the
    official code the sign is not dropped: a table should hold absolute gaps for ties.
    """
    names = ("different_flag", "aesthetic_gap", "clipscore_gap", "vqascore_gap")
    try:
        with open(scores, encoding="utf-8-sig", newline="") as f:
            rows = csv.DictReader(f)
            if missing := [n for n in names if n not in (rows.fieldnames or [])]:
                raise InputError(str(scores), f"has no column {missing[0]!r}", "use a score table", "--scores")
            different, aesthetic, clip, vqa = np.array([[float(row[n]) for n in names] for row in rows]).reshape(-1, 4).T
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(str(scores), "cannot be read", "name a .csv score table", "--scores") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(scores), f"a value is no number ({error})", "mend the table", "--scores") from error
    win = (different == 1) & (aesthetic > {1: 0.0, 2: -0.5, 3: -1.0}[strategy]) & (clip > 0) & (vqa > 0)
    tie = (different == 0) & (aesthetic < 0.2) & (clip < 0.03) & (vqa < 0.07)
    return np.flatnonzero(win | tie), len(win)
