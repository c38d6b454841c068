"""The run directory: settings, what ran where, metrics, timings, trackers, and a clean stop.

metrics.jsonl holds what the seed determines (two equal runs write equal bytes), timings.jsonl what the machine does.
"""

import io
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.run import environment
from lpo_fast.system import distributed, writing


class RunLog:
    """An open run directory; rows go to metrics.jsonl and, if asked, to a tracker. Of many processes, the main one writes."""

    def __init__(self, config: LPO | LRM, resumed: bool = False):
        self.out, self.started, self.tracker, writes = Path(config.out), time.perf_counter(), None, distributed.is_main()
        if writes:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", asdict(config))
            write_json(self.out / "environment.json", environment.environment())
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
        with writing.writing(Path(file.name)):
            while line:  # a full disk takes a part before it refuses
                line = line[file.write(line):]

    def log(self, kind: str, step: int, *, epoch: int | None = None, **row) -> None:
        """A row of metrics."""
        row = ({} if epoch is None else {"epoch": epoch}) | row
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

    def time(self, **row) -> dict:
        """Write a row of timings, and return it."""
        self._write(self.timings, row)
        return row

    def truncate(self, size: int) -> None:
        """Drop metrics written after the state that a resumed run starts from."""
        if distributed.is_main():
            size = min(size, self.metrics.seek(0, os.SEEK_END))
            self.metrics.truncate(size)
            self.metrics.seek(size)

    def truncate_to_epoch(self, epoch: int) -> None:
        """Drop metrics of this epoch and later ones, which are run again."""
        lines = (self.out / "metrics.jsonl").read_bytes().splitlines(keepends=True) if distributed.is_main() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # a killed run's last one may not be
        self.truncate(sum(len(line) for line in whole if json.loads(line)["epoch"] < epoch))

    @property
    def size(self) -> int:
        """Bytes of metrics so far, all of which are on the disk."""
        if distributed.is_main():
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
    with writing.replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text file, by the main process. Raises InputError if the disk refuses."""
    if distributed.is_main():
        with writing.writing(path.parent):
            path.write_text(text, encoding="utf-8")


def _tracker(config: LPO | LRM) -> Accelerator | None:
    """accelerate's tracker, or None with a warning: a missing package or login must not cost the run."""
    name, out = config.log_with, Path(config.out)
    if not name:
        return None
    wandb = {key: value for key, value in (("name", config.run_name), ("entity", config.tracker_entity)) if value}
    try:
        accelerator = Accelerator(log_with=name, project_dir=out)
        accelerator.init_trackers(config.tracker_project, config={k: environment.redacted(str(v)) for k, v in asdict(config).items()},
                                  init_kwargs={"wandb": wandb} if name == "wandb" else {})
        if not accelerator.trackers:
            raise RuntimeError("its package is not installed")
        return accelerator
    except Exception as error:  # trackers raise whatever their service raises
        print(f"warning: --log-with {name}: {error}; metrics are written to {out / 'metrics.jsonl'} alone",
              file=sys.stderr)
        return None


def require_same(before: str, now: str, path: str, flag: str) -> None:
    """Raise InputError if what a resumed run reads is not what it read before; digests of both."""
    if before != now:
        raise InputError(path, "holds other rows than when this run began", "resume with the run's own, or start a run in "
                         "another directory", flag)
