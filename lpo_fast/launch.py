"""How the Triton kernels are launched: when they run, on which device, and a record of launches for the compiler.

Kernels run on CUDA, and on any device under Triton's interpreter (TRITON_INTERPRET=1 before the first import); elsewhere,
in float64 and where Triton is not installed, the public functions of kernels/ take their plain PyTorch references.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # the references run; kernel bodies are never reached
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(kernel):
        """In place of triton.jit."""
        return kernel

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Launch(NamedTuple):
    """One launch: a jitted function, its grid, positional arguments, compile-time constants by name, warps a program."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict[str, object]
    warps: int


_record: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches instead of running them: what production would compile for these tensors, on any device."""
    global _record
    _record = []
    try:
        yield _record
    finally:
        _record = None


def launch(kernel, grid: tuple[int, ...], *arguments, warps: int = 4, **constants) -> None:
    """Run ``kernel`` over ``grid`` on the device of its first tensor. arguments: tensors, tuples of them, ints, floats."""
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments, constants, warps))
    elif math.prod(grid):  # an empty batch launches nothing
        first = next(t for a in arguments for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, Tensor))
        with torch.cuda.device_of(first):
            kernel[grid](*arguments, num_warps=warps, **constants)


def fused(x: Tensor) -> bool:
    """Whether a kernel runs for ``x`` (or is recorded), or else the reference."""
    return x.dtype in DTYPES and triton is not None and (x.is_cuda or INTERPRETED or _record is not None)


def channels_last(x: Tensor) -> bool:
    """Whether x [B, C, H, W] lies in memory as [B, H, W, C] without gaps, and not as NCHW at the same time."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x itself if it is NCHW or channels-last without gaps, else an NCHW copy."""
    return x if channels_last(x) else x.contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def expect_finite(name: str, number: float) -> None:
    """Raise ValueError for NaN and infinities; not within torch.compile, where a number may be a symbol."""
    if not torch.compiler.is_compiling():
        expect(math.isfinite(number), f"{name} is {number}, expected a finite number")


def expect(condition: bool, message: str) -> None:
    """Raise ValueError: what is wrong with an operator's input, with the value found and what was expected."""
    if not condition:
        raise ValueError(message)


def expect_tensor(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor,
                  dtypes: tuple[torch.dtype, ...] = (*DTYPES, torch.float64)) -> None:
    """Shape, dtype and device (that of ``like``) of an operator's input; raises ValueError naming it."""
    expect(tuple(x.shape) == tuple(shape), f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    expect(x.dtype in dtypes, f"{name} is {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    expect(x.device == like.device, f"{name} is on {x.device}, expected {like.device}")
