"""Fixtures of the benchmarks, and where their results go:
the terminal and, with --results, files that grow row by row."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.support.measure import copy_bytes_per_second, table, write

ROWS = pytest.StashKey[dict]()
KEY = "op", "size", "pass", "how"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="DIR",
                     help="write DIR/<device>.json and .md, keeping rows of other runs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


@pytest.fixture(scope="session")
def copy_rate() -> float:
    """Bytes per second of a copy within the device, in this session."""
    return copy_bytes_per_second(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the random models lie; $BENCH_WORK keeps them between calls."""
    kept = os.environ.get("BENCH_WORK")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
    return Path(kept or tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Callable[[dict], None]:
    """record(row): keep a row for the table and, with --results, write it to the files at once."""
    def keep(row: dict) -> None:
        rows = pytestconfig.stash[ROWS]
        rows[tuple(row[k] for k in KEY)] = row
        folder = pytestconfig.getoption("--results")
        if folder and "device" in row:
            save(folder, row)
    return keep


def save(folder: Path, row: dict) -> None:
    """Add a row to the files of its device, or replace it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join("".join(c if c.isalnum() else " " for c in row["device"].split(",")[0].lower()).split())
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [r for r in rows if any(r[k] != row[k] for k in KEY)] + [row]
    made = sorted({", ".join(f"{k} {r[k]}" for k in ("torch", "triton", "python", "commit", "date"))
                   for r in rows})
    rate = sorted(r["copy GB/s"] for r in rows)
    page = (f"# {row['device']}\n\nTimes in µs on the GPU (wall clock); copy within the device: "
            f"{rate[0]:.0f} to {rate[-1]:.0f} GB/s. How: bench/support/measure.py.\n\n{table(rows)}\n"
            + "".join(f"- {line}\n" for line in made))
    write(path, rows, page)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if any("wall_us" in row for row in rows.values()):
        terminalreporter.write_line("\n" + table(rows.values()))
