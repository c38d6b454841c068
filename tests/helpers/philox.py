"""Philox in plain Python, and the distance of floats in ulp."""

import torch
from torch import Tensor

ONES = 0xFFFFFFFF


def philox_python(seed: int, counter: list[int]) -> list[int]:
    """Compute Philox4x32-10 in Python's integers."""
    key = [seed & ONES, seed >> 32 & ONES]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & ONES, a >> 32 ^ counter[3] ^ key[1], a & ONES]
        key = [key[0] + 0x9E3779B9 & ONES, key[1] + 0xBB67AE85 & ONES]
    return counter


def apart(a: Tensor, b: Tensor) -> int:
    """Return the largest distance in ulp of two fp32 tensors."""
    a, b = (x.cpu().contiguous().view(torch.int32).long() for x in (a, b))
    a, b = (torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in (a, b))
    return (a - b).abs().max().item()
