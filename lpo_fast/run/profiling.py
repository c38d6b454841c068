"""Profile one round of a loop (--profile) with torch.profiler: write a trace and a table."""

import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch.autograd import DeviceType

from lpo_fast.system import console, distributed

ROWS = 40  # most rows of the table


class Profiler:
    """Profile one round (a prompt batch, an LRM step) after two warm-up rounds; later rounds run unprofiled.

    Writes profile/trace.json.gz (for chrome://tracing or Perfetto) and profile/table.md below the run
    directory.
    """

    def __init__(self, out: Path | None, unit: str, rounds: int):
        """Set up for a run of ``rounds`` rounds, called ``unit``. out: run directory; None: no profile."""
        self.folder, self.unit = None, unit
        self.left = min(2, rounds - 1)
        if out and distributed.is_main():
            self.folder = out / "profile"
        self.profile: torch.profiler.profile | None = None

    def round(self) -> None:
        """Start or finish the profile if it is due. Call it before each round and after the last."""
        if self.folder is None:
            return
        if self.profile is not None:
            self.finish()
        elif self.left == 0:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.start = time.perf_counter()
            self.profile.start()
        self.left -= 1

    def finish(self) -> None:
        """Stop the profiler and write both files."""
        profile, folder = self.profile, self.folder
        assert profile and folder, "nothing is being profiled"
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        profile.stop()
        folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(folder / "trace.json.gz"))
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events() or ()
                 if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        on_cpu = [(e.key, e.self_cpu_time_total, e.count) for e in profile.key_averages()]
        (folder / "table.md").write_text(page(self.unit, seconds, spans, on_cpu), encoding="utf-8")
        console.say(f"profile of one {self.unit}: {folder / 'table.md'}")
        self.folder = self.profile = None


def page(unit: str, seconds: float, spans: list[tuple[str, float, float]],
         on_cpu: list[tuple[str, float, int]]) -> str:
    """Return the profile as a Markdown page.

    seconds: wall time. spans: (name, start, end) in µs on the GPU. on_cpu: (operator, own time in µs, calls).
    """
    lines = [f"# Profile of one {unit}", "", f"{seconds * 1e3:,.1f} ms, profiler included, on "
             + (torch.cuda.get_device_name() if spans else "the CPU") + ".", ""]
    if spans:
        busy, gaps = union(spans)
        longest = max(gaps, default=0.0) / 1e3
        median = statistics.median(gaps or [0.0])
        lines += [f"- {len(spans):,} launches (kernels, copies, fills); a CUDA graph's are started together",
                  f"- busy {busy / 1e3:,.1f} ms; idle {sum(gaps) / 1e3:,.1f} ms between the first launch and "
                  "the last",
                  "- gaps above 10 µs, in which the GPU waits for the host: "
                  f"{sum(gap > 10 for gap in gaps):,}; the longest gap {longest:,.2f} ms, the median of all "
                  f"gaps {median:,.1f} µs", ""]
        times: dict[str, float] = defaultdict(float)
        calls = Counter(name for name, *_ in spans)
        for name, start, end in spans:
            times[name] += end - start
        rows = [(name, spent, calls[name]) for name, spent in times.items()]
    else:
        rows = on_cpu
    total = sum(spent for _, spent, _ in rows) or 1.0
    lines += [f"Shares are of {total / 1e3:,.1f} ms, the sum of all rows.", ""]
    lines += ["| ms | share | calls | " + ("kernel" if spans else "operator, own time") + " |",
              "|---|---|---|---|"]
    for name, spent, count in sorted(rows, key=lambda row: -row[1])[:ROWS]:
        shown = name.replace("|", "\\|")
        lines.append(f"| {spent / 1e3:,.2f} | {spent / total:.1%} | {count:,} | `{shown[:100]}` |")
    return "\n".join(lines) + "\n"


def union(spans: list[tuple[str, float, float]]) -> tuple[float, list[float]]:
    """Return the time in which at least one span (name, start, end) runs, and the gaps between spans."""
    busy, gaps, last = 0.0, [], None
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        if last is not None and start > last:
            gaps.append(start - last)
        busy += max(0.0, end - (start if last is None else max(start, last)))
        last = end if last is None else max(last, end)
    return busy, gaps
