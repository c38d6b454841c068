"""Random inputs of the fused pair loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from lpo_fast.method import schedule
from lpo_fast.method.schedule import Schedule
from tests.helpers.models import DEVICE

SETTINGS = {"guidance": 5.0, "beta": 500.0, "eps": 0.1}


def schedules(kind: str, clip: float | None = None) -> Schedule:
    a = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    return schedule.ddim(a, torch.arange(951, 0, -50), 20, 1.0, kind, clip).to(DEVICE).to(torch.float32)


class Batch(NamedTuple):
    """The tensors of ``pair_loss``, in its order after the schedule."""

    x_t: Tensor
    winner: Tensor
    loser: Tensor
    t: Tensor
    policy: Tensor
    reference: Tensor
    weight: Tensor

    def double(self) -> "Batch":
        return Batch(*(x.double() if x.is_floating_point() else x for x in self))


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, last: bool = False, latent: float = 1.0,
          output: float = 1.0, apart: float = 1e-3, seed: int = 0) -> Batch:
    """N random pairs; latent, output: standard deviations; apart:
    relative difference of policy and reference."""
    random = torch.Generator().manual_seed(seed)
    n = shape[0]

    def draw(scale: float, *size: int) -> Tensor:
        return torch.randn(size, generator=random) * scale

    reference = draw(output, 2 * n, *shape[1:])
    policy = reference + draw(output * apart, 2 * n, *shape[1:])
    t = torch.randint(20, (n,), generator=random) * 50 + 1
    memory = torch.channels_last if last else torch.contiguous_format
    policy, reference = (x.to(dtype).to(DEVICE).contiguous(memory_format=memory) for x in (policy, reference))
    latents = [draw(latent, *shape).to(DEVICE) for _ in range(3)]
    weight = torch.rand(n, generator=random) * (torch.arange(n) % 3 != 2)  # every third is padding
    return Batch(*latents, t.to(DEVICE), policy.requires_grad_(), reference, weight.to(DEVICE))
