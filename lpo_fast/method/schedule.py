"""Tabulate the DDIM coefficients: every quantity of one denoising step t → p, for all timesteps, as tensors.

Song et al., "Denoising Diffusion Implicit Models" (2021), eq. 12, with a_t = alphas_cumprod[t] and m the
network's output:

    x0 = x0_x·x_t + x0_m·m,   e = e_x·x_t + e_m·m          (these four numbers encode the prediction type)
    p = max(t − 1000 // T, 0),   sigma² = eta² (1 − a_p)/(1 − a_t) (1 − a_t/a_p)
    mean = sqrt(a_p)·x0 + sqrt(1 − a_p − sigma²)·e,   x_p = mean + sigma·z
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

X0_X, X0_M, E_X, E_M, SQRT_A_P, DIRECTION, SIGMA = range(7)


@dataclass(frozen=True)
class Schedule:
    """Hold the coefficients of a sampler.

    timesteps: int64 [T], descending. table: [N, 7], one row per training timestep, columns in the order of
    the constants above. alphas_cumprod: [N]. clip: bound of x0, or None. Indexing with a tensor of timesteps
    never synchronizes with the host.
    """

    timesteps: Tensor
    table: Tensor
    alphas_cumprod: Tensor
    clip: float | None = None

    @property
    def sigmas(self) -> Tensor:
        """Return the standard deviation of every training timestep's step, [N]."""
        return self.table[:, SIGMA]

    def to(self, *args) -> "Schedule":
        """Return the schedule on another device and/or with tables of another floating dtype.

        Timesteps stay int64.
        """
        table, alphas = self.table.to(*args), self.alphas_cumprod.to(*args)
        return replace(self, timesteps=self.timesteps.to(table.device), table=table, alphas_cumprod=alphas)


def ddim(alphas_cumprod: Tensor, timesteps: Tensor, num_steps: int, eta: float = 1.0,
         prediction_type: str = "epsilon", clip: float | None = None) -> Schedule:
    """Return the schedule of ``num_steps`` steps, computed in fp64 and stored in the dtype of
    ``alphas_cumprod`` [N].

    Raises ValueError for an unknown prediction type.
    """
    a = alphas_cumprod.double()
    n = len(a)
    p = (torch.arange(n, device=a.device) - n // num_steps).clamp(min=0)
    a_p = a[p]
    sigma = (eta**2 * (1 - a_p) / (1 - a) * (1 - a / a_p)).clamp(min=0).sqrt()
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    signal, noise = a.sqrt(), (1 - a).sqrt()
    forms = {
        "epsilon": (1 / signal, -noise / signal, zero, one),
        "v_prediction": (signal, -noise, noise, signal),
        "sample": (zero, one, 1 / noise, -signal / noise),
    }
    if prediction_type not in forms:
        raise ValueError(f"prediction_type {prediction_type!r} is not one of {', '.join(forms)}")
    direction = (1 - a_p - sigma**2).clamp(min=0).sqrt()
    table = torch.stack([*forms[prediction_type], a_p.sqrt(), direction, sigma], 1)
    return Schedule(timesteps, table.to(alphas_cumprod.dtype), alphas_cumprod, clip)


def from_config(config: dict, num_steps: int, eta: float = 1.0) -> Schedule:
    """Return the schedule for a model's scheduler config, with its own timesteps, prediction type and betas.

    x0 is clipped only if the config contains ``clip_sample: true`` (DDIM's own default would clip).

    >>> config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    ...           "steps_offset": 1}
    >>> from_config(config, 4).timesteps
    tensor([751, 501, 251,   1])
    """
    config = {"clip_sample": False, **config}
    scheduler: Any = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
    return ddim(scheduler.alphas_cumprod, scheduler.timesteps, num_steps, eta,
                scheduler.config.prediction_type, clip)


def coefficients(schedule: Schedule, t: Tensor) -> tuple[Tensor, ...]:
    """Return the seven columns for timesteps t [B], each [B, 1, 1, 1]."""
    return schedule.table[t].T[..., None, None, None].unbind(0)


def mean(schedule: Schedule, x_t: Tensor, model_output: Tensor, t: Tensor) -> Tensor:
    """Return the mean of x_p given x_t. x_t, model_output: [B, C, H, W] floating; t: int64 [B]."""
    x0_x, x0_m, e_x, e_m, sqrt_a_p, direction, _ = coefficients(schedule, t)
    x0 = x0_x * x_t + x0_m * model_output
    if schedule.clip is not None:
        x0 = x0.clamp(-schedule.clip, schedule.clip)
    return sqrt_a_p * x0 + direction * (e_x * x_t + e_m * model_output)


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return sqrt(a_t)·x0 + sqrt(1 − a_t)·noise, the DDPM forward process; shapes as in ``mean``."""
    a = schedule.alphas_cumprod[t][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise
