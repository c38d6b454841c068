"""Time rows of a waterfall against the official statement, and write pages (bench_lpo.py, bench_lrm.py).

Each round of a row runs the baseline and then the row, so that both see the same machine load. A row's factor
is the median of the rounds' ratios. Attention is counted as matrix products: torch has no formula for the
CPU's own.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.support.measure import clock, environment, markdown, write
from lpo_fast.run import accounting

READS = {"_local_scalar_dense", "nonzero", "masked_select"}  # operations that the host waits for


class Reads(TorchDispatchMode):
    """Count how often the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        to_host = (function._opname in ("_to_copy", "copy_") and isinstance(out, Tensor)
                   and out.device.type == "cpu" and any(isinstance(x, Tensor) and x.is_cuda for x in args))
        first = args[0] if args else None
        on_host = torch.cuda.is_available() and isinstance(first, Tensor) and not first.is_cuda
        self.count += function._opname in READS and not on_host or to_host
        return out


def host_reads(call: Callable[[], object]) -> int:
    """Return how often the host waits for the device in one call of uncompiled functions."""
    with Reads() as reads:
        call()
    return reads.count


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention as two matrix products within the block, which torch's counter knows everywhere."""
    before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, lambda q, k, v, *_, **__: (
        (q @ k.transpose(-1, -2)).softmax(-1) @ v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def operations(call: Callable[[], object]) -> int:
    """Return the operations of a call, including the backward passes it runs."""
    with plain_attention(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def launches(call: Callable[[], object]) -> int | None:
    """Return how many kernels, graphs, copies and fills the host launches in a call; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
    return sum(e.name.startswith(names) for e in profile.events())


def peak_bytes(call: Callable[[], object], others: int) -> int | None:
    """Return the peak memory during a call minus ``others``, in bytes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - others


def allocated() -> int:
    """Return the bytes of all tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def timed(parts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Run the parts one after another; return the seconds of each."""
    seconds = {}
    for name, part in parts.items():
        start = clock()
        part()
        seconds[name] = clock() - start
    return seconds


def measured(benchmark, base: dict[str, Callable], parts: dict[str, Callable], rounds: int) -> dict:
    """Return a row's times; pytest-benchmark runs the baseline (in its setup) and the parts alternately."""
    pairs: list[tuple[dict, dict]] = []
    timed(base)
    timed(parts)

    def setup() -> None:
        pairs.append((timed(base), {}))
    benchmark.pedantic(lambda: pairs[-1][1].update(timed(parts)), setup=setup, rounds=rounds, iterations=1)
    wall = [sum(own.values()) for _, own in pairs]
    return {
        "ms": {name: statistics.median(own[name] for _, own in pairs) * 1e3 for name in parts},
        "whole_ms": statistics.median(wall) * 1e3,
        "fastest_ms": min(wall) * 1e3, "slowest_ms": max(wall) * 1e3,
        "official_ms": statistics.median(sum(b.values()) for b, _ in pairs) * 1e3, "rounds": rounds,
        "factor": statistics.median(sum(b.values()) / sum(own.values()) for b, own in pairs),
        "factors": [sum(b.values()) / sum(own.values()) for b, own in pairs]}


def rated(row: dict, needed: int, rate: float) -> dict:
    """Add the TFLOP/s of the necessary work (``needed`` operations) and its share of ``rate`` to a row."""
    done = needed / (row["whole_ms"] / 1e3)
    return row | {"needed_tflop": needed / 1e12, "tflops": done / 1e12, "share_of_matrix_rate": done / rate,
                  "matrix_tflops": rate / 1e12}


def machine() -> str:
    """Return the name of the folder of this machine's results."""
    name = environment()["device"].split(",")[0].lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def matrix_rate(precision: torch.dtype) -> float:
    """Return the operations per second of a large matrix product on this machine."""
    return accounting.matrix_rate(torch.device("cuda" if torch.cuda.is_available() else "cpu"), precision)


def keep(folder: Path | None, name: str, about: str, row: dict) -> list[dict]:
    """Add a row to the waterfall ``name``, or replace it; return all rows so far.

    Writes JSON, Markdown and PNG below folder/<machine>/, if a folder is given.
    """
    row = row | environment()
    if folder is None:
        return [row]
    place = folder / machine()
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    names = [r["row"] for r in rows]
    rows = [row if r["row"] == row["row"] else r for r in rows] + ([] if row["row"] in names else [row])
    keys = ("device", "torch", "triton", "python", "commit", "date")
    made = sorted({", ".join(f"{k} {r[k]}" for k in keys) for r in rows})
    page = (f"# {name}\n\n{about}\n\n{table(rows)}\n![waterfall]({name}.png)\n\n"
            + "".join(f"- {line}\n" for line in made))
    write(path, rows, page)
    picture(rows, path.with_suffix(".png"))
    return rows


def skip_if_known(folder: Path | None, name: str, row: str) -> None:
    """Skip a benchmark whose row was measured on this device at this commit, so that a run can resume."""
    path, now = folder and folder / machine() / f"{name}.json", environment()
    rows = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else []
    if any(r["row"] == row and all(r[key] == now[key] for key in ("device", "torch", "commit"))
           for r in rows):
        pytest.skip(f"already measured at this commit, in {path}; remove it to measure again")


def table(rows: list[dict]) -> str:
    """Return the waterfall as Markdown, without columns that have no measurement.

    On a CPU two columns are omitted: the share of the matrix rate, which other processes disturb, and host
    reads, since AdamW reads its own counters.
    """
    if rows[0]["device"].startswith("cpu"):
        rows = [row | {"share_of_matrix_rate": None, "host_reads": None} for row in rows]
    def some(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)
    def maybe(key: str, form: str) -> Callable[[dict], str]:
        return lambda row: some(row.get(key), form)
    parts = list(rows[0]["ms"])
    columns = {"row": lambda r: r["row"], **{f"{p} ms": (lambda r, p=p: f"{r['ms'][p]:,.0f}") for p in parts},
               "whole ms": lambda r: f"{r['whole_ms']:,.0f} ({r['fastest_ms']:,.0f}–{r['slowest_ms']:,.0f})",
               "× official": lambda r: f"{r['factor']:.2f} ({min(r['factors']):.2f}–{max(r['factors']):.2f})",
               "TFLOP": maybe("tflop", "{:.3g}"), "TFLOP/s needed": lambda r: f"{r['tflops']:.3g}",
               "of matrix rate": maybe("share_of_matrix_rate", "{:.0%}"),
               "launches": maybe("launches", "{:,}"), "host reads": maybe("host_reads", "{:,}"),
               "peak GB": maybe("peak_gb", "{:.2f}"), "pairs kept": maybe("pairs_kept", "{:.1%}"),
               "signal kept": maybe("signal", "{:.2%}"), "loss − fp32": maybe("loss_difference", "{:+.1e}"),
               "first call s": maybe("first_s", "{:.0f}")}
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(c != "-" for c in column)}
    return markdown(cells, zip(*cells.values(), strict=True))


def picture(rows: list[dict], path: Path) -> None:
    """Draw milliseconds of each row by part as bars, into a PNG file."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.5 * len(rows)), layout="constrained")
    places, left = range(len(rows)), [0.0] * len(rows)
    for part, color in zip(rows[0]["ms"], ("#4472a8", "#d08c3c", "#6aa66a"), strict=False):
        width = [row["ms"][part] for row in rows]
        axes.barh(places, width, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for place, row in zip(places, rows, strict=True):
        axes.text(left[place], place, f"  {row['factor']:.2f}×", va="center")
    axes.set_yticks(places, [row["row"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.15)
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
