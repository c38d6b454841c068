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


def read_prompts(path: str, caption_key: str = "caption") -> list[str]:
    """Prompts of a .json, .jsonl, .txt, .csv or .parquet file. Raises InputError naming the file and the record."""
    file = Path(path)
    if not path or not file.is_file():
        raise InputError(path or "(none)", "no such file", "name a file of prompts", "--prompts")
    readers = {".json": _json, ".jsonl": _jsonl, ".txt": _txt, ".csv": _csv, ".parquet": _parquet}
    if file.suffix not in readers:
        raise InputError(path, f"unknown kind {file.suffix!r}", f"use {', '.join(readers)}", "--prompts")
    try:
        records = readers[file.suffix](file, caption_key)
    except UnicodeDecodeError as error:
        raise InputError(path, f"byte {error.start} is not UTF-8", "save it as UTF-8", "--prompts") from error
    except RecursionError as error:
        raise InputError(path, "is nested too deeply", "use a list of objects", "--prompts") from error
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


def read_table(path: Path, columns: Sequence[str], flag: str) -> pa.Table:
    """The columns of a .parquet file or of all such files in a directory."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(str(path), "no .parquet there", "name a .parquet file or a directory of them", flag)
    tables = []
    for file in files:
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(str(file), "is not parquet", "name a .parquet file", flag) from error
        if missing := [c for c in columns if c not in names]:
            raise InputError(str(file), f"has no column {missing[0]!r}, only {', '.join(names)}", "rename its columns", flag)
        tables.append(pq.read_table(file, columns=list(columns)))
    return pa.concat_tables(tables, promote_options="default")


class PairDataset(Dataset):
    """Preference pairs in Pick-a-Pic layout; an item decodes two pictures.

    path: .parquet file or directory with caption, jpg_0, jpg_1 (encoded bytes), label_0, label_1 (1/0, ½/½ a tie) and,
    if present, num_example_per_prompt. keep: row numbers to use. resolution: pictures become [3, r, r] in [−1, 1].
    """

    def __init__(self, path: Path, resolution: int, keep: np.ndarray | None = None, flag: str = "--pairs"):
        self.resolution = resolution
        table = read_table(path, PAIR_COLUMNS, flag)
        self.counts = _counts(table["caption"])
        self.rows = np.arange(len(table)) if keep is None else keep
        if len(self.rows) == 0:
            raise InputError(str(path), "no pair is left", "add pairs, or filter fewer", flag)
        if self.rows[-1] >= len(table):
            raise InputError(str(path), f"the score table has more rows than the {len(table)} pairs",
                             "use the table made from these pairs", "--scores")
        self.captions = table["caption"].to_pylist()
        self.labels = np.stack([table["label_0"].to_numpy(), table["label_1"].to_numpy()], 1).astype(np.float32)
        self.images = table["jpg_0"], table["jpg_1"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        """row: int; caption: str; pixels: fp32 [2, 3, r, r]; labels: fp32 [2]; count: pairs of that caption."""
        row = int(self.rows[i])
        pixels = torch.stack([decode(column[row].as_py(), self.resolution) for column in self.images])
        return {"row": row, "caption": self.captions[row], "pixels": pixels,
                "labels": torch.from_numpy(self.labels[row]), "count": int(self.counts[row])}


def _counts(captions: pa.ChunkedArray) -> np.ndarray:
    """How many pairs each row's caption has in all."""
    codes = captions.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.bincount(codes)[codes]


def collate(items: list[dict]) -> dict:
    """A batch: rows int64 [B], captions, pixels [2, B, 3, r, r], labels [2, B], counts int64 [B]."""
    return {"rows": torch.tensor([item["row"] for item in items]), "captions": [item["caption"] for item in items],
            "pixels": torch.stack([item["pixels"] for item in items], 1),
            "labels": torch.stack([item["labels"] for item in items], 1),
            "counts": torch.tensor([item["count"] for item in items])}


def decode(encoded: bytes, resolution: int) -> Tensor:
    """Encoded picture → fp32 [3, r, r] in [−1, 1], upright and resized to the square."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    if picture.size != (resolution, resolution):
        picture = picture.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def mpcf(scores: Path, strategy: int) -> np.ndarray:
    """Row numbers of a score table (.csv) that the filter keeps, ascending.

    Win–lose rows (different_flag 1) whose gaps all favour the preferred picture, the aesthetic one down to 0, −0.5 or −1
    by strategy; tie rows whose gaps are all small (|gap|: < 0.2 aesthetic, < 0.03 CLIP score, < 0.07 VQA score).
    """
    names = ("different_flag", "aesthetic_gap", "clipscore_gap", "vqascore_gap")
    try:
        with open(scores, encoding="utf-8-sig", newline="") as f:
            rows = csv.DictReader(f)
            if missing := [n for n in names if n not in (rows.fieldnames or [])]:
                raise InputError(str(scores), f"has no column {missing[0]!r}", "use a score table", "--scores")
            different, aesthetic, clip, vqa = np.array([[float(row[n]) for n in names] for row in rows]).reshape(-1, 4).T
    except OSError as error:
        raise InputError(str(scores), "cannot be read", "name a .csv score table", "--scores") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(scores), f"a value is no number ({error})", "mend the table", "--scores") from error
    win = (different == 1) & (aesthetic > {1: 0.0, 2: -0.5, 3: -1.0}[strategy]) & (clip > 0) & (vqa > 0)
    tie = (different == 0) & (aesthetic < 0.2) & (clip < 0.03) & (vqa < 0.07)
    return np.flatnonzero(win | tie)
