"""What is read: prompts, tables, pictures, and the multi-preference consistent filter's score tables (MPCF)."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lpo_fast.errors import InputError
from lpo_fast.files import parse_json, room

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS, which runs Ghostscript
LARGEST_PICTURE = 2**26  # pixels, 8,192 × 8,192: RGB of it has 200 MB
LARGEST_TEXT, A_VALUE = 2**31, 64  # bytes of a column and, in Python, of each value: 13 million prompts of 100 letters
EXPANDS = 100  # times that tables with pictures may be larger than their files, if they are larger than LARGEST_TEXT


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
    except (ValueError, csv.Error) as error:  # a key twice, a number of 5,000 digits, a field of 200 kB
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
        records = parse_json(file.read_text(encoding="utf-8-sig"))
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
            records.append((f"line {number}", parse_json(line)))
        except ValueError as error:
            problem = getattr(error, "msg", error)
            raise InputError(str(file), f"line {number} is not JSON ({problem})", "mend it", "--prompts") from error
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
    require_columns(file, (key,), "--prompts")
    try:
        with room(3 * LARGEST_TEXT):
            return [(f"row {i}", caption) for i, caption in enumerate(read_columns([file], (key,))[key].to_pylist())]
    except (pa.ArrowException, OSError) as error:
        raise InputError(str(file), f"cannot be read ({error})", "write it again", "--prompts") from error


def parquet_files(path: Path, flag: str) -> list[Path]:
    """A .parquet file, or all such files of a directory."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(str(path) if str(path) != "." else "(none)", "no .parquet there",
                         "name a .parquet file or a directory of them", flag)
    return files


def column_names(files: list[Path], flag: str) -> list[str]:
    """The columns that every file has, once."""
    names = []
    for file in files:
        try:
            names.append(pq.read_schema(file).names)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(str(file), "is not parquet", "name a .parquet file", flag) from error
    return [name for name in names[0] if all(other.count(name) == 1 for other in names)]


def require_columns(path: Path, columns: Sequence[str], flag: str) -> None:
    """Refuse parquet files that lack a column."""
    names = column_names(parquet_files(path, flag), flag)
    if missing := [c for c in columns if c not in names]:
        raise InputError(str(path), f"has no column {missing[0]!r}, only {', '.join(names)}", "rename its columns", flag)


def read_columns(files: list[Path], columns: Sequence[str] | None = None, most: int = 0) -> pa.Table:
    """Some columns of .parquet files, or all. Raises ValueError if they take more than ``most`` bytes, else LARGEST_TEXT, as
    those of files of kilobytes may: rows come few at a time, and are counted."""
    most, tables, size = most or LARGEST_TEXT, [], 0
    for file in files:
        parquet = pq.ParquetFile(file)
        schema = pa.schema([parquet.schema_arrow.field(name) for name in columns]) if columns else parquet.schema_arrow
        batches = parquet.iter_batches(_rows(parquet, schema, most), columns=schema.names, use_threads=False)
        rows, found = parquet.metadata.num_rows * len(schema) * A_VALUE, []
        while rows + size <= most and (batch := next(batches, None)) is not None:
            found.append(batch.select(schema.names))
            size += sum(map(_size, found[-1].columns))
        if (size := size + rows) > most:
            raise ValueError(f"{file.name} holds more than {most:,} bytes of text and numbers")
        tables.append(pa.Table.from_batches(found, schema))
    return pa.concat_tables(tables, promote_options="default")


def _rows(parquet: pq.ParquetFile, schema: pa.Schema, most: int) -> int:
    """How many rows take ``most`` bytes or less: no value is larger than its row group's column, unless metadata lie."""
    if any(pa.types.is_dictionary(field.type) for field in schema):
        return 2**16  # the values come once, and their numbers
    groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
    columns, paths = (g.column(i) for g in groups for i in range(g.num_columns)), tuple(f"{name}." for name in schema.names)
    sizes = (column.total_uncompressed_size for column in columns if f"{column.path_in_schema}.".startswith(paths))
    return min(max(most // max([1, *sizes]), 1), 64)


def largest(files: Sequence[Path] = ()) -> int:
    """Bytes that tables with pictures may take; without pictures: LARGEST_TEXT."""
    return max(LARGEST_TEXT, EXPANDS * sum(file.stat().st_size for file in files))


def _size(column: pa.Array) -> int:
    """Bytes of a column's values, each for itself."""
    if pa.types.is_dictionary(column.type) and isinstance(column.dictionary, pa.StringArray | pa.LargeStringArray):
        return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    return column.nbytes


def opened(file: Path | io.BytesIO) -> Image.Image:
    """A picture, nothing but its header read. Raises ValueError if it is huge, and whatever Pillow raises for what is none."""
    picture = Image.open(file, formats=FORMATS)
    if picture.width * picture.height > LARGEST_PICTURE:
        raise ValueError(f"{picture.width} × {picture.height} pixels are more than {LARGEST_PICTURE:,}")
    return picture


def picture(encoded: bytes) -> Image.Image:
    """Encoded picture → RGB, upright: the first frame, without transparency. Raises as ``opened`` does."""
    return upright(opened(io.BytesIO(encoded)))


def upright(picture: Image.Image) -> Image.Image:
    """As its EXIF orientation says, in RGB."""
    if picture.mode.startswith("I;16"):  # which Pillow cuts off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels of 32 bits (mode {picture.mode}) have no known range")
    return ImageOps.exif_transpose(picture).convert("RGB")


def decode(encoded: bytes, resolution: int) -> Tensor:
    """Encoded picture → fp32 [3, r, r] in [−1, 1], upright and resized to the square."""
    return pixels(opened(io.BytesIO(encoded)), resolution)


def pixels(picture: Image.Image, resolution: int) -> Tensor:
    """What ``decode`` makes of a picture: fp32 [3, r, r]."""
    picture = upright(picture)
    if picture.size != (resolution, resolution):
        picture = picture.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


class Scores(NamedTuple):
    """A score table of P rows: different_flag (1 win–lose, 0 tie) and the three gaps, fp64 [P]; keys: 2 × [P], or None."""

    path: str
    different: np.ndarray
    aesthetic: np.ndarray
    clip: np.ndarray
    vqa: np.ndarray
    keys: tuple[list[str], list[str]] | None


GAPS = ("different_flag", "aesthetic_gap", "clipscore_gap", "vqascore_gap")
KEYS = ("image_0_uid", "image_1_uid")


def read_scores(path: str) -> Scores:
    """A score table (.csv); a gap is the preferred picture's score less the other's, of a tie the absolute difference."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            table = csv.DictReader(f)
            if missing := [n for n in GAPS if n not in (table.fieldnames or [])]:
                raise InputError(path, f"has no column {missing[0]!r}", "use a score table", "--scores")
            keyed, rows, keys = set(KEYS) <= set(table.fieldnames or []), [], ([], [])
            for row in table:
                try:
                    rows.append([float(row[n]) for n in GAPS])
                except (ValueError, TypeError) as error:
                    raise InputError(path, f"line {table.line_num}: a value is no number ({error})", "mend the table",
                                     "--scores") from error
                for column, name in zip(keys, KEYS if keyed else (), strict=False):
                    column.append(str(row[name]))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(path, "cannot be read", "name a .csv score table", "--scores") from error
    return Scores(path, *np.array(rows).reshape(-1, 4).T, keys if keyed else None)


def kept(scores: Scores, strategy: int) -> np.ndarray:
    """bool [P]: what the multi-preference consistent filter keeps; strategy 0 keeps all.

    Win–lose rows whose gaps all favour the preferred picture, the aesthetic one down to 0, −0.5 or −1 by strategy; tie
    rows whose gaps are all below 0.2 (aesthetic), 0.03 (CLIP score) and 0.07 (VQA score). As in the official code the
    sign is not dropped: a table should hold absolute gaps for ties (``lpo_fast.score_table`` writes them).
    """
    _, different, aesthetic, clip, vqa, _ = scores
    if strategy == 0:
        return np.ones(len(different), bool)
    win = (different == 1) & (aesthetic > {1: 0.0, 2: -0.5, 3: -1.0}[strategy]) & (clip > 0) & (vqa > 0)
    tie = (different == 0) & (aesthetic < 0.2) & (clip < 0.03) & (vqa < 0.07)
    return win | tie


def mpcf(path: Path, strategy: int) -> tuple[np.ndarray, int]:
    """Row numbers of a score table that the filter keeps, ascending, and how many rows there are."""
    keep = kept(read_scores(str(path)), strategy)
    return np.flatnonzero(keep), len(keep)
