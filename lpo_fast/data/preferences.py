"""Preference pairs for LRM training: which pairs a run uses.

Their pictures are read one at a time, never all at once.
"""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lpo_fast.config import Columns, PairChoice
from lpo_fast.data import mpcf
from lpo_fast.data.mpcf import Scores
from lpo_fast.data.sources import Source, open_source
from lpo_fast.errors import InputError

if TYPE_CHECKING:
    pass

OPTIONAL = ("label_0", "label_1", "are_different", "has_label", "num_example_per_prompt", "image_0_uid",
            "image_1_uid")


@dataclass(frozen=True)
class PairTable:
    """Hold N rows of a table of pairs, and the M pairs that a run makes of them.

    captions: [N]. labels: fp32 [N, 2], 1/0, or ½/½ for a tie, or 0/0 if not judged. counts: int64 [N], number
    of pairs of the prompt. different, judged: bool [N]. uids: keys of the pictures, 2 × [N], or None. rows:
    int64 [M], the row of each pair. pictures: int64 [M, 2, 2], row and side of each of its pictures. compare:
    bool [M], the pair is one picture at two timesteps.
    """

    source: Source
    columns: Columns
    captions: list[str]
    labels: np.ndarray
    counts: np.ndarray
    different: np.ndarray
    judged: np.ndarray
    uids: tuple[list, list] | None
    rows: np.ndarray
    pictures: np.ndarray
    compare: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> int:
        """Return the key of pair i's noise: its row, or another number if the pair is one picture at two
        timesteps.
        """
        return int(self.rows[i]) + len(self.captions) * bool(self.compare[i])


def read(path: str, flag: str = "--pairs", columns: Columns | None = None, split: str = "",
         cache_dir: str = "") -> PairTable:
    """Read all pairs of a table and check captions and labels; no picture is read.

    Raises InputError, which names flag and row.
    """
    columns = columns or Columns()
    source = open_source(path, flag, split, cache_dir)
    names, values = vars(columns), {}
    for key in ("jpg_0", "jpg_1"):
        source.require(names[key], key)
    for key in ("caption", *OPTIONAL):
        given = key in ("caption", "label_0", "label_1") or names[key] != getattr(Columns(), key)
        if names[key] and (given or source.has(names[key])):
            values[key] = source.values(names[key], key)
    captions = values["caption"] if "caption" in values else source.values("", "caption")
    if bad := next(((i, caption) for i, caption in enumerate(captions) if not isinstance(caption, str)),
                   None):
        raise InputError(path, f"row {bad[0]}: the caption is {bad[1]!r}", "make every caption text", flag)
    judged = np.array([bool(value) for value in values.get("has_label", [True] * len(captions))], bool)
    labels = _labels(values, judged, path, flag)
    different = labels[:, 0] != labels[:, 1]
    if "are_different" in values:
        different = np.array([bool(value) for value in values["are_different"]], bool)
    uids = ((values["image_0_uid"], values["image_1_uid"]) if {"image_0_uid", "image_1_uid"} <= values.keys()
            else None)
    for key in itertools.chain(*(uids or ())):
        if isinstance(key, list | dict):
            raise InputError(path, f"a picture's key is {key!r}", "use text or numbers", flag)
    rows = np.arange(len(captions))
    return PairTable(source, columns, captions, labels,
                     _counts(values, captions, path, flag), different, judged, uids, rows,
                     np.stack([np.stack([rows, np.full_like(rows, side)], 1) for side in (0, 1)], 1),
                     np.zeros(len(rows), bool))


def _numbers(values: list) -> np.ndarray:
    """Return fp32 [N]. Raises TypeError or ValueError for anything that is not a number."""
    numbers = np.array(values, np.float32)
    if numbers.ndim != 1:
        raise ValueError("it is a list")
    return numbers


def _labels(values: dict[str, list], judged: np.ndarray, path: str, flag: str) -> np.ndarray:
    """Return the label columns, fp32 [N, 2].

    If only one column is used, the other follows from it; if none is, the first picture has won.
    """
    try:
        given = {side: _numbers(values[f"label_{side}"]) for side in (0, 1) if f"label_{side}" in values}
    except (TypeError, ValueError) as error:
        raise InputError(path, f"a label is not a number ({error})", "use 1/0, 0/1 or 0.5/0.5",
                         flag) from error
    first = given.get(0, 1 - given.get(1, np.zeros(len(judged), np.float32)))
    labels = np.stack([first, given.get(1, 1 - first)], 1)
    good = np.isin(labels, (0.0, 0.5, 1.0)).all(1) & (labels.sum(1) == 1)
    if (wrong := judged & ~good).any():
        row = int(wrong.argmax())
        raise InputError(path, f"row {row}: labels {labels[row].tolist()}", "use 1/0, 0/1 or 0.5/0.5", flag)
    labels[~good] = 0
    return labels


def _counts(values: dict[str, list], captions: list[str], path: str, flag: str) -> np.ndarray:
    """Return the number of pairs of each row's prompt, int64 [N], from the table or counted."""
    if "num_example_per_prompt" not in values:
        counted = Counter(captions)
        return np.array([counted[caption] for caption in captions], np.int64)
    try:
        counts = _numbers(values["num_example_per_prompt"])
    except (TypeError, ValueError) as error:
        raise InputError(path, f"num_example_per_prompt is not a number ({error})",
                         "fix it, or drop the column with --columns.num-example-per-prompt ''",
                         flag) from error
    if not (good := (counts >= 1) & (counts < 2**31)).all():
        raise InputError(path, f"row {int((~good).argmax())}: num_example_per_prompt is below 1 or too large",
                         "fix it, or drop the column with --columns.num-example-per-prompt ''", flag)
    return counts.astype(np.int64)


def choose(pairs: PairTable, config: PairChoice, scores: Scores | None = None,
           training: bool = True) -> PairTable:
    """Return the pairs that a run uses, selected by its options and (in training) the score table.

    Raises InputError if none is left.
    """
    keep = np.ones(len(pairs), bool)
    if config.keep_only_different:
        keep &= pairs.different
    if config.keep_only_with_label or (config.keep_only_with_label_in_validation and not training):
        keep &= pairs.judged
    if config.limit_examples_per_prompt:
        seen: Counter[str] = Counter()
        for row in np.flatnonzero(keep):
            seen[pairs.captions[row]] += 1
            keep[row] = seen[pairs.captions[row]] <= config.limit_examples_per_prompt
    pictures = pairs.pictures
    if training and config.only_on_best:
        keep, pictures = best_of_chains(pairs, keep & pairs.judged)
    if not keep.any():
        raise InputError(pairs.source.path, "no pairs are left", "use less strict options (--keep-only-…)",
                         pairs.source.flag)
    if training and scores is not None:
        filtered = mpcf.kept(scores, config.filter_strategy)[match(scores, pairs)]
        if not (keep & filtered).any():
            raise InputError(scores.path, f"the filter keeps none of its {len(scores.different)} rows",
                             "use a less strict --filter-strategy", "--scores")
        keep &= filtered
    rows = np.flatnonzero(keep)
    compare = np.zeros(len(rows), bool)
    pictures = pictures[rows]
    if training and config.compare_between_timestep:
        won = np.flatnonzero(pairs.labels[rows, 0] != pairs.labels[rows, 1])
        best = pictures[won, pairs.labels[rows[won]].argmax(1)]
        rows, compare = np.concatenate([rows, rows[won]]), np.concatenate([compare, np.ones(len(won), bool)])
        pictures = np.concatenate([pictures, np.stack([best, best], 1)])
    return replace(pairs, rows=rows, pictures=pictures, compare=compare)


def best_of_chains(pairs: PairTable, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to keep [N] and their pictures [N, 2, 2], with each winner replaced by the end of its
    chain of preferences.

    A picture that lost to A, which lost to B, …, is compared with the end of that chain. As in the official
    code, a picture's last defeat counts (those as second picture before those as first), and rows are dropped
    if the chain of one of their pictures is a cycle. Ties keep their pictures.
    """
    if pairs.uids is None:
        raise InputError(pairs.source.path, "has no picture keys, which --only-on-best needs",
                         "name their columns with --columns.image-0-uid and --columns.image-1-uid",
                         "--only-on-best")
    rows = np.flatnonzero(keep)
    better: dict = {}
    for winner in (1, 0):  # defeats as second picture replace those as first
        better |= {pairs.uids[1 - winner][row]: pairs.uids[winner][row] for row in rows
                   if pairs.labels[row, winner] == 1}
    cyclic = set()
    for loser in list(better):
        seen, best = {loser}, better[loser]
        while best in better:
            if best in seen:
                cyclic.add(loser)
                break
            seen.add(best)
            best = better[best]
        better[loser] = best
    position = {pairs.uids[side][row]: (row, side) for side in (1, 0) for row in rows[::-1]}
    keep, pictures = keep.copy(), pairs.pictures.copy()
    for row in rows:
        if pairs.uids[0][row] in cyclic or pairs.uids[1][row] in cyclic:
            keep[row] = False
        elif pairs.labels[row, 0] != pairs.labels[row, 1]:
            winner = int(pairs.labels[row].argmax())
            pictures[row, winner] = position[better[pairs.uids[1 - winner][row]]]
    return keep, pictures


def match(scores: Scores, pairs: PairTable) -> np.ndarray:
    """Return the score table's row of each pair, int64 [N].

    Rows are matched by the pictures' keys, in either order, if both tables have them, else by position. Pairs
    with equal keys take the rows of these keys in turn. Raises InputError if the score table does not belong
    to these pairs.
    """
    count = len(pairs.captions)
    if scores.keys is not None and pairs.uids is not None:
        found = defaultdict(list)
        for row, key in enumerate(zip(*scores.keys, strict=True)):
            found[tuple(sorted(key))].append(row)
        place, turn = np.full(count, -1), Counter()
        for row, key in enumerate(zip(*pairs.uids, strict=True)):
            key = tuple(sorted(map(str, key)))
            if turn[key] < len(found.get(key, ())):
                place[row] = found[key][turn[key]]
            turn[key] += 1
        if (place < 0).any():
            raise InputError(scores.path, f"has no row for {int((place < 0).sum())} of the {count} pairs, "
                             f"the first of them row {int((place < 0).argmax())} (counting from 0)",
                             "use the table made from these pairs", "--scores")
    elif len(scores.different) != count:
        raise InputError(scores.path, f"has {len(scores.different)} rows, {pairs.source.path} {count} pairs",
                         "use the table made from these pairs", "--scores")
    else:
        place = np.arange(count)
    won = pairs.labels[:, 0] != pairs.labels[:, 1]
    wrong = np.flatnonzero(pairs.judged & (won != (scores.different[place] == 1)))
    if len(wrong):
        raise InputError(scores.path, f"different_flag contradicts the labels in {len(wrong)} of {count} "
                         f"pairs, the first: rows {', '.join(map(str, wrong[:5]))} (counting from 0)",
                         "use the table made from these pairs, in the same order", "--scores")
    return place
