"""Load the policy: the denoiser to be trained, its reference, text features and sampler's schedule."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lpo_fast.config import LPO, Model, Prompts, Weights
from lpo_fast.method import schedule
from lpo_fast.method.schedule import Schedule
from lpo_fast.models import attention, denoisers, families, fused_norms, locate, loras, sharding, texts, vaes
from lpo_fast.models.families import Family
from lpo_fast.models.texts import Text, TextWindow
from lpo_fast.system import compilation, console, devices, distributed


class Policy:
    """Evaluate the denoiser being trained and its reference.

    The reference is the denoiser with its adapters off or, if all weights are trained, a frozen copy of the
    initial weights.
    """

    def __init__(self, unet: UNet2DConditionModel, text: Text | TextWindow, sizes: Tensor | None, *,
                 full: bool, precision: str = "no", compile: str = "none", sharded: bool = False,
                 attention: str = "sdpa"):
        """Set up the networks and compile their training steps.

        full: train all weights. sizes: SDXL's time ids [1, 6], or None. precision: "no", "fp16" or "bf16".
        compile: see ``compilation.compiled``. sharded: shard the weights across ranks (FSDP). attention: the
        implementation in use.
        """
        self.unet, self.text, self.sizes = unet, text, sizes
        self.precision, self.attention = precision, attention
        self.frozen = copy.deepcopy(unet).requires_grad_(False) if full else None
        for network in filter(None, (unet, self.frozen)) if sharded else ():
            sharding.shard(network, precision)
        self.adapters, self.prefetch = loras.adapters(unet), text.prefetch
        self._compiled = compilation.compiled(self._evaluate, compile)

    def predict(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """Return outputs [2B, C, H, W], null branch first, in the network's precision.

        x_t: [B, C, H, W]. t, prompts: int64 [B], timesteps and prompt numbers. This is not compiled, so B may
        vary and compiled functions may call it; ``train`` and ``reference`` are compiled for one B.
        """
        return self._evaluate(self.unet, x_t, t, prompts)

    def train(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """Return what ``predict`` returns, with gradient, for a training step."""
        return self._compiled(self.unet, x_t, t, prompts)

    @torch.no_grad()
    def reference(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """Return what ``predict`` returns for the reference, the model that training started from."""
        if self.frozen is not None:
            return self._compiled(self.frozen, x_t, t, prompts)
        with loras.adapters_off(self.adapters):
            return self._compiled(self.unet, x_t, t, prompts)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run the block without compiled code, which torch's counter of operations cannot inspect."""
        compiled, self._compiled = self._compiled, self._evaluate
        try:
            yield
        finally:
            self._compiled = compiled

    def _evaluate(self, unet: nn.Module, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        with devices.autocast(self.precision):
            return denoisers.predict(unet, x_t, t, self.text[prompts], self.sizes)


def add_lora(unet: UNet2DConditionModel, config: Weights) -> None:
    """Attach the run's LoRA to a denoiser, with trainable weights in fp32."""
    loras.add_lora(unet, config.rank, config.alpha or config.rank, config.targets, config.seed)
    for parameter in loras.trainable(unet):
        parameter.data = parameter.data.float()


def load_denoiser(config: LPO, device: torch.device, precision: str,
                  weights: bool = True) -> UNet2DConditionModel:
    """Load the denoiser to be trained, with its LoRA; weights=False leaves it on the meta device.

    Raises InputError if files are missing or do not fit.
    """
    # Frozen weights are loaded in the network's precision, which takes less memory than fp32.
    dtype = torch.float32 if config.full else devices.DTYPES[precision]
    unet: Any = denoisers.load_unet(locate.model(config), dtype, weights)
    unet = unet.to("cpu" if config.shard else device)  # sharded: it may not fit into one GPU
    unet = devices.layout(unet).eval()
    if config.fused_norms:
        fused_norms.fuse_norms(unet)
    attention.attention(unet, "sdpa" if config.attention == "auto" else config.attention)
    attention.checkpointing(unet, config.checkpointing)
    if not config.full:
        add_lora(unet, config)
        if config.lora:
            loras.load_lora(unet, Path(config.lora))
    return unet


def load(config: LPO, prompts: list[str], device: torch.device) -> tuple[Policy, Schedule]:
    """Load the policy, with a LoRA attached or all weights trainable, and its sampler's schedule.

    prompts: the training prompts, then --validation-prompts; all are encoded here. Raises InputError if files
    are missing or do not fit.
    """
    model = locate.model(config)
    precision = devices.precision(config.mixed_precision, "fp16")
    unet = load_denoiser(config, device, precision)
    family = families.family_of(unet.config)
    encoders = [e.to(device).eval() for e in texts.load_text(model, family)]
    tokenizers = texts.load_tokenizers(model, family)
    text = encoded(config, family, tokenizers, encoders, prompts, family.zero_null, precision)
    training = prompts[:len(prompts) - len(config.validation_prompts)]
    limit = tokenizers[0].model_max_length
    too_long = sum(len(ids) > limit for ids in tokenizers[0](training).input_ids)
    if too_long:
        console.say(f"{too_long} of {len(training)} prompts exceed {limit} tokens and are truncated")
    sizes = denoisers.size_conditions(model, family, unet, config.resolution)
    sizes = None if sizes is None else sizes.to(device)
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    sched = schedule.from_config(scheduler, config.num_steps, config.eta).to(device)
    policy = Policy(unet, text, sizes, full=config.full, precision=precision, compile=config.compiled,
                    sharded=config.shard, attention=config.attention)
    if config.attention == "auto":
        x = torch.zeros(config.batch_size, *latent_shape(config, unet), device=device)
        index = torch.zeros(config.batch_size, dtype=torch.int64, device=device)
        evaluate = torch.no_grad()(partial(policy.predict, x, index, index))
        policy.attention = attention.faster_attention(evaluate, unet)
        for network in (unet, policy.frozen) if policy.frozen else (unet,):
            attention.attention(network, policy.attention)
    return policy, sched


def encoded(config: Prompts, family: Family, tokenizers: list[CLIPTokenizer], encoders: list[nn.Module],
            prompts: list[str], zero_null: bool, precision: str) -> Text | TextWindow:
    """Return the text features of all prompts, on the device if they fit.

    Else they are kept in host memory, and each batch's features are copied to the device (``TextWindow``).
    zero_null: replace the null prompt's features by zeros. precision: "no", "fp16" or "bf16".
    """
    text = texts.encode_prompts(family, tokenizers, encoders, prompts, zero_null=zero_null,
                                dtype=devices.DTYPES[precision], placement=devices.text_placement)
    if text.null is None or text.context.device == text.null.context.device:
        return text
    console.say(f"text features of {len(prompts)} prompts take {text.context.nbytes / 1e9:.1f} GB and are "
                "kept in host memory")
    return TextWindow(text, config.batch_size * distributed.world_size())


def latent_shape(config: Model, unet: Any) -> tuple[int, int, int]:
    """Return (C, H, W) of the latents that the policy generates."""
    size = config.resolution // vaes.pixels_per_latent(locate.model(config)) or unet.config.sample_size
    return unet.config.in_channels, size, size
