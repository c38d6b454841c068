"""Lock the run directory: one run uses it at a time."""

import errno
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from lpo_fast.errors import InputError
from lpo_fast.system import distributed, writing

LOCK = ".lock"


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Lock a run directory within the block, creating it if needed, and remove a killed run's leftovers.

    The main process holds the lock; it ends with that process. Raises InputError if another run holds it.
    Where the file system has no locks, prints a warning instead.
    """
    if not distributed.is_main():
        yield
        return
    made = not out.exists()
    with writing.writing(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # /proc
            raise InputError(str(out), f"cannot be created ({error.strerror})", "choose another directory",
                             "--out") from error
        held = _lock(out)
    try:
        writing.sweep(out)
        yield
    finally:
        with suppress(OSError):
            (out / LOCK).unlink(missing_ok=True)
            if made:
                out.rmdir()  # fails, as intended, if the run wrote anything
        held.close()


def holder(out: Path) -> str:
    """Return which process holds the lock of a run directory; "" if none does."""
    with suppress(OSError), open(out / LOCK, "r+", encoding="utf-8") as file:
        return _taken(file)
    return ""


def in_use(out: Path, by: str) -> InputError:
    """Return the error for a run directory that another process holds."""
    return InputError(str(out), f"is in use by {by}",
                      "wait until it ends, stop it, or choose another directory", "--out")


def _taken(file: TextIO) -> str:
    """Try to take the lock; return "" on success, else which process holds it.

    Raises OSError where the file system has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which workers would inherit and keep
        return ""
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        file.seek(0)
        return file.read().strip() or "another run"


def _lock(out: Path) -> TextIO:
    """Take the lock and return the open lock file, which names this process.

    Raises InputError if another run holds it.
    """
    while True:
        file = open(out / LOCK, "a+", encoding="utf-8")
        try:
            if process := _taken(file):
                raise in_use(out, process)
        except OSError as error:
            print(f"warning: {out} cannot be locked ({error.strerror}): do not start another run there",
                  file=sys.stderr)
        try:
            if os.path.samestat(os.stat(out / LOCK), os.fstat(file.fileno())):
                break
        except FileNotFoundError:
            pass
        file.close()  # the previous run ended and removed its lock file after this process opened it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
