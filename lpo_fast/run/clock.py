"""Wall time of a loop, and a clean stop."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lpo_fast.system import console


class Clock:
    """Wall time between laps, and how much of it a loop stood waiting for its data loader with so many worker processes."""

    def __init__(self, workers: int):
        self.workers, self.seconds, self.idle = workers, 0.0, 0.0
        self.start()
        cores, local = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if workers * local > cores:
            console.say(f"warning: --num-workers {workers} in {local} processes here, which have {cores} cores: use at most "
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
            console.say(f"the loop waited for pictures in {self.idle / self.seconds:.0%} of its time: --cache-latents DIR, or more "
                f"--num-workers than {self.workers}, would help")


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
