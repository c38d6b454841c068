"""Select a pair and the next latent from K scored candidates.

    best, worst = argmax_k, argmin_k scores[k],   margin = scores[best] − scores[worst],
    valid = margin > gap[t],   winner, loser, next = x_p[best], x_p[worst], x_p[choice]

(arXiv 2502.01051, section 3.3)

``sampling.trajectory`` calls the operator once per denoising step. The choice is given, or drawn in the
kernel as in ``noise.integers``. One launch reads three latents per item and writes three; plain PyTorch
launches about a dozen kernels for the numbers, about fifty for the draw, and three gathers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lpo_fast.method import noise, select
from lpo_fast.method.noise import CHOICE, Counter, words_at
from lpo_fast.system.launch import expect, expect_table, expect_tensor, fused, jit, launch, tl

BLOCK = 512  # elements per program, 16 bytes per thread; not yet tuned on a GPU


class Selection(NamedTuple):
    """Hold the selection for B items.

    best, worst: int64 [B] candidate numbers; margin: [B]; valid: bool [B]; winner, loser, next: [B, C, H, W].
    """

    best: Tensor
    worst: Tensor
    margin: Tensor
    valid: Tensor
    winner: Tensor
    loser: Tensor
    next: Tensor


def pair_select_reference(scores: Tensor, x_p: Tensor, gap: Tensor, t: Tensor,
                          choice: Tensor | Counter) -> Selection:
    """Select in plain PyTorch with ``select.pairs`` and three gathers.

    Arguments and result as in ``pair_select``.
    """
    if isinstance(choice, Counter):
        seed, epoch = choice.run
        choice = noise.integers(seed, epoch, choice.items, choice.step, len(scores))
    pair = select.pairs(scores, gap[t])
    rows = torch.arange(scores.shape[1], device=scores.device)
    clamped = choice.clamp(0, len(scores) - 1)
    following = torch.where((choice == clamped)[:, None, None, None], x_p[clamped, rows], torch.nan)
    return Selection(*pair, x_p[pair.best, rows], x_p[pair.worst, rows], following)


@jit
def _kernel(scores_ptr, x_ptr, gap_ptr, t_ptr, t_stride, choice, best_ptr, worst_ptr, margin_ptr, valid_ptr,
            winner_ptr, loser_ptr, next_ptr, batch, K: tl.constexpr, D: tl.constexpr, GIVEN: tl.constexpr,
            CHOICE: tl.constexpr, BLOCK: tl.constexpr):
    # One program copies BLOCK elements of the three latents of one item.
    # choice: (numbers,), or the run, step and items of a Counter.
    b = tl.program_id(0).to(tl.int64)
    high = tl.load(scores_ptr + b)
    low, best = high, b * 0
    worst = best
    for k in tl.static_range(1, K):
        score = tl.load(scores_ptr + k * batch + b)
        nan = (score != score) & (high == high)  # the first NaN is best and worst, as with torch.max/min
        above, below = (score > high) | nan, (score < low) | nan
        high, best = tl.where(above, score, high), tl.where(above, k, best)
        low, worst = tl.where(below, score, low), tl.where(below, k, worst)
    if GIVEN:
        chosen = tl.load(choice[0] + b)
    else:
        word, _, _, _ = words_at(choice[0], choice[1], choice[2], b, CHOICE, tl.full([], 0, tl.uint32))
        chosen = word.to(tl.int64) % K
    if tl.program_id(1) == 0:
        tl.store(best_ptr + b, best)
        tl.store(worst_ptr + b, worst)
        tl.store(margin_ptr + b, high - low)
        tl.store(valid_ptr + b, high - low > tl.load(gap_ptr + tl.load(t_ptr + b * t_stride)))
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, out = element < D, b * D + element
    size = tl.where((chosen >= 0) & (chosen < K), D, 0)
    tl.store(winner_ptr + out, tl.load(x_ptr + (best * batch + b) * D + element, mask=mask), mask=mask)
    tl.store(loser_ptr + out, tl.load(x_ptr + (worst * batch + b) * D + element, mask=mask), mask=mask)
    following = tl.load(x_ptr + (chosen * batch + b) * D + element, mask=element < size, other=float("nan"))
    tl.store(next_ptr + out, following, mask=mask)


@torch.library.custom_op("lpo_fast::pair_select", mutates_args=())
def _op(scores: Tensor, x_p: Tensor, gap: Tensor, t: Tensor, choice: list[Tensor]) -> tuple[
        Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, batch = scores.shape
    size = x_p[0, 0].numel() if batch else 0
    best, worst = t.new_empty(batch), t.new_empty(batch)
    margin, valid = scores.new_empty(batch), t.new_empty(batch, dtype=torch.bool)
    latents = [x_p.new_empty(x_p.shape[1:]) for _ in range(3)]
    launch(_kernel, (batch, max(-(-size // BLOCK), 1)), scores.contiguous(), x_p.contiguous(),
           gap.contiguous(), t, t.stride(0), tuple(n.contiguous() for n in choice), best, worst, margin,
           valid, *latents, batch, K=k, D=size, GIVEN=len(choice) == 1, CHOICE=CHOICE, BLOCK=BLOCK)
    return best, worst, margin, valid, *latents


@_op.register_fake
def _(scores, x_p, gap, t, choice):
    best, worst = t.new_empty(t.shape), t.new_empty(t.shape)
    margin, valid = scores.new_empty(t.shape), t.new_empty(t.shape, dtype=torch.bool)
    return best, worst, margin, valid, *(x_p.new_empty(x_p.shape[1:]) for _ in range(3))


def pair_select(scores: Tensor, x_p: Tensor, gap: Tensor, t: Tensor, choice: Tensor | Counter) -> Selection:
    """Return the best, the worst and the chosen one of K candidates x_p [K, B, C, H, W] with scores [K, B].

    scores, x_p, gap: fp32; x_p in float64 takes the reference, and the others may then be either. gap: [N],
    for every training timestep the margin that a valid pair must exceed. t: int64 [B]. choice: int64 [B], or
    a Counter. B may be 0. Ties go to the first candidate. If scores are NaN, the first NaN is best and worst,
    and the pair is not valid.

    There is no gradient: call it under torch.no_grad() if scores or x_p require one. The values of t and
    choice are not checked, because that would synchronize with the device: with t outside [0, N) the result
    is undefined, with a choice outside [0, K) ``next`` is NaN. Raises ValueError for any other invalid
    argument.
    """
    expect_tensor("x_p", x_p, ("K", "B", "C", "H", "W"), x_p, (torch.float32, torch.float64), gradient=False)
    expect(len(x_p) > 0, "x_p holds no candidates")
    expect_tensor("scores", scores, x_p.shape[:2], x_p, (torch.float32, x_p.dtype), gradient=False)
    expect_table("gap", gap, (), x_p, (torch.float32, x_p.dtype))
    expect_tensor("t", t, x_p.shape[1:2], x_p, (torch.int64,))
    given = not isinstance(choice, Counter)
    if given:
        expect_tensor("choice", choice, t.shape, x_p, (torch.int64,))
    else:
        noise.expect_counter("choice", choice, t)
    if not fused(x_p):
        return pair_select_reference(scores, x_p, gap, t, choice)
    return Selection(*_op(scores, x_p, gap, t, [choice] if given else list(choice)))
