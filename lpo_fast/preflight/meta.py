"""Networks on the meta device, where tensors have shapes but no contents: built from configs as a run builds them, and what
functions on them would compute and hold on a GPU.

``Cuda`` gives results the precisions that they would have there, ``Tally`` follows the bytes that live at a time and counts
operations by torch's formulas. No weights are read, and no GPU is needed.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from lpo_fast.config import LPO, LRM
from lpo_fast.lpo.policies import Policy, add_lora
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import attention, denoisers, families, fused_norms, locate, texts
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


def built(kind: type[nn.Module], folder: Path) -> nn.Module:
    """A network of diffusers or transformers from its config.json; frozen, fp32."""
    with META:
        if kind in (UNet2DConditionModel, AutoencoderKL):
            network = kind.from_config(kind.load_config(folder))
        else:
            network = kind(kind.config_class.from_pretrained(folder, attn_implementation="sdpa"))
    return network.requires_grad_(False).eval()


def encoded(family: families.Family, encoders: list[nn.Module], count: int) -> tuple[Text, Cost]:
    """Text features of ``count`` prompts and the null text, and the cost of encoding a batch of them, in fp32."""
    ids = [empty(min(count, ENCODED), e.config.max_position_embeddings, dtype=torch.int64) for e in encoders]
    with torch.no_grad(), on_cuda():
        cost = measure(lambda: texts.encode(family, encoders, ids))
        one = texts.encode(family, encoders, [i[:1] for i in ids])
    return Text(empty(count, *one.context.shape[1:]), empty(count, *one.pooled.shape[1:]), one), cost


def policy(config: LPO, precision: str, text: Text) -> Policy:
    """As ``policy.load`` makes it."""
    model = locate.model(config)
    unet = built(UNet2DConditionModel, model / "unet").requires_grad_(config.full)
    unet.to(torch.float32 if config.full else devices.DTYPES[precision]).to(memory_format=torch.channels_last)
    if config.fused_norms:
        fused_norms.fuse_norms(unet)
    attention.attention(unet, "sdpa")
    if config.checkpointing != "none":
        unet.enable_gradient_checkpointing(partial(checkpointed, precision, config.checkpointing))
    if not config.full:
        add_lora(unet, config)
    sizes = denoisers.size_conditions(model, families.family_of(unet.config), unet, config.resolution)
    return Policy(unet, text, sizes if sizes is None else sizes.to(META), full=config.full,
                  precision=precision)


def reward_model(unet: nn.Module, encoders: list[nn.Module], heads: dict[str, tuple[int, ...]], pixels: int,
                 **settings) -> LatentRewardModel:
    """An LRM of its parts; heads: shapes of the projections."""
    family = families.family_of(unet.config)
    lrm = LatentRewardModel(
        family, unet, encoders, empty(*heads["visual_projection"]),
        empty(*heads["text_projection"]) if "text_projection" in heads else None, empty(),
        sizes=denoisers.time_ids(pixels, pixels) if family.time_ids else None, **settings)
    return lrm.to(META)


def checkpointed(precision: str, how: str, block: Callable, *inputs) -> Tensor:
    """A block whose activations are computed again in the backward pass, where no mode and no autocast is left."""
    def run(*inputs):
        with Cuda(), devices.autocast(precision):
            return block(*inputs)
    return attention.recomputed(how, run, *inputs)


def scorer(config: LPO, pixels: int) -> LatentRewardModel:
    """As ``policy.load_score`` loads it: with its text encoders, in fp32."""
    path, base = locate.lrm(config), locate.base(config)
    home = base if path.is_file() else path
    unet = denoisers.empty_down_mid(home / "unet").to(memory_format=torch.channels_last)
    if config.fused_norms:
        fused_norms.fuse_norms(unet)
    attention.attention(unet, "sdpa")
    channels = list(unet.config.block_out_channels)
    heads = {name: tuple(head["weight"].shape) for name, head in checkpoint.read_heads(path, channels).items()
             if name.endswith("_projection")}
    own = checkpoint.recorded_settings(path)
    guidance = config.lrm_guidance or own.get("guidance_scale", 7.5)
    stages = own.get("multi_scale_cfg", False) if config.lrm_multi_scale_cfg is None else config.lrm_multi_scale_cfg
    encoders = [built(kind, (home if (home / name).is_dir() else base) / name)
                for name, kind in families.family_of(unet.config).encoders]
    lrm = reward_model(unet, encoders, heads, pixels, guidance_scale=guidance, multi_scale_cfg=stages,
                       multi_scale=heads["visual_projection"][1] == sum(checkpoint.feature_widths(unet, True)))
    return lrm.requires_grad_(False).eval()


def trained_lrm(config: LRM, pixels: int) -> LatentRewardModel:
    """As ``train_lrm.load`` makes it."""
    model = locate.model(config)
    unet = denoisers.empty_down_mid(model / "unet").to(memory_format=torch.channels_last)
    encoders = [built(kind, model / name) for name, kind in families.family_of(unet.config).encoders]
    width = encoders[-1].config.hidden_size
    clip = locate.clip(config)
    text = (width, width) if clip is None else tuple(checkpoint.read_text_projection(clip).shape)
    heads = {"text_projection": text}
    if families.family_of(unet.config).time_ids:
        heads, text = {}, (encoders[-1].config.projection_dim,)
    heads["visual_projection"] = text[0], sum(checkpoint.feature_widths(unet, config.multi_scale))
    lrm = reward_model(unet, encoders, heads, pixels, guidance_scale=config.guidance_scale, multi_scale=config.multi_scale,
                       multi_scale_cfg=config.multi_scale_cfg).train()
    lrm.text_encoders.requires_grad_(not config.freeze_text_encoder)
    if config.fused_norms:
        fused_norms.fuse_norms(lrm.unet)
    return lrm


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without contents."""
    return torch.empty(shape, dtype=dtype, device=META)
