"""What a run computes, how fast the device could, and where the time goes: TFLOP/s in the log line, and --profile.

Work is what the method needs, whatever a run computes: operations of one policy and one reference evaluation a pair, of
sampling and of scoring, by torch's formulas, without recomputation. The log line's share is of the rate of a large matrix
product, measured on this device in the networks' precision at the start of the run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def operations(step: Callable[[], Tensor | tuple[Tensor, ...]], parameters: list[nn.Parameter] | None = None) -> int:
    """Operations of a step (a multiplication and its addition are two); with parameters, of the gradients of the loss that it
    returns too, which are dropped. Attention on a CPU does not count: torch has no formula for it."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(parameters is not None):
        out = step()
        if parameters is not None:
            torch.autograd.grad(out, parameters, allow_unused=True)
    return counter.get_total_flops()


@contextmanager
def countable(unet: Any) -> Iterator[None]:
    """A denoiser with attention that has a formula and activations that are computed once."""
    processors, checkpointing = unet.attn_processors, unet.is_gradient_checkpointing
    unet.set_attn_processor(AttnProcessor2_0())
    if checkpointing:
        function = next(m._gradient_checkpointing_func for m in unet.modules() if getattr(m, "gradient_checkpointing", False))
        unet.disable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.set_attn_processor(processors)
        if checkpointing:
            unet.enable_gradient_checkpointing(function)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the best of a few: 8,192 a side on a GPU, 1,024 on a CPU."""
    size, cuda = (8192, True) if device.type == "cuda" else (1024, False)
    a, times = torch.randn(size, size, device=device).to(dtype), []
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
    """Turns work and seconds into the log line's part. work: operations of a unit (a prompt, a pair) by name."""

    def __init__(self, device: torch.device, dtype: torch.dtype, work: Callable[[], dict[str, int]]):
        """work is called, and the device's rate measured, on a GPU alone; on a CPU a run does not wait for it."""
        self.work, self.rate = {}, 0.0
        if device.type == "cuda":
            self.work, self.rate = work(), matrix_rate(device, dtype)
            torch.cuda.reset_peak_memory_stats()

    def row(self, seconds: float, **units: int) -> dict[str, float]:
        """Of ``units`` of each kind in so many seconds: TFLOP/s and the share of the matrix rate; empty on a CPU."""
        if not self.rate:
            return {}
        done = sum(self.work[name] * count for name, count in units.items()) / seconds
        return {"tflops": done / 1e12, "share_of_matrix_rate": done / self.rate}


def text(row: dict[str, float]) -> str:
    """A Meter's row for the log line."""
    return f" | {row['tflops']:.0f} TFLOP/s ({row['share_of_matrix_rate']:.0%})" if "tflops" in row else ""
