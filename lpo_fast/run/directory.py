"""The run directory belongs to one run at a time."""

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
    """Within the block a run directory, made if need be, is this run's alone, and holds nothing that a killed one left.

    The main process takes the lock, which ends with it. Raises InputError if another run has it; where the file system has no
    locks, a warning is all.
    """
    if not distributed.is_main():
        yield
        return
    made = not out.exists()
    with writing.writing(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # /proc
            raise InputError(str(out), f"cannot be made ({error.strerror})", "choose another directory", "--out") from error
        held = _lock(out)
    try:
        writing.sweep(out)
        yield
    finally:
        with suppress(OSError):
            (out / LOCK).unlink(missing_ok=True)
            if made:
                out.rmdir()  # fails, as it should, if the run wrote anything
        held.close()


def holder(out: Path) -> str:
    """Which process holds a run directory; "" if none does."""
    with suppress(OSError), open(out / LOCK, "r+", encoding="utf-8") as file:
        return _taken(file)
    return ""


def in_use(out: Path, by: str) -> InputError:
    """The refusal of a run directory that another process holds."""
    return InputError(str(out), f"is in use by {by}", "wait for its end or stop it, or choose another directory", "--out")


def _taken(file: TextIO) -> str:
    """Take the lock of a lock file; who has it, or "" now that this process does. Raises OSError where there are no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which workers would inherit and keep
        return ""
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        file.seek(0)
        return file.read().strip() or "another run"


def _lock(out: Path) -> TextIO:
    """The open lock file, which says who holds it."""
    while True:
        file = open(out / LOCK, "a+", encoding="utf-8")
        try:
            if process := _taken(file):
                raise in_use(out, process)
        except OSError as error:
            print(f"warning: {out} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)
        try:
            if os.path.samestat(os.stat(out / LOCK), os.fstat(file.fileno())):
                break
        except FileNotFoundError:
            pass
        file.close()  # the one before ended, and took its lock file with it, after we had opened it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
