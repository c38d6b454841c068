"""Preference pairs for the LRM: which of them are used, and their pictures, which are read one by one and never held."""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lpo_fast import data, ranks
from lpo_fast.config import LRM, Columns
from lpo_fast.data import Scores
from lpo_fast.errors import InputError
from lpo_fast.sources import Source, flag_of, open_source

if TYPE_CHECKING:
    from lpo_fast.latents import Cache

OPTIONAL = ("label_0", "label_1", "are_different", "has_label", "num_example_per_prompt", "image_0_uid", "image_1_uid")
LOOKED_AT = 16  # rows whose pictures are tried before a run starts


@dataclass(frozen=True)
class Pairs:
    """N rows of a table of pairs, and the M pairs of a run made of them.

    captions: [N]. labels: fp32 [N, 2], 1/0 or ½/½ for a tie; 0/0 if not judged. counts: int64 [N], pairs of the prompt.
    different, judged: bool [N]. uids: keys of the pictures, 2 × [N], or None. rows: int64 [M], the row of each pair.
    pictures: int64 [M, 2, 2], row and side of each of its pictures. compare: bool [M], one picture at two timesteps.
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
        """What keys the noise of a run's pair: its row, and another number if it is one picture at two timesteps."""
        return int(self.rows[i]) + len(self.captions) * bool(self.compare[i])


def read(path: str, flag: str = "--pairs", columns: Columns | None = None, split: str = "", cache_dir: str = "") -> Pairs:
    """All pairs of a table, captions and labels checked; no picture is read. Raises InputError naming flag and row."""
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
    if bad := next(((i, caption) for i, caption in enumerate(captions) if not isinstance(caption, str)), None):
        raise InputError(path, f"row {bad[0]}: the caption is {bad[1]!r}", "make every caption text", flag)
    judged = np.array([bool(value) for value in values.get("has_label", [True] * len(captions))], bool)
    labels = _labels(values, judged, path, flag)
    different = labels[:, 0] != labels[:, 1]
    if "are_different" in values:
        different = np.array([bool(value) for value in values["are_different"]], bool)
    uids = (values["image_0_uid"], values["image_1_uid"]) if {"image_0_uid", "image_1_uid"} <= values.keys() else None
    for key in itertools.chain(*(uids or ())):
        if isinstance(key, list | dict):
            raise InputError(path, f"a picture's key is {key!r}", "use text or numbers", flag)
    rows = np.arange(len(captions))
    return Pairs(source, columns, captions, labels, _counts(values, captions, path, flag), different, judged, uids, rows,
                 np.stack([np.stack([rows, np.full_like(rows, side)], 1) for side in (0, 1)], 1), np.zeros(len(rows), bool))


def _numbers(values: list) -> np.ndarray:
    """fp32 [N]. Raises TypeError or ValueError for what are no numbers."""
    numbers = np.array(values, np.float32)
    if numbers.ndim != 1:
        raise ValueError("it is a list")
    return numbers


def _labels(values: dict[str, list], judged: np.ndarray, path: str, flag: str) -> np.ndarray:
    """fp32 [N, 2] of the label columns; one that is not used follows from the other, both: the first picture won."""
    try:
        given = {side: _numbers(values[f"label_{side}"]) for side in (0, 1) if f"label_{side}" in values}
    except (TypeError, ValueError) as error:
        raise InputError(path, f"a label is no number ({error})", "use 1/0, 0/1 or 0.5/0.5", flag) from error
    first = given.get(0, 1 - given.get(1, np.zeros(len(judged), np.float32)))
    labels = np.stack([first, given.get(1, 1 - first)], 1)
    good = np.isin(labels, (0.0, 0.5, 1.0)).all(1) & (labels.sum(1) == 1)
    if (wrong := judged & ~good).any():
        row = int(wrong.argmax())
        raise InputError(path, f"row {row}: labels {labels[row].tolist()}", "use 1/0, 0/1 or 0.5/0.5", flag)
    labels[~good] = 0
    return labels


def _counts(values: dict[str, list], captions: list[str], path: str, flag: str) -> np.ndarray:
    """int64 [N]: pairs of each row's prompt, from the table or counted."""
    if "num_example_per_prompt" not in values:
        counted = Counter(captions)
        return np.array([counted[caption] for caption in captions], np.int64)
    try:
        counts = _numbers(values["num_example_per_prompt"])
    except (TypeError, ValueError) as error:
        raise InputError(path, f"a number of pairs of a prompt is no number ({error})", "mend it, or drop the column with "
                         "--columns.num-example-per-prompt ''", flag) from error
    if not (good := (counts >= 1) & (counts < 2**31)).all():
        raise InputError(path, f"row {int((~good).argmax())}: num_example_per_prompt is below 1 or huge", "mend it, or drop "
                         "the column with --columns.num-example-per-prompt ''", flag)
    return counts.astype(np.int64)


def choose(pairs: Pairs, config: LRM, scores: Scores | None = None, training: bool = True) -> Pairs:
    """The pairs that a run uses, by its options and (in training) the score table. Raises InputError if none is left."""
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
        raise InputError(pairs.source.path, "no pair is left to use", "use less strict options (--keep-only-…)",
                         pairs.source.flag)
    if training and scores is not None:
        filtered = data.kept(scores, config.filter_strategy)[match(scores, pairs)]
        if not (keep & filtered).any():
            raise InputError(scores.path, f"the filter keeps none of its {len(scores.different)} rows",
                             "use a laxer --filter-strategy", "--scores")
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


def best_of_chains(pairs: Pairs, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep [N] and their pictures [N, 2, 2]: the preferred one replaced by the last of its chain of preferences.

    A picture that lost against A, which lost against B, …, is compared with the end of that chain. As in the official
    code a picture's last defeat counts (those as second picture before those as first), and the rows of pictures whose
    chain is a circle are left out. Ties keep their pictures.
    """
    if pairs.uids is None:
        raise InputError(pairs.source.path, "has no keys of pictures, which only_on_best follows", "name their columns with "
                         "--columns.image-0-uid and --columns.image-1-uid", "--only-on-best")
    rows = np.flatnonzero(keep)
    better: dict = {}
    for winner in (1, 0):  # defeats as second picture replace those as first
        better |= {pairs.uids[1 - winner][row]: pairs.uids[winner][row] for row in rows if pairs.labels[row, winner] == 1}
    circular = set()
    for loser in list(better):
        seen, best = {loser}, better[loser]
        while best in better:
            if best in seen:
                circular.add(loser)
                break
            seen.add(best)
            best = better[best]
        better[loser] = best
    place = {pairs.uids[side][row]: (row, side) for side in (1, 0) for row in rows[::-1]}
    keep, pictures = keep.copy(), pairs.pictures.copy()
    for row in rows:
        if pairs.uids[0][row] in circular or pairs.uids[1][row] in circular:
            keep[row] = False
        elif pairs.labels[row, 0] != pairs.labels[row, 1]:
            winner = int(pairs.labels[row].argmax())
            pictures[row, winner] = place[better[pairs.uids[1 - winner][row]]]
    return keep, pictures


def match(scores: Scores, pairs: Pairs) -> np.ndarray:
    """int64 [N]: the table's row of each pair, by the pictures' keys in either order if both have them, else by position.

    Pairs of equal keys take the table's rows of these keys in turn. Raises InputError if the table cannot be theirs.
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
            raise InputError(scores.path, f"has no row for {int((place < 0).sum())} of the {count} pairs, the first of them "
                             f"row {int((place < 0).argmax())} (from 0)", "use the table made from these pairs", "--scores")
    elif len(scores.different) != count:
        raise InputError(scores.path, f"has {len(scores.different)} rows, {pairs.source.path} {count} pairs",
                         "use the table made from these pairs", "--scores")
    else:
        place = np.arange(count)
    won = pairs.labels[:, 0] != pairs.labels[:, 1]
    wrong = np.flatnonzero(pairs.judged & (won != (scores.different[place] == 1)))
    if len(wrong):
        raise InputError(scores.path, f"different_flag is not what the labels say in {len(wrong)} of {count} pairs, the first: "
                         f"rows {', '.join(map(str, wrong[:5]))} (from 0)", "use the table made from these pairs, in their "
                         "order", "--scores")
    return place


class PairDataset(Dataset):
    """The pairs as items; each decodes its pictures to [3, r, r] in [−1, 1]. Pictures stay on disk until then.

    cache: of their latents (``latents.Cache``); a pair whose pictures are both in it is not decoded.
    """

    def __init__(self, pairs: Pairs, resolution: int, cache: "Cache | None" = None):
        self.pairs, self.resolution, self.cache = pairs, resolution, cache
        self.pictures = [pairs.source.pictures(spec) for spec in (pairs.columns.jpg_0, pairs.columns.jpg_1)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        """row: int, the pair's key; caption: str; pixels: fp32 [2, 3, r, r]; labels: fp32 [2]; count: int, pairs of that
        caption; compare: bool; corrupt: bool, if a picture does not decode, whose pixels then are 0.

        With a cache: numbers: int64 [2], its pictures' there; cached: bool, whether nothing is to be encoded; moments
        [2, 2C, h, w] if so, in place of pixels (0 for a corrupt pair); damaged: int, entries that are.
        """
        pairs, row = self.pairs, int(self.pairs.rows[i])
        places, compare = pairs.pictures[i], bool(pairs.compare[i])
        item = {"row": pairs.key(i), "caption": pairs.captions[row],
                "labels": torch.from_numpy(pairs.labels[row]), "count": int(pairs.counts[row]), "compare": compare,
                "corrupt": False}
        if self.cache is not None:
            numbers = places @ np.array([2, 1])
            moments, damaged = self.cache.read(numbers)
            item |= {"numbers": torch.from_numpy(numbers), "cached": moments is not None, "damaged": damaged}
            if moments is not None:
                return item | {"moments": moments}
        try:
            return item | {"pixels": self.decode(places)}
        except Exception:  # Pillow raises many kinds for what is no picture
            if self.cache is not None:
                blank = torch.zeros(2, *self.cache.shape, dtype=self.cache.dtype)
                return item | {"moments": blank, "cached": True, "corrupt": True}
            return item | {"pixels": torch.zeros(2, 3, self.resolution, self.resolution), "corrupt": True}

    def decode(self, places: np.ndarray) -> Tensor:
        """fp32 [2, 3, r, r] of two pictures, given as (row, side)."""
        return torch.stack([data.decode(self.pictures[side](row), self.resolution) for row, side in places.tolist()])


def check_pictures(pairs: Pairs) -> None:
    """Refuse a table none of whose first rows has two pictures; nothing is converted or written."""
    problem, names = None, {key: getattr(pairs.columns, key) for key in ("jpg_0", "jpg_1")}
    for row, cells in enumerate(pairs.source.first(LOOKED_AT, *names.values())):
        try:
            for key, cell in zip(names, cells, strict=True):  # noqa: B007 - which of them it was
                data.decode(pairs.source.encoded(cell), 8)
            return
        except Exception as error:
            what = f"a picture of row {row} does not decode ({type(error).__name__}: {error})"
            if names[key] == key:
                found = InputError(pairs.source.path, what, "store encoded JPEG or PNG", pairs.source.flag)
            else:
                found = InputError(names[key], f"{what} in {pairs.source.path}", "name a column of encoded pictures or of "
                                   "their files", flag_of(key))
            problem = problem or found
    raise problem or InputError(pairs.source.path, "holds no pair", "add pairs", pairs.source.flag)


def collate(items: list[dict]) -> dict:
    """A batch: rows int64 [B], captions, pixels [2, B, 3, r, r], labels [2, B], counts int64 [B], compare and corrupt
    bool [B]. With a cache also cached bool [B], numbers int64 [2, B], damaged (an int) and moments [2, B, 2C, h, w]; pixels and
    moments are left out if no pair has them, and are 0 for a pair that has the other."""
    batch = {"rows": torch.tensor([item["row"] for item in items]), "captions": [item["caption"] for item in items],
             "counts": torch.tensor([item["count"] for item in items])}
    for key in ("compare", "corrupt", "cached"):
        if key in items[0]:
            batch[key] = torch.tensor([item[key] for item in items])
    for key in ("labels", "numbers", "pixels", "moments"):
        if (one := next((item[key] for item in items if key in item), None)) is not None:
            batch[key] = torch.stack([item[key] if key in item else torch.zeros_like(one) for item in items], 1)
    return batch | ({"damaged": sum(item["damaged"] for item in items)} if "cached" in batch else {})


class Corrupt:
    """The rows whose pictures do not decode, of one table; more than ``limit`` stop the run."""

    def __init__(self, pairs: Pairs, limit: int):
        self.pairs, self.limit = pairs, limit
        self.rows: set[int] = set()

    def count(self, batch: dict) -> None:
        """Note a batch's."""
        self.rows |= {row % len(self.pairs.captions) for row in batch["rows"][batch["corrupt"]].tolist()}

    def share(self) -> None:
        """Note those of the other processes. Raises InputError naming the table and the first rows."""
        if ranks.count() > 1:
            rows = torch.tensor(sorted(self.rows), dtype=torch.int64, device=ranks.state().device)
            self.rows = set(ranks.gather(rows)[0].tolist())
        if len(self.rows) > self.limit:
            first = ", ".join(map(str, sorted(self.rows)[:5]))
            raise InputError(self.pairs.source.path, f"pictures of {len(self.rows)} pairs do not decode, the first: rows "
                             f"{first}", "mend them, or allow more with --max-corrupt", self.pairs.source.flag)
