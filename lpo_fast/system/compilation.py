"""Wrap torch.compile: every call in the project is made here."""

from collections.abc import Callable

import torch
import torch._functorch.config
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from lpo_fast.system import console

# torch.compile's mode for (--compile, whether launches are captured in a CUDA graph).
MODES = {("default", False): "default", ("default", True): "reduce-overhead",
         ("max", False): "max-autotune-no-cudagraphs", ("max", True): "max-autotune"}


def compiled(function: Callable, setting: str, *, graphs: bool = False) -> Callable:
    """Return ``function`` compiled as --compile requests: as one graph, for the shapes it is called with.

    setting: "none", "default", "max", or "auto", which compiles on a GPU only. graphs: for a function without
    gradient that returns tensors; on CUDA its launches are replayed as a CUDA graph, and its results are
    copied out of the graph's memory. If compilation fails, the function runs uncompiled, and a warning states
    why.
    """
    setting = ("default" if torch.cuda.is_available() else "none") if setting == "auto" else setting
    if setting == "none":
        return function
    # Compile the backward pass in the first call too, where a failure can still be handled.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    graphs = graphs and torch.cuda.is_available()
    fast = torch.compile(function, fullgraph=True, dynamic=False, mode=MODES[setting, graphs])
    ran = False

    def call(*arguments):
        nonlocal fast, ran
        if fast is function:
            return function(*arguments)
        if not ran:
            from torch._inductor.runtime.cache_dir_utils import cache_dir
            console.say(f"compiling {function.__qualname__}: takes minutes the first time; "
                        f"cached in {cache_dir()}")
        try:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            returned = fast(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise many kinds; an error of the function itself comes again
            if ran and not isinstance(error, TorchDynamoException):
                raise
            console.say(f"warning: {function.__qualname__} cannot be compiled and runs uncompiled, slower: "
                     f"{str(error).strip().splitlines()[0][:200]}")
            fast = function
            return function(*arguments)
        ran = True
        return tuple(x.clone() for x in returned) if graphs else returned
    return call


def mark_static(*tensors: Tensor) -> None:
    """Mark tensors whose addresses never change, so that CUDA graphs read them in place.

    All other inputs of a CUDA graph are copied at every replay.
    """
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def metric_lag() -> int:
    """Return by how many steps a training loop delays reading its metrics: 1 on a GPU, 0 elsewhere.

    On a GPU the metrics of a step are read after the next step is queued, so that reading leaves no gap in
    the device's work.
    """
    return int(torch.cuda.is_available())
