"""Files are written beside their target and renamed into place."""

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
from typing import BinaryIO

import torch
from safetensors import SafetensorError

from lpo_fast.errors import InputError

RECORD = 1024  # bytes that names and records take beside a parameter and its optimizer's state


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
def make_once(target: Path) -> Iterator[Path | None]:
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


def require_disk_space(folder: Path, size: int, remedy: str) -> None:
    """Raise InputError if fewer than ``size`` bytes are free where a run is about to write so many."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(str(folder), f"has {free / 2**30:.2f} GiB free, and the run will write up to {size / 2**30:.2f} GiB",
                         remedy, "--out")
