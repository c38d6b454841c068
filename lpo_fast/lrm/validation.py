"""Accuracy on held-out pairs."""

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

VALIDATION_EPOCH = 0xFFFFFFFF  # validation noise is always the same


class Validator:
    """Measures accuracy on the held-out pairs of a run."""

    def __init__(self, lrm: LatentRewardModel, encoder: Encoder, loaders: Loaders, config: LRM):
        """Choose the timesteps: every 50th, the one of the headline number (t = 1) first."""
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
    """Measure accuracy on held-out pairs at each timestep; ``accuracy`` is the one at the first, t = 1."""
    lrm.eval()
    device = encoder.device
    right = torch.zeros(len(timesteps) + 1, dtype=torch.float64, device=device)  # and the number of pairs
    for batch in loader:
        if corrupt is not None:
            corrupt.count(batch)
        good = (~batch["corrupt"]).nonzero()[:, 0].to(device)
        rows, posterior = (batch["rows"].to(device),
                           encoder.posterior(batch, cast(PairDataset, loader.dataset).cache))
        with devices.autocast(encoder.precision):
            words = lrm.encode(*encoder.ids(batch["captions"]))
        right[-1] += len(good)
        for k, timestep in enumerate(timesteps):
            t = torch.full_like(rows, timestep)
            with devices.autocast(encoder.precision):
                x = encoder.latents(*posterior, rows, VALIDATION_EPOCH - timestep, t)
                text, image_0, image_1 = reward.features(lrm, words, x, t)
            right[k] += steps.correct(((image_0 - image_1) * text).sum(-1),
                                      batch["labels"].to(device))[good].sum()
    lrm.train()
    if corrupt is not None:
        corrupt.share()
    *shares, count = [*(distributed.all_sum(right)[:-1] / right[-1]).tolist(), int(right[-1])]
    if corrupt is not None and not count:
        raise InputError(corrupt.pairs.source.path, "has no pair whose pictures decode",
                         "fix them, or name other pairs", corrupt.pairs.source.flag)
    accuracy = dict(zip(map(str, timesteps), shares, strict=True))
    return {"accuracy": accuracy[str(timesteps[0])], "accuracy_by_timestep": accuracy, "n": count}
