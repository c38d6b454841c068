"""--dry-run: what a run would train, hold and compute on a GPU, from the models' configs alone.

After the whole preflight the networks are built on the meta device, where tensors have shapes but no contents, and the run's
own functions are called on them at the run's own batch sizes, not compiled. ``Cuda`` gives the results the precisions that
they would have on a GPU, ``Meter`` follows the bytes that live at a time and counts operations by torch's formulas. No weights
are read, no GPU is needed, and no run directory is written. Sizes are those of one process.
"""

import os
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
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from torch.utils.flop_counter import flop_registry

from lpo_fast import (
    backbone,
    checkpoint,
    latents,
    launch,
    loss,
    models,
    preflight,
    ranks,
    sample,
    schedule,
    speed,
    surgery,
    train_lpo,
    train_lrm,
)
from lpo_fast import policy as policies
from lpo_fast.backbone import Text
from lpo_fast.config import LPO, LRM
from lpo_fast.policy import Policy, trainable
from lpo_fast.reward import LatentRewardModel
from lpo_fast.sample import CounterNoise, Pairs
from lpo_fast.speed import optimizer_state

META = torch.device("meta")
# What autocast does on CUDA to the functions that the networks call; others take what they are given.
HALF = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm,
        Tensor.matmul, Tensor.__matmul__}
FULL = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, torch.exp, torch.pow, Tensor.pow}
ENCODED = 64  # prompts at a time (backbone.encode_prompts)
DECODED = 4  # latents at a time (policy.pictures)


class Cost(NamedTuple):
    """flops: operations, a multiplication and its addition are two. peak: the most bytes that lived at a time; kept: those
    that lived after the forward pass, which are the results and what the backward pass needs."""

    flops: int
    peak: int
    kept: int


class Cuda(TorchFunctionMode):
    """On meta tensors, which autocast leaves alone: its casts as on CUDA, where the run is within ``speed.autocast``; and
    fused attention, which keeps no matrix."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, device = kwargs or {}, speed.device().type
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


class Meter(TorchDispatchMode):
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
    with torch.no_grad(), Meter() as meter:
        out = step()
        kept = meter.live
    del out
    return Cost(meter.flops, meter.peak, kept)


def training_pass(step: Callable[[], Tensor], parameters: list[nn.Parameter], accumulate: int = 1) -> Cost:
    """The same of a forward pass, which gives the loss, and its backward pass, gradients included. accumulate: passes an
    optimizer step; in the second the gradients of the first are there already."""
    costs = []
    for before in (0, sum(p.numel() * p.element_size() for p in parameters))[:accumulate]:
        with Meter() as meter:
            out = step()
            kept = meter.live
            out.backward()
            del out
        costs.append(Cost(meter.flops, before + meter.peak, kept))
    return costs[0]._replace(peak=max(cost.peak for cost in costs))


@contextmanager
def on_cuda() -> Iterator[None]:
    """Networks compute as on a GPU, our kernels in place of their references."""
    with Cuda(), launch.recording():
        yield


# The networks on the meta device


def built(kind: type[nn.Module], folder: Path) -> nn.Module:
    """A network of diffusers or transformers from its config.json; frozen, fp32."""
    with META:
        if kind in (UNet2DConditionModel, AutoencoderKL):
            network = kind.from_config(kind.load_config(folder))
        else:
            network = kind(kind.config_class.from_pretrained(folder, attn_implementation="sdpa"))
    return network.requires_grad_(False).eval()


def encoded(family: backbone.Family, encoders: list[nn.Module], count: int) -> tuple[Text, Cost]:
    """Text features of ``count`` prompts and the null text, and the cost of encoding a batch of them, in fp32."""
    ids = [empty(min(count, ENCODED), e.config.max_position_embeddings, dtype=torch.int64) for e in encoders]
    with torch.no_grad(), on_cuda():
        cost = measure(lambda: backbone.encode(family, encoders, ids))
        one = backbone.encode(family, encoders, [i[:1] for i in ids])
    return Text(empty(count, *one.context.shape[1:]), empty(count, *one.pooled.shape[1:]), one), cost


def policy(config: LPO, precision: str, text: Text) -> Policy:
    """As ``policy.load`` makes it."""
    model = models.model(config)
    unet = built(UNet2DConditionModel, model / "unet").requires_grad_(config.full)
    unet.to(torch.float32 if config.full else speed.DTYPES[precision]).to(memory_format=torch.channels_last)
    if config.fused_norms:
        surgery.fuse_norms(unet)
    speed.attention(unet, "sdpa")
    if config.checkpointing:
        unet.enable_gradient_checkpointing(partial(checkpointed, precision))
    if not config.full:
        checkpoint.add_lora(unet, config.rank, config.alpha or config.rank, config.targets, config.seed)
        for parameter in trainable(unet):
            parameter.data = parameter.data.float()
    sizes = checkpoint.size_conditions(model, backbone.family_of(unet.config), unet, config.resolution)
    return Policy(unet, text, sizes if sizes is None else sizes.to(META), full=config.full,
                  precision=precision)


def reward_model(unet: nn.Module, encoders: list[nn.Module], heads: dict[str, tuple[int, ...]], pixels: int,
                 **settings) -> LatentRewardModel:
    """An LRM of its parts; heads: shapes of the projections."""
    family = backbone.family_of(unet.config)
    lrm = LatentRewardModel(
        family, unet, encoders, empty(*heads["visual_projection"]),
        empty(*heads["text_projection"]) if "text_projection" in heads else None, empty(),
        sizes=backbone.time_ids(pixels, pixels) if family.time_ids else None, **settings)
    return lrm.to(META)


def checkpointed(precision: str, block: Callable, *inputs) -> Tensor:
    """A block whose activations are computed again in the backward pass, where no mode and no autocast is left."""
    def run(*inputs):
        with Cuda(), speed.autocast(precision):
            return block(*inputs)
    return activation_checkpoint(run, *inputs, use_reentrant=False)


def scorer(config: LPO, pixels: int) -> LatentRewardModel:
    """As ``policy.load_score`` loads it: with its text encoders, in fp32."""
    path, base = models.lrm(config), models.base(config)
    home = base if path.is_file() else path
    unet = backbone.empty_down_mid(home / "unet").to(memory_format=torch.channels_last)
    if config.fused_norms:
        surgery.fuse_norms(unet)
    speed.attention(unet, "sdpa")
    channels = list(unet.config.block_out_channels)
    heads = {name: tuple(head["weight"].shape) for name, head in checkpoint.read_heads(path, channels).items()
             if name.endswith("_projection")}
    own = checkpoint.recorded_settings(path)
    guidance = config.lrm_guidance or own.get("guidance_scale", 7.5)
    stages = own.get("multi_scale_cfg", False) if config.lrm_multi_scale_cfg is None else config.lrm_multi_scale_cfg
    encoders = [built(kind, (home if (home / name).is_dir() else base) / name)
                for name, kind in backbone.family_of(unet.config).encoders]
    lrm = reward_model(unet, encoders, heads, pixels, guidance_scale=guidance, multi_scale_cfg=stages,
                       multi_scale=heads["visual_projection"][1] == sum(checkpoint.feature_widths(unet, True)))
    return lrm.requires_grad_(False).eval()


def learner(config: LRM, pixels: int) -> LatentRewardModel:
    """As ``train_lrm.train`` makes it."""
    model = models.model(config)
    unet = backbone.empty_down_mid(model / "unet").to(memory_format=torch.channels_last)
    encoders = [built(kind, model / name) for name, kind in backbone.family_of(unet.config).encoders]
    width = encoders[-1].config.hidden_size
    clip = models.clip(config)
    text = (width, width) if clip is None else tuple(checkpoint.read_text_projection(clip).shape)
    heads = {"text_projection": text}
    if backbone.family_of(unet.config).time_ids:
        heads, text = {}, (encoders[-1].config.projection_dim,)
    heads["visual_projection"] = text[0], sum(checkpoint.feature_widths(unet, config.multi_scale))
    lrm = reward_model(unet, encoders, heads, pixels, guidance_scale=config.guidance_scale, multi_scale=config.multi_scale,
                       multi_scale_cfg=config.multi_scale_cfg).train()
    lrm.text_encoders.requires_grad_(not config.freeze_text_encoder)
    if config.fused_norms:
        surgery.fuse_norms(lrm.unet)
    return lrm


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A meta tensor."""
    return torch.empty(shape, dtype=dtype, device=META)


# Bytes


def held(module: nn.Module | None, trained: bool | None = None) -> int:
    """Bytes of the parameters, or of those that train, or of those that do not."""
    return sum(p.numel() * p.element_size() for p in (module.parameters() if module else ())
               if trained is None or p.requires_grad == trained)


def of_text(text: Text) -> int:
    """Bytes of text features."""
    return sum(x.numel() * x.element_size() for x in (text.context, text.pooled))


# The report


def report(config: LPO | LRM) -> list[str]:
    """The lines of a dry run. Raises InputError for whatever a run would refuse."""
    return lpo(config) if isinstance(config, LPO) else lrm(config)


def lpo(config: LPO) -> list[str]:
    """The report of an LPO run."""
    prompts, _ = preflight.lpo(config)
    precision = "fp16" if config.mixed_precision == "auto" else config.mixed_precision
    model, size, k, n = models.model(config), config.batch_size, config.num_candidates, config.train_batch_size
    family = backbone.family_of(preflight.read_config(model / "unet", "--model"))
    encoders = [built(kind, model / name) for name, kind in family.encoders]
    text, encoding = encoded(family, encoders, len(prompts) + len(config.validation_prompts))
    actor = policy(config, precision, text.prepared(speed.DTYPES[precision]))
    parameters = trainable(actor.unet)
    shape = policies.latent_shape(config, actor.unet)
    pixels = shape[-1] * backbone.pixels_per_latent(model)
    judge = scorer(config, pixels)
    words, judging = encoded(judge.family, list(judge.text_encoders), len(prompts))
    vae = built(AutoencoderKL, backbone.vae_folder(models.vae(config)))
    scheduler = preflight.read_config(model / "scheduler", "--model", "scheduler_config.json")
    sched = schedule.from_config(scheduler, config.num_steps, config.eta).to(META)
    first, steps = config.window
    judged, latent = steps - first, 4 * shape[0] * shape[1] * shape[2]
    x, t, index = empty(n, *shape), empty(n, dtype=torch.int64), empty(size, dtype=torch.int64)
    pairs = Pairs(x, x.clone(), x.clone(), t, t, empty(n, dtype=torch.bool))
    gradients, optimizers, cut = held(actor.unet, True), optimizer_states(parameters), processes() if config.shard else 1
    loading = max(
        held(actor.unet, config.full) // cut + sum(map(held, encoders)) + encoding.peak + 2 * of_text(text),
        held(actor.unet) // cut + of_text(actor.text) + held(judge) + judging.peak + 2 * of_text(words))
    judge_encoders, judge.text_encoders = judge.text_encoders, nn.ModuleList()
    judge.unet.to(speed.DTYPES[precision])
    words = words.prepared(speed.DTYPES[precision])

    def score(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        with speed.autocast(precision):
            return judge.score(x, t, words[index])
    with on_cuda():
        sampling = measure(lambda: sample.trajectory(
            actor.predict, score, sched, empty(1000),
            CounterNoise(config.seed, 0, index, shape), index, guidance=config.guidance_scale, num_candidates=k, window=(0, 1)))
        drawing = measure(lambda: actor.predict(empty(size, *shape), index, index))
        training = training_pass(lambda: train_lpo.evaluate(
            actor, sched, pairs, empty(n), beta=config.beta, eps=config.clip_eps,
            guidance=config.train_guidance).loss, parameters, config.accumulate)
        decoding = measure(lambda: vae.decode(empty(min(DECODED, size), *shape)).sample)

    always = {
        f"denoiser, {'fp32' if config.full else names(precision)}": held(actor.unet) // cut,
        "reference, fp32": held(actor.frozen) // cut,
        f"reward model, {names(precision)}": held(judge),
        f"text features of {len(prompts):,} prompts": of_text(actor.text) + of_text(words),
        f"optimizer state ({config.optimizer})": optimizers[config.optimizer] // cut,
        "average of the weights": gradients // cut if config.ema_decay else 0,
        "pairs of a prompt batch": 2 * 3 * latent * judged * size,
        "sampling, which its CUDA graph keeps (--compile)": 0 if config.compiled == "none" else sampling.peak}
    base = sum(always.values())
    phases = {
        "loading": loading,
        f"sampling, {size} prompts, {k * size} candidates": base + (sampling.peak if config.compiled == "none" else 0),
        f"training, {n} pairs{' with checkpointing' if config.checkpointing else ''}":
            base + training.peak - gradients + gradients // cut}
    if config.pictures or config.validation_prompts:
        phases["drawing pictures, VAE in fp32"] = base + held(vae) + max(decoding.peak, drawing.peak)
    scoring = sampling.flops - drawing.flops
    each, guided = training.flops / n, 2 if max(judge.guidance_scale) > 1 else 1
    sampled = steps * drawing.flops / size, judged * scoring / size
    return [
        heading("LPO", family, pixels, precision), "",
        *parameter_table({
            "denoiser": [p for name, p in actor.unet.named_parameters() if "lora_" not in name],
            **({} if config.full else {f"LoRA, rank {config.rank}": parameters}),
            "reward model's denoiser (down, mid)": list(judge.unet.parameters()),
            "reward model's projections": heads_of(judge),
            "its text encoders, while loading": list(judge_encoders.parameters()),
            "text encoders, while loading": [p for e in encoders for p in e.parameters()],
            "VAE, for pictures": list(vae.parameters())}), "",
        *memory_table(always, training.kept, gradients // cut, phases, optimizers),
        *(["sharded: weights, gradients, optimizer state and average are a process's part; activations are those of whole "
           "weights"] if config.shard else []), "",
        f"a batch of {size} prompts: up to {judged * size} pairs, "
        f"{-(-judged * size // (n * config.accumulate))} optimizer steps",
        *table(["network evaluations", "a prompt", "a batch"], [
            ["policy, sampling (null and text pass)", 2 * steps, 2 * steps * size],
            [f"reward model ({guided} a candidate)", guided * k * judged, guided * k * judged * size],
            ["policy, training (2 a pair, if all are valid)", 2 * judged, 2 * judged * size],
            ["reference, training (2 a pair)", 2 * judged, 2 * judged * size]]), "",
        *table(["TFLOP", "a prompt", "a batch"], [
            [name, f"{x / 1e12:,.1f}", f"{x * size / 1e12:,.1f}"] for name, x in (
                ("sampling, policy", sampled[0]), ("sampling, reward model", sampled[1]),
                (f"training, {each / 1e12:.2f} a pair, if all are valid", judged * each),
                ("together, if all are valid", sum(sampled) + judged * each),
                ("together, if half are valid", sum(sampled) + judged * each / 2))])]


def lrm(config: LRM) -> list[str]:
    """The report of an LRM run."""
    used = preflight.lrm(config)
    precision = "bf16" if config.mixed_precision == "auto" else config.mixed_precision
    model, world = models.model(config), processes()
    unet = preflight.read_config(model / "unet", "--model")
    size = config.resolution // backbone.pixels_per_latent(model) or unet["sample_size"]
    vae = built(AutoencoderKL, backbone.vae_folder(models.vae(config)))
    pixels = size * 2 ** (len(vae.config.block_out_channels) - 1)
    reward = learner(config, pixels)
    parameters = trainable(reward)
    own = min(config.batch_size, len(used["train"])) // world  # train_lrm.own_size
    n = -(-own // config.accumulate)
    encoded_at_once = train_lrm.part_size(2 * own, pixels)
    ids = [empty(n, e.config.max_position_embeddings, dtype=torch.int64) for e in reward.text_encoders]
    x, t, label = empty(2, n, unet["in_channels"], size, size), empty(2, n, dtype=torch.int64), empty(n)

    def forward() -> Tensor:
        with speed.autocast(precision):
            unit = train_lrm.encode_features(reward, ids, [i[:1] for i in ids], x, t)
        return loss.preference(*unit, reward.logit_scale.exp(), label, label, t[0], t.T, loss_type=config.loss_type,
                               batch_coeff=config.batch_coeff, aux_loss_coeff=config.aux_loss_coeff)
    with on_cuda():
        encoding = measure(lambda: train_lrm.encode(vae, empty(encoded_at_once, 3, pixels, pixels), precision))
        training = training_pass(forward, parameters, config.accumulate)
    gradients, optimizers = held(reward, True), optimizer_states(parameters)
    always = {"reward model, fp32": held(reward), "VAE, fp32": held(vae),
              f"optimizer state ({config.optimizer})": optimizers[config.optimizer]}
    base = sum(always.values()) + 2 * 4 * x.numel() * own // n  # and mean and deviation of each of the step's pictures, fp32
    phases = {f"encoding, {encoded_at_once} pictures at a time": base + encoding.peak,
              f"training, {n} pairs a pass": base + training.peak}
    evaluations = 2 * (2 if max(config.guidance_scale) > 1 else 1)
    work = 2 * encoding.flops / encoded_at_once, training.flops / n
    kept = latents.needed(config, used, precision) if config.cache_latents else None
    return [
        heading("LRM", reward.family, pixels, precision), "",
        *parameter_table({"denoiser (down, mid)": list(reward.unet.parameters()),
                          "text encoders": list(reward.text_encoders.parameters()),
                          "projections, logit scale": heads_of(reward), "VAE": list(vae.parameters())}), "",
        *memory_table(always, training.kept, gradients, phases, optimizers), "",
        f"an optimizer step: {own} pairs a process in {-(-own // n)} passes; {config.max_steps} steps",
        *([f"--cache-latents: {kept[0]:,} pictures to come, {kept[1] / 2**30:,.2f} GiB of disk"] if kept else []),
        *table(["network evaluations", "a pair", "a step"], [
            ["VAE's encoder", 2, 2 * own],
            [f"denoiser, down and mid ({evaluations // 2} a picture)", evaluations, evaluations * own]]), "",
        *table(["TFLOP", "a pair", "a step"], [[name, f"{x / 1e12:,.2f}", f"{x * own / 1e12:,.1f}"] for name, x in (
            ("VAE", work[0]), ("training", work[1]), ("together", sum(work)))])]


def processes() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def heading(stage: str, family: backbone.Family, pixels: int, precision: str) -> str:
    """The first line."""
    return (f"dry run: {stage}, {family.name}, {pixels}×{pixels} pixels, networks in {names(precision)} (on CUDA), "
            f"{'' if processes() == 1 else 'one of '}{ranks.named(processes())}")


def names(precision: str) -> str:
    """fp32 for "no"."""
    return "fp32" if precision == "no" else precision


def heads_of(lrm: LatentRewardModel) -> list[nn.Parameter]:
    """The parameters of an LRM beside its networks."""
    return [p for name, p in lrm.named_parameters() if not name.startswith(("unet.", "text_encoders."))]


def optimizer_states(parameters: list[nn.Parameter]) -> dict[str, int]:
    """Bytes of each optimizer's state."""
    return {name: optimizer_state(name, parameters) for name in speed.OPTIMIZERS}


def parameter_table(parts: dict[str, list[nn.Parameter]]) -> list[str]:
    """Lines: parameters of each part."""
    counts = [[name, *(sum(p.numel() for p in part if p.requires_grad == trained) for trained in (True, False))]
              for name, part in parts.items()]
    return table(["parameters", "trained", "frozen"], counts)


def memory_table(always: dict[str, int], activations: int, gradients: int, phases: dict[str, int],
                 optimizers: dict[str, int]) -> list[str]:
    """Lines: what is held, what a training pass adds, the most that lives in each phase, and each optimizer's state."""
    def gib(size: int) -> str:
        return f"{size / 2**30:,.2f}"
    top = max(phases, key=lambda name: phases[name])
    return table(["memory, GiB: estimate, not yet checked on a GPU", ""], [
        *([name, gib(size)] for name, size in always.items() if size), ["held in all phases", gib(sum(always.values()))],
        ["a training pass's activations", gib(activations)], ["a training pass's gradients", gib(gradients)],
        *([f"most while {name}", gib(size)] for name, size in phases.items()),
        [f"peak ({top.partition(',')[0]})", gib(phases[top])]]) + [
        "optimizer states: " + ", ".join(f"{name} {gib(size)}" for name, size in optimizers.items()),
        "counted as not compiled; on top: CUDA's context, its libraries' workspaces, what PyTorch's allocator keeps"]


def table(header: list[str], rows: list[list[object]]) -> list[str]:
    """Aligned lines; whole numbers get commas."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [(f"{row[0]:<{max(widths[0], 48)}}" + "".join(f"  {cell:>{max(w, 13)}}" for cell, w in zip(
        row[1:], widths[1:], strict=True))).rstrip() for row in cells]
