"""Read and write tables of prompts and pictures: the same rows of a .csv, .jsonl or .parquet file, with one
more column.
"""

import csv
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from lpo_fast.data.parquet import largest, read_columns
from lpo_fast.errors import InputError
from lpo_fast.system import writing
from lpo_fast.system.reading import memory_limit, parse_json

Picture = Image.Image | str | os.PathLike | bytes
Rows = pa.Table | list[dict]
KINDS = (".csv", ".jsonl", ".parquet")


def read(table: str, prompt_key: str, image_key: str, new_key: str) -> tuple[Rows, list[str], list[Picture]]:
    """Read a table; return its rows unchanged, their prompts and their pictures.

    Raises InputError, which names the bad row.

    A picture is a path (relative to the table's directory or the current one), encoded bytes, or a dict with
    either, as the datasets library stores it. new_key: the column to be added, which the table must not have.
    """
    file = Path(table)
    if file.suffix not in KINDS or not file.is_file():
        raise InputError(table,
                         "no such file" if file.suffix in KINDS else f"unknown file type {file.suffix!r}",
                         f"name a table: {', '.join(KINDS)}", "--table")
    try:
        rows = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[file.suffix](file)
    except (OSError, ValueError, csv.Error) as error:  # also decode and pyarrow errors
        raise InputError(table, f"cannot be read ({error})", "fix it", "--table") from error
    if not len(rows):
        raise InputError(table, "holds no rows", "add rows", "--table")
    names = columns(rows)
    for key, option in ((prompt_key, "--prompt-key"), (image_key, "--image-key")):
        if key not in names:
            raise InputError(table, f"has no column {key!r}, only {', '.join(names)}",
                             f"name its column with {option}", "--table")
    if new_key in names:
        raise InputError(new_key, f"{file.name} already has this column", "name another one", "--score-key")
    prompts, pictures = ([row.get(key) for row in rows] if isinstance(rows, list) else rows[key].to_pylist()
                         for key in (prompt_key, image_key))
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(table, f"row {row}: the prompt is {prompt!r}", "make every prompt text",
                             "--table")
    return rows, prompts, [_picture(value, row, file) for row, value in enumerate(pictures)]


def columns(rows: Rows) -> list[str]:
    """Return the names of all columns, in order."""
    return (list(dict.fromkeys(name for row in rows for name in row))
            if isinstance(rows, list) else rows.column_names)


def _csv(file: Path) -> list[dict]:
    with open(file, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f)
        rows = [(reader.line_num, row) for row in reader]
    if bad := next((line for line, row in rows if None in row or None in row.values()), None):
        raise ValueError(f"line {bad} has a different number of fields")
    return [row for _, row in rows]


def _parquet(file: Path) -> pa.Table:
    with memory_limit(3 * largest([file])):
        return read_columns([file], most=largest([file]))


def _jsonl(file: Path) -> list[dict]:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            rows |= {number: parse_json(line)} if line.strip() else {}
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    if bad := next((number for number, row in rows.items() if not isinstance(row, dict)), None):
        raise ValueError(f"line {bad} is not an object")
    return list(rows.values())


def _picture(value: object, row: int, table: Path) -> Picture:
    """Return a row's picture: bytes, or a path that exists."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise InputError(str(table), f"row {row}: the picture is {value!r}", "give a path or encoded bytes",
                         "--table")
    try:
        found = next((path for path in (table.parent / value, Path(value)) if path.is_file()), None)
    except OSError:  # e.g. a name of 5,000 letters
        found = None
    if found is None:
        raise InputError(str(table), f"row {row}: no such picture: {value[:160]!r}", "fix the path",
                         "--table")
    return found


def write(rows: Rows, scores: Tensor, file: Path, key: str) -> None:
    """Write the rows and a column of scores [N] as .csv, .jsonl or .parquet, atomically."""
    column = [float(str(score)) for score in scores.numpy()]  # shortest decimals that give the same fp32
    if isinstance(rows, pa.Table) and file.suffix == ".parquet":
        with writing.replacing(file) as aside:
            pq.write_table(rows.append_column(key, pa.array(column, pa.float32())), aside)
        return
    rows = rows.to_pylist() if isinstance(rows, pa.Table) else rows
    rows = [row | {key: score} for row, score in zip(rows, column, strict=True)]
    names = columns(rows)
    with writing.replacing(file) as aside:
        if file.suffix == ".parquet":
            pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), aside)
            return
        with open(aside, "w", encoding="utf-8", newline="") as f:
            if file.suffix == ".jsonl":
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(f, names, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
