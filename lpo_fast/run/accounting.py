"""Count operations and measure the device's matrix rate: the TFLOP/s of the log line.

Only necessary work counts: one policy and one reference evaluation per pair, sampling and scoring, by torch's
formulas and without recomputation. The share in the log line is relative to the rate of a large matrix
product, measured on this device in the networks' precision when the run starts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def operations(step: Callable[[], Tensor | tuple[Tensor, ...]],
               parameters: list[nn.Parameter] | None = None) -> int:
    """Return the number of operations of ``step`` (a multiply-add counts as two).

    parameters: count the gradients of the loss that ``step`` returns as well; they are discarded. Attention
    on a CPU is not counted: torch has no formula for it.
    """
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(parameters is not None):
        out = step()
        if parameters is not None:
            torch.autograd.grad(out, parameters, allow_unused=True)
    return counter.get_total_flops()


@contextmanager
def countable(unet: Any) -> Iterator[None]:
    """Use attention that torch can count, and no activation checkpointing, within the block."""
    processors = unet.attn_processors
    checkpointing = unet.is_gradient_checkpointing
    unet.set_attn_processor(AttnProcessor2_0())
    if checkpointing:
        function = next(m._gradient_checkpointing_func for m in unet.modules()
                        if getattr(m, "gradient_checkpointing", False))
        unet.disable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.set_attn_processor(processors)
        if checkpointing:
            unet.enable_gradient_checkpointing(function)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best measured rate of a square matrix product, in operations per second.

    The side is 8,192 on a GPU and 1,024 on a CPU.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(8):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


class Meter:
    """Convert work and seconds into TFLOP/s for the log line."""

    def __init__(self, device: torch.device, dtype: torch.dtype, work: Callable[[], dict[str, int]]):
        """Measure the matrix rate and call ``work``, on a GPU only; a CPU run does not wait for it.

        work: returns the operations per unit (prompts, pairs), by name.
        """
        self.work: dict[str, int] = {}
        self.rate = 0.0
        if device.type == "cuda":
            self.work = work()
            self.rate = matrix_rate(device, dtype)
            torch.cuda.reset_peak_memory_stats()

    def row(self, seconds: float, **units: int) -> dict[str, float]:
        """Return TFLOP/s and the share of the matrix rate of ``units`` done in ``seconds``; {} on a CPU."""
        if not self.rate:
            return {}
        done = sum(self.work[name] * count for name, count in units.items()) / seconds
        return {"tflops": done / 1e12, "share_of_matrix_rate": done / self.rate}


def text(row: dict[str, float]) -> str:
    """Return the part of the log line that shows a row of ``Meter``."""
    return f" | {row['tflops']:.0f} TFLOP/s ({row['share_of_matrix_rate']:.0%})" if "tflops" in row else ""
