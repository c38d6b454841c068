"""Read prompt files: .json, .jsonl, .txt, .csv or .parquet."""

import csv
import json
from pathlib import Path

import pyarrow as pa

from lpo_fast.data import parquet
from lpo_fast.data.parquet import LARGEST_TEXT
from lpo_fast.errors import InputError
from lpo_fast.system.reading import memory_limit, parse_json


def read_prompts(path: str, caption_key: str = "caption") -> list[str]:
    """Read the prompts of a .json, .jsonl, .txt, .csv or .parquet file.

    Raises InputError, which names the file and the record.
    """
    file = Path(path)
    if not path or not file.is_file():
        problem = "is a directory" if path and file.is_dir() else "no such file" if path else "is required"
        raise InputError(path or "(none)", problem, "name a file of prompts", "--prompts")
    readers = {".json": _json, ".jsonl": _jsonl, ".txt": _txt, ".csv": _csv, ".parquet": _parquet}
    if file.suffix not in readers:
        raise InputError(path, f"unknown file type {file.suffix!r}", f"use {', '.join(readers)}", "--prompts")
    try:
        records = readers[file.suffix](file, caption_key)
    except UnicodeDecodeError as error:
        raise InputError(path, f"byte {error.start} is not UTF-8", "save it as UTF-8", "--prompts") from error
    except (ValueError, csv.Error) as error:  # e.g. duplicate keys, a number of 5,000 digits
        if isinstance(error, InputError):
            raise
        raise InputError(path, f"cannot be read ({error})", "fix it", "--prompts") from error
    prompts = [_caption(path, place, record, caption_key) for place, record in records]
    if not prompts:
        raise InputError(path, "holds no prompts", "add prompts", "--prompts")
    return prompts


def _caption(path: str, place: str, record: object, key: str) -> str:
    """Return the prompt of a record: the record itself if it is a string, else its caption."""
    if isinstance(record, dict):
        if key not in record:
            raise InputError(path, f"{place} has no {key!r}",
                             "add it, or name another key with --caption-key", "--prompts")
        record = record[key]
    if not isinstance(record, str):
        raise InputError(path, f"{place} is {type(record).__name__}, not text", "make every prompt a string",
                         "--prompts")
    if not record.strip():
        raise InputError(path, f"{place} is blank", "remove it", "--prompts")
    try:
        record.encode()
    except UnicodeEncodeError as error:
        raise InputError(path, f"{place} holds a lone surrogate", "fix its encoding", "--prompts") from error
    return record


def _json(file: Path, _: str) -> list[tuple[str, object]]:
    try:
        records = parse_json(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(str(file), f"line {error.lineno} is not JSON ({error.msg})", "fix it",
                         "--prompts") from error
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
            raise InputError(str(file), f"line {number} is not JSON ({problem})", "fix it",
                             "--prompts") from error
    return records


def _txt(file: Path, _: str) -> list[tuple[str, object]]:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return [(f"line {n}", line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]


def _csv(file: Path, key: str) -> list[tuple[str, object]]:
    with open(file, encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f)
        if key not in (rows.fieldnames or []):
            raise InputError(str(file), f"has no column {key!r}", "name its column with --caption-key",
                             "--prompts")
        return [(f"line {rows.line_num}", row) for row in rows]


def _parquet(file: Path, key: str) -> list[tuple[str, object]]:
    parquet.require_columns(file, (key,), "--prompts")
    try:
        with memory_limit(3 * LARGEST_TEXT):
            return [(f"row {i}", caption)
                    for i, caption in enumerate(parquet.read_columns([file], (key,))[key].to_pylist())]
    except (pa.ArrowException, OSError) as error:
        raise InputError(str(file), f"cannot be read ({error})", "write it again", "--prompts") from error
