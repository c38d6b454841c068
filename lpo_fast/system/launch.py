"""Launch the Triton kernels: decide when and where they run, check their inputs, and record launches for the
compiler.

Kernels run on CUDA, and on any device under Triton's interpreter (TRITON_INTERPRET=1 before the first
import). Elsewhere, in float64, and where Triton is not installed, the public functions of kernels/ use their
plain PyTorch references.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the references run; kernels are never called
    triton, tl = None, SimpleNamespace(constexpr=None)

jit: Any = triton.jit if triton else lambda kernel: kernel

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*DTYPES, torch.float64)
LARGEST = sys.float_info.max


class Launch(NamedTuple):
    """Record one launch: a jitted function, its grid, positional arguments, compile-time constants by name,
    warps per program.
    """

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict[str, object]
    warps: int


_record: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches instead of running them: what training would compile for these tensors, on any
    device.
    """
    global _record
    _record = []
    try:
        yield _record
    finally:
        _record = None


def launch(kernel, grid: tuple[int, ...], *arguments, warps: int = 4, **constants) -> None:
    """Run ``kernel`` over ``grid`` on the device of its first tensor.

    arguments: tensors, tuples of tensors, ints, floats.
    """
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments, constants, warps))
    elif math.prod(grid):  # an empty batch launches nothing
        first = next(t for a in arguments for t in (a if isinstance(a, tuple) else (a,))
                     if isinstance(t, Tensor))
        with torch.cuda.device_of(first):
            kernel[grid](*arguments, num_warps=warps, **constants)


def fused(x: Tensor) -> bool:
    """Return whether a kernel runs (or is recorded) for ``x``, rather than the reference."""
    return x.dtype in DTYPES and triton is not None and (x.is_cuda or INTERPRETED or _record is not None)


def channels_last(x: Tensor) -> bool:
    """Return whether x [B, C, H, W] is stored as [B, H, W, C] without gaps, and not as NCHW at the same time.
    """
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return x itself if it is NCHW or channels-last without gaps, else an NCHW copy."""
    return x if channels_last(x) else x.contiguous()


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def expect(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds.

    message: states what is wrong with an operator's input, the value found, and the value expected.
    """
    if not condition:
        raise ValueError(message)


def expect_type(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Check that an operator's argument has one of the given types; a bool is not a number.

    Raises ValueError, which names the argument.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        raise ValueError(f"{name} is of type {type(value).__name__}, expected "
                         f"{' or '.join(k.__name__ for k in kinds)}")


def expect_number(name: str, number: float, least: float = -LARGEST) -> None:
    """Check that an argument is a finite Python number of at least ``least``.

    Raises ValueError, which names the argument. This also works where torch.compile makes the number a
    symbol, which supports comparisons but not math.isfinite. In that case torch.compile raises its own error,
    which quotes the ValueError.
    """
    expect_type(name, number, (int, float))
    if not least <= number <= LARGEST:
        bound = "" if least == -LARGEST else f" of at least {least}"
        raise ValueError(f"{name} is {float(number)}, expected a finite number{bound}")


def expect_tensor(name: str, x: Tensor, shape: tuple[int | str, ...], like: Tensor,
                  dtypes: tuple[torch.dtype, ...] = FLOATS, gradient: bool = True) -> None:
    """Check type, shape, dtype and device (that of ``like``) of an operator's input.

    shape: a letter stands for any size. gradient: whether the operator has a gradient for this input; if not,
    x must not require one, except under torch.no_grad(). Raises ValueError, which names the input.
    """
    expect_type(name, x, Tensor)
    if (x.ndim != len(shape)
            or not all(isinstance(n, str) or size == n for size, n in zip(x.shape, shape, strict=True))):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}".replace("'", ""))
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}, expected {' or '.join(map(str, dict.fromkeys(dtypes)))}")
    expect(x.device == like.device, f"{name} is on {x.device}, expected {like.device}")
    if not gradient and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but the operator has none: detach it, or call under "
                         "torch.no_grad()")


def expect_table(name: str, x: Tensor, columns: tuple[int, ...], like: Tensor,
                 dtypes: tuple[torch.dtype, ...]) -> None:
    """Check a table with one row of ``columns`` per training timestep, at least one row, without gradient.

    Raises ValueError, which names the argument.
    """
    expect_tensor(name, x, ("N", *columns), like, dtypes, gradient=False)
    expect(len(x) > 0, f"{name} has shape {tuple(x.shape)}: no timesteps")
