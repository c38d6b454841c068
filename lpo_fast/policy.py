"""The policy: the denoiser that trains, its reference, its text features and its sampler; loading and drawing with it."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lpo_fast import backbone, checkpoint, models, ranks, runs, sample, schedule, shard, speed, surgery
from lpo_fast.backbone import Family, Text, Windowed
from lpo_fast.config import LPO
from lpo_fast.reward import LatentRewardModel
from lpo_fast.sample import CounterNoise, Predict
from lpo_fast.schedule import Schedule

PICTURE_EPOCH = 0xFFFFFFFF  # pictures for reports have noise of their own


class Policy:
    """The denoiser that trains and its reference: the same weights with the adapters off, or a frozen copy of them."""

    def __init__(self, unet: UNet2DConditionModel, text: Text | Windowed, sizes: Tensor | None, *, full: bool,
                 precision: str = "no", compile: str = "none", sharded: bool = False, attention: str = "sdpa"):
        self.unet, self.text, self.sizes, self.precision, self.attention = unet, text, sizes, precision, attention
        self.frozen = copy.deepcopy(unet).requires_grad_(False) if full else None
        for network in (unet, self.frozen) if sharded else ():
            shard.cut(network, precision)
        self.adapters, self.bring = adapters(unet), text.bring
        self._compiled = speed.compiled(self._evaluate, compile)

    def predict(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """Outputs [2B, C, H, W], null pass first, in the network's precision; x_t [B, C, H, W], t, prompt numbers [B].

        For batches of any size, and inside what is compiled; ``train`` and ``reference`` are compiled for one size.
        """
        return self._evaluate(self.unet, x_t, t, prompts)

    def train(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """The same for a training step."""
        return self._compiled(self.unet, x_t, t, prompts)

    @torch.no_grad()
    def reference(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """The same of the model that training started from."""
        if self.frozen is not None:
            return self._compiled(self.frozen, x_t, t, prompts)
        with adapters_off(self.adapters):
            return self._compiled(self.unet, x_t, t, prompts)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within the block nothing is compiled: torch's modes, which count operations, look into plain code alone."""
        compiled, self._compiled = self._compiled, self._evaluate
        try:
            yield
        finally:
            self._compiled = compiled

    def _evaluate(self, unet: nn.Module, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        with speed.autocast(self.precision):
            return backbone.predict(unet, x_t, t, self.text[prompts], self.sizes)


def adapters(unet: nn.Module) -> list[BaseTunerLayer]:
    """The layers that have a LoRA."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_off(layers: list[BaseTunerLayer]) -> Iterator[None]:
    """Without the LoRA in these layers. Unlike peft's ``disable_adapters`` this leaves requires_grad alone."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def trainable(unet: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in unet.parameters() if p.requires_grad]


def add_lora(unet: nn.Module, config: LPO) -> None:
    """Attach the LoRA that a run trains, in fp32."""
    checkpoint.add_lora(unet, config.rank, config.alpha or config.rank, config.targets, config.seed)
    for parameter in trainable(unet):
        parameter.data = parameter.data.float()


def load(config: LPO, prompts: list[str], device: torch.device) -> tuple[Policy, Schedule]:
    """The policy with a LoRA attached (or all weights trainable), its text features and its sampler's schedule.

    prompts: those that train, then --validation-prompts.
    """
    model = models.model(config)
    precision = speed.precision(config.mixed_precision, "fp16")
    # Frozen weights are never in memory in more than the precision of the network.
    unet = backbone.load_unet(model, torch.float32 if config.full else speed.DTYPES[precision])
    unet = speed.layout(unet.to("cpu" if config.shard else device)).eval()  # sharded: a GPU may not hold it
    if config.fused_norms:
        surgery.fuse_norms(unet)
    speed.attention(unet, "sdpa" if config.attention == "auto" else config.attention)
    speed.checkpointing(unet, config.checkpointing)
    family = backbone.family_of(unet.config)
    encoders = [e.to(device).eval() for e in backbone.load_text(model, family)]
    tokenizers = backbone.load_tokenizers(model, family)
    text = encoded(config, family, tokenizers, encoders, prompts, family.zero_null, precision)
    own = prompts[:len(prompts) - len(config.validation_prompts)]
    too_long = sum(len(ids) > tokenizers[0].model_max_length for ids in tokenizers[0](own).input_ids)
    if too_long:
        runs.say(f"{too_long} of {len(own)} prompts exceed {tokenizers[0].model_max_length} tokens and are cut")
    if not config.full:
        add_lora(unet, config)
        if config.lora:
            checkpoint.load_lora(unet, Path(config.lora))
    sizes = checkpoint.size_conditions(model, family, unet, config.resolution)
    sizes = None if sizes is None else sizes.to(device)
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    sched = schedule.from_config(scheduler, config.num_steps, config.eta).to(device)
    policy = Policy(unet, text, sizes, full=config.full, precision=precision, compile=config.compiled, sharded=config.shard,
                    attention=config.attention)
    if config.attention == "auto":
        x, index = torch.zeros(config.batch_size, *latent_shape(config, unet), device=device), torch.zeros(
            config.batch_size, dtype=torch.int64, device=device)
        policy.attention = speed.faster_attention(torch.no_grad()(partial(policy.predict, x, index, index)), unet)
        for network in (unet, policy.frozen) if policy.frozen else (unet,):
            speed.attention(network, policy.attention)
    return policy, sched


def encoded(config: LPO, family: Family, tokenizers: list[CLIPTokenizer], encoders: list[nn.Module], prompts: list[str],
            zero_null: bool, precision: str) -> Text | Windowed:
    """Text features of all prompts, on the device if they fit, else within reach of it."""
    text = backbone.encode_prompts(family, tokenizers, encoders, prompts, zero_null=zero_null, dtype=speed.DTYPES[precision],
                                   home=speed.text_home)
    if text.context.device == text.null.context.device:
        return text
    runs.say(f"text features of {len(prompts)} prompts take {text.context.nbytes / 1e9:.1f} GB and stay in the host's memory")
    return Windowed(text, config.batch_size * ranks.count())


def latent_shape(config: LPO, unet: UNet2DConditionModel) -> tuple[int, int, int]:
    """(C, H, W) of the latents that the policy makes."""
    size = config.resolution // backbone.pixels_per_latent(models.model(config)) or unet.config.sample_size
    return unet.config.in_channels, size, size


def load_score(config: LPO, prompts: list[str], device: torch.device) -> "Judge":
    """The LRM as a function of latents, timesteps and prompt numbers; its text features are computed here, once."""
    path, base, model = models.lrm(config), models.base(config), models.model(config)
    size = backbone.pixels(model, json.loads((model / "unet" / "config.json").read_text()), config.resolution)
    settings = {"guidance_scale": config.lrm_guidance or None, "multi_scale_cfg": config.lrm_multi_scale_cfg}
    lrm = checkpoint.load_lrm(path, base, resolution=size,  # of the latents that it scores, whatever it was trained at
                              **{k: v for k, v in settings.items() if v is not None}).to(device)
    speed.layout(lrm.unet)
    if config.fused_norms:
        surgery.fuse_norms(lrm.unet)
    speed.attention(lrm.unet, config.attention)
    tokenizers = backbone.load_tokenizers(models.tokenizer(config), lrm.family)
    precision = speed.precision(config.mixed_precision, "fp16")
    text = encoded(config, lrm.family, tokenizers, list(lrm.text_encoders), prompts, False, precision)
    lrm.text_encoders = nn.ModuleList()  # never needed again
    if precision != "no":
        lrm.unet.to(speed.DTYPES[precision])
    return Judge(lrm, text, precision)


class Judge:
    """A reward model as a ``Score``: of latents, timesteps and prompt numbers."""

    def __init__(self, lrm: LatentRewardModel, text: Text | Windowed, precision: str):
        self.lrm, self.text, self.precision, self.bring = lrm, text, precision, text.bring

    def __call__(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        with speed.autocast(self.precision):
            return self.lrm.score(x, t, self.text[prompts])


@torch.no_grad()
def pictures(predict: Predict, sched: Schedule, model: Path, prompts: Tensor, shape: tuple[int, int, int], *,
             guidance: float, seed: int, batch: int, items: Tensor | None = None,
             bring: Callable[[Tensor], None] = lambda prompts: None) -> Tensor:
    """uint8 [N, H, W, 3] pictures for prompt numbers [N], decoded by the VAE of ``model`` (or that is ``model``).

    items: the numbers that key their noise (default: 0 … N−1). bring: ``Policy.bring``.
    """
    device = sched.table.device
    vae = backbone.load_vae(model).to(device)
    items = torch.arange(len(prompts)) if items is None else items
    drawn = []
    for index, item in zip(prompts.split(batch), items.to(device).split(batch), strict=True):
        bring(index)
        index = index.to(device)
        latents = sample.generate(predict, sched, CounterNoise(seed, PICTURE_EPOCH, item, shape), index, guidance=guidance)
        for part in latents.split(4):  # decoding is what takes memory
            decoded = vae.decode(part / vae.config.scaling_factor).sample
            drawn.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(drawn)
