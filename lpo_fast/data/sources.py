"""Open tables of pairs: .parquet files, a directory written by datasets' save_to_disk, or a data set on the
hub.

Columns are named NAME or NAME[i]. Small columns are read completely. Pictures are read one at a time from
memory-mapped Arrow files, so that host memory stays constant and worker processes share it. Parquet has no
random access; it is converted once to such files, in the cache of datasets (below lpo_fast/).
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lpo_fast.data.parquet import column_names, largest, parquet_files, read_columns
from lpo_fast.errors import InputError
from lpo_fast.system.reading import memory_limit, read_picture
from lpo_fast.system.writing import make_once

SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}.*\.parquet")  # split-00000-of-00655-….parquet, as on the hub
NAMED = re.compile(r"((train|validation|valid|val|dev|test)(_\w+)?)(-.*)?\.parquet")
READ = 100  # pictures in memory during the conversion of parquet
FOOTER = 2**16  # bytes read from a parquet file's end
HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
Place = tuple[str, int | None]  # a column, and the index into its lists


def flag_of(key: str) -> str:
    """Return the flag that names a column."""
    return f"--columns.{key.replace('_', '-')}"


class Source:
    """A table of pairs. path, flag: how the user named it, for error messages."""

    def __init__(self, path: str, flag: str, names: list[str]):
        self.path, self.flag, self.names = path, flag, names

    def place(self, spec: str) -> Place | None:
        """Return the column (and index) for NAME or NAME[i], or None if there is no such column."""
        if spec in self.names:
            return spec, None
        found = re.fullmatch(r"(.+)\[(\d+)\]", spec)
        return (found[1], int(found[2])) if found and found[1] in self.names else None

    def has(self, spec: str) -> bool:
        """Return whether there is such a column."""
        return self.place(spec) is not None

    def require(self, spec: str, key: str) -> Place:
        """Return the column. Raises InputError with the column's flag and the columns there are."""
        if (place := self.place(spec)) is None:
            raise InputError(spec or "(none)",
                             f"is not a column of {self.path}, which has {', '.join(self.names)}",
                             "name the column that holds it", flag_of(key))
        return place

    def values(self, spec: str, key: str) -> list:
        """Return all values of a small column."""
        name, index = self.require(spec, key)
        try:
            with memory_limit(3 * largest()):
                return _element(self.read(name), index).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:  # e.g. bytes that are not UTF-8
            raise InputError(spec, f"cannot be read from {self.path} ({error})",
                             "name a column that has it in every row", flag_of(key)) from error

    def encoded(self, cell: Any) -> bytes:
        """Return the encoded bytes of a picture's cell: bytes, {bytes, path}, or a file name (relative to the
        table's directory).
        """
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            folder = Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent
            return read_picture(folder / cell)
        if not isinstance(cell, bytes):
            raise ValueError(f"a picture is {type(cell).__name__}, not bytes")
        return cell

    def pictures(self, spec: str) -> "PictureColumn":
        """Return the pictures of a column, by row."""
        name, index = self.require(spec, "jpg_0")
        return PictureColumn(self.open(name), index, self.encoded)

    def identity(self) -> set[object]:
        """Return identifiers of the files that hold the rows.

        Two sources with a common identifier have rows in common.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a hash that changes if the table's files change: see ``_version``."""
        raise NotImplementedError

    def read(self, name: str) -> pa.ChunkedArray:
        """Return a small column."""
        raise NotImplementedError

    def open(self, name: str) -> Any:
        """Return a column as a datasets.Dataset that yields Arrow tables."""
        raise NotImplementedError

    def first(self, count: int, *specs: str) -> Iterator[list]:
        """Yield the cells of the first rows; nothing is converted."""
        raise NotImplementedError


class PictureColumn:
    """A function from row numbers to encoded pictures.

    Worker processes receive it as the names of memory-mapped files.
    """

    def __init__(self, dataset: Any, index: int | None, encoded: Callable[[Any], bytes]):
        self.dataset, self.index, self.encoded = dataset, index, encoded

    def __call__(self, row: int) -> bytes:
        """Return the encoded bytes of a row's picture. Raises whatever a damaged cell raises."""
        cell = self.dataset[row].column(0)[0]
        return self.encoded((cell if self.index is None else cell[self.index]).as_py())


def _element(column: pa.ChunkedArray, index: int | None) -> pa.ChunkedArray:
    return column if index is None else pc.list_element(column, index)


class Parquet(Source):
    """One or several .parquet files with the same columns."""

    def __init__(self, path: str, flag: str, files: list[Path], cache_dir: str):
        self.files, self.cache_dir = files, cache_dir
        super().__init__(path, flag, column_names(files, flag))

    def fingerprint(self) -> str:
        """Return a hash of the files' versions."""
        return _fingerprint(self.files)

    def read(self, name: str) -> pa.ChunkedArray:
        """Return a small column of all files."""
        return read_columns(self.files, (name,))[name]

    def identity(self) -> set[object]:
        """Return the resolved paths of the files."""
        return {file.resolve() for file in self.files}

    def open(self, name: str) -> Any:
        """Return a column as a memory-mapped dataset; it is converted to Arrow once, in the cache."""
        import datasets
        try:
            home = Path(self.cache_dir or datasets.config.HF_DATASETS_CACHE) / "lpo_fast"
            key = hashlib.sha256(repr([name, [(str(file.resolve()), *_version(file)) for file in self.files]])
                                 .encode())
            with make_once(home / f"{key.hexdigest()[:16]}.arrow") as aside:
                if aside:
                    self.convert(name, aside)
            dataset = (datasets.Dataset.from_file(str(home / f"{key.hexdigest()[:16]}.arrow"))
                       .with_format("arrow"))
            if len(dataset) != (rows := sum(pq.read_metadata(file).num_rows for file in self.files)):
                raise ValueError(f"{home}/{key.hexdigest()[:16]}.arrow has {len(dataset)} rows, not "
                                 f"{rows}: remove it")
            return dataset
        except Exception as error:  # datasets wraps whatever its readers raise
            raise InputError(self.path,
                             f"cannot be converted to Arrow ({type(error).__name__}: {_line(error)})",
                             "write it again, or choose a --cache-dir with more space", self.flag) from error

    def convert(self, name: str, target: Path) -> None:
        """Write a column as an Arrow file, without its metadata, which would make datasets decode pictures.
        """
        schema = pa.unify_schemas([pa.schema([pq.read_schema(file).field(name)]) for file in self.files],
                                  promote_options="permissive").remove_metadata()
        left = largest(self.files)
        with (memory_limit(3 * left), pa.OSFile(str(target), "wb") as out,
              pa.ipc.new_stream(out, schema) as stream):
            for file in self.files:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=READ, columns=[name],
                                                               use_threads=False):
                    if (left := left - batch.nbytes) < 0:
                        raise ValueError(f"its pictures take more than {largest(self.files):,} bytes")
                    stream.write_table(pa.table(batch).cast(schema))

    def first(self, count: int, *specs: str) -> Iterator[list]:
        """Yield the cells of the first rows, read directly from the files."""
        places = [self.require(spec, "jpg_0") for spec in specs]
        names, left = list(dict.fromkeys(name for name, _ in places)), count
        for file in self.files:
            try:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=1, columns=names):
                    if left and len(batch):
                        left -= 1
                        yield [_cell(batch.column(name)[0], index) for name, index in places]
                    if not left:
                        return
            except (pa.ArrowException, OSError, ValueError) as error:
                raise InputError(str(file), f"cannot be read ({_line(error)})", "write it again",
                                 self.flag) from error


def _version(file: Path) -> tuple[object, ...]:
    """Return what identifies a file's content: size, modification time, and the last bytes (a parquet file's
    column offsets).
    """
    about = file.stat()
    with open(file, "rb") as f:
        f.seek(-min(FOOTER, about.st_size), os.SEEK_END)
        return about.st_size, about.st_mtime_ns, f.read()


class Stored(Source):
    """A datasets.Dataset, from a directory or from the hub."""

    def __init__(self, path: str, flag: str, dataset: Any):
        self.dataset = dataset.with_format("arrow")
        super().__init__(path, flag, list(dataset.column_names))

    def identity(self) -> set[object]:
        """Return the fingerprint that datasets gives the dataset."""
        return {self.dataset._fingerprint}

    def fingerprint(self) -> str:
        """Return a hash of the files' versions and the dataset's fingerprint."""
        return _fingerprint((file["filename"] for file in self.dataset.cache_files),
                            self.dataset._fingerprint)

    def read(self, name: str) -> pa.ChunkedArray:
        """Return a small column."""
        return self.open(name)[:].column(0)

    def open(self, name: str) -> Any:
        """Return a column as a dataset."""
        return self.dataset.select_columns([name])

    def first(self, count: int, *specs: str) -> Iterator[list]:
        """Yield the cells of the first rows."""
        places = [self.require(spec, "jpg_0") for spec in specs]
        for row in range(min(count, len(self.dataset))):
            yield [_cell(self.open(name)[row].column(0)[0], index) for name, index in places]


def _cell(cell: pa.Scalar, index: int | None) -> Any:
    """Return a cell's value, or None where its list is too short."""
    try:
        return (cell if index is None else cell[index]).as_py()
    except (IndexError, TypeError):
        return None


def _fingerprint(files: Iterable[str | Path], of: str = "") -> str:
    return (hashlib.sha256(repr([of, *((Path(file).name, *_version(Path(file))) for file in files)]).encode())
            .hexdigest())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def open_source(path: str, flag: str, split: str = "", cache_dir: str = "") -> Source:
    """Open what ``path`` names: a file or directory if it exists, else a data set on the hub.

    Raises InputError if it cannot be opened.
    """
    place = Path(path)
    if path and any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        import datasets
        return Stored(path, flag, _load(path, flag, split, lambda: datasets.load_from_disk(path)))
    if not path or place.exists() or place.suffix == ".parquet" or not HUB.fullmatch(path):
        return Parquet(path, flag, _of_split(path, flag, split), cache_dir)
    import datasets
    return Stored(path, flag, _load(path, flag, split, lambda: datasets.load_dataset(
        path, split=split or None, cache_dir=cache_dir or None)))


def _load(path: str, flag: str, split: str, load: Callable[[], Any]) -> Any:
    """Load a datasets.Dataset; of a dictionary of datasets, the given split."""
    try:
        loaded = load()
    except Exception as error:  # offline, absent, gated, damaged: datasets and the hub raise many kinds
        raise InputError(path,
                         "is not a file or directory, and cannot be loaded as a data set "
                         f"({type(error).__name__}: {_line(error)})",
                         "name a .parquet file, a directory, or a data set that can be reached",
                         flag) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise InputError(split or "(none)", f"is not a split of {path}, which has {', '.join(loaded)}",
                             "name one of these", _split_flag(flag))
        loaded = loaded[split]
    return loaded


def _of_split(path: str, flag: str, split: str) -> list[Path]:
    """Return the files of a directory (or of its data/).

    If the files are named SPLIT.parquet or SPLIT-….parquet, only those of the given split are returned.
    Raises InputError if some files are not named so, or the split does not exist.
    """
    folder = Path(path)
    if folder.is_dir() and not list(folder.glob("*.parquet")) and (folder / "data").is_dir():
        folder = folder / "data"
    files = parquet_files(folder, flag)
    if not folder.is_dir() or not split:
        return files
    splits = {file: _split(file.name, split) for file in files}
    if not any(splits.values()):
        return files
    names = ", ".join(sorted(set(splits.values()) - {""}))
    if stray := [file.name for file in files if not splits[file]]:
        raise InputError(
            path, f"some of its files are named for splits ({names}), others are not: {', '.join(stray[:5])}",
            "move them to separate directories, or name one file", flag)
    if split not in splits.values():
        raise InputError(split, f"is not a split of {path}, which has {names}", "name one of these",
                         _split_flag(flag))
    return [file for file in files if splits[file] == split]


def _split(name: str, split: str) -> str:
    """Return the split in a file's name: ``split`` itself, the split of a shard as on the hub, or a common
    split name; else "".
    """
    if name == f"{split}.parquet" or name.startswith(f"{split}-"):
        return split
    found = SHARD.fullmatch(name) or NAMED.fullmatch(name)
    return found[1] if found else ""


def _split_flag(flag: str) -> str:
    return {"--validation-pairs": "--validation-split",
            "--test-pairs": "--test-split"}.get(flag, "--train-split")
