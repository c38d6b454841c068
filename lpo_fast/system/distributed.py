"""Many processes (``torchrun``, ``accelerate launch``): who is who, and the few things that they tell one another.

Alone, every function here does nothing. Gradients are summed once an optimizer step, when they are whole: losses carry
weights over the global batch, so a sum is all there is to do.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lpo_fast.errors import InputError, PeerError

BUCKET = 2**25  # elements of a message of gradients


@contextmanager
def _together() -> Iterator[None]:
    """Around what needs all processes."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError(f"rank {rank()}: another process has failed, and says why, or was killed; this one ends") from error


def state() -> PartialState:
    """This process among all; the first call joins the others and picks the GPU. Raises InputError if they cannot meet."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"  # launched with --use_deepspeed or not: it is not needed
    try:
        return PartialState(cpu=not torch.cuda.is_available())
    except dist.DistNetworkError as error:
        where = ":".join(os.environ.get(key, "?") for key in ("MASTER_ADDR", "MASTER_PORT"))
        raise InputError(where, f"the processes cannot meet there ({str(error).splitlines()[0]})",
                         "name a free port: --master_port, or --main_process_port", "MASTER_PORT") from error


def is_main() -> bool:
    """Whether this process prints and writes."""
    return state().is_main_process if PartialState._shared_state else os.environ.get("RANK", "0") == "0"


def named(processes: int) -> str:
    """So many processes, in words."""
    return "1 process" if processes == 1 else f"{processes} processes"


def world_size() -> int:
    """How many processes there are."""
    return state().num_processes


def rank() -> int:
    """Which of them this one is, from 0."""
    return state().process_index


def barrier() -> None:
    """Until all are here."""
    with _together():
        state().wait_for_everyone()


def all_sum(x: Tensor) -> Tensor:
    """Σ over the processes, in place."""
    if world_size() > 1:
        with _together():
            dist.all_reduce(x)
    return x


def any_rank(flag: object) -> bool:
    """Whether ``flag`` is true in any process."""
    if world_size() == 1:
        return bool(flag)
    return all_sum(torch.tensor(float(bool(flag)), device=state().device)).item() > 0


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Σ over the processes, in place, in messages of about BUCKET elements.

    A parameter without a gradient counts as 0, but keeps none if it has none in any process: a zero would let weight decay
    act on it.

    Those of a sharded network are left out: FSDP sums them in the backward pass.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if not parameters:
        return
    reached = all_sum(torch.tensor([float(p.grad is not None) for p in parameters], device=state().device)).tolist()
    for parameter in (p for p, times in zip(parameters, reached, strict=True) if times):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (bucket[0].dtype != parameter.dtype or sum(grad.numel() for grad in bucket) >= BUCKET):
            _sum_together(bucket)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _sum_together(bucket)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Values of the main process for all, in place."""
    for tensor in tensors if world_size() > 1 else ():
        with _together():
            dist.broadcast(tensor.data, 0)


def _sum_together(grads: list[Tensor]) -> None:
    flat = all_sum(torch.cat([grad.flatten() for grad in grads]))
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor [n_rank, …] of all processes one after another; n may differ, and be 0 on some.

    The own part keeps its gradient: if every process computes a loss of the whole, the sum of the gradients is that of the
    loss.
    """
    if world_size() == 1:
        return tensors
    own_rank = rank()
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=tensors[0].device)
    sizes[own_rank] = len(tensors[0])
    sizes = all_sum(sizes).tolist()
    gathered = []
    for x in tensors:
        own = x.new_zeros(max(sizes), *x.shape[1:])
        own[:len(x)] = x.detach()
        parts = [torch.empty_like(own) for _ in sizes]
        with _together():
            dist.all_gather(parts, own)
        parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        gathered.append(torch.cat([*parts[:own_rank], x, *parts[own_rank + 1:]]))
    return tuple(gathered)
