"""Write the files of a run directory: settings, environment, metrics, timings; and feed trackers.

metrics.jsonl holds what the seed determines: on a CPU, or with --deterministic, two equal runs write equal
bytes. timings.jsonl holds what
depends on the machine.
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
    """Write rows of metrics and timings to an open run directory, and to a tracker if requested.

    Only the main process writes.
    """

    def __init__(self, config: LPO | LRM, resumed: bool = False):
        """Write config.json and environment.json, and open the files; resumed: append to them."""
        self.out = Path(config.out)
        self.started = time.perf_counter()
        self.tracker = None
        writes = distributed.is_main()
        if writes:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", asdict(config))
            write_json(self.out / "environment.json", environment.environment())
            self.tracker = _tracker(config)
        self.metrics = self._open("metrics.jsonl", resumed, writes)
        self.timings = self._open("timings.jsonl", resumed, writes)

    def _open(self, name: str, resumed: bool, writes: bool) -> io.FileIO:
        """Open a file without buffering: a row is either in the file, or its write failed."""
        file = open(self.out / name if writes else os.devnull, "ab+" if resumed else "wb+", buffering=0)
        if resumed and writes:  # the last row may be incomplete
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
        return file

    def _write(self, file: io.FileIO, row: dict) -> None:
        line = memoryview(f"{json.dumps(row)}\n".encode())
        with writing.writing(Path(file.name)):
            while line:  # a full disk accepts a part before the write fails
                line = line[file.write(line):]

    def log(self, kind: str, step: int, *, epoch: int | None = None, **row) -> None:
        """Write a row of metrics; NaN and infinities become null."""
        row = ({} if epoch is None else {"epoch": epoch}) | row
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        row = {"kind": kind, "global_step": step, **finite}
        self._write(self.metrics, row)
        if self.tracker:
            self.tracker.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)

    def show(self, name: str, step: int, pictures: list[Image.Image]) -> None:
        """Send pictures to the tracker, if it accepts any."""
        for tracker in self.tracker.trackers if self.tracker else ():
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(p) for p in pictures])
                tracker.log_images({name: stacked}, step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: pictures}, step)

    def time(self, **row) -> dict:
        """Write a row of timings and return it."""
        self._write(self.timings, row)
        return row

    def truncate(self, size: int) -> None:
        """Drop the metrics after byte ``size``, written after the state that a resumed run starts from."""
        if distributed.is_main():
            size = min(size, self.metrics.seek(0, os.SEEK_END))
            self.metrics.truncate(size)
            self.metrics.seek(size)

    def truncate_to_epoch(self, epoch: int) -> None:
        """Drop the metrics of ``epoch`` and later epochs, which are run again."""
        data = (self.out / "metrics.jsonl").read_bytes() if distributed.is_main() else b""
        lines = data.splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]  # a killed run's last line may not be
        self.truncate(sum(len(line) for line in complete if json.loads(line)["epoch"] < epoch))

    @property
    def size(self) -> int:
        """Return the bytes of metrics so far, after they are synced to disk."""
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
    """Write indented JSON atomically."""
    with writing.replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text file in the main process. Raises InputError if it cannot be written."""
    if distributed.is_main():
        with writing.writing(path.parent):
            path.write_text(text, encoding="utf-8")


def _tracker(config: LPO | LRM) -> Accelerator | None:
    """Return accelerate's tracker, or None with a warning: a missing package must not end the run."""
    name, out = config.log_with, Path(config.out)
    if not name:
        return None
    wandb = {"name": config.run_name, "entity": config.tracker_entity}
    wandb = {key: value for key, value in wandb.items() if value}
    try:
        accelerator = Accelerator(log_with=name, project_dir=out)
        accelerator.init_trackers(config.tracker_project,
                                  config={k: environment.redacted(str(v)) for k, v in asdict(config).items()},
                                  init_kwargs={"wandb": wandb} if name == "wandb" else {})
        if not accelerator.trackers:
            raise RuntimeError("its package is not installed")
        return accelerator
    except Exception as error:  # trackers raise the errors of their services
        print(f"warning: --log-with {name}: {error}; metrics are written to {out / 'metrics.jsonl'} only",
              file=sys.stderr)
        return None


def require_same(before: str, now: str, path: str, flag: str) -> None:
    """Raise InputError if the data at ``path`` changed since the run began.

    before, now: digests of the data.
    """
    if before != now:
        raise InputError(path, "holds other rows than when this run began",
                         "resume with the original file, or start a run in another directory", flag)
