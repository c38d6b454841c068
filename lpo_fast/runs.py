"""The run directory: settings, what ran where, metrics, timings, trackers, and a clean stop.

metrics.jsonl holds what the seed determines (two equal runs write equal bytes), timings.jsonl what the machine does.
"""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from lpo_fast import files, models, ranks
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError

LOCK = ".lock"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers")
SECRET = re.compile(r"token(?!iz)|secret|password|passwd|api_?key|credential", re.I)
CREDENTIALS = (re.compile(r"\b()hf_[A-Za-z0-9]{16,}"), re.compile(r"(\w://)[^/@\s]+(?=@)"),  # user:password@host
               re.compile(r"(-[\w.-]*(?:token|secret|password|passwd|api[_-]?key)(?:=|\s+))[^\s-]\S*", re.I))


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Within the block a run directory, made if need be, is this run's alone, and holds nothing that a killed one left.

    The main process takes the lock, which ends with it. Raises InputError if another run has it; where the file system has no
    locks, a warning is all.
    """
    if not ranks.main():
        yield
        return
    made = not out.exists()
    with files.writing(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # /proc
            raise InputError(str(out), f"cannot be made ({error.strerror})", "choose another directory", "--out") from error
        lock = _lock(out)
    try:
        files.sweep(out)
        yield
    finally:
        with suppress(OSError):
            (out / LOCK).unlink(missing_ok=True)
            if made:
                out.rmdir()  # fails, as it should, if the run wrote anything
        lock.close()


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


class Run:
    """An open run directory; rows go to metrics.jsonl and, if asked, to a tracker. Of many processes, the main one writes."""

    def __init__(self, config: LPO | LRM, resumed: bool = False):
        self.out, self.started, self.tracker, writes = Path(config.out), time.perf_counter(), None, ranks.main()
        if writes:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", asdict(config))
            write_json(self.out / "environment.json", environment())
            self.tracker = _tracker(config)
        self.metrics, self.timings = (self._open(f"{name}.jsonl", resumed, writes) for name in ("metrics", "timings"))

    def _open(self, name: str, resumed: bool, writes: bool) -> io.FileIO:
        """Not buffered: a row is in the file or the disk has refused it."""
        file = open(self.out / name if writes else os.devnull, "ab+" if resumed else "wb+", buffering=0)
        if resumed and writes:  # the last row may be a part of one
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
        return file

    def _write(self, file: io.FileIO, row: dict) -> None:
        line = memoryview(f"{json.dumps(row)}\n".encode())
        with files.writing(Path(file.name)):
            while line:  # a full disk takes a part before it refuses
                line = line[file.write(line):]

    def log(self, kind: str, step: int, **row) -> None:
        """A row of metrics."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        row = {"kind": kind, "global_step": step, **finite}
        self._write(self.metrics, row)
        if self.tracker:
            self.tracker.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)

    def show(self, name: str, step: int, pictures: list[Image.Image]) -> None:
        """Pictures for the tracker, if it takes any."""
        for tracker in self.tracker.trackers if self.tracker else ():
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.stack([np.asarray(p) for p in pictures])}, step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: pictures}, step)

    def time(self, **row) -> None:
        """A row of timings."""
        self._write(self.timings, row)

    def truncate(self, size: int) -> None:
        """Drop metrics written after the state that a resumed run starts from."""
        if ranks.main():
            size = min(size, self.metrics.seek(0, os.SEEK_END))
            self.metrics.truncate(size)
            self.metrics.seek(size)

    def truncate_to_epoch(self, epoch: int) -> None:
        """Drop metrics of this epoch and later ones, which are run again."""
        lines = (self.out / "metrics.jsonl").read_bytes().splitlines(keepends=True) if ranks.main() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # a killed run's last one may not be
        self.truncate(sum(len(line) for line in whole if json.loads(line)["epoch"] < epoch))

    @property
    def size(self) -> int:
        """Bytes of metrics so far, all of which are on the disk."""
        if ranks.main():
            os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    def close(self) -> None:
        """End the trackers and close the files."""
        if self.tracker:
            self.tracker.end_training()
        self.metrics.close()
        self.timings.close()


def write_json(path: Path, value: object) -> None:
    """Indented JSON, whole or not there."""
    with files.replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def environment() -> dict[str, object]:
    """Versions, hardware, commit, command and date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"command": redacted(" ".join(sys.orig_argv)),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit(), "python": platform.python_version(),
            **versions, "models": dict(models.RESOLVED),
            "gpu": gpu, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def redacted(text: str) -> str:
    """Without credentials: tokens by their form, passwords in URLs, values of secret-looking options and variables.

    What a run records is shown around: report.html, trackers.
    """
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    for form in CREDENTIALS:
        text = form.sub(r"\1***", text)
    return text


def commit() -> str | None:
    """The commit of this package's own repository, if it runs from one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True,
                              text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        return None


def _tracker(config: LPO | LRM) -> Accelerator | None:
    """accelerate's tracker, or None with a warning: a missing package or login must not cost the run."""
    name, out = config.log_with, Path(config.out)
    if not name:
        return None
    wandb = {key: value for key, value in (("name", config.run_name), ("entity", config.tracker_entity)) if value}
    try:
        accelerator = Accelerator(log_with=name, project_dir=out)
        accelerator.init_trackers(config.tracker_project, config={k: redacted(str(v)) for k, v in asdict(config).items()},
                                  init_kwargs={"wandb": wandb} if name == "wandb" else {})
        if not accelerator.trackers:
            raise RuntimeError("its package is not installed")
        return accelerator
    except Exception as error:  # trackers raise whatever their service raises
        print(f"warning: --log-with {name}: {error}; metrics are written to {out / 'metrics.jsonl'} alone",
              file=sys.stderr)
        return None


class Clock:
    """Wall time between laps, and how much of it a loop stood waiting for its data loader with so many worker processes."""

    def __init__(self, workers: int):
        self.workers, self.seconds, self.idle = workers, 0.0, 0.0
        self.start()
        cores, local = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if workers * local > cores:
            say(f"warning: --num-workers {workers} in {local} processes here, which have {cores} cores: use at most "
                f"{cores // local}")

    def start(self) -> None:
        """A lap begins."""
        self.since, self.waited = time.perf_counter(), 0.0

    def fetched(self, loader: Iterable) -> Iterator:
        """What the loader yields."""
        batches = iter(loader)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and those of them spent waiting."""
        seconds, waited = time.perf_counter() - self.since, self.waited
        self.seconds, self.idle = self.seconds + seconds, self.idle + waited
        self.start()
        return seconds, waited

    def advise(self) -> None:
        """Say at the end what would help if a tenth of all laps was spent waiting."""
        if self.idle > 0.1 * self.seconds:
            say(f"the loop waited for pictures in {self.idle / self.seconds:.0%} of its time: --cache-latents DIR, or more "
                f"--num-workers than {self.workers}, would help")


def say(line: str) -> None:
    """A line above the progress bar, by the main process."""
    if ranks.main():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def digest(value: object) -> str:
    """SHA-256 of lists of texts and numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def same(before: str, now: str, path: str, flag: str) -> None:
    """Raise InputError if what a resumed run reads is not what it read before; digests of both."""
    if before != now:
        raise InputError(path, "holds other rows than when this run began", "resume with the run's own, or start a run in "
                         "another directory", flag)


def memory() -> str:
    """Peak memory of the device (of the process on a CPU)."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    import resource
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM only append their number to the list; the loop saves and stops at it."""
    caught: list[int] = []
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
