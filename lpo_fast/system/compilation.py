"""torch.compile: every call of the project."""

from collections.abc import Callable

import torch
import torch._functorch.config
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from lpo_fast.system import console

# The modes of torch.compile by --compile and whether launches become a CUDA graph.
MODES = {("default", False): "default", ("default", True): "reduce-overhead",
         ("max", False): "max-autotune-no-cudagraphs", ("max", True): "max-autotune"}


def compiled(function: Callable, setting: str, *, graphs: bool = False) -> Callable:
    """``function`` compiled as --compile says: as one graph and for the shapes it is called with ("auto": on a GPU).

    graphs: for a function without gradient that returns tensors; on CUDA its launches are replayed as a CUDA graph, and what
    it returns is copied out of the graph's memory. Where it cannot be compiled it runs as it is, and a warning says why.
    """
    setting = ("default" if torch.cuda.is_available() else "none") if setting == "auto" else setting
    if setting == "none":
        return function
    torch._functorch.config.force_non_lazy_backward_lowering = True  # one that cannot be compiled shows in the forward
    graphs = graphs and torch.cuda.is_available()
    fast, ran = torch.compile(function, fullgraph=True, dynamic=False, mode=MODES[setting, graphs]), False

    def call(*arguments):
        nonlocal fast, ran
        if fast is function:
            return function(*arguments)
        if not ran:
            from torch._inductor.runtime.cache_dir_utils import cache_dir
            console.say(f"compiling {function.__qualname__}: minutes the first time; what is compiled is kept in {cache_dir()}")
        try:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            returned = fast(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a first call: compilers fail in many ways, and the function's own errors come again
            if ran and not isinstance(error, TorchDynamoException):
                raise
            console.say(f"warning: {function.__qualname__} cannot be compiled and runs as it is, slower: "
                     f"{str(error).strip().splitlines()[0][:200]}")
            fast = function
            return function(*arguments)
        ran = True
        return tuple(x.clone() for x in returned) if graphs else returned
    return call


def mark_static(*tensors: Tensor) -> None:
    """Say that these are never anywhere else: a CUDA graph reads them where they are, and others' copies at every replay."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def metric_lag() -> int:
    """Steps whose metrics a loop leaves on the device for a while: on a GPU the last one's, which are read when the next one is
    queued behind it, so that reading leaves no gap; elsewhere none."""
    return int(torch.cuda.is_available())
