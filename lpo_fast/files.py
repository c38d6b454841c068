"""Files: written beside their target and renamed into place, so a killed run leaves no half file; read without running code."""

import errno
import fcntl
import glob
import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpo_fast.errors import InputError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh path beside ``target`` (file or directory) that becomes ``target`` when the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    _remove(aside)  # a killed run's
    _settle(old, target)  # killed between the two renames below
    try:
        yield aside
        for file in [aside] if aside.is_file() else sorted(p for p in aside.rglob("*") if p.is_file()):
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        if target.is_dir():
            os.replace(target, old)
        os.replace(aside, target)
    finally:
        _remove(aside)
        _settle(old, target)


@contextmanager
def once(target: Path) -> Iterator[Path | None]:
    """A fresh path that becomes ``target`` (file or directory), or None if that is there: what is made once for all.

    Of many processes one makes it and the others wait. What a killed one left is removed. Where the file system has no locks
    each makes its own, and the first remains.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    own = target.with_name(f"{target.name}.{platform.node()}-{os.getpid()}")
    with open(target.with_name(f".{target.name}.lock"), "a", encoding="utf-8") as lock:
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


def read_pickle(file: Path, key: str = "", mmap: bool = False) -> dict:
    """A .pt file, read without running code (mmap: only the tensors that are used).

    Raises InputError if it is damaged or holds anything but tensors.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(file))
    except Exception as error:  # torch raises many kinds for damaged or hostile files
        raise InputError(str(file), f"cannot be read safely ({type(error).__name__})",
                         "use a file written by the official code or by lpo_fast", key) from error


def read_safetensors(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file. Raises InputError if it is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(str(file), f"cannot be read ({error})", "copy or download it again", key) from error
