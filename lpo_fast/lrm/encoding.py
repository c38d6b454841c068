"""Prepare an LRM's inputs: encode pictures to noisy latents and captions to token ids, and draw timesteps."""

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

# Pixels that the VAE encodes at a time: 4 pictures of SDXL or 16 of SD1.5, which take 7 GiB in bf16; 32 pairs
# of SDXL at once would take 113 GiB (both by --dry-run).
ENCODED = 2**22
# Counter numbers ("steps" of method/noise.py) of a pair's further draws; 0 is for its latents and timestep.
NEIGHBOR, MIRROR, OFFSET = 1, 2, 4


class Encoder:
    """Encode pictures to noisy latents and captions to token ids: the inputs of the LRM, without gradient."""

    def __init__(self, model: Path, lrm: LatentRewardModel, seed: int, precision: str,
                 vae: Path | None = None, noise_offset: float = 0.0, compile: str = "none"):
        """Load the tokenizers and the noise schedule of a model; the VAE is loaded when first used.

        model: a diffusers directory. seed: of all draws. precision: "no", "fp16" or "bf16". vae: a directory
        with another VAE. noise_offset: scale of the noise added per channel. compile: see
        ``compilation.compiled``.
        """
        self.device = device = next(lrm.parameters()).device
        scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
        self.vae_path = vae or model
        self.vae_config = vaes.vae_config(self.vae_path)
        self.tokenizers: list[CLIPTokenizer] = texts.load_tokenizers(model, lrm.family)
        self.sched: Schedule = schedule.from_config(scheduler, 20).to(device)
        self.noise_offset = noise_offset
        self.seed = seed
        self.precision = precision
        self.null_ids = texts.tokenize(self.tokenizers, [""])
        self.train_encode = compilation.compiled(encode, compile)
        self.train_features = compilation.compiled(reward.encode_features, compile)
        self.resolution = lrm.unet.config.sample_size * 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @cached_property
    def vae(self) -> Any:
        """Return the VAE, loaded when a picture is first encoded: not at all if all latents are cached."""
        vae: Any = vaes.load_vae(self.vae_path)
        return vae.to(self.device)

    def moments(self, pixels: Tensor, flips: Tensor | None = None,
                compiled: Callable | None = None) -> Tensor:
        """Return the VAE's moments (``encode``) [2, B, 2C, h, w] of pixels [2, B, 3, H, W].

        flips: bool [2, B], which pictures to mirror. compiled: a compiled ``encode``. The pictures are copied
        to the device and encoded in equal parts of at most ENCODED pixels.
        """
        size = part_size(pixels.shape[1] * 2, pixels.shape[-1])
        made = []
        for i, part in enumerate(pixels.flatten(0, 1).split(size)):
            part = part.to(self.device, non_blocking=True)
            if flips is not None:
                part = mirrored(part, flips.flatten().split(size)[i])
            made.append((compiled or encode)(self.vae, part, self.precision))
        # Contiguous like the cache's entries: layouts round differently.
        return torch.cat(made).contiguous().unflatten(0, (2, -1))

    def posterior(self, batch: dict, cache: Cache | None = None, flips: Tensor | None = None,
                  compiled: Callable | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation, fp32 [2, B, C, h, w] each, of a batch's VAE posterior.

        batch: from ``dataset.collate``; its pictures are pixels, cached moments, or some of each. cache:
        stores the moments of encoded pictures. flips, compiled: see ``moments``.
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
        """Return noisy latents x_t, fp32 [2, B, C, h, w], from samples of the posterior (``posterior``).

        rows: int64 [B]. t: int64 [B] or [2, B], timesteps. The noise of a pair's two pictures is independent
        and keyed by (seed, step, row): candidates 0 and 1 sample the posterior, 2 and 3 are the diffusion
        noise.
        """
        z = noise.normal(self.seed, step, rows, 0, 4, tuple(mean.shape[2:]))
        x0, eps = (mean + std * z[:2]) * self.vae_config["scaling_factor"], z[2:]
        if self.noise_offset:
            offset = noise.normal(self.seed, step, rows, OFFSET, 2, (mean.shape[2], 1, 1))
            eps = eps + self.noise_offset * offset
        x_t = schedule.add_noise(self.sched, x0.flatten(0, 1), eps.flatten(0, 1), t.expand(2, -1).flatten())
        return x_t.view_as(mean)

    def ids(self, captions: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Return token ids of B captions, int64 [B, L], and of the null prompt, [1, L].

        Each list holds one tensor per text encoder.
        """
        own, null = ([i.to(self.device, non_blocking=True) for i in ids]
                     for ids in (texts.tokenize(self.tokenizers, captions), self.null_ids))
        return own, null


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, precision: str) -> Tensor:
    """Return moments [n, 2C, h, w], mean and log variance of the VAE's posterior, of pixels [n, 3, H, W].

    precision: of the networks, "no", "fp16" or "bf16".
    """
    with devices.autocast(precision):
        return vae.encode(pixels).latent_dist.parameters


def split(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation, fp32 [2, B, C, h, w] each, of moments [2, B, 2C, h, w].

    The log variance is clamped to [-30, 20], the bounds of diffusers' DiagonalGaussianDistribution.
    """
    mean, log_variance = moments.float().chunk(2, 2)
    return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


def part_size(count: int, side: int) -> int:
    """Return how many pictures the VAE encodes at a time, of ``count`` pictures with side² pixels each."""
    return -(-count // min(-(-count * side**2 // ENCODED), count))


def timesteps(config: LRM, step: int, rows: Tensor, compare: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Draw timesteps, int64 [2, B], of a step's pairs; return them and the pairs' labels [2, B].

    rows: int64 [B]. compare: bool [B], pairs of a picture with itself; with --compare-between-timestep, their
    second timestep is timestep_interval places from the first one, in either direction, and the less noisy
    picture is preferred. labels: [2, B], of the other pairs. Keyed by (seed, step, row).
    """
    if not config.variable_timestep:
        return torch.full_like(labels, config.constant_timestep, dtype=torch.int64), labels
    every = torch.arange(1, config.largest_timestep + 1, 50, device=rows.device)
    first = noise.integers(config.seed, step, rows, 0, len(every))
    if not config.compare_between_timestep:
        return every[first].expand(2, -1), labels
    up = noise.integers(config.seed, step, rows, NEIGHBOR, 2) == 1
    up = torch.where(first < config.timestep_interval, True, up)
    up = torch.where(first >= len(every) - config.timestep_interval, False, up)
    second = torch.where(compare, first + torch.where(up, 1, -1) * config.timestep_interval, first)
    labels = torch.where(compare, torch.stack([up, ~up]).to(labels.dtype), labels)
    return every[torch.stack([first, second])], labels


def flips(config: Noising, step: int, rows: Tensor) -> Tensor:
    """Draw which pictures are mirrored, bool [2, B], each with probability ½, keyed by (seed, step, row)."""
    return torch.stack([noise.integers(config.seed, step, rows, MIRROR + side, 2) for side in (0, 1)]) == 1


def mirrored(pixels: Tensor, flips: Tensor) -> Tensor:
    """Return pixels [n, 3, H, W], mirrored where flips, bool [n], is true."""
    return torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
