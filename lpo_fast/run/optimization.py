"""What a long run needs: optimizer steps that survive what is not finite or does not fit, and signs that training goes wrong.

A step whose gradient is not finite changes nothing: ``torch.amp.GradScaler`` finds out on the device and skips it, in fp16 with
a scale that it lowers, in other precisions with a scale of 1. Such steps are counted, what led to the first of them is kept for
``python -m lpo_fast.replay FILE``, and too many in a row stop the run.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch._functorch.config
from torch import Tensor, nn

from lpo_fast.errors import InputError
from lpo_fast.models import sharding
from lpo_fast.system import console, distributed


class Unscaled(torch.amp.GradScaler):
    """A scale that stays 1: skipped steps do not lower it."""

    def __init__(self, device: str):
        super().__init__(device, init_scale=1.0)

    def update(self, new_scale: float | None = None) -> None:
        """Ready for the next step."""
        super().update(1.0)


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """What skips steps without a finite gradient; see above."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else Unscaled(device.type)


@contextmanager
def explained_errors() -> Iterator[None]:
    """InputError where the GPU's memory does not suffice and nothing can be done about it, or for what --deterministic rules
    out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU's memory", f"does not suffice ({str(error).splitlines()[0]})",
                         "see what takes how much with --dry-run, and README's table of settings that save memory") from error
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        raise InputError("True", f"cannot be had here ({str(error).splitlines()[0][:160]})", "leave it out",
                         "--deterministic") from error


class OptimizerStep:
    """An optimizer's steps: one without a finite gradient changes nothing, and where the GPU's memory does not suffice for
    ``pairs`` at a time, half as many go through the networks from then on, which leaves the loss as it is."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float, pairs: int,
                 remedy: str, halves: bool = True):
        """remedy: for the user, if memory does not suffice at last. halves: whether passes may be halved."""
        self.optimizer, self.scaler, self.max_norm = optimizer, scaler, max_norm
        self.pairs, self.remedy, self.halves = pairs, remedy, halves
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

    def __call__(self, gradients: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """One step. gradients: adds to the parameters', with so many pairs at a time, and returns the step's metrics.

        Those metrics and the gradient's norm before it is clipped, [], on the device. Raises InputError if memory is too small.
        """
        while (metrics := self._tried(gradients)) is None:  # by now what the failed pass held is free
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
        """The metrics, or None if memory was too small."""
        try:
            return gradients(self.pairs)
        except torch.OutOfMemoryError as error:
            size = f"{self.pairs} pair{'s' * (self.pairs > 1)}"
            if self.pairs == 1 or not self.halves:
                raise InputError(size, f"does not fit into the GPU's memory ({str(error).splitlines()[0]})",
                                 self.remedy, "a training pass of") from error
        console.say(f"warning: a training pass of {size} does not fit into the GPU's memory: from now on passes are of "
                 f"{self.pairs // 2}, with the same loss; to make room, {self.remedy}")
        self.pairs //= 2
        return None


OPTIMIZERS = {"adamw": "torch", "adafactor": "transformers", "adamw8bit": "bitsandbytes", "paged_adamw8bit": "bitsandbytes"}


def check_optimizer(name: str) -> None:
    """Raise InputError if the package of an optimizer is not installed."""
    if find_spec(OPTIMIZERS[name]) is None:
        raise InputError(name, f"{OPTIMIZERS[name]} is not installed", f"pip install {OPTIMIZERS[name]}, or use adamw",
                         "--optimizer")


def optimizer(name: str, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float,
              **adam) -> torch.optim.Optimizer:
    """An optimizer over the parameters that train. adam: betas and eps of the AdamWs; Adafactor has none."""
    parameters = [p for p in parameters if p.requires_grad]
    check_optimizer(name)
    if name == "adafactor":
        from transformers.optimization import Adafactor
        return Adafactor(parameters, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=torch.cuda.is_available(), **adam)
    from bitsandbytes import optim
    cls = {"adamw8bit": optim.AdamW8bit, "paged_adamw8bit": optim.PagedAdamW8bit}[name]
    return cls(parameters, lr=lr, weight_decay=weight_decay, **adam)


def optimizer_state(name: str, parameters: list[nn.Parameter]) -> int:
    """Bytes of an optimizer's state. AdamW: two fp32 moments. 8 bits: two bytes and, a block of 256, two fp32 scales; fp32
    below 4,096 elements. Adafactor: fp32 row and column means of the squares, one by one for vectors."""
    def each(p: nn.Parameter) -> int:
        if name == "adafactor":
            return 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel())
        if name == "adamw" or p.numel() < 4096:
            return 8 * p.numel()
        return 2 * p.numel() + 8 * -(-p.numel() // 256)
    return sum(map(each, parameters))


def learning_rate(warmup: str, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Factor of the peak rate at optimizer step k = 0, 1, …: warm-up, then linear decay to 0 at max_steps."""
    def factor(k: int) -> float:
        if k < warmup_steps and warmup == "linear":
            return (k + 1) / warmup_steps
        if k < warmup_steps:  # DeepSpeed's logarithmic warm-up
            return float(torch.log(torch.tensor(k + 1.0)) / torch.log(torch.tensor(max(warmup_steps, 2.0))))
        return max(max_steps - k, 0) / max(max_steps - warmup_steps, 1)
    return factor
