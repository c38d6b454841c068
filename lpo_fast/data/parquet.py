"""Read parquet files, within limits on memory."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lpo_fast.errors import InputError

LARGEST_TEXT = 2**31  # bytes of a column without pictures: 13 million prompts of 100 letters
A_VALUE = 64  # bytes of each value in Python, in addition
EXPANDS = 100  # a table with pictures may be this many times larger than its files, or LARGEST_TEXT


def parquet_files(path: Path, flag: str) -> list[Path]:
    """Return a .parquet file, or all such files of a directory. Raises InputError if there are none."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(str(path) if str(path) != "." else "(none)", "no .parquet there",
                         "name a .parquet file or a directory of them", flag)
    return files


def column_names(files: list[Path], flag: str) -> list[str]:
    """Return the names of the columns that occur exactly once in every file."""
    names = []
    for file in files:
        try:
            names.append(pq.read_schema(file).names)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(str(file), "is not a parquet file", "name a .parquet file", flag) from error
    return [name for name in names[0] if all(other.count(name) == 1 for other in names)]


def require_columns(path: Path, columns: Sequence[str], flag: str) -> None:
    """Raise InputError if parquet files lack a column."""
    names = column_names(parquet_files(path, flag), flag)
    if missing := [c for c in columns if c not in names]:
        raise InputError(str(path), f"has no column {missing[0]!r}, only {', '.join(names)}",
                         "rename its columns", flag)


def read_columns(files: list[Path], columns: Sequence[str] | None = None, most: int = 0) -> pa.Table:
    """Read some columns of .parquet files, or all.

    Raises ValueError if they take more than ``most`` bytes (default: LARGEST_TEXT), which even files of a few
    kilobytes can: the files are read a few rows at a time, and the bytes are counted.
    """
    most, tables, size = most or LARGEST_TEXT, [], 0
    for file in files:
        parquet = pq.ParquetFile(file)
        schema = (pa.schema([parquet.schema_arrow.field(name) for name in columns])
                  if columns else parquet.schema_arrow)
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
    """Return how many rows take at most ``most`` bytes.

    No value is larger than its column in a row group, if the metadata are correct.
    """
    if any(pa.types.is_dictionary(field.type) for field in schema):
        return 2**16  # distinct values are stored once, with indices
    groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
    columns, paths = ((g.column(i) for g in groups for i in range(g.num_columns)),
                      tuple(f"{name}." for name in schema.names))
    sizes = (column.total_uncompressed_size for column in columns
             if f"{column.path_in_schema}.".startswith(paths))
    return min(max(most // max([1, *sizes]), 1), 64)


def largest(files: Sequence[Path] = ()) -> int:
    """Return the bytes that a table of these files may take; without files: LARGEST_TEXT."""
    return max(LARGEST_TEXT, EXPANDS * sum(file.stat().st_size for file in files))


def _size(column: pa.Array) -> int:
    """Return the bytes of a column's values, each counted separately."""
    if (pa.types.is_dictionary(column.type)
            and isinstance(column.dictionary, pa.StringArray | pa.LargeStringArray)):
        return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    return column.nbytes
