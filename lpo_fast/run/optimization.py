"""Take optimizer steps that survive non-finite gradients, and micro-batches that do not fit into memory.

A step whose gradient is not finite is skipped: ``torch.amp.GradScaler`` detects it on the device. In fp16 it
also lowers its scale; in other precisions the scale is 1. Skipped steps are counted
(``monitor.SkippedSteps``), the inputs of the first one are kept for ``python -m lpo_fast.replay FILE``, and
too many in a row stop the run.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lpo_fast.errors import InputError
from lpo_fast.models import sharding
from lpo_fast.system import console, distributed


class Unscaled(torch.amp.GradScaler):
    """Skip steps without a finite gradient, with a scale that is always 1."""

    def __init__(self, device: str):
        super().__init__(device, init_scale=1.0)

    def update(self, new_scale: float | None = None) -> None:
        """Prepare for the next step; the scale remains 1."""
        super().update(1.0)


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return the GradScaler that skips steps without a finite gradient."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else Unscaled(device.type)


@contextmanager
def explained_errors() -> Iterator[None]:
    """Raise InputError if GPU memory runs out in the block, or --deterministic rules an operation out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU's memory", f"is too small ({str(error).splitlines()[0]})",
                         "see --dry-run for what it holds, and docs/memory.md for settings that save memory"
                         ) from error
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        raise InputError("True", f"is not available here ({str(error).splitlines()[0][:160]})",
                         "remove the flag", "--deterministic") from error


class OptimizerStep:
    """Take an optimizer's steps.

    A step without a finite gradient changes nothing. If ``pairs`` at a time do not fit into GPU memory, the
    micro-batch is halved from then on; the loss is unchanged.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float,
                 pairs: int, remedy: str, halves: bool = True):
        """Wrap ``optimizer``, whose gradients are clipped to the norm ``max_norm``.

        remedy: what the user can do if memory is too small. halves: whether micro-batches may be halved.
        """
        self.optimizer, self.scaler, self.max_norm = optimizer, scaler, max_norm
        self.pairs, self.remedy, self.halves = pairs, remedy, halves
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

    def __call__(self, gradients: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """Take one step; return its metrics and the gradient norm before clipping, [], on the device.

        gradients: computes the gradients with the given number of pairs per micro-batch, adds them to the
        parameters' own, and returns the metrics. Raises InputError if memory is too small.
        """
        while (metrics := self._tried(gradients)) is None:  # the failed micro-batch's tensors are free by now
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        distributed.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = sharding.clip(self.parameters, self.max_norm)
        if self.scaler.is_enabled() or norm.isfinite():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics, norm

    def _tried(self, gradients: Callable[[int], Tensor]) -> Tensor | None:
        """Return the metrics, or None if memory was too small. Raises InputError if nothing can be halved."""
        try:
            return gradients(self.pairs)
        except torch.OutOfMemoryError as error:
            size = f"{self.pairs} pair{'s' * (self.pairs > 1)}"
            if self.pairs == 1 or not self.halves:
                raise InputError(size, f"does not fit into the GPU's memory ({str(error).splitlines()[0]})",
                                 self.remedy, "a training micro-batch of") from error
        console.say(f"warning: a training micro-batch of {size} does not fit into the GPU's memory: from now "
                    f"on its size is {self.pairs // 2}, with the same loss; to free memory, {self.remedy}")
        self.pairs //= 2
        return None


OPTIMIZERS = {"adamw": "torch", "adafactor": "transformers", "adamw8bit": "bitsandbytes",
              "paged_adamw8bit": "bitsandbytes"}  # name: package


def check_optimizer(name: str) -> None:
    """Raise InputError if the package of an optimizer is not installed."""
    if find_spec(OPTIMIZERS[name]) is None:
        raise InputError(name, f"{OPTIMIZERS[name]} is not installed",
                         f"pip install {OPTIMIZERS[name]}, or use adamw", "--optimizer")


def optimizer(name: str, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float,
              **adam) -> torch.optim.Optimizer:
    """Return an optimizer over the parameters that require gradients.

    adam: betas and eps of the AdamW variants; Adafactor ignores them. Raises InputError if its package is not
    installed.
    """
    parameters = [p for p in parameters if p.requires_grad]
    check_optimizer(name)
    if name == "adafactor":
        from transformers.optimization import Adafactor
        return Adafactor(parameters, lr=lr, weight_decay=weight_decay, scale_parameter=False,
                         relative_step=False)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay,
                                 fused=torch.cuda.is_available(), **adam)
    from bitsandbytes import optim
    cls = {"adamw8bit": optim.AdamW8bit, "paged_adamw8bit": optim.PagedAdamW8bit}[name]
    return cls(parameters, lr=lr, weight_decay=weight_decay, **adam)


def optimizer_state(name: str, parameters: list[nn.Parameter]) -> int:
    """Return the bytes of an optimizer's state.

    AdamW: two fp32 moments. 8-bit AdamW: two bytes per element and two fp32 scales per block of 256; fp32 for
    tensors with fewer than 4,096 elements. Adafactor: fp32 row and column means of the squared gradients;
    for vectors, of each element.
    """
    def each(p: nn.Parameter) -> int:
        if name == "adafactor":
            return 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel())
        if name == "adamw" or p.numel() < 4096:
            return 8 * p.numel()
        return 2 * p.numel() + 8 * -(-p.numel() // 256)
    return sum(map(each, parameters))


def learning_rate(warmup: str, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Return a function from the optimizer step (0, 1, …) to its factor of the peak learning rate.

    The rate warms up, then decays linearly to 0 at ``max_steps``.
    """
    def factor(k: int) -> float:
        if k < warmup_steps and warmup == "linear":
            return (k + 1) / warmup_steps
        if k < warmup_steps:  # DeepSpeed's logarithmic warm-up
            return float(torch.log(torch.tensor(k + 1.0)) / torch.log(torch.tensor(max(warmup_steps, 2.0))))
        return max(max_steps - k, 0) / max(max_steps - warmup_steps, 1)
    return factor
