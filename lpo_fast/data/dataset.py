"""Preference pairs as items of a data loader."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lpo_fast.data import images
from lpo_fast.data.preferences import PairTable
from lpo_fast.data.sources import flag_of
from lpo_fast.errors import InputError
from lpo_fast.system import distributed

if TYPE_CHECKING:
    from lpo_fast.data.latent_cache import Cache

LOOKED_AT = 16  # rows whose pictures are tried before a run starts


class PairDataset(Dataset):
    """The pairs as items; each decodes its pictures to [3, r, r] in [−1, 1]. Pictures stay on disk until then.

    cache: of their latents (``latent_cache.Cache``); a pair whose pictures are both in it is not decoded.
    """

    def __init__(self, pairs: PairTable, resolution: int, cache: "Cache | None" = None):
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
        return torch.stack([images.decode(self.pictures[side](row), self.resolution) for row, side in places.tolist()])


def check_pictures(pairs: PairTable) -> None:
    """Refuse a table none of whose first rows has two pictures; nothing is converted or written."""
    problem, names = None, {key: getattr(pairs.columns, key) for key in ("jpg_0", "jpg_1")}
    for row, cells in enumerate(pairs.source.first(LOOKED_AT, *names.values())):
        try:
            for key, cell in zip(names, cells, strict=True):  # noqa: B007 - which of them it was
                images.decode(pairs.source.encoded(cell), 8)
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

    def __init__(self, pairs: PairTable, limit: int):
        self.pairs, self.limit = pairs, limit
        self.rows: set[int] = set()

    def count(self, batch: dict) -> None:
        """Note a batch's."""
        self.rows |= {row % len(self.pairs.captions) for row in batch["rows"][batch["corrupt"]].tolist()}

    def share(self) -> None:
        """Note those of the other processes. Raises InputError naming the table and the first rows."""
        if distributed.world_size() > 1:
            rows = torch.tensor(sorted(self.rows), dtype=torch.int64, device=distributed.state().device)
            self.rows = set(distributed.gather(rows)[0].tolist())
        if len(self.rows) > self.limit:
            first = ", ".join(map(str, sorted(self.rows)[:5]))
            raise InputError(self.pairs.source.path, f"pictures of {len(self.rows)} pairs do not decode, the first: rows "
                             f"{first}", "mend them, or allow more with --max-corrupt", self.pairs.source.flag)
