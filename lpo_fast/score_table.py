"""Write the score table of the multi-preference consistent filter.

Run as python -m lpo_fast.score_table --pairs … --aesthetic module:function … --out table.csv. The table has
one row per pair, in the pairs' order: the pictures' keys if the pairs have them, different_flag (1 win–lose,
0 tie), and for each of three scorers the gap: the preferred picture's score minus the other's, or for a tie
the absolute difference. A scorer is ``function(pictures: list[PIL.Image], prompts: list[str]) -> one number
per picture``. A killed run continues.
"""

import csv
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lpo_fast import cli
from lpo_fast.config import Columns
from lpo_fast.data import dataset, images, mpcf, preferences
from lpo_fast.data.dataset import PairDataset
from lpo_fast.data.preferences import PairTable
from lpo_fast.errors import InputError
from lpo_fast.preflight.models import writable

SCORERS = ("aesthetic", "clipscore", "vqascore")
Scorer = Callable[[list[Image.Image], list[str]], object]


@dataclass(frozen=True)
class ScoreTable:
    """Write the score table of the multi-preference consistent filter, using three scorers."""

    pairs: str = ""
    """Pairs, as for `lpo_fast.train lrm`."""
    aesthetic: str = ""
    """Scorer of aesthetics, module:function; the filter expects the LAION aesthetic predictor's scale (1 to
    10).
    """
    clipscore: str = ""
    """Scorer of agreement with the prompt, module:function; the filter expects CLIP's cosine."""
    vqascore: str = ""
    """Second scorer of prompt agreement, module:function; the filter expects VQAScore's probability."""
    out: str = "scores.csv"
    """The table (.csv)."""
    train_split: str = "train"
    """Split of --pairs, if it has splits."""
    cache_dir: str = ""
    """Cache directory of datasets, for downloads and conversions."""
    columns: Columns = Columns()
    """Names of the pairs' columns."""
    batch_size: int = 32
    """Pairs per call of a scorer."""
    max_corrupt: int = 100
    """Pairs with undecodable pictures get no gaps, so the filter drops them; a run with more of them stops.
    """


def make(config: ScoreTable) -> Path:
    """Write the table and return its path. Raises InputError, which names the scorer and the rows."""
    out = Path(config.out)
    if config.batch_size < 1:
        raise InputError(str(config.batch_size), "is below 1", "use 1 or more", "--batch-size")
    if out.exists():
        raise InputError(config.out, "already exists", "choose another name, or remove it", "--out")
    writable(out.parent)
    scorers = {name: load(getattr(config, name), f"--{name}") for name in SCORERS}
    table = preferences.read(config.pairs, "--pairs", config.columns, config.train_split, config.cache_dir)
    dataset.check_pictures(table)
    names = [*(mpcf.KEYS if table.uids else ()), *mpcf.GAPS]
    key = repr((astuple(config), len(table))).encode()  # an unfinished table belongs to its settings
    part = out.with_name(f".{out.name}.{hashlib.sha256(key).hexdigest()[:12]}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    first = resume(part, names)
    with open(part, "a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if first is None:
            writer.writerow(names)
        for row in tqdm(scored(config, table, scorers, first or 0), desc="scores", unit="pair",
                        initial=first or 0, total=len(table), disable=None):
            writer.writerow(row)
            file.flush()
        os.fsync(file.fileno())
    os.replace(part, out)
    return out


def load(name: str, flag: str) -> Scorer:
    """Return the function that module:function names."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(name or "(none)", "is not module:function",
                         "name a scorer, such as my_scorers:aesthetic", flag)
    try:
        found = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever importing the user's module raises
        raise InputError(name, f"cannot be imported ({type(error).__name__}: {error})",
                         "run where Python finds the module, with its dependencies installed",
                         flag) from error
    if not callable(found):
        raise InputError(name, f"is {type(found).__name__}, not a function", "name a function", flag)
    return found


def resume(part: Path, names: list[str]) -> int | None:
    """Return the number of rows of an unfinished table, or None if there is none.

    An incomplete last line is cut off.
    """
    complete = b""
    if part.is_file():
        content = part.read_bytes()
        complete = content[:content.rfind(b"\n") + 1]
        if not complete.startswith((",".join(names) + "\n").encode()):
            complete = b""
        part.write_bytes(complete)
    rows = list(csv.reader(complete.decode().splitlines()))
    return len(rows) - 1 if rows else None


def scored(config: ScoreTable, table: PairTable, scorers: dict[str, Scorer], first: int) -> Iterator[list]:
    """Yield the table's rows, starting with row ``first``."""
    dataset, corrupt = PairDataset(table, 8), set()
    with ThreadPoolExecutor() as pool:
        for start in range(first, len(table), config.batch_size):
            rows = range(start, min(start + config.batch_size, len(table)))
            pictures = list(pool.map(lambda row: both(dataset, row), rows))
            corrupt |= {row for row, pair in zip(rows, pictures, strict=True) if pair is None}
            if len(corrupt) > config.max_corrupt:
                raise InputError(config.pairs,
                                 f"pictures of {len(corrupt)} pairs cannot be decoded, the first: rows "
                                 f"{', '.join(map(str, sorted(corrupt)[:5]))}",
                                 "fix them, or allow more with --max-corrupt", "--pairs")
            good = [row for row, pair in zip(rows, pictures, strict=True) if pair is not None]
            found = [gaps(name, getattr(config, name), scorers[name], [p for p in pictures if p], table, good)
                     for name in SCORERS]
            known = dict(zip(good, zip(*found, strict=True), strict=True))
            for row in rows:
                keys = [column[row] for column in table.uids] if table.uids else []
                different = int(table.labels[row, 0] != table.labels[row, 1])
                yield [*keys, different, *(f"{gap:.6g}" for gap in known.get(row, (np.nan,) * 3))]


def both(dataset: PairDataset, row: int) -> tuple[Image.Image, Image.Image] | None:
    """Return the two pictures of a row, upright and in their own sizes, or None if one cannot be decoded."""
    try:
        return tuple(images.picture(pictures(row)) for pictures in dataset.pictures)
    except Exception:  # Pillow raises many kinds
        return None


def gaps(name: str, given: str, scorer: Scorer, pictures: list, table: PairTable,
         rows: list[int]) -> list[float]:
    """Return the gap of each row by one scorer; NaN for pairs that were not judged."""
    if not rows:
        return []
    where = f"at rows {rows[0]} to {rows[-1]}"
    prompts = [table.captions[row] for row in rows]
    try:
        scores = scorer([first for first, _ in pictures] + [second for _, second in pictures], prompts * 2)
        scores = np.array([float(score) for score in scores], np.float64)
    except Exception as error:  # whatever the user's scorer raises
        raise InputError(given, f"{where} failed ({type(error).__name__}: {error})",
                         "fix the scorer; finished rows are kept", f"--{name}") from error
    if scores.shape != (2 * len(rows),):
        raise InputError(given, f"{where} gave {scores.size} scores for {2 * len(rows)} pictures",
                         "return one per picture", f"--{name}")
    if not np.isfinite(scores).all():
        row = rows[int((~np.isfinite(scores)).argmax()) % len(rows)]
        raise InputError(given, f"a score of row {row} (from 0) is not finite",
                         "fix the scorer; finished rows are kept", f"--{name}")
    first, second = scores.reshape(2, -1)
    sign = np.sign(table.labels[rows, 0] - table.labels[rows, 1])
    gap = np.where(sign == 0, np.abs(first - second), sign * (first - second))
    return np.where(table.labels[rows].sum(1) == 1, gap, np.nan).tolist()


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: success; 2: a user's error; 130: interrupted, in which case the same command continues.
    """
    return cli.command(ScoreTable, lambda config: print(f"score table: {make(config)}"), argv, "score_table",
                       stopped="stopped; run the same command to continue")


if __name__ == "__main__":
    sys.exit(main())
