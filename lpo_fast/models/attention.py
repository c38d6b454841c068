"""Choose how a denoiser computes attention, and which activations it keeps for the backward pass."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from lpo_fast.errors import InputError
from lpo_fast.system import console


def xformers_problem() -> str:
    """Return why xformers' attention cannot run on this device; "" if it can."""
    if find_spec("xformers") is None:
        return "is not installed"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    try:
        from xformers.ops import memory_efficient_attention
        q = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cuda")
        memory_efficient_attention(q, q, q)
    except Exception as error:  # built for another torch or GPU: it raises many kinds
        return f"does not run here ({str(error).splitlines()[0][:160]})"
    return ""


def check_attention(choice: str) -> None:
    """Raise InputError if xformers is requested where it cannot run."""
    if choice == "xformers" and (problem := xformers_problem()):
        raise InputError(choice, problem,
                         "use sdpa, which computes the same, or install the xformers built for this torch",
                         "--attention")


def attention(unet: nn.Module, choice: str) -> None:
    """Set how a denoiser computes attention: "sdpa" (torch's own) or "xformers".

    Raises InputError where xformers cannot run.
    """
    check_attention(choice)
    if choice == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor2_0())


def faster_attention(run: Callable[[], Tensor], unet: nn.Module) -> str:
    """Return the attention with which ``run`` is faster; the decision is logged.

    run: an evaluation of ``unet`` at the shapes of the training run. The medians of 5 timings are compared.
    Where xformers cannot run, the result is "sdpa".
    """
    if problem := xformers_problem():
        console.say(f"attention: sdpa; xformers {problem}")
        return "sdpa"
    seconds = {}
    for choice in ("sdpa", "xformers"):
        attention(unet, choice)
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[choice] = statistics.median(times[2:])
    best = min(seconds, key=seconds.get)
    measured = ", ".join(f"{s * 1e3:.1f} ms with {name}" for name, s in seconds.items())
    console.say(f"attention: {best}; one evaluation takes {measured}")
    return best


def checkpoint_policy(_, operation: torch._ops.OpOverload, *args, **kwargs) -> CheckpointPolicy:
    """Decide which outputs selective activation checkpointing saves.

    Convolutions and attention take the most time per byte to recompute, so their outputs are saved; the rest
    is recomputed.
    """
    # flash_fwd is the name of xformers' operation
    expensive = any(word in str(operation) for word in ("convolution", "attention", "flash_fwd"))
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(how: str, block: Callable, *inputs) -> Tensor:
    """Run a block and recompute its activations in the backward pass.

    how: "full" recomputes all of them; "selective" those that ``checkpoint_policy`` does not save.
    """
    selective = ({"context_fn": partial(create_selective_checkpoint_contexts, checkpoint_policy)}
                 if how == "selective" else {})
    return activation_checkpoint(block, *inputs, use_reentrant=False, **selective)


def checkpointing(unet: nn.Module, how: str) -> None:
    """Set activation checkpointing of a denoiser's blocks: "none", "selective" or "full" (--checkpointing).
    """
    if how != "none":
        unet.enable_gradient_checkpointing(partial(recomputed, how))
