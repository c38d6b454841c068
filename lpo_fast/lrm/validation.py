"""Measure an LRM's accuracy on held-out pairs."""

from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from lpo_fast.config import LRM
from lpo_fast.data.dataset import Corrupt, PairDataset
from lpo_fast.errors import InputError
from lpo_fast.lrm import reward, steps
from lpo_fast.lrm.encoding import Encoder
from lpo_fast.lrm.loaders import Loaders
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.system import devices, distributed

VALIDATION_EPOCH = 0xFFFFFFFF  # keys the validation noise, which is always the same


class Validator:
    """Measure accuracy on the held-out pairs of a run."""

    def __init__(self, lrm: LatentRewardModel, encoder: Encoder, loaders: Loaders, config: LRM):
        """Choose the timesteps: the one of the reported accuracy (default t = 1), then 1, 51, ….

        It is --constant-timestep in runs that train at a single timestep.
        """
        self.lrm, self.encoder, self.loaders = lrm, encoder, loaders
        first = 1 if config.variable_timestep else config.constant_timestep
        self.timesteps = list(dict.fromkeys([first, *range(1, config.largest_timestep + 1, 50)]))

    def __call__(self, use: str, every: int = 1) -> dict[str, Any]:
        """Return the accuracies (``validate``) on the pairs of a use, at every ``every``-th timestep."""
        held_out, corrupt = self.loaders.held_out[use], self.loaders.corrupt[use]
        return validate(self.lrm, self.encoder, held_out, self.timesteps[::every], corrupt)


@torch.no_grad()
def validate(lrm: LatentRewardModel, encoder: Encoder, loader: DataLoader, timesteps: list[int],
             corrupt: Corrupt | None = None) -> dict[str, Any]:
    """Return the accuracy on held-out pairs at each timestep; ``accuracy`` is that at the first timestep.

    loader: this rank's batches; the result is of all ranks. corrupt: counts the pairs that cannot be decoded,
    which are left out. ``n`` is the number of pairs. Raises InputError if no pair can be decoded.
    """
    lrm.eval()
    device = encoder.device
    totals = torch.zeros(len(timesteps) + 1, dtype=torch.float64, device=device)  # correct pairs; all pairs
    for batch in loader:
        if corrupt is not None:
            corrupt.count(batch)
        good = (~batch["corrupt"]).nonzero()[:, 0].to(device)
        rows = batch["rows"].to(device)
        posterior = encoder.posterior(batch, cast(PairDataset, loader.dataset).cache)
        with devices.autocast(encoder.precision):
            captions = lrm.encode(*encoder.ids(batch["captions"]))
        totals[-1] += len(good)
        for k, timestep in enumerate(timesteps):
            t = torch.full_like(rows, timestep)
            with devices.autocast(encoder.precision):
                x = encoder.latents(*posterior, rows, VALIDATION_EPOCH - timestep, t)
                text, image_0, image_1 = reward.features(lrm, captions, x, t)
            margin = ((image_0 - image_1) * text).sum(-1)
            totals[k] += steps.correct(margin, batch["labels"].to(device))[good].sum()
    lrm.train()
    if corrupt is not None:
        corrupt.share()
    totals = distributed.all_sum(totals)
    count = int(totals[-1])
    if corrupt is not None and not count:
        raise InputError(corrupt.pairs.source.path, "has no pair whose pictures can be decoded",
                         "fix the pictures, or name other pairs", corrupt.pairs.source.flag)
    accuracy = dict(zip(map(str, timesteps), (totals[:-1] / totals[-1]).tolist(), strict=True))
    return {"accuracy": accuracy[str(timesteps[0])], "accuracy_by_timestep": accuracy, "n": count}
