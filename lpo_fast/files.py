"""Files: written beside their target and renamed into place, so a killed run leaves no half file; read without running code.

Names that begin with a dot and end in .new (being written), .old (being replaced) or .gone (being removed) are a writer's own.
Whatever is read may be damaged or hostile: it is refused with an InputError, and never takes much more memory than its size.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import stat
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lpo_fast.errors import InputError

SUMS = "checksums.json"  # of a directory: {file: SHA-256}
RECORD = 1024  # bytes that names and records take beside a parameter and its optimizer's state
LARGEST_CONFIG = 100_000  # bytes; the official ones have 3,000. YAML's sexagesimal numbers take time quadratic in it
LARGEST_PICTURE = 2**28  # bytes of a picture that is named by its file


@contextmanager
def room(size: int) -> Iterator[None]:
    """Within the block this process may take so many bytes more than it has; ValueError beyond. The net below other limits.

    Threads that start there count with their stacks and heaps, of which a machine with many cores has many: start none.
    """
    limits, have = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    most = have * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (most if limits[0] < 0 else min(most, limits[0]), limits[1]))
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"it takes more than {size:,} bytes of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise InputError, which names ``path`` and the reason, if the disk refuses what the block writes."""
    try:
        yield
    except FileNotFoundError:  # not the disk's fault
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := _refusal(error)) is None:
            raise
        raise InputError(str(path), f"cannot be written ({reason})", "make room or make it writable, then run again (training: "
                         "with --resume); what was saved before is whole") from error


def _refusal(error: Exception) -> str | None:
    """Why the disk refused, or None if it did not: torch's and safetensors' writers have errors of their own."""
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save; the cause may be its context
        error = error.__context__ or error
    if isinstance(error, OSError):
        return error.strerror or str(error)
    own = re.search("inline_container|iostream error|I/O error: .*|IoError.*", str(error))
    return own and own[0]


@contextmanager
def replacing(target: Path, before: Path | None = None) -> Iterator[Path]:
    """A fresh path beside ``target`` (file or directory) that becomes ``target`` when the block succeeds.

    before: where the file that stood there goes; None: it is removed. Raises InputError if the disk refuses; what stood there
    then stands there still.
    """
    aside, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)  # a killed run's
        _settle(old, target)  # killed between the two renames below
        try:
            yield aside
            for file in [aside] if aside.is_file() else contents(aside):
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
            if target.is_dir():
                os.replace(target, old)
            elif before and target.is_file():
                os.replace(target, before)
            os.replace(aside, target)
        finally:
            _remove(aside)
            _settle(old, target)


def contents(folder: Path) -> list[Path]:
    """The files below a directory."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def discard(path: Path) -> None:
    """Remove a directory, if it is there, under another name: a killed process leaves no half one."""
    gone = path.with_name(f".{path.name}.gone")
    _remove(gone)
    if path.exists():
        os.replace(path, gone)
        _remove(gone)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a directory; what they were about to replace comes back."""
    for old in folder.glob(".*.old"):
        _settle(old, folder / old.name[1:-len(".old")])
    for left in (*folder.glob(".*.new"), *folder.glob(".*.gone")):
        _remove(left)


@contextmanager
def once(target: Path) -> Iterator[Path | None]:
    """A fresh path that becomes ``target`` (file or directory), or None if that is there: what is made once for all.

    Of many processes one makes it and the others wait. What a killed one left is removed. Where the file system has no locks
    each makes its own, and the first remains.
    """
    own = target.with_name(f"{target.name}.{platform.node()}-{os.getpid()}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(f".{target.name}.lock"), "a", encoding="utf-8")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            locked = True
        except OSError as error:
            print(f"warning: {target.parent} cannot be locked ({error.strerror})", file=sys.stderr)
            locked = False
        if target.exists():
            yield None
            return
        name = glob.escape(target.name)
        for left in (*target.parent.glob(f"{name}.*-*"), *target.parent.glob(f".{name}.*-*.new")) if locked else ():
            _remove(left)
        with replacing(own) as aside:
            yield aside
        try:
            os.rename(own, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        finally:
            _remove(own)


def _settle(old: Path, target: Path) -> None:
    """Bring the old one back unless a new one took its place."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    _remove(old)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class _Summed:
    """A file that torch.save writes to from front to back, and the SHA-256 of it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sum = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_pickle(value: object, file: Path) -> str:
    """torch.save, and the file's SHA-256; through a file of Python's, whose errors say why the disk refused."""
    with open(file, "wb") as f:
        torch.save(value, summed := _Summed(f))
    return summed.sum.hexdigest()


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file below a directory into SUMS."""
    sums = {file.relative_to(folder).as_posix(): sha256(file) for file in contents(folder)}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def damage(path: Path) -> str:
    """What is wrong with a file or a directory that was written whole; "" if nothing can be found.

    A directory is held against its SUMS. What has none (official ones, single files) is checked as far as it can be: by the
    CRC-32 that torch.save puts into its files, by the header of .safetensors, as JSON.
    """
    sums = path / SUMS
    if not sums.is_file():
        return next(filter(None, map(_damage, contents(path) if path.is_dir() else [path])), "")
    try:
        recorded = read_json(sums, "")
    except InputError:
        return f"{SUMS} cannot be read"
    for name, wanted in recorded.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != wanted:
            return f"{name} has changed since it was written"
    return ""


def _damage(file: Path) -> str:
    """``damage`` of a single file."""
    try:
        if file.suffix in (".pt", ".bin"):
            read_pickle(file, mmap=True)  # names and shapes; what the checksums do not cover
            with open(file, "rb") as f:
                if f.read(2) == b"PK":  # else it is of torch before 1.6, without checksums
                    with zipfile.ZipFile(file) as records:
                        return f"{file.name}: {bad} does not match its checksum" if (bad := records.testzip()) else ""
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return ""
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except InputError as error:
        return f"{file.name} {error.problem}"
    except Exception as error:  # zipfile raises many kinds for damaged files
        return f"{file.name} cannot be read ({type(error).__name__})"
    return ""


def sha256(file: Path) -> str:
    """Of the bytes of a file, in hexadecimal."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_room(folder: Path, size: int, remedy: str) -> None:
    """Raise InputError if fewer than ``size`` bytes are free where a run is about to write so many."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(str(folder), f"has {free / 2**30:.2f} GiB free, and the run will write up to {size / 2**30:.2f} GiB",
                         remedy, "--out")


def read_pickle(file: Path, key: str = "", mmap: bool = False) -> dict:
    """The dictionary in a .pt, .bin or .ckpt file, read without running code (mmap: only the tensors that are used).

    Raises InputError if it is damaged, holds anything but tensors and plain values, or claims more than the file has.
    """
    try:
        if zipped := zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as members:
                if sum(member.file_size for member in members.infolist()) > file.stat().st_size:
                    raise ValueError("it is compressed, which torch never does")  # 10 MB may become 10 GB
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipped)
        if not isinstance(state, dict):
            raise ValueError("it is no dictionary")
        for leaf in tree_leaves(state):  # a stride of 0 makes terabytes of one number
            if isinstance(leaf, Tensor) and (leaf.layout != torch.strided or leaf.nbytes > leaf.untyped_storage().nbytes()):
                raise ValueError("a tensor is larger than what is stored of it")
        return state
    except Exception as error:  # torch raises many kinds for damaged or hostile files
        reason = type(error).__name__ + (f": {error}" if type(error) is ValueError else "")
        raise InputError(str(file), f"cannot be read safely ({reason})",
                         "use a file written by the official code or by lpo_fast", key) from error


def read_safetensors(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file. Raises InputError if it is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(str(file), f"cannot be read ({error})", "copy or download it again", key) from error


def parse_json(text: str) -> object:
    """JSON's value. Raises ValueError, also for keys that occur twice and for what is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} occurs twice")
        found[name] = value
    return found


def read_json(file: Path, key: str, remedy: str = "download it again") -> dict:
    """The object in a .json file. Raises InputError naming it."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no object")
        return value
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(str(file), f"cannot be read as JSON ({error})", remedy, key) from error


def read_config(file: Path, key: str) -> dict:
    """The nested dictionary of a .json, .toml or .yaml file: data alone, nothing in it runs. Raises InputError naming it."""
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        text = file.read_text(encoding="utf-8")
        value = {".json": parse_json, ".toml": tomllib.loads}.get(file.suffix, _yaml)(text)
        if not isinstance(value, dict):
            raise ValueError("it is no mapping")
        if any(isinstance(leaf, int) and abs(leaf) >= 2**63 for leaf in tree_leaves(value)):
            raise ValueError("a number has more than 64 bits")
        return value
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:  # also TOMLDecodeError, UnicodeDecodeError
        kind = file.suffix.removeprefix(".").upper().replace("YML", "YAML") or "YAML"
        raise InputError(str(file), f"is no {kind} ({(str(error).splitlines() or [type(error).__name__])[0]})", "mend it",
                         key) from error


def _yaml(text: str) -> object:
    """YAML of plain values. Aliases are refused: a few of them, nested, name a billion values."""
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
        raise ValueError("it has aliases (*name); write the values")
    return yaml.safe_load(text)


def read_picture(path: Path, most: int = LARGEST_PICTURE) -> bytes:
    """A regular file's bytes. Raises ValueError for a device or a pipe, which may never end, and for more than ``most``."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        raise ValueError(f"{path} is no file of at most {most:,} bytes")
    return path.read_bytes()
