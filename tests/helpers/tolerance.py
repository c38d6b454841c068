"""How far a kernel may be from the exact result, in one place:
derived from the dtype and the number of summed terms."""

import math

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def allowed(dtype: torch.dtype, exact: Tensor, scale: Tensor | float, terms: int = 1) -> Tensor:
    """What rounding may cost, elementwise, of a result stored in ``dtype`` and computed in fp32.

    exact: the result in fp64. scale: sum of the magnitudes that were added up to give it (of its summands, or
    of the intermediate results that cancel). terms: how many. The result's own rounding costs
    eps(dtype)·|exact| (a truncating store included) and the sum 4·sqrt(terms)·eps(fp32)·scale: errors of
    independent additions add up like a random walk.
    """
    stored, smallest = torch.finfo(dtype).eps * exact.abs(), torch.finfo(dtype).smallest_normal
    return (stored + 4 * math.sqrt(terms) * EPS * torch.as_tensor(scale, device=exact.device)
            + smallest * torch.finfo(dtype).eps)


def assert_close(what: str, got: Tensor, exact: Tensor, scale: Tensor | float, terms: int = 1) -> None:
    """``got`` is within ``allowed`` of ``exact`` (fp64), NaN where that is,
    and infinite where its dtype cannot hold that."""
    assert (exact.dtype == torch.float64
            and got.shape == exact.shape), f"{what}: {got.shape}, expected {exact.shape}"
    largest = torch.finfo(got.dtype).max * (1 - torch.finfo(got.dtype).eps)
    same = ((got.double() == exact)
            | (got.abs() >= largest) & (exact.abs() >= largest) & (got.sign() == exact.sign()))
    error = torch.where(same | got.isnan() & exact.isnan(), 0.0, (got.double() - exact).abs())
    limit = allowed(got.dtype, exact, scale, terms)
    bad = ~(error <= limit)
    assert not bad.any(), (f"{what}: {int(bad.sum())} of {bad.numel()} wrong, by up to "
                           f"{(error / limit)[bad].nan_to_num(torch.inf).max().item():.3g} times what "
                           "rounding allows")
