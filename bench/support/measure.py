"""Measure operators for bench/bench_kernels.py, and print the table of a run.

Only correct results are timed: every variant is first checked against the reference in fp64, on the device
and inputs that are timed (coarsely; precision is tested in tests/). Wall clock: back-to-back calls, the cost
for a caller without a CUDA graph. GPU time: a replayed CUDA graph of many calls, without the host. Both
rotate over copies of the inputs that together are at least twice the L2 cache, and keep as many results
alive, so that memory is measured and not the cache.
"""

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._functorch.config

from lpo_fast.verify.operators import Operator, error

HERE = Path(__file__).resolve().parents[1]
# rounds of a benchmark; seconds of one
ROUNDS, ROUND = (20, 0.02) if torch.cuda.is_available() else (10, 0.003)
GRAPH = 20  # least number of calls in a CUDA graph
VARIANTS = ("eager", "compiled", "kernel")


def clock() -> float:
    """Return the time in seconds after the GPU has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rotation(calls: list[Callable]) -> Callable[[], None]:
    """Return a function that makes the calls one after another; it keeps results alive, so buffers differ."""
    turn, alive = itertools.cycle(calls), deque(maxlen=len(calls))
    return lambda: alive.append(next(turn)())


def gpu_seconds(calls: list[Callable], stream: torch.cuda.Stream) -> float:
    """Return the seconds per call within a CUDA graph; ``calls`` must have run on ``stream`` before."""
    call, n = rotation(calls), len(calls) * -(-GRAPH // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(n):
            call()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        graph.replay()
        end.record(stream)
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / n)
    return statistics.median(times[2:])


def launches(call: Callable) -> int:
    """Return how many kernels, copies and fills one call runs on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
               for e in profile.events())


def copy_bytes_per_second(device: torch.device) -> float:
    """Return a device copy's bytes per second, read and written: the limit of memory-bound kernels."""
    source = torch.ones(2**29 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(ROUNDS):
        start = clock()
        for _ in range(8):
            target.copy_(source)
        times.append((clock() - start) / 8)
    return 2 * source.numel() / statistics.median(times[2:])


def environment() -> dict[str, str]:
    """Return the device, versions, commit and date of a measurement."""
    import triton
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = (subprocess.run(command, capture_output=True, text=True).stdout.strip()
              if shutil.which("git") else "")
    return {
        "device": torch.cuda.get_device_name()
            if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0],
        "commit": commit or os.environ.get("COMMIT", "unknown"), "date": datetime.now(UTC).date().isoformat()}


def run(operator: Operator, size: str, how: str, backward: bool, benchmark, copy_rate: float) -> dict:
    """Check and time one variant; return its row of results, without times if benchmarks are disabled."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    make = partial(operator.inputs, device, **(operator.sizes if cuda else operator.small)[size])
    torch.manual_seed(0)
    inputs, direction = [make()], "backward" if backward else "forward"
    moved = operator.moved(inputs[0], backward)
    if cuda:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        inputs += [make() for _ in range(min(math.ceil(2 * cache / moved), 64) - 1)]
    function = operator.kernel if how == "kernel" else operator.reference
    if how == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    row = {"op": operator.name, "size": size, "pass": direction, "how": how, "bytes": moved,
           "copies": len(inputs)}

    with torch._functorch.config.patch(donated_buffer=False):  # the autograd graph is kept
        todo = operator.calls(function, inputs, backward)
        error(f"{operator.name} {how} {direction}", todo[0](), operator.truth(inputs[0], backward))
    call = rotation(todo)
    for _ in range(2 * len(todo) + 2):
        call()
    start = clock()
    for _ in range(4):
        call()
    seconds = (clock() - start) / 4
    benchmark.pedantic(call, rounds=ROUNDS, iterations=min(max(int(ROUND / seconds), 1), 1000),
                       warmup_rounds=1)
    if benchmark.stats is None:
        return row
    wall = benchmark.stats.stats
    row |= {"wall_us": wall.median * 1e6, "wall_q1_us": wall.q1 * 1e6, "wall_q3_us": wall.q3 * 1e6}
    seconds = wall.median
    if cuda:
        seconds = gpu_seconds(todo, torch.cuda.current_stream())
        row |= {"gpu_us": seconds * 1e6, "launches": launches(todo[0])}
    rate = moved / seconds
    return row | {"GB/s": rate / 1e9, "copy GB/s": copy_rate / 1e9, "share": rate / copy_rate,
                  **environment()}


def benchmarks(operator: Operator) -> Callable:
    """Return a pytest function over size × (forward, backward) × variant; no kernel without a GPU."""
    cuda = torch.cuda.is_available()
    directions = (False,) if operator.differentiable is None else (False, True)
    cases = itertools.product(operator.sizes if cuda else operator.small, directions,
                              VARIANTS if cuda else VARIANTS[:2])

    @pytest.mark.benchmark(timer=clock, group=operator.name)
    @pytest.mark.parametrize("size, backward, how", [pytest.param(
        *case, id=f"{case[0]}-{'backward' if case[1] else 'forward'}-{case[2]}") for case in cases])
    def test(size: str, backward: bool, how: str, benchmark, copy_rate: float,
             record: Callable[[dict], None]) -> None:
        # a backward pass runs on the stream of its forward pass
        stream = torch.cuda.Stream() if cuda else None
        with torch.cuda.stream(stream):
            row = run(operator, size, how, backward, benchmark, copy_rate)
        benchmark.extra_info.update(row)
        record(row)
    return test


def stamp() -> str:
    """Return ``environment`` as one line."""
    return ", ".join(f"{key} {value}" for key, value in environment().items())


def write(path: Path, rows: list[dict], page: str) -> None:
    """Write rows as JSON and the page as Markdown next to it, atomically."""
    for target, text in ((path, json.dumps(rows, indent=1) + "\n"), (path.with_suffix(".md"), page)):
        aside = target.with_suffix(".new")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, target)


def markdown(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Return a Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]
    return ("\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
            + "\n")


def table(rows: Iterable[dict]) -> str:
    """Return the table of eager, compiled and kernel: µs on the GPU (wall clock); rates of the last that ran.

    Columns without measurements are omitted: those of kernels and launches without a GPU.
    """
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "wall_us" in row:
            found.setdefault((row["op"], row["size"], row["pass"]), {})[row["how"]] = row

    def cell(row: dict | None) -> str:
        if row is None:
            return "-"
        return f"{row['gpu_us']:.1f} ({row['wall_us']:.1f})" if "gpu_us" in row else f"({row['wall_us']:.1f})"

    def times(row: dict | None, last: dict) -> str:
        name = "gpu_us" if "gpu_us" in last else "wall_us"
        return f"{row[name] / last[name]:.2f}" if row and row is not last else "-"

    lines = []
    for key, variants in sorted(found.items()):
        three = [variants.get(how) for how in VARIANTS]
        last = [row for row in three if row][-1]
        counts = "/".join(str(row.get("launches", "-")) if row else "-" for row in three)
        lines.append([*key, *map(cell, three), *(times(row, last) for row in three[:2]),
                      f"{last['GB/s']:.1f}", f"{last['share']:.0%}", counts])
    header = ("op", "size", "pass", "eager µs", "compiled µs", "kernel µs", "× eager", "× compiled", "GB/s",
              "of copy", "launches")
    keep = [not lines or any(cell.strip("-/") for cell in column)
            for column in zip(*lines or [header], strict=True)]
    header, *lines = ([cell for cell, kept in zip(row, keep, strict=True) if kept]
                      for row in (header, *lines))
    return markdown(header, lines)
