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

LOOKED_AT = 16  # rows whose pictures are decoded as a check before a run starts


class PairDataset(Dataset):
    """Preference pairs as items; pictures stay on disk until an item decodes them to [3, r, r] in [−1, 1].

    cache: of the pictures' latents (``latent_cache.Cache``). A pair with both pictures in the cache is not
    decoded.
    """

    def __init__(self, pairs: PairTable, resolution: int, cache: "Cache | None" = None):
        self.pairs, self.resolution, self.cache = pairs, resolution, cache
        self.pictures = [pairs.source.pictures(spec) for spec in (pairs.columns.jpg_0, pairs.columns.jpg_1)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        """Return one pair as a dict.

        row: int, the pair's key. caption: str. pixels: fp32 [2, 3, r, r]. labels: fp32 [2]. count: int,
        number of pairs of this caption. compare: bool. corrupt: bool, whether a picture cannot be decoded;
        pixels are then 0.

        With a cache also numbers: int64 [2], the pictures' numbers in it. cached: bool, whether nothing has
        to be encoded; if so, moments [2, 2C, h, w] replaces pixels (0 for a corrupt pair). damaged: int,
        number of damaged cache entries.
        """
        pairs, row = self.pairs, int(self.pairs.rows[i])
        places, compare = pairs.pictures[i], bool(pairs.compare[i])
        item = {"row": pairs.key(i), "caption": pairs.captions[row],
                "labels": torch.from_numpy(pairs.labels[row]), "count": int(pairs.counts[row]),
                "compare": compare, "corrupt": False}
        if self.cache is not None:
            numbers = places @ np.array([2, 1])
            moments, damaged = self.cache.read(numbers)
            item |= {"numbers": torch.from_numpy(numbers), "cached": moments is not None, "damaged": damaged}
            if moments is not None:
                return item | {"moments": moments}
        try:
            return item | {"pixels": self.decode(places)}
        except Exception:  # Pillow raises many kinds
            if self.cache is not None:
                blank = torch.zeros(2, *self.cache.shape, dtype=self.cache.dtype)
                return item | {"moments": blank, "cached": True, "corrupt": True}
            return item | {"pixels": torch.zeros(2, 3, self.resolution, self.resolution), "corrupt": True}

    def decode(self, places: np.ndarray) -> Tensor:
        """Return fp32 [2, 3, r, r] of two pictures, given as (row, side)."""
        return torch.stack([images.decode(self.pictures[side](row), self.resolution)
                            for row, side in places.tolist()])


def check_pictures(pairs: PairTable) -> None:
    """Raise InputError unless one of the table's first rows has two decodable pictures.

    Nothing is converted or written.
    """
    problem, names = None, {key: getattr(pairs.columns, key) for key in ("jpg_0", "jpg_1")}
    for row, cells in enumerate(pairs.source.first(LOOKED_AT, *names.values())):
        try:
            for key, cell in zip(names, cells, strict=True):  # noqa: B007 - used after the loop
                images.decode(pairs.source.encoded(cell), 8)
            return
        except Exception as error:
            what = f"a picture of row {row} cannot be decoded ({type(error).__name__}: {error})"
            if names[key] == key:
                found = InputError(pairs.source.path, what, "store encoded JPEG or PNG", pairs.source.flag)
            else:
                found = InputError(names[key], f"{what} in {pairs.source.path}",
                                   "name a column of encoded pictures or of picture files", flag_of(key))
            problem = problem or found
    raise problem or InputError(pairs.source.path, "holds no pairs", "add pairs", pairs.source.flag)


def collate(items: list[dict]) -> dict:
    """Return a batch of items.

    rows int64 [B], captions, pixels [2, B, 3, r, r], labels [2, B], counts int64 [B], compare and corrupt
    bool [B]. With a cache also cached bool [B], numbers int64 [2, B], damaged (an int) and moments [2, B, 2C,
    h, w]. pixels or moments are omitted if no pair has them, and are 0 for pairs that have the other.
    """
    batch = {"rows": torch.tensor([item["row"] for item in items]),
             "captions": [item["caption"] for item in items],
             "counts": torch.tensor([item["count"] for item in items])}
    for key in ("compare", "corrupt", "cached"):
        if key in items[0]:
            batch[key] = torch.tensor([item[key] for item in items])
    for key in ("labels", "numbers", "pixels", "moments"):
        if (one := next((item[key] for item in items if key in item), None)) is not None:
            batch[key] = torch.stack([item[key] if key in item else torch.zeros_like(one) for item in items],
                                     1)
    return batch | ({"damaged": sum(item["damaged"] for item in items)} if "cached" in batch else {})


class Corrupt:
    """The rows of one table whose pictures cannot be decoded; more than ``limit`` of them stop the run."""

    def __init__(self, pairs: PairTable, limit: int):
        self.pairs, self.limit = pairs, limit
        self.rows: set[int] = set()

    def count(self, batch: dict) -> None:
        """Add the corrupt rows of a batch."""
        self.rows |= {row % len(self.pairs.captions) for row in batch["rows"][batch["corrupt"]].tolist()}

    def share(self) -> None:
        """Add the corrupt rows of the other ranks.

        Raises InputError, which names the table and the first rows, if there are more than ``limit``.
        """
        if distributed.world_size() > 1:
            rows = torch.tensor(sorted(self.rows), dtype=torch.int64, device=distributed.state().device)
            self.rows = set(distributed.gather(rows)[0].tolist())
        if len(self.rows) > self.limit:
            first = ", ".join(map(str, sorted(self.rows)[:5]))
            raise InputError(self.pairs.source.path,
                             f"pictures of {len(self.rows)} pairs cannot be decoded, the first: rows "
                             f"{first}", "fix them, or allow more with --max-corrupt", self.pairs.source.flag)
