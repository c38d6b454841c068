"""The run directory: settings, what ran where, metrics, timings, trackers, and a clean stop.

metrics.jsonl holds what the seed determines (two equal runs write equal bytes), timings.jsonl what the machine does.
"""

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
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from lpo_fast import models, ranks
from lpo_fast.config import LPO, LRM

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers")
SECRET = re.compile(r"token(?!iz)|secret|password|passwd|api_?key|credential", re.I)
CREDENTIALS = (re.compile(r"\b()hf_[A-Za-z0-9]{16,}"), re.compile(r"(\w://)[^/@\s]+(?=@)"),  # user:password@host
               re.compile(r"(-[\w.-]*(?:token|secret|password|passwd|api[_-]?key)(?:=|\s+))[^\s-]\S*", re.I))


class Run:
    """An open run directory; rows go to metrics.jsonl and, if asked, to a tracker. Of many processes, the main one writes."""

    def __init__(self, config: LPO | LRM):
        self.out, self.started, self.tracker, writes = Path(config.out), time.perf_counter(), None, ranks.main()
        if writes:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", asdict(config))
            write_json(self.out / "environment.json", environment())
            self.tracker = _tracker(config)
        mode = "a" if config.resume else "w"
        self.metrics, self.timings = (open(self.out / f"{name}.jsonl" if writes else os.devnull, mode, encoding="utf-8")
                                      for name in ("metrics", "timings"))

    def log(self, kind: str, step: int, **row) -> None:
        """A row of metrics."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        row = {"kind": kind, "global_step": step, **finite}
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
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
        self.timings.write(json.dumps(row) + "\n")
        self.timings.flush()

    def truncate(self, size: int) -> None:
        """Drop metrics written after the state that a resumed run starts from."""
        if ranks.main():
            self.metrics.truncate(size)
            self.metrics.seek(size)

    @property
    def size(self) -> int:
        """Bytes of metrics so far."""
        return self.metrics.tell()

    def close(self) -> None:
        """End the trackers and close the files."""
        if self.tracker:
            self.tracker.end_training()
        self.metrics.close()
        self.timings.close()


def write_json(path: Path, value: object) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
