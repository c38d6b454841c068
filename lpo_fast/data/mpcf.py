"""Apply the multi-preference consistent filter (MPCF), and read its score tables."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lpo_fast.errors import InputError


class Scores(NamedTuple):
    """Hold a score table of P rows.

    different: fp64 [P], 1 win–lose, 0 tie. aesthetic, clip, vqa: the gaps, fp64 [P]. keys: 2 × [P], or None.
    """

    path: str
    different: np.ndarray
    aesthetic: np.ndarray
    clip: np.ndarray
    vqa: np.ndarray
    keys: tuple[list[str], list[str]] | None


GAPS = ("different_flag", "aesthetic_gap", "clipscore_gap", "vqascore_gap")
KEYS = ("image_0_uid", "image_1_uid")


def read_scores(path: str) -> Scores:
    """Read a score table (.csv). Raises InputError, which names the line.

    A gap is the preferred picture's score minus the other's; for a tie, the absolute difference.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            table = csv.DictReader(f)
            if missing := [n for n in GAPS if n not in (table.fieldnames or [])]:
                raise InputError(path, f"has no column {missing[0]!r}", "use a score table", "--scores")
            keyed, rows, keys = set(KEYS) <= set(table.fieldnames or []), [], ([], [])
            for row in table:
                try:
                    rows.append([float(row[n]) for n in GAPS])
                except (ValueError, TypeError) as error:
                    raise InputError(path, f"line {table.line_num}: a value is not a number ({error})",
                                     "fix the table", "--scores") from error
                for column, name in zip(keys, KEYS if keyed else (), strict=False):
                    column.append(str(row[name]))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(path, "cannot be read", "name a .csv score table", "--scores") from error
    return Scores(path, *np.array(rows).reshape(-1, 4).T, keys if keyed else None)


def kept(scores: Scores, strategy: int) -> np.ndarray:
    """Return which rows the multi-preference consistent filter keeps, bool [P]; strategy 0 keeps all.

    It keeps win–lose rows whose gaps all favor the preferred picture, where the aesthetic gap may go down to
    0, −0.5 or −1, depending on the strategy, and tie rows whose gaps are all below 0.2 (aesthetic), 0.03
    (CLIP score) and 0.07 (VQA score). As in the official code the sign is kept: for ties a table should hold
    absolute gaps (``lpo_fast.score_table`` writes them).
    """
    _, different, aesthetic, clip, vqa, _ = scores
    if strategy == 0:
        return np.ones(len(different), bool)
    win = (different == 1) & (aesthetic > {1: 0.0, 2: -0.5, 3: -1.0}[strategy]) & (clip > 0) & (vqa > 0)
    tie = (different == 0) & (aesthetic < 0.2) & (clip < 0.03) & (vqa < 0.07)
    return win | tie


def mpcf(path: Path, strategy: int) -> tuple[np.ndarray, int]:
    """Return the row numbers of a score table that the filter keeps, ascending, and the number of rows."""
    keep = kept(read_scores(str(path)), strategy)
    return np.flatnonzero(keep), len(keep)
