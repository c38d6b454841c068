"""The multi-preference consistent filter and its score table."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lpo_fast.errors import InputError


class Scores(NamedTuple):
    """A score table of P rows: different_flag (1 win–lose, 0 tie) and the three gaps, fp64 [P]; keys: 2 × [P], or None."""

    path: str
    different: np.ndarray
    aesthetic: np.ndarray
    clip: np.ndarray
    vqa: np.ndarray
    keys: tuple[list[str], list[str]] | None

GAPS = ("different_flag", "aesthetic_gap", "clipscore_gap", "vqascore_gap")
KEYS = ("image_0_uid", "image_1_uid")


def read_scores(path: str) -> Scores:
    """A score table (.csv); a gap is the preferred picture's score less the other's, of a tie the absolute difference."""
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
                    raise InputError(path, f"line {table.line_num}: a value is no number ({error})", "mend the table",
                                     "--scores") from error
                for column, name in zip(keys, KEYS if keyed else (), strict=False):
                    column.append(str(row[name]))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(path, "cannot be read", "name a .csv score table", "--scores") from error
    return Scores(path, *np.array(rows).reshape(-1, 4).T, keys if keyed else None)


def kept(scores: Scores, strategy: int) -> np.ndarray:
    """bool [P]: what the multi-preference consistent filter keeps; strategy 0 keeps all.

    Win–lose rows whose gaps all favour the preferred picture, the aesthetic one down to 0, −0.5 or −1 by strategy; tie
    rows whose gaps are all below 0.2 (aesthetic), 0.03 (CLIP score) and 0.07 (VQA score). As in the official code the
    sign is not dropped: a table should hold absolute gaps for ties (``lpo_fast.score_table`` writes them).
    """
    _, different, aesthetic, clip, vqa, _ = scores
    if strategy == 0:
        return np.ones(len(different), bool)
    win = (different == 1) & (aesthetic > {1: 0.0, 2: -0.5, 3: -1.0}[strategy]) & (clip > 0) & (vqa > 0)
    tie = (different == 0) & (aesthetic < 0.2) & (clip < 0.03) & (vqa < 0.07)
    return win | tie


def mpcf(path: Path, strategy: int) -> tuple[np.ndarray, int]:
    """Row numbers of a score table that the filter keeps, ascending, and how many rows there are."""
    keep = kept(read_scores(str(path)), strategy)
    return np.flatnonzero(keep), len(keep)
