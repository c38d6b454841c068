"""Counter-based randomness: each number is a function of (seed, epoch, item, step, candidate), never of the
call order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64 tensors.
Because nothing depends on the call order, the same weights give the same pairs for every split of the prompts
into batches and ranks, and a resumed run continues exactly although no generator state is saved.

Counter of the block that holds elements 4e … 4e+3 of one latent:
    (e, step << 16 | candidate, item, epoch),   key = (seed low 32 bits, seed high 32 bits)

Seed, epoch and step are ints, or int64 tensors on the device; both give the same numbers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lpo_fast.system.launch import expect, expect_tensor, expect_type, jit, tl

INITIAL = 0xFFFF  # "step" of a trajectory's initial latents
ORDER = 0xFFFE  # "step" of permutations
CHOICE = 0xFFFF  # "candidate" of draws other than latents: the next candidate, a training timestep
_MASK = 0xFFFFFFFF


class Counter(NamedTuple):
    """Locate draws in the random stream, in int64 on the device, so that a captured CUDA graph can be
    replayed for other draws.

    run: [2], seed and epoch. step: [] or [1]. items: [B], prompt or row numbers.
    """

    run: Tensor
    step: Tensor
    items: Tensor


def expect_counter(name: str, counter: Counter, rows: Tensor) -> None:
    """Check shapes, dtypes and devices of an operator's Counter for the rows [B, …].

    Raises ValueError, which names the argument and the problem.
    """
    expect_tensor(f"{name}.run", counter.run, (2,), rows, (torch.int64,))
    expect_tensor(f"{name}.items", counter.items, rows.shape[:1], rows, (torch.int64,))
    expect_type(f"{name}.step", counter.step, Tensor)
    expect(tuple(counter.step.shape) in ((), (1,)),
           f"{name}.step has shape {tuple(counter.step.shape)}, expected [] or [1]")
    expect_tensor(f"{name}.step", counter.step, counter.step.shape, rows, (torch.int64,))


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of a·b, where a·b itself would overflow int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK


def philox(seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor,
           c3: int | Tensor) -> tuple[Tensor, ...]:
    """Return four uint32 words of Philox4x32-10 as int64 tensors.

    c0 … c3, the counters: int64 tensors with uint32 values, broadcast together.
    The vector of Random123's authors:

    >>> zero = torch.tensor(0)
    >>> [f"{int(word):08x}" for word in philox(0, zero, zero, zero, zero)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3  # pyright: ignore[reportReturnType]  # c3 is a tensor by now


def _words(seed: int | Tensor, epoch: int | Tensor, items: Tensor, step: int | Tensor, candidates: Tensor,
           blocks: int) -> tuple[Tensor, ...]:
    """Return Philox words of shape [K, B, blocks] for candidates [K] and items [B]."""
    element = torch.arange(blocks, device=items.device)
    c1 = (step << 16 | candidates)[:, None, None]
    return philox(seed, element, c1, items[None, :, None] & _MASK, epoch & _MASK)


def normal(seed: int | Tensor, epoch: int | Tensor, items: Tensor, step: int | Tensor, candidates: int,
           shape: tuple[int, ...]) -> Tensor:
    """Return standard normals, fp32 [K, B, *shape], for int64 items [B] (prompt or row numbers) and K
    candidates.

    Box–Muller on 24-bit uniforms, evaluated in fp64 and rounded once, so that all devices agree.
    """
    size = math.prod(shape)
    words = _words(seed, epoch, items, step, torch.arange(candidates, device=items.device), -(-size // 4))
    u = [(word >> 8).double() * 2.0**-24 for word in words]
    normals = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2 * torch.log(radius + 2.0**-24)).sqrt(), 2 * math.pi * angle
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, -1).flatten(2)[..., :size].float().reshape(candidates, len(items), *shape)


def integers(seed: int | Tensor, epoch: int | Tensor, items: Tensor, step: int | Tensor, high: int) -> Tensor:
    """Return uniform integers in [0, high), int64 [B].

    ``high`` is far below 2³², so the bias of the modulo is negligible.
    """
    candidate = torch.full((1,), CHOICE, device=items.device)
    return _words(seed, epoch, items, step, candidate, 1)[0][0, :, 0] % high


def permutation(seed: int, epoch: int, item: int, n: int) -> Tensor:
    """Return a random order of n items, int64 [n] on the CPU: the sort order of n random words.

    >>> sorted(permutation(seed=0, epoch=1, item=0, n=5).tolist())
    [0, 1, 2, 3, 4]
    """
    words = _words(seed, epoch, torch.tensor([item]), ORDER, torch.tensor([CHOICE]), -(-n // 4))
    return torch.stack(words, -1).flatten()[:n].argsort(stable=True)


@jit
def words_at(run_ptr, step_ptr, items_ptr, b, candidate, element):
    """Return, in a kernel, the four Philox words (uint32) of a Counter's item b.

    candidate: its number; element: the numbers of the blocks.
    """
    seed = tl.load(run_ptr)
    c1, item, epoch = tl.load(step_ptr) << 16 | candidate, tl.load(items_ptr + b), tl.load(run_ptr + 1)
    return tl.philox_impl(element.to(tl.uint32), c1.to(tl.uint32), item.to(tl.uint32), epoch.to(tl.uint32),
                          seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@jit
def box_muller(length, turn):
    """Return, in a kernel, two standard normals from two uint32 words.

    The cosine is computed here, because the compiler's own fp64 cosine accepts angles of any size and needs
    stack memory.
    """
    length = tl.sqrt(-2 * tl.log(((length >> 8) + 1).to(tl.float64) * 2.0**-24))
    angle = 6.283185307179586 * ((turn >> 8).to(tl.float64) * 2.0**-24)
    quarter = ((turn >> 8) + 2**21) >> 22  # nearest quarter turn, 0 … 4
    q = quarter.to(tl.float64)
    # π/2 in two parts, the first of 33 bits
    x = (angle - q * 1.57079632673412561417) - q * 6.07710050650619224932e-11
    y, cos, sin = x * x, 1.0, 1.0
    for i in tl.static_range(8):  # Taylor, |x| ≤ π/4  # pyright: ignore
        cos = 1 - y * (1 / ((15 - 2 * i) * (16 - 2 * i))) * cos
        sin = 1 - y * (1 / ((16 - 2 * i) * (17 - 2 * i))) * sin
    sin *= x
    odd = (quarter & 1) == 1
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    first = tl.where(((quarter + 1) & 2) == 2, -first, first)
    second = tl.where((quarter & 2) == 2, -second, second)
    return (length * first).to(tl.float32), (length * second).to(tl.float32)


@jit
def normals_at(run_ptr, step_ptr, items_ptr, b, candidate, first, N: tl.constexpr):
    """Return, in a kernel, N standard normals as in ``normal``, from element 4·first on, of a Counter's item
    b.
    """
    w0, w1, w2, w3 = words_at(run_ptr, step_ptr, items_ptr, b, candidate, first + tl.arange(0, N // 4))
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
