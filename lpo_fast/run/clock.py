"""Measure the wall time of a loop, and let signals stop it between two steps."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lpo_fast.system import console


class Clock:
    """Measure wall time per lap, and how much of it a loop waited for its data loader."""

    def __init__(self, workers: int):
        """Start the first lap; warn if this machine has fewer cores than data loader workers.

        workers: worker processes per training process.
        """
        self.workers, self.seconds, self.idle = workers, 0.0, 0.0
        self.start()
        cores = len(os.sched_getaffinity(0))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if workers * local > cores:
            console.say(f"warning: --num-workers {workers} in each of {local} processes, but this machine "
                        f"has {cores} cores: use at most {cores // local}")

    def start(self) -> None:
        """Start a lap."""
        self.since, self.waited = time.perf_counter(), 0.0

    def fetched(self, loader: Iterable) -> Iterator:
        """Yield the loader's batches, and add the time spent waiting for them to the lap."""
        batches = iter(loader)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def lap(self) -> tuple[float, float]:
        """Return the seconds since the last lap and those spent waiting; start the next lap."""
        seconds, waited = time.perf_counter() - self.since, self.waited
        self.seconds += seconds
        self.idle += waited
        self.start()
        return seconds, waited

    def advise(self) -> None:
        """Print advice if more than a tenth of the time was spent waiting."""
        if self.idle > 0.1 * self.seconds:
            console.say(f"the loop waited for pictures {self.idle / self.seconds:.0%} of the time: "
                        f"use --cache-latents DIR, or more --num-workers than {self.workers}")


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM only append their number within the block.

    The loop reads it, saves its state and stops.
    """
    caught: list[int] = []
    before = {s: signal.signal(s, lambda number, _: caught.append(number))
              for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
