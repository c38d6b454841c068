"""Communicate between ranks (``torchrun``, ``accelerate launch``): world size, rank, barrier, all-reduce,
all-gather.

With one process the collectives do nothing. Gradients are summed once per optimizer step, after the last
backward pass: losses carry weights over the global batch, so a sum is all that is needed.
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

BUCKET = 2**25  # elements per all-reduce of gradients


@contextmanager
def _collective() -> Iterator[None]:
    """Wrap a collective: raise PeerError if another rank has failed."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError(f"rank {rank()}: another rank has failed (see its error) or was killed; "
                        "this one stops") from error


def state() -> PartialState:
    """Return this process's place among all; the first call joins the process group and selects the GPU.

    Raises InputError if the processes cannot connect.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"  # even if launched with --use_deepspeed
    try:
        return PartialState(cpu=not torch.cuda.is_available())
    except dist.DistNetworkError as error:
        where = ":".join(os.environ.get(key, "?") for key in ("MASTER_ADDR", "MASTER_PORT"))
        raise InputError(where, f"the ranks cannot connect there ({str(error).splitlines()[0]})",
                         "name a free port: --master_port, or --main_process_port", "MASTER_PORT") from error


def is_main() -> bool:
    """Return whether this process is rank 0, which prints and writes files."""
    return state().is_main_process if PartialState._shared_state else os.environ.get("RANK", "0") == "0"


def named(processes: int) -> str:
    """Return a number of processes in words."""
    return "1 process" if processes == 1 else f"{processes} processes"


def world_size() -> int:
    """Return the number of processes."""
    return state().num_processes


def rank() -> int:
    """Return the number of this process, from 0."""
    return state().process_index


def barrier() -> None:
    """Wait until all ranks are here."""
    with _collective():
        state().wait_for_everyone()


def all_sum(x: Tensor) -> Tensor:
    """All-reduce x: sum it over all ranks, in place; return it."""
    if world_size() > 1:
        with _collective():
            dist.all_reduce(x)
    return x


def any_rank(flag: object) -> bool:
    """Return whether ``flag`` is true on any rank."""
    if world_size() == 1:
        return bool(flag)
    return all_sum(torch.tensor(float(bool(flag)), device=state().device)).item() > 0


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduce the gradients: sum them over all ranks, in place, in messages of about BUCKET elements.

    A missing gradient counts as 0. A parameter without a gradient on every rank keeps None, because with a
    zero gradient weight decay would still change it. Sharded parameters are skipped: FSDP sums their
    gradients in the backward pass.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if not parameters:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=state().device)
    counts = all_sum(present).tolist()
    for parameter in (p for p, count in zip(parameters, counts, strict=True) if count):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (bucket[0].dtype != parameter.dtype or sum(grad.numel() for grad in bucket) >= BUCKET):
            _sum_bucket(bucket)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _sum_bucket(bucket)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcast the tensors' values from rank 0 to all ranks, in place."""
    for tensor in tensors if world_size() > 1 else ():
        with _collective():
            dist.broadcast(tensor.data, 0)


def _sum_bucket(grads: list[Tensor]) -> None:
    flat = all_sum(torch.cat([grad.flatten() for grad in grads]))
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All-gather each tensor [n_rank, …] and concatenate in the order of the ranks; n may differ between
    ranks, and be 0.

    This rank's part keeps its gradient: if every rank computes the loss of the concatenation, the sum of the
    ranks' gradients is the gradient of that loss.
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
        with _collective():
            dist.all_gather(parts, own)
        parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        gathered.append(torch.cat([*parts[:own_rank], x, *parts[own_rank + 1:]]))
    return tuple(gathered)
