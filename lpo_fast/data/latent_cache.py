"""Keep the VAE's output for each picture on disk (--cache-latents), so that a picture is decoded and encoded
only once.

The VAE gives the mean and the log-variance of a posterior, from which every step draws a new sample, so
training with the cache equals training without it. The cache is filled during training; missing and damaged
entries are encoded when needed.

The cache of a table is a subfolder of --cache-latents, named by a hash of everything that determines its
contents: the VAE's weights, resolution, precision, and the table. It holds two files, regardless of the
number of pictures: ``latents``, a sparse file with one entry of fixed size per picture, and ``marks``, 8
bytes per picture: 0, or 1 + the CRC-32 of the entry. Entries are written before their marks and checked when
they are read, so a killed run leaves no partial entry, and processes share the files without a lock. The
files are read, not memory-mapped: in a truncated file an entry is missing, whereas a memory map would kill
the process.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lpo_fast.config import LRM
from lpo_fast.data.preferences import PairTable
from lpo_fast.errors import InputError
from lpo_fast.models import families, locate, vaes
from lpo_fast.system import devices

MARK = 8  # bytes


class Cache:
    """The moments of a table's pictures: [2C, h, w] (mean, log-variance) of the picture ``number`` = 2·row +
    side.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype,
                 contents: dict[str, object]):
        self.folder, self.shape, self.dtype, self.contents = folder, shape, dtype, contents
        self.size = int(np.prod(shape)) * dtype.itemsize
        self.files: tuple[int, int] | None = None  # file descriptors of marks and latents
        self.writes = True

    def __getstate__(self) -> dict:
        return vars(self) | {"files": None}  # worker processes open the files again

    def open(self) -> tuple[int, int]:
        """Return the file descriptors of marks and latents; the files are created if they do not exist."""
        if self.files is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Every process writes the same contents.
            (self.folder / "contents.json").write_text(json.dumps(self.contents, indent=1) + "\n")
            marks, latents = (os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
                              for name in ("marks", "latents"))
            self.files = marks, latents
        return self.files

    def missing(self, numbers: np.ndarray) -> int:
        """Return how many of these pictures have no entry. numbers: int64 [N], distinct. No file is created.
        """
        file = self.folder / "marks"
        known = (np.fromfile(file, "<u8", count=file.stat().st_size // MARK)
                 if file.is_file() else np.zeros(0, "<u8"))
        return len(numbers) - int((known[numbers[numbers < len(known)]] != 0).sum())

    def read(self, numbers: np.ndarray) -> tuple[Tensor | None, int]:
        """Return moments [N, 2C, h, w] of the pictures, or None if any is missing or damaged, and the number
        of damaged entries.
        """
        marks, latents = self.open()
        entries, damaged = [], 0
        for number in numbers.tolist():
            if mark := int.from_bytes(os.pread(marks, MARK, MARK * number), "little"):
                entry = os.pread(latents, self.size, self.size * number)
                good = len(entry) == self.size and zlib.crc32(entry) + 1 == mark
                entries += [entry] if good else []
                damaged += not good
        if len(entries) < len(numbers):
            return None, damaged
        return torch.frombuffer(bytearray(b"".join(entries)), dtype=self.dtype).view(-1, *self.shape), 0

    def write(self, numbers: Tensor, moments: Tensor) -> None:
        """Write moments [N, 2C, h, w] of the pictures.

        If the disk fails, a warning is printed and training continues without writing.
        """
        marks, latents = self.open()
        for number, entry in zip(numbers.tolist(), moments.to(self.dtype).cpu(), strict=True):
            if not self.writes:
                return
            entry = entry.contiguous().view(torch.uint8).numpy().tobytes()
            try:
                if os.pwrite(latents, entry, self.size * number) < self.size:
                    raise OSError("the disk is full")
                os.pwrite(marks, (zlib.crc32(entry) + 1).to_bytes(MARK, "little"), MARK * number)
            except OSError as error:
                self.writes = False
                print(f"warning: --cache-latents {self.folder}: {error}; missing entries are "
                      "encoded every time", file=sys.stderr)

    def keep(self, batch: dict, moments: Tensor) -> None:
        """Write moments [2, B, 2C, h, w] of those pictures of a batch (``dataset.collate``) that were not
        read from the cache.
        """
        if batch["damaged"]:
            print(f"{batch['damaged']} entries of {self.folder} are damaged and will be rewritten",
                  file=sys.stderr)
        new = (~(batch["cached"] | batch["corrupt"])).cpu()
        self.write(batch["numbers"].cpu()[:, new].flatten(), moments[:, new.to(moments.device)].flatten(0, 1))


def of(config: LRM, pairs: PairTable, precision: str) -> Cache:
    """Return the cache of a table's pictures below --cache-latents, for networks of this precision.

    No file is created.

    Entries have the dtype in which the VAE returns its moments, so nothing is rounded: bf16 under autocast,
    else fp32.
    """
    path = locate.vae(config)
    vae = vaes.vae_config(path)
    side = 2 ** (len(vae["block_out_channels"]) - 1)
    unet = json.loads((locate.model(config) / "unet" / "config.json").read_text())
    resolution = config.resolution or unet["sample_size"] * side
    contents = {"vae": digest(vaes.vae_folder(path)), "resolution": resolution, "precision": precision,
                "table": pairs.source.fingerprint(), "pictures": [pairs.columns.jpg_0, pairs.columns.jpg_1]}
    name = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
    shape = (2 * vae["latent_channels"], resolution // side, resolution // side)
    return Cache(Path(config.cache_latents) / name, shape, devices.DTYPES[precision],
                 contents | {"entry": list(shape)})


@lru_cache
def digest(folder: Path) -> str:
    """Return the SHA-256 of a network's weights and config."""
    total = hashlib.sha256()
    for file in [folder / "config.json", *families.weight_files(folder)]:
        with open(file, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def numbers(pairs: PairTable) -> np.ndarray:
    """Return the numbers of all pictures that the pairs use, int64, distinct."""
    return np.unique(pairs.pictures @ np.array([2, 1]))


def needed(config: LRM, used: dict[str, PairTable], precision: str) -> tuple[int, int]:
    """Return how many pictures of a run's tables have no entry yet, and the bytes of those entries and their
    marks.
    """
    caches = [(of(config, pairs, precision), numbers(pairs)) for pairs in used.values()]
    missing = [cache.missing(found) for cache, found in caches]
    return sum(missing), sum(n * (cache.size + MARK) for n, (cache, _) in zip(missing, caches, strict=True))


def check_space(config: LRM, used: dict[str, PairTable]) -> None:
    """Raise InputError if the disk of --cache-latents has no room for the missing entries."""
    existing = Path(config.cache_latents).absolute()
    while not existing.exists():
        existing = existing.parent
    count, size = needed(config, used, devices.precision(config.mixed_precision, "bf16"))
    free = shutil.disk_usage(existing).free
    if size > free:
        raise InputError(config.cache_latents,
                         f"needs {size:,} bytes ({size / 2**30:,.1f} GiB) for {count:,} pictures, and "
                         f"{free:,} are free there", "choose a disk with more space, or drop --cache-latents",
                         "--cache-latents")
