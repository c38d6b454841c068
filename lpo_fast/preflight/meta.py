"""Networks on the meta device, where tensors have shapes but no contents: built from configs as a run builds them, and what
functions on them would compute and hold on a GPU.

``Cuda`` gives results the precisions that they would have there, ``Tally`` follows the bytes that live at a time and counts
operations by torch's formulas. No weights are read, and no GPU is needed.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from lpo_fast.config import LPO, LRM
from lpo_fast.lpo import judging, policies
from lpo_fast.lpo.policies import Policy
from lpo_fast.lrm import steps
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import attention, denoisers, families, locate, texts
from lpo_fast.models.texts import Text
from lpo_fast.system import devices, launch

META = torch.device("meta")
# What autocast does on CUDA to the functions that the networks call; others take what they are given.
HALF = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm,
        Tensor.matmul, Tensor.__matmul__}
FULL = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, torch.exp, torch.pow, Tensor.pow}
ENCODED = 64  # prompts at a time (texts.encode_prompts)


class Cost(NamedTuple):
    """flops: operations, a multiplication and its addition are two. peak: the most bytes that lived at a time; kept: those
    that lived after the forward pass, which are the results and what the backward pass needs."""

    flops: int
    peak: int
    kept: int


class Cuda(TorchFunctionMode):
    """On meta tensors, which autocast leaves alone: its casts as on CUDA, where the run is within ``devices.autocast``; and
    fused attention, which keeps no matrix."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, device = kwargs or {}, devices.device().type
        if torch.is_autocast_enabled(device) and func in HALF | FULL:
            dtype = torch.float32 if func in FULL else torch.get_autocast_dtype(device)
            args, kwargs = tree_map(
                lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs))
        return (fused_attention if func is F.scaled_dot_product_attention else func)(*args, **kwargs)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                    is_causal: bool = False, scale: float | None = None, **_) -> Tensor:
    """What PyTorch's attention keeps and computes on CUDA; on the meta device it would be plain matrix products."""
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, keep, dropout_p, is_causal, scale=scale)[0]


class Tally(TorchDispatchMode):
    """Bytes that operations inside allocate, as long as they live (what was there before does not count), and what is computed
    by torch's formulas. FlopCounterMode itself would hold on to tensors that checkpointing lets go."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until nothing holds it."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def freed(_) -> None:
            self.live -= size
            del self.known[key]
        self.known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def measure(step: Callable[[], object]) -> Cost:
    """What a function on meta tensors computes without gradients, and its memory beyond what was there before."""
    with torch.no_grad(), Tally() as tally:
        out = step()
        kept = tally.live
    del out
    return Cost(tally.flops, tally.peak, kept)


def training_pass(step: Callable[[], Tensor], parameters: list[nn.Parameter], accumulate: int = 1) -> Cost:
    """The same of a forward pass, which gives the loss, and its backward pass, gradients included. accumulate: passes an
    optimizer step; in the second the gradients of the first are there already."""
    costs = []
    for before in (0, sum(p.numel() * p.element_size() for p in parameters))[:accumulate]:
        with Tally() as tally:
            out = step()
            kept = tally.live
            out.backward()
            del out
        costs.append(Cost(tally.flops, before + tally.peak, kept))
    return costs[0]._replace(peak=max(cost.peak for cost in costs))


@contextmanager
def on_cuda() -> Iterator[None]:
    """Networks compute as on a GPU, our kernels in place of their references."""
    with Cuda(), launch.recording():
        yield


# Networks


def encoded(family: families.Family, encoders: list[nn.Module], count: int) -> tuple[Text, Cost]:
    """Text features of ``count`` prompts and the null text, and the cost of encoding a batch of them, in fp32."""
    ids = [empty(min(count, ENCODED), e.config.max_position_embeddings, dtype=torch.int64) for e in encoders]
    with torch.no_grad(), on_cuda():
        cost = measure(lambda: texts.encode(family, encoders, ids))
        one = texts.encode(family, encoders, [i[:1] for i in ids])
    return Text(empty(count, *one.context.shape[1:]), empty(count, *one.pooled.shape[1:]), one), cost


def policy(config: LPO, precision: str, text: Text) -> Policy:
    """Load the policy as a run does, without weights; xformers and a LoRA's file are left out."""
    plain = replace(config, attention="sdpa", checkpointing="none", lora="", shard=False)
    unet = policies.load_denoiser(plain, META, precision, weights=False).to(memory_format=torch.channels_last)
    if config.checkpointing != "none":
        unet.enable_gradient_checkpointing(partial(checkpointed, precision, config.checkpointing))
    family = families.family_of(unet.config)
    sizes = denoisers.size_conditions(locate.model(config), family, unet, config.resolution)
    return Policy(unet, text, sizes if sizes is None else sizes.to(META), full=config.full, precision=precision)


def checkpointed(precision: str, how: str, block: Callable, *inputs) -> Tensor:
    """A block whose activations are computed again in the backward pass, where no mode and no autocast is left."""
    def run(*inputs):
        with Cuda(), devices.autocast(precision):
            return block(*inputs)
    return attention.recomputed(how, run, *inputs)


def scorer(config: LPO) -> LatentRewardModel:
    """Load the LRM that scores candidates as a run does, without weights."""
    return channels_last(judging.load_reward(replace(config, attention="sdpa"), META, weights=False))


def trained_lrm(config: LRM) -> LatentRewardModel:
    """Load the LRM that is to be trained as a run does, without weights."""
    return channels_last(steps.load_reward(config, META, weights=False))


def channels_last(lrm: LatentRewardModel) -> LatentRewardModel:
    """Lay the denoiser out as on CUDA."""
    lrm.unet.to(memory_format=torch.channels_last)
    return lrm


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without contents."""
    return torch.empty(shape, dtype=dtype, device=META)
