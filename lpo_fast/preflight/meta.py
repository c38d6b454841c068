"""Build a run's networks on the meta device, and measure what functions would compute and hold on a GPU.

Meta tensors have shapes but no contents. ``Cuda`` gives results the dtypes they would have on CUDA. ``Tally``
tracks live bytes and counts operations by torch's formulas. No weights are read, and no GPU is needed.
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
# Functions whose inputs autocast casts to half precision, or to fp32, on CUDA; others keep their dtypes.
HALF = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm,
        torch.addmm, Tensor.matmul, Tensor.__matmul__}
FULL = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, torch.exp, torch.pow,
        Tensor.pow}
ENCODED = 64  # prompts encoded at a time (texts.encode_prompts)


class Cost(NamedTuple):
    """Hold the cost of a function.

    flops: operations; a multiply-add counts as two. peak: most bytes alive at a time. kept: bytes alive after
    the forward pass, which are the results and what the backward pass needs.
    """

    flops: int
    peak: int
    kept: int


class Cuda(TorchFunctionMode):
    """Treat meta tensors as if on CUDA: cast them within ``devices.autocast``, and use fused attention.

    Autocast itself ignores meta tensors. Fused attention keeps no attention matrix.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, device = kwargs or {}, devices.device().type
        if torch.is_autocast_enabled(device) and func in HALF | FULL:
            dtype = torch.float32 if func in FULL else torch.get_autocast_dtype(device)
            args, kwargs = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point()
                                    else x, (args, kwargs))
        return (fused_attention if func is F.scaled_dot_product_attention else func)(*args, **kwargs)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                    is_causal: bool = False, scale: float | None = None, **_) -> Tensor:
    """Return PyTorch's fused attention, as on CUDA; the meta device would use plain matrix products."""
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, keep, dropout_p, is_causal, scale=scale)[0]


class Tally(TorchDispatchMode):
    """Track the live bytes that operations allocate, and count operations by torch's formulas.

    Storages that existed before are not counted. FlopCounterMode itself would keep tensors alive that
    checkpointing frees.
    """

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
        """Count a storage until it is freed."""
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
    """Return the cost of ``step`` on meta tensors without gradients; memory held before is not counted."""
    with torch.no_grad(), Tally() as tally:
        out = step()
        kept = tally.live
    del out
    return Cost(tally.flops, tally.peak, kept)


def training_pass(step: Callable[[], Tensor], parameters: list[nn.Parameter], accumulate: int = 1) -> Cost:
    """Return the cost of ``step``, which returns the loss, and of its backward pass, gradients included.

    accumulate: micro-batches per optimizer step; during the second one, the gradients of the first exist.
    """
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
    """Let networks compute as on a GPU within the block, with the kernels instead of their references."""
    with Cuda(), launch.recording():
        yield


# Networks


def encoded(family: families.Family, encoders: list[nn.Module], count: int) -> tuple[Text, Cost]:
    """Return fp32 text features of ``count`` prompts and the null text, and the cost of encoding a batch."""
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
    return Policy(unet, text, sizes if sizes is None else sizes.to(META), full=config.full,
                  precision=precision)


def checkpointed(precision: str, how: str, block: Callable, *inputs) -> Tensor:
    """Run a block whose activations are recomputed in the backward pass, outside modes and autocast."""
    def run(*inputs):
        with Cuda(), devices.autocast(precision):
            return block(*inputs)
    return attention.recomputed(how, run, *inputs)


def scorer(config: LPO) -> LatentRewardModel:
    """Load the LRM that scores candidates as a run does, without weights."""
    return channels_last(judging.load_reward(replace(config, attention="sdpa"), META, weights=False))


def trained_lrm(config: LRM) -> LatentRewardModel:
    """Load the LRM to be trained as a run does, without weights."""
    return channels_last(steps.load_reward(config, META, weights=False))


def channels_last(lrm: LatentRewardModel) -> LatentRewardModel:
    """Lay out the LRM's denoiser as on CUDA (channels-last); return the LRM."""
    lrm.unet.to(memory_format=torch.channels_last)
    return lrm


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without contents, on the meta device."""
    return torch.empty(shape, dtype=dtype, device=META)
