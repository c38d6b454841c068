"""What an LRM is trained on: pictures to noisy latents, captions to token ids, and the draws of timesteps and mirroring."""

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

ENCODED = 2**22  # pixels at a time, SDXL's 4 or SD1.5's 16 pictures: 7 GiB in bf16 by --dry-run; SDXL's 32 pairs at once: 113
NEIGHBOUR, MIRROR, OFFSET = 1, 2, 4  # "steps" of a pair's further draws; its latents' and its timestep's is 0


class Encoder:
    """Pictures to noisy latents and captions to token ids: all that stands before the LRM and does not train."""

    def __init__(self, model: Path, lrm: LatentRewardModel, seed: int, precision: str, vae: Path | None = None,
                 noise_offset: float = 0.0, compile: str = "none"):
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
        """Loaded when a picture is to be encoded: where all latents are cached, never."""
        vae: Any = vaes.load_vae(self.vae_path)
        return vae.to(self.device)

    def moments(self, pixels: Tensor, flips: Tensor | None = None, compiled: Callable | None = None) -> Tensor:
        """The VAE's moments (``encode``) [2, B, 2C, h, w] of pixels [2, B, 3, H, W], mirrored where flips, bool [2, B], says
        so. In equal parts of at most ENCODED pixels, which come to the device one by one."""
        size, made = part_size(pixels.shape[1] * 2, pixels.shape[-1]), []
        for i, part in enumerate(pixels.flatten(0, 1).split(size)):
            part = part.to(self.device, non_blocking=True)
            if flips is not None:
                part = mirrored(part, flips.flatten().split(size)[i])
            made.append((compiled or encode)(self.vae, part, self.precision))
        return torch.cat(made).contiguous().unflatten(0, (2, -1))  # as in the cache: another layout, other roundings

    def posterior(self, batch: dict, cache: Cache | None = None, flips: Tensor | None = None,
                  compiled: Callable | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, fp32 [2, B, C, h, w] each, of the VAE's posterior for the pictures of a batch
        (``pairs.collate``): from the cache, or from the pixels, which then go into the cache."""
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
        """x_t [2, B, C, h, w] at timesteps t ([B] or [2, B]) from a sample of the posterior, independent noise for the two.

        Noise is keyed by (seed, step, row): candidates 0 and 1 are the posterior's, 2 and 3 the diffusion's.
        """
        z = noise.normal(self.seed, step, rows, 0, 4, tuple(mean.shape[2:]))
        x0, eps = (mean + std * z[:2]) * self.vae_config["scaling_factor"], z[2:]
        if self.noise_offset:
            eps = eps + self.noise_offset * noise.normal(self.seed, step, rows, OFFSET, 2, (mean.shape[2], 1, 1))
        x_t = schedule.add_noise(self.sched, x0.flatten(0, 1), eps.flatten(0, 1), t.expand(2, -1).flatten())
        return x_t.view_as(mean)

    def ids(self, captions: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Token ids of captions and of the null prompt, a tensor an encoder."""
        own, null = ([i.to(self.device, non_blocking=True) for i in ids]
                     for ids in (texts.tokenize(self.tokenizers, captions), self.null_ids))
        return own, null


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, precision: str) -> Tensor:
    """Mean and log-variance [n, 2C, h, w] of the VAE's posterior for pixels [n, 3, H, W], in the networks' precision."""
    with devices.autocast(precision):
        return vae.encode(pixels).latent_dist.parameters


def split(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, fp32 [2, B, C, h, w] each, of moments [2, B, 2C, h, w]; diffusers' bounds."""
    mean, log_variance = moments.float().chunk(2, 2)
    return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


def part_size(count: int, side: int) -> int:
    """Pictures that the VAE encodes at a time, of ``count`` of side² pixels."""
    return -(-count // min(-(-count * side**2 // ENCODED), count))


def timesteps(config: LRM, step: int, rows: Tensor, compare: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps [2, B] of the pairs of a step, and their labels [2, B]: of a picture compared with itself (compare [B])
    the second is a neighbour timestep_interval away, and the less noisy one is preferred. Keyed by (seed, step, row)."""
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
    """bool [2, B]: which pictures are mirrored, each with probability ½. Keyed by (seed, step, row)."""
    return torch.stack([noise.integers(config.seed, step, rows, MIRROR + side, 2) for side in (0, 1)]) == 1


def mirrored(pixels: Tensor, flips: Tensor) -> Tensor:
    """pixels [n, 3, H, W], mirrored where flips, bool [n], says so."""
    return torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
