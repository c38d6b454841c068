"""Counter-based randomness: a number is a function of (seed, epoch, item, step, candidate), never of call order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64 tensors. Because nothing
depends on the order of calls, the same weights give the same pairs however prompts are split into batches and ranks,
and a resumed run continues exactly without any generator state being saved.

Counter of the block that holds elements 4e … 4e+3 of one latent:
    (e, step << 16 | candidate, item, epoch),   key = (seed low 32 bits, seed high 32 bits)
"""

import math

import torch
from torch import Tensor

INITIAL = 0xFFFF  # "step" of the latents that a trajectory starts from
ORDER = 0xFFFE  # "step" of permutations
CHOICE = 0xFFFF  # "candidate" of draws that are no latent: the next candidate, a training timestep
_MASK = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b, where a·b itself would overflow int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. Counters: int64 tensors holding uint32 values, broadcast together. Four uint32 as int64."""
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def _words(seed: int, epoch: int, items: Tensor, step: int, candidates: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """Philox words of shape [K, B, blocks] for candidates [K] and items [B]."""
    element = torch.arange(blocks, device=items.device)
    c1 = (step << 16 | candidates)[:, None, None]
    return philox(seed, element, c1, items[None, :, None] & _MASK, torch.full_like(element, epoch & _MASK))


def normal(seed: int, epoch: int, items: Tensor, step: int, candidates: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normals, fp32 [K, B, *shape], for items [B] int64 (prompt or row numbers) and K candidates.

    Box–Muller on 24-bit uniforms, evaluated in fp64 and rounded once, so that devices agree.
    """
    size = math.prod(shape)
    words = _words(seed, epoch, items, step, torch.arange(candidates, device=items.device), -(-size // 4))
    u = [(word >> 8).double() * 2.0**-24 for word in words]
    normals = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2 * torch.log(radius + 2.0**-24)).sqrt(), 2 * math.pi * angle
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, -1).flatten(2)[..., :size].float().reshape(candidates, len(items), *shape)


def integers(seed: int, epoch: int, items: Tensor, step: int, high: int) -> Tensor:
    """Uniform integers in [0, high), int64 [B]; high is far below 2³², so the modulo's bias is negligible."""
    candidate = torch.full((1,), CHOICE, device=items.device)
    return _words(seed, epoch, items, step, candidate, 1)[0][0, :, 0] % high


def permutation(seed: int, epoch: int, item: int, n: int) -> Tensor:
    """A random order of n things, int64 [n] on the CPU: the ranks of n words."""
    words = _words(seed, epoch, torch.tensor([item]), ORDER, torch.tensor([CHOICE]), -(-n // 4))
    return torch.stack(words, -1).flatten()[:n].argsort(stable=True)
