"""Every setting of a run as two frozen dataclasses, and the recipes as functions: shapes(), sd15(), sd21(), sdxl().

``check`` refuses, before anything is loaded or written, every value that cannot work, with its key and the remedy.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lpo_fast.errors import InputError

Precision = Literal["auto", "no", "fp16", "bf16"]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor"]


@dataclass(frozen=True)
class LPO:
    """Align a diffusion model with a latent reward model (arXiv 2502.01051, section 3.3)."""

    model: str = ""
    """Stable Diffusion: a diffusers directory, a hub name (ORG/NAME) or a single-file .safetensors or .ckpt checkpoint."""
    revision: str = ""
    """Branch, tag or commit of a hub name; default: its main branch."""
    vae: str = ""
    """Another VAE: a directory or hub name (SDXL: madebyollin/sdxl-vae-fp16-fix); default: the model's own."""
    resolution: int = 0
    """Height and width of the pictures in pixels; 0: the denoiser's own."""
    lrm: str = ""
    """Latent reward model: a directory written by `lrm` or by the official code, its single .pt file, or a hub name."""
    lrm_base: str = ""
    """Diffusers directory with what the LRM's directory lacks: tokenizer, a frozen text encoder (default: the model)."""
    prompts: str = ""
    """Prompts: .json (strings, or objects with the caption key), .jsonl, .txt (a line each), .csv or .parquet."""
    caption_key: str = "caption"
    """Key or column of the prompt."""
    out: str = "runs/lpo"
    """Run directory."""
    resume: bool = False
    """Go on from the state in the run directory."""
    seed: int = 42
    """All randomness is a function of the seed, the epoch, the prompt, the step and the candidate."""
    epochs: int = 5
    """Passes over the prompts."""
    max_batches: int = 0
    """Stop after so many prompt batches; 0: no limit."""

    batch_size: int = 5
    """Prompts a sampling batch."""
    num_steps: int = 20
    """Denoising steps T."""
    eta: float = 1.0
    """DDIM's eta; 1 is ancestral sampling."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, in sampling and in training."""
    num_candidates: int = 4
    """Candidates K of the next latent at every step."""
    start_step: int = 0
    """First step with candidates and pairs (official: divert_start_step)."""
    stop_step: int = 0
    """End the trajectory before this step; 0: at its end (official: divert_end_step)."""
    threshold_shape: Literal["none", "linear", "sigma", "variance"] = "sigma"
    """How the smallest difference of a valid pair grows with the timestep; none: the constant threshold_min."""
    threshold_min: float = 0.35
    """Threshold at the least noisy timestep, a difference of probabilities."""
    threshold_max: float = 0.5
    """Threshold at the noisiest timestep."""

    full: bool = False
    """Full fine-tuning instead of a LoRA."""
    rank: int = 4
    """LoRA rank."""
    alpha: float = 0.0
    """LoRA alpha; 0: the rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Modules that get a LoRA."""
    lora: str = ""
    """Start from this LoRA (official or diffusers form)."""

    train_batch_size: int = 10
    """Pairs a forward and backward pass."""
    accumulate: int = 1
    """Passes an optimizer step."""
    beta: float = 500.0
    """DPO's inverse temperature."""
    clip_eps: float = 0.1
    """Ratios are clamped to 1 ± clip_eps."""
    learning_rate: float = 6e-5
    """Constant."""
    optimizer: Optimizer = "adamw"
    """AdamW, bitsandbytes' 8-bit or paged 8-bit AdamW, or Adafactor (the given rate, no momentum: it has no betas)."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.999
    """AdamW's second beta."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this."""
    ema_decay: float = 0.0
    """Export an exponential moving average of the trained weights; 0: export the weights."""
    mixed_precision: Precision = "auto"
    """Precision of the networks; auto: fp16 on CUDA, fp32 on a CPU."""
    fused_norms: bool = False
    """GroupNorm fused with what stands around it, in channels-last networks; no gain is measured yet."""

    save_epochs: int = 1
    """Epochs between checkpoints."""
    save_batches: int = 50
    """Prompt batches between saved states (for --resume)."""
    pictures: int = 16
    """Prompts drawn before and after for the report."""
    log_with: str = ""
    """Tracker of accelerate: tensorboard, wandb, …"""

    def check(self) -> None:
        """Raise InputError for a setting that cannot work."""
        _finite(self)
        _at_least(self, 1, "epochs", "batch_size", "num_steps", "train_batch_size", "accumulate", "save_epochs",
                  "save_batches")
        _at_least(self, 2, "num_candidates")
        _at_least(self, 0, "resolution", "max_batches", "start_step", "stop_step", "pictures", "seed", "weight_decay",
                  "adam_beta1", "learning_rate", "guidance_scale", "alpha", "threshold_min", "ema_decay", "adam_beta2")
        _above(self, 0, "eta", "beta", "clip_eps", "max_grad_norm", "adam_epsilon")
        _below(self, 1, "threshold_min", "threshold_max", "ema_decay", "adam_beta1", "adam_beta2")
        if self.num_steps > 999:
            _refuse(self, "num_steps", "as many steps as training timesteps", "use at most 999")
        if self.threshold_shape != "none" and self.threshold_min > self.threshold_max:
            _refuse(self, "threshold_min", f"above --threshold-max {self.threshold_max}", "swap the two")
        last = self.stop_step or self.num_steps
        if last > self.num_steps:
            _refuse(self, "stop_step", f"beyond the {self.num_steps} steps", "use at most --num-steps")
        if self.start_step >= last:
            _refuse(self, "start_step", f"no step is left before step {last}", "use a smaller start")
        if self.full and self.lora:
            _refuse(self, "lora", "full fine-tuning has no LoRA to start from", "drop --lora or --full")
        if not self.full:
            _at_least(self, 1, "rank")


@dataclass(frozen=True)
class LRM:
    """Train a latent reward model from preference pairs (arXiv 2502.01051, section 3.2)."""

    model: str = ""
    """Stable Diffusion that the LRM starts from: as in `lpo`."""
    revision: str = ""
    """Branch, tag or commit of a hub name; default: its main branch."""
    vae: str = ""
    """Another VAE: a directory or hub name (SDXL: madebyollin/sdxl-vae-fp16-fix); default: the model's own."""
    pairs: str = ""
    """Training pairs in Pick-a-Pic layout: a .parquet file or a directory of them."""
    validation_pairs: str = ""
    """Held-out pairs, same layout."""
    clip: str = ""
    """CLIP ViT-L/14 checkpoint whose text projection W_t starts from (SD1.5); default: the identity."""
    scores: str = ""
    """Score table (.csv) of the multi-preference consistent filter, a row a training pair; default: keep every pair."""
    filter_strategy: Literal[1, 2, 3] = 2
    """Which rows of the score table are kept."""
    out: str = "runs/lrm"
    """Run directory."""
    resume: bool = False
    """Go on from the state in the run directory."""
    seed: int = 42
    """All randomness is a function of the seed, the step and the pair."""

    multi_scale: bool = True
    """Pool every down block, not the mid block alone."""
    multi_scale_cfg: bool = False
    """Guide the down blocks' features as well."""
    guidance_scale: tuple[float, ...] = (7.5,)
    """Guidance of the mid feature; 1 switches it off. Several: interpolated over the timesteps, from t = 0 to 999."""
    freeze_text_encoder: bool = False
    """Train the denoiser and the projections alone."""
    resolution: int = 0
    """Pictures are resized to this square; 0: the denoiser's own."""
    largest_timestep: int = 951
    """Training timesteps are 1, 51, … up to this."""

    batch_size: int = 128
    """Pairs a step."""
    max_steps: int = 4000
    """Optimizer steps."""
    learning_rate: float = 1e-5
    """Peak rate, decayed linearly to 0 at max_steps."""
    warmup_steps: int = 500
    """Steps of warm-up."""
    warmup: Literal["log", "linear"] = "log"
    """Shape of the warm-up; log is the official one: lr·ln(k+1)/ln(steps)."""
    optimizer: Optimizer = "adamw"
    """AdamW, bitsandbytes' 8-bit or paged 8-bit AdamW, or Adafactor (the given rate, no momentum: it has no betas)."""
    weight_decay: float = 0.3
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this."""
    loss_type: Literal["pair", "batch", "both"] = "pair"
    """Compare within pairs, over the batch, or both."""
    batch_coeff: float = 1.0
    """Weight of the batch loss in `both`."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of the networks; auto: bf16 on CUDA, fp32 on a CPU."""
    fused_norms: bool = False
    """GroupNorm fused with what stands around it, in channels-last networks; no gain is measured yet."""

    validate_steps: int = 100
    """Steps between validations and saved states; the best checkpoint is what is handed on."""
    num_workers: int = 2
    """Processes that decode pictures."""
    log_with: str = ""
    """Tracker of accelerate: tensorboard, wandb, …"""

    def check(self) -> None:
        """Raise InputError for a setting that cannot work."""
        _finite(self)
        _at_least(self, 1, "batch_size", "max_steps", "validate_steps")
        _at_least(self, 0, "seed", "resolution", "warmup_steps", "weight_decay", "num_workers", "learning_rate")
        if not self.guidance_scale or min(self.guidance_scale) < 0:
            _refuse(self, "guidance_scale", "not one or more numbers of at least 0", "use 7.5, or 1 for none")
        _above(self, 0, "max_grad_norm")
        if not 1 <= self.largest_timestep <= 999:
            _refuse(self, "largest_timestep", "not a training timestep", "use 1 to 999")
        if self.warmup_steps >= self.max_steps:
            _refuse(self, "warmup_steps", f"the run ends at step {self.max_steps}", "use fewer than --max-steps")


@dataclass(frozen=True)
class Demo:
    """Both stages on the embedded world: train an LRM, align the tiny pipeline with it, count the right pictures."""

    out: str = "runs/demo"
    """Run directory; an earlier demo there is replaced."""
    seed: int = 0
    """All randomness is a function of it."""
    pictures: int = 200
    """Pictures of held-out captions that are judged before and after."""

    def check(self) -> None:
        """Raise InputError for a setting that cannot work."""
        _at_least(self, 0, "seed")
        _at_least(self, 1, "pictures")


class Recipe(NamedTuple):
    """The settings of both stages for one kind of model."""

    lrm: LRM
    lpo: LPO


def sd15() -> Recipe:
    """The paper's recipe for Stable Diffusion 1.5."""
    return Recipe(LRM(), LPO())


def sd21() -> Recipe:
    """Stable Diffusion 2.1: aligned with an SD1.5 LRM, otherwise as SD1.5."""
    return sd15()


def sdxl() -> Recipe:
    """The paper's recipe for SDXL."""
    recipe = sd15()
    return Recipe(
        replace(recipe.lrm, batch_size=32, max_steps=8000, warmup_steps=1000),
        replace(recipe.lpo, batch_size=4, train_batch_size=4, rank=64, learning_rate=1e-5,
                threshold_min=0.45, threshold_max=0.6),
    )


def shapes() -> Recipe:
    """The embedded world: both stages in minutes on two CPU cores."""
    recipe = sd15()
    return Recipe(
        replace(recipe.lrm, seed=0, batch_size=64, max_steps=250, learning_rate=1e-3, weight_decay=0.01,
                warmup_steps=20, warmup="linear", validate_steps=125, num_workers=0),
        replace(recipe.lpo, seed=0, epochs=1, max_batches=8, batch_size=32, guidance_scale=2.25, rank=16,
                learning_rate=7e-4, train_batch_size=32),
    )


def _finite(config: LPO | LRM) -> None:
    for key, value in vars(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            _refuse(config, key, "not a finite number", "use a finite number")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _refuse(config: LPO | LRM | Demo, key: str, problem: str, remedy: str) -> None:
    raise InputError(str(getattr(config, key)), problem, remedy, _flag(key))


def _at_least(config: LPO | LRM | Demo, bound: float, *keys: str) -> None:
    for key in keys:
        if not getattr(config, key) >= bound:
            _refuse(config, key, f"below {bound}", f"use {bound} or more")


def _above(config: LPO | LRM | Demo, bound: float, *keys: str) -> None:
    for key in keys:
        if not getattr(config, key) > bound:
            _refuse(config, key, f"not above {bound}", f"use a number above {bound}")


def _below(config: LPO | LRM | Demo, bound: float, *keys: str) -> None:
    for key in keys:
        if not getattr(config, key) < bound:
            _refuse(config, key, f"not below {bound}", f"use a number below {bound}")
