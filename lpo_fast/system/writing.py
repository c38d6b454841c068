"""Write files atomically: next to their target, then renamed into place, so a killed run leaves no partial
file.

Names that begin with a dot and end in .new (being written), .old (being replaced) or .gone (being removed)
are reserved for these functions.
"""

import errno
import fcntl
import glob
import hashlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError

from lpo_fast.errors import InputError

RECORD = 1024  # bytes of names and records per parameter and its optimizer state


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise InputError, which names ``path`` and the reason, if the block's writes to disk fail."""
    try:
        yield
    except FileNotFoundError:  # not a failed write
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := _refusal(error)) is None:
            raise
        raise InputError(str(path), f"cannot be written ({reason})",
                         "free some space or make it writable, then run again (training: with --resume); "
                         "earlier files are intact") from error


def _refusal(error: BaseException) -> str | None:
    """Return why a write failed, or None if the error is another one.

    torch's and safetensors' writers raise their own errors.
    """
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save
        error = error.__context__ or error
    if isinstance(error, OSError):
        return error.strerror or str(error)
    own = re.search("inline_container|iostream error|I/O error: .*|IoError.*", str(error))
    return own and own[0]


@contextmanager
def replacing(target: Path, before: Path | None = None) -> Iterator[Path]:
    """Yield a new path next to ``target`` (file or directory), which becomes ``target`` when the block
    succeeds.

    before: where the file that was there is moved; None: it is removed. Raises InputError if the disk fails;
    the previous ``target`` is then unchanged.
    """
    aside, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)  # left by a killed run
        _restore_or_remove(old, target)  # left by a run that was killed between the two renames below
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
            _restore_or_remove(old, target)


def contents(folder: Path) -> list[Path]:
    """Return the files below a directory, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def discard(path: Path) -> None:
    """Remove a directory, if it exists.

    It is renamed first, so that a killed process leaves no partial directory.
    """
    gone = path.with_name(f".{path.name}.gone")
    _remove(gone)
    if path.exists():
        os.replace(path, gone)
        _remove(gone)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a directory, and restore what they were about to replace."""
    for old in folder.glob(".*.old"):
        _restore_or_remove(old, folder / old.name[1:-len(".old")])
    for left in (*folder.glob(".*.new"), *folder.glob(".*.gone")):
        _remove(left)


@contextmanager
def make_once(target: Path) -> Iterator[Path | None]:
    """Create a file or directory once for all processes.

    Yields a new path that becomes ``target``, or None if ``target`` exists. One process creates it while the
    others wait. Leftovers of killed processes are removed. Where the file system has no locks, each process
    creates its own, and the first one remains.
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
        for left in ((*target.parent.glob(f"{name}.*-*"), *target.parent.glob(f".{name}.*-*.new"))
                     if locked else ()):
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


def _restore_or_remove(old: Path, target: Path) -> None:
    """Move ``old`` back to ``target`` if that no longer exists, else remove it."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    _remove(old)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class _Hashing:
    """A file opened for writing from front to back, with the SHA-256 of its bytes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sum = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_pickle(value: object, file: Path) -> str:
    """Write ``value`` with torch.save; return the SHA-256 of the file.

    The data passes through a Python file object, whose errors state why a write failed.
    """
    with open(file, "wb") as f:
        torch.save(value, hashing := cast(Any, _Hashing(f)))
    return hashing.sum.hexdigest()


def require_disk_space(folder: Path, size: int, remedy: str) -> None:
    """Raise InputError if fewer than ``size`` bytes are free in a folder that a run is about to write to."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(str(folder), f"has {free / 2**30:.2f} GiB free, and the run will write up to "
                         f"{size / 2**30:.2f} GiB", remedy, "--out")
