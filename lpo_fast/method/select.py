"""Select a pair from K scores: the best and the worst candidate, if they differ enough for the timestep.

A pair is valid iff softmax(S_max, S_min)_0 − softmax(S_max, S_min)_1 > th_t (arXiv 2502.01051, section 3.3).
This is equivalent to a gap S_max − S_min > ln((1 + th_t) / (1 − th_t)); gaps are compared, so nothing
saturates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lpo_fast.method.schedule import Schedule


class Pair(NamedTuple):
    """Hold the selected pairs of B items.

    best, worst: int64 [B] candidate numbers; margin: [B], S_max − S_min; valid: bool [B].
    """

    best: Tensor
    worst: Tensor
    margin: Tensor
    valid: Tensor


def gaps(schedule: Schedule, shape: str, low: float, high: float) -> Tensor:
    """Return the score gap that a valid pair must exceed, for every training timestep: [N].

    The threshold th_t runs from ``low`` at the trajectory's last timestep to ``high`` at its first: along t
    ("linear"), the sampler's standard deviation ("sigma") or its square ("variance"). "none" is the constant
    ``low``. eta scales all deviations by the same factor and cancels; it must be positive. Raises ValueError
    for any other shape.
    """
    sigma = schedule.sigmas.double()
    curves = {
        "none": torch.zeros_like(sigma),
        "linear": torch.arange(len(sigma), device=sigma.device, dtype=torch.float64),
        "sigma": sigma,
        "variance": sigma**2,
    }
    if shape not in curves:
        raise ValueError(f"threshold shape {shape!r} is not one of {', '.join(curves)}")
    curve = curves[shape]
    first, last = curve[schedule.timesteps[-1]], curve[schedule.timesteps[0]]
    span = torch.where(last == first, 1.0, last - first)  # a single step, or a constant threshold
    threshold = low + (curve - first) / span * (high - low)
    return 2 * torch.atanh(threshold.clamp(0, 1)).to(schedule.table.dtype)


def pairs(scores: Tensor, gap: Tensor) -> Pair:
    """Return the best and the worst of scores [K, B]; a pair is valid if its margin exceeds gap [B].

    Ties go to the first candidate. On CUDA kernels/pair_select.py computes the same: change both.

    >>> pair = pairs(torch.tensor([[1.0], [3.0], [2.0]]), gap=torch.tensor([1.5]))
    >>> pair.best, pair.worst, pair.valid
    (tensor([1]), tensor([0]), tensor([True]))
    """
    best, worst = scores.max(0), scores.min(0)
    margin = best.values - worst.values
    return Pair(best.indices, worst.indices, margin, margin > gap)
