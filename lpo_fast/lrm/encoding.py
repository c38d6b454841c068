"""An LRM's training inputs: noisy latents, token ids, and random timesteps and mirroring."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from lpo_fast.config import LRM, Noising
from lpo_fast.data.latent_cache import Cache
from lpo_fast.lrm import reward
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.method import noise, schedule
from lpo_fast.method.schedule import Schedule
from lpo_fast.models import texts, vaes
from lpo_fast.system import compilation, devices

# pixels at a time, SDXL's 4 or SD1.5's 16 pictures: 7 GiB in bf16 by --dry-run; SDXL's 32 pairs at once: 113
ENCODED = 2**22
NEIGHBOUR, MIRROR, OFFSET = 1, 2, 4  # "steps" of a pair's further draws; its latents' and its timestep's is 0


class Encoder:
    """Turns pictures into noisy latents and captions into token ids:
    everything before the LRM that does not train.
    """

    def __init__(self, model: Path, lrm: LatentRewardModel, seed: int, precision: str,
                 vae: Path | None = None, noise_offset: float = 0.0, compile: str = "none"):
        self.device = device = next(lrm.parameters()).device
        scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
        self.vae_path = vae or model
        self.vae_config = vaes.vae_config(self.vae_path)
        self.tokenizers: list[CLIPTokenizer] = texts.load_tokenizers(model, lrm.family)
        self.sched: Schedule = schedule.from_config(scheduler, 20).to(device)
        self.noise_offset = noise_offset
        self.seed, self.precision, self.null_ids = seed, precision, texts.tokenize(self.tokenizers, [""])
        self.train_encode = compilation.compiled(encode, compile)
        self.train_features = compilation.compiled(reward.encode_features, compile)
        self.resolution = lrm.unet.config.sample_size * 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @cached_property
    def vae(self) -> Any:
        """Load the VAE when the first picture is to be encoded: never, if all latents are cached."""
        vae: Any = vaes.load_vae(self.vae_path)
        return vae.to(self.device)

    def moments(self, pixels: Tensor, flips: Tensor | None = None,
                compiled: Callable | None = None) -> Tensor:
        """Return the VAE's moments (``encode``) [2, B, 2C, h, w] of pixels [2, B, 3, H, W].

        flips: bool [2, B], which pictures are mirrored. Encoded in equal parts of at most ENCODED pixels,
        which are moved to the device one by one.
        """
        size, made = part_size(pixels.shape[1] * 2, pixels.shape[-1]), []
        for i, part in enumerate(pixels.flatten(0, 1).split(size)):
            part = part.to(self.device, non_blocking=True)
            if flips is not None:
                part = mirrored(part, flips.flatten().split(size)[i])
            made.append((compiled or encode)(self.vae, part, self.precision))
        # as in the cache: another layout, other roundings
        return torch.cat(made).contiguous().unflatten(0, (2, -1))

    def posterior(self, batch: dict, cache: Cache | None = None, flips: Tensor | None = None,
                  compiled: Callable | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, fp32 [2, B, C, h, w] each, of the VAE's posterior for a batch.

        batch: see ``dataset.collate``. Taken from the cache, or computed from the pixels and then cached.
        """
        moments = batch["moments"].to(self.device, non_blocking=True) if "moments" in batch else None
        if "pixels" in batch:
            made = self.moments(batch["pixels"], flips, compiled)
            if cache is not None:
                cache.keep(batch, made)
            if moments is not None:
                cached = batch["cached"].to(self.device, non_blocking=True)[:, None, None, None]
                made = torch.where(cached, moments, made)
            moments = made
        assert moments is not None, "a batch holds pixels or moments"
        return split(moments)

    def latents(self, mean: Tensor, std: Tensor, rows: Tensor, step: int, t: Tensor) -> Tensor:
        """Return x_t [2, B, C, h, w] at timesteps t ([B] or [2, B]), from samples of the posterior.

        Noise is independent for the two pictures and keyed by (seed, step, row): candidates 0 and 1 are the
        posterior's, 2 and 3 the diffusion's.
        """
        z = noise.normal(self.seed, step, rows, 0, 4, tuple(mean.shape[2:]))
        x0, eps = (mean + std * z[:2]) * self.vae_config["scaling_factor"], z[2:]
        if self.noise_offset:
            eps = eps + self.noise_offset * noise.normal(self.seed, step, rows, OFFSET, 2,
                                                         (mean.shape[2], 1, 1))
        x_t = schedule.add_noise(self.sched, x0.flatten(0, 1), eps.flatten(0, 1), t.expand(2, -1).flatten())
        return x_t.view_as(mean)

    def ids(self, captions: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the token ids of captions and of the null prompt, one tensor per encoder."""
        own, null = ([i.to(self.device, non_blocking=True) for i in ids]
                     for ids in (texts.tokenize(self.tokenizers, captions), self.null_ids))
        return own, null


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, precision: str) -> Tensor:
    """Return mean and log-variance [n, 2C, h, w] of the VAE's posterior for pixels [n, 3, H, W],
    in ``precision``.
    """
    with devices.autocast(precision):
        return vae.encode(pixels).latent_dist.parameters


def split(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, fp32 [2, B, C, h, w] each, of moments [2, B, 2C, h, w],
    bounded as in diffusers.
    """
    mean, log_variance = moments.float().chunk(2, 2)
    return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


def part_size(count: int, side: int) -> int:
    """Return how many of ``count`` pictures of side² pixels the VAE encodes at a time."""
    return -(-count // min(-(-count * side**2 // ENCODED), count))


def timesteps(config: LRM, step: int, rows: Tensor, compare: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return timesteps [2, B] and labels [2, B] of the pairs of a step. Keyed by (seed, step, row).

    Where compare [B] is True, a picture is compared with itself at a timestep that is timestep_interval away,
    and the less noisy one is preferred.
    """
    if not config.variable_timestep:
        return torch.full_like(labels, config.constant_timestep, dtype=torch.int64), labels
    every = torch.arange(1, config.largest_timestep + 1, 50, device=rows.device)
    first = noise.integers(config.seed, step, rows, 0, len(every))
    if not config.compare_between_timestep:
        return every[first].expand(2, -1), labels
    up = noise.integers(config.seed, step, rows, NEIGHBOUR, 2) == 1
    up = torch.where(first < config.timestep_interval, True, up)
    up = torch.where(first >= len(every) - config.timestep_interval, False, up)
    second = torch.where(compare, first + torch.where(up, 1, -1) * config.timestep_interval, first)
    labels = torch.where(compare, torch.stack([up, ~up]).to(labels.dtype), labels)
    return every[torch.stack([first, second])], labels


def flips(config: Noising, step: int, rows: Tensor) -> Tensor:
    """Return which pictures are mirrored, bool [2, B], each with probability 1/2. Keyed by (seed, step, row).
    """
    return torch.stack([noise.integers(config.seed, step, rows, MIRROR + side, 2) for side in (0, 1)]) == 1


def mirrored(pixels: Tensor, flips: Tensor) -> Tensor:
    """Return pixels [n, 3, H, W], mirrored where flips, bool [n], is True."""
    return torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
