"""Make data loaders of an LRM run's pairs, for training, validation, and test."""

from functools import partial

from torch.utils.data import DataLoader

from lpo_fast.config import LRM
from lpo_fast.data import latent_cache
from lpo_fast.data.dataset import Corrupt, PairDataset, collate
from lpo_fast.data.preferences import PairTable
from lpo_fast.lrm import steps
from lpo_fast.lrm.encoding import Encoder
from lpo_fast.run import environment
from lpo_fast.system import console, distributed


class Loaders:
    """Hold data loaders by use: "train", and "validation" and "test" if pairs are given for them.

    caches: the latent caches, by use. corrupt: pairs whose pictures could not be decoded, by use.
    """

    def __init__(self, config: LRM, used: dict[str, PairTable], encoder: Encoder):
        """Open the caches and the datasets. used: the chosen pairs of each use (``preflight.runs.lrm``)."""
        self.config, self.used = config, used
        world = distributed.world_size()
        self.caches = {use: latent_cache.of(config, pairs, encoder.precision)
                       for use, pairs in used.items() if config.cache_latents}
        resolution = config.resolution or encoder.resolution
        self.sets = {use: PairDataset(pairs, resolution, self.caches.get(use)) for use, pairs in used.items()}
        self.corrupt = {use: Corrupt(pairs, config.max_corrupt) for use, pairs in used.items()}
        self.fetch = partial(DataLoader, collate_fn=collate, num_workers=config.num_workers,
                             persistent_workers=config.num_workers > 0,
                             pin_memory=encoder.device.type == "cuda")
        size = config.batch_size // config.accumulate // world
        self.held_out = {use: self.fetch(pairs, size, sampler=range(distributed.rank(), len(pairs), world))
                         for use, pairs in self.sets.items() if use != "train"}
        self.number = len(used["train"])

    @property
    def digest(self) -> str:
        """Return the digest of the training pairs: their captions, chosen rows, and labels."""
        train = self.used["train"]
        return environment.digest([train.captions, *(x.tolist() for x in (train.rows, train.labels))])

    @property
    def unusable(self) -> int:
        """Return how many pairs have been left out so far."""
        return sum(len(corrupt.rows) for corrupt in self.corrupt.values())

    def train(self, step: int) -> DataLoader:
        """Return this rank's training batches, starting at optimizer step ``step``."""
        numbers = list(steps.batches(self.config, self.number, step))
        return self.fetch(self.sets["train"], batch_sampler=numbers)

    def announce(self) -> None:
        """Print how many of the pictures' latents the caches hold."""
        for use, cache in self.caches.items():
            found = latent_cache.numbers(self.used[use])
            cached = len(found) - cache.missing(found)
            console.say(f"latents of {use} pairs: {cache.folder} holds {cached:,} of {len(found):,}")

    def summary(self) -> None:
        """Print how many pairs were left out, if any."""
        for use, corrupt in self.corrupt.items():
            if corrupt.rows:
                console.say(f"{len(corrupt.rows)} {use} pairs left out because a picture cannot be decoded")
