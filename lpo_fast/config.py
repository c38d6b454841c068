"""Every setting of a run as frozen dataclasses, and the recipes as functions: shapes(), sd15(), sd21(), sdxl().

preflight/settings.py refuses values that cannot work.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from tyro.conf import arg

Precision = Literal["auto", "no", "fp16", "bf16"]
Compile = Literal["auto", "none", "default", "max"]
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
    lrm_tokenizer: str = ""
    """The LRM's tokenizer, a directory or hub name (SDXL: with tokenizer/ and tokenizer_2/); default: its own or its base's."""
    lrm_guidance: tuple[float, ...] = ()
    """Guidance of the LRM's mid feature, as in LRM training; default: what its directory records, or 7.5."""
    lrm_multi_scale_cfg: bool | None = None
    """Guide the LRM's down features too; default: what its directory records, or not."""
    prompts: str = ""
    """Prompts: .json (strings, or objects with the caption key), .jsonl, .txt (a line each), .csv or .parquet."""
    caption_key: str = "caption"
    """Key or column of the prompt."""
    out: str = "runs/lpo"
    """Run directory."""
    resume: bool = False
    """Go on from the state in the run directory."""
    dry_run: bool = False
    """The command checks everything as for a run, prints what the run would train, hold and compute, and ends."""
    resume_from: str = ""
    """Start from a checkpoint_{epoch} directory (or the newest of a directory of them), official or ours: in a new run,
    or in the run directory --out itself, whose later epochs are run again."""
    seed: int = 42
    """All randomness is a function of the seed, the epoch, the prompt, the step and the candidate."""
    epochs: int = 5
    """Passes over the prompts."""
    max_batches: int = 0
    """Stop after so many prompt batches, with --resume-from counted from there; 0: no limit."""

    batch_size: int = 5
    """Prompts a sampling batch."""
    shuffle: bool = True
    """A new order of the prompts each epoch."""
    drop_last: bool = False
    """Leave out an epoch's last prompt batch if it is smaller."""
    num_steps: int = 20
    """Denoising steps T."""
    eta: float = 1.0
    """DDIM's eta; 1 is ancestral sampling."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, in sampling and in training."""
    num_candidates: int = 4
    """Candidates K of the next latent at every step."""
    steps_used: str = ""
    """FIRST:END of the denoising steps, as 0:5: candidates and pairs from step FIRST on, the trajectory ends before END
    (official: divert_start_step, divert_end_step); default: all. An approximation: later steps then teach nothing."""
    threshold_shape: Literal["none", "linear", "sigma", "variance"] = "sigma"
    """How the smallest difference of a valid pair grows with the timestep; none: the constant threshold_min."""
    threshold_min: float = 0.35
    """Threshold at the least noisy timestep, a difference of probabilities."""
    threshold_max: float = 0.5
    """Threshold at the noisiest timestep."""

    full: bool = False
    """Full fine-tuning instead of a LoRA."""
    shard: bool = False
    """Shard weights, gradients and optimizer state of --full over the processes (FSDP)."""
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
    train_cfg: bool = True
    """Guidance in training as in sampling; without it the text pass alone (guidance 1)."""
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
    attention: Literal["sdpa", "xformers", "auto"] = "sdpa"
    """PyTorch's attention or xformers'; auto: the faster of the two, timed on the policy at the start of the run."""
    deterministic: bool = False
    """Equal bits on repeat on one GPU too, where that costs speed (how much is not measured); on a CPU runs are so anyway."""
    compile: Compile = "auto"
    """Compile the sampling step and the training step: "default", "max" (searches longer), or "none"; auto: on a GPU."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute activations again in the backward pass of training, which takes less memory and more time: all but what
    convolutions and attention give, or all within the denoiser's blocks."""
    tf32: bool = True
    """TensorFloat-32 in what runs in fp32 on CUDA."""
    profile: bool = False
    """Profile the third prompt batch, or the last of a shorter run: profile/table.md and a trace in the run directory."""

    save_epochs: int = 1
    """Epochs between checkpoints."""
    keep_checkpoints: int = 0
    """Checkpoints kept, the newest; 0: all."""
    save_steps: int = 50
    """Optimizer steps between saved states (for --resume)."""
    preempt_exit_code: int = 0
    """Exit code after SIGTERM or SIGINT; 0: 128 + the signal's number."""
    pictures: int = 16
    """Prompts drawn before and after for the report."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts drawn during training."""
    validation_pictures: int = 2
    """Pictures of each of them."""
    validate_epochs: int = 1
    """Epochs between such drawings."""
    log_with: str = ""
    """Tracker of accelerate: tensorboard, wandb, …"""
    tracker_project: str = "lpo"
    """The tracker's project."""
    tracker_entity: str = ""
    """The tracker's team (wandb)."""
    run_name: str = ""
    """The run's name in the tracker; default: the tracker's choice."""

    @property
    def train_guidance(self) -> float:
        """Guidance of policy and reference in training."""
        return self.guidance_scale if self.train_cfg else 1.0

    @property
    def window(self) -> tuple[int, int]:
        """First step with candidates, and the one before which the trajectory ends."""
        first, _, end = self.steps_used.partition(":")
        return int(first or 0), int(end or 0) or self.num_steps

    @property
    def in_place(self) -> bool:
        """Whether --resume-from names a checkpoint in the run directory itself, as official launches go on."""
        out, source = Path(self.out).resolve(), Path(self.resume_from).resolve()
        return bool(self.resume_from) and out in (source, source.parent)

    @property
    def compiled(self) -> str:
        """--compile, but for sharded weights, which are gathered between the operations of a graph."""
        return "none" if self.shard else self.compile


@dataclass(frozen=True)
class Columns:
    """Names of the pairs' columns. A name may index a list: images[0]. An empty name: the column is not used."""

    caption: str = "caption"
    """The prompt."""
    jpg_0: str = "jpg_0"
    """First picture: encoded bytes, a {bytes, path} structure as datasets stores, or a file name."""
    jpg_1: str = "jpg_1"
    """Second picture."""
    label_0: str = "label_0"
    """1, 0, or 0.5 for a tie. Empty: 1 less the other label; both empty: the first picture is the preferred one."""
    label_1: str = "label_1"
    """The other picture's label."""
    are_different: str = "are_different"
    """Whether there is a preference; where the column is absent, the labels say."""
    has_label: str = "has_label"
    """Whether the pair was judged; where the column is absent, every pair was."""
    num_example_per_prompt: str = "num_example_per_prompt"
    """Pairs of that prompt, whose inverse is the pair's weight; where the column is absent, they are counted."""
    image_0_uid: str = "image_0_uid"
    """Key of the first picture: for the score table and only_on_best."""
    image_1_uid: str = "image_1_uid"
    """Key of the second picture."""

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
    """Training pairs: a .parquet file, a directory of them, a directory of datasets' save_to_disk, or a hub data set."""
    validation_pairs: str = ""
    """Held-out pairs, in any of these forms; may be the same as --pairs if that has splits."""
    test_pairs: str = ""
    """Pairs that the LRM handed on is tested on, once, at the end."""
    train_split: str = "train"
    """Split of --pairs, if it has splits."""
    validation_split: str = "validation_unique"
    """Split of --validation-pairs, if it has splits."""
    test_split: str = "test_unique"
    """Split of --test-pairs, if it has splits."""
    cache_dir: str = ""
    """Where datasets keeps what it downloads and converts; default: its own cache."""
    columns: Columns = Columns()
    """Names of the pairs' columns."""
    keep_only_different: bool = False
    """Leave ties out."""
    keep_only_with_label: bool = False
    """Leave out pairs that were not judged."""
    keep_only_with_label_in_validation: bool = True
    """Leave them out of validation and test."""
    limit_examples_per_prompt: int = 0
    """Use the first pairs of each prompt, at most so many; 0: all."""
    only_on_best: bool = False
    """Put the best picture of the chain of preferences that leads from the other one in the preferred one's place."""
    compare_between_timestep: bool = False
    """Add to each win–lose pair one of the preferred picture at two timesteps, the less noisy one preferred."""
    timestep_interval: int = 1
    """How many training timesteps (of 50) lie between the two."""
    aux_loss_coeff: float = 1.0
    """Weight of such a pair's loss."""
    hflip: bool = False
    """Mirror each training picture with probability ½."""
    noise_offset: float = 0.0
    """Add so much of a normal number a channel to the noise in training and validation; 0: none."""
    max_corrupt: int = 100
    """Pairs whose pictures do not decode are left out, and counted; a run with more of them stops."""
    clip: str = ""
    """CLIP ViT-L/14 checkpoint whose text projection W_t starts from (SD1.5); default: the identity."""
    scores: str = ""
    """Score table (.csv) of the multi-preference consistent filter: joined by image_0_uid and image_1_uid if it and the
    pairs have them, else a row a training pair in their order; default: keep every pair."""
    filter_strategy: Literal[0, 1, 2, 3] = 2
    """Smallest aesthetic gap of a win–lose pair: 0, -0.5, -1 by 1, 2, 3; 0: no filter, the table only says what is a tie."""
    out: str = "runs/lrm"
    """Run directory."""
    resume: bool = False
    """Go on from the state in the run directory."""
    dry_run: bool = False
    """The command checks everything as for a run, prints what the run would train, hold and compute, and ends."""
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
    logit_scale: float = 2.6592
    """Logarithm of the scale of scores that training starts from."""
    resolution: int = 0
    """Pictures are resized to this square; 0: the denoiser's own."""
    largest_timestep: int = 951
    """Training timesteps are 1, 51, … up to this."""
    variable_timestep: bool = True
    """Train at these timesteps and validate at t = 1; else both at constant_timestep."""
    constant_timestep: int = 1
    """The one timestep if variable_timestep is off."""

    batch_size: int = 128
    """Pairs an optimizer step, over all passes and processes."""
    accumulate: int = 1
    """Passes that a step's batch is split into, to save memory; the loss is the whole batch's (with loss_type pair)."""
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
    deterministic: bool = False
    """Equal bits on repeat on one GPU too, where that costs speed (how much is not measured); on a CPU runs are so anyway."""
    compile: Compile = "auto"
    """Compile the step: "default", "max" (searches longer), or "none"; auto: on a GPU."""
    fused_norms: bool = False
    """GroupNorm fused with what stands around it, in channels-last networks; no gain is measured yet."""

    eval_on_start: bool = True
    """Validate before the first step too; it tells whether anything was learned, and leaves no checkpoint."""
    validate_steps: int = 100
    """Steps between validations, each of which may leave a checkpoint."""
    save_steps: int = 100
    """Steps between saved states (for --resume)."""
    save_only_if_best: bool = True
    """Write checkpoint-gstep{N} only where no validation before was better (those after step 0 count; of equals the
    later is written)."""
    keep_checkpoints: int = 1
    """Checkpoints kept; 0: all."""
    keep_best: bool = True
    """Keep the best checkpoints by validation accuracy, else the newest (and the best one, if it becomes checkpoint-final)."""
    final_checkpoint: Annotated[Literal["best", "last"], arg(aliases=["--handed-on"])] = "best"
    """Which LRM becomes checkpoint-final: the best by validation accuracy (after step 0; of equals the later), or the last
    step's as official."""
    num_workers: int = 2
    """Processes that decode pictures, beside each training process; 0: the training process itself."""
    cache_latents: str = ""
    """Directory that keeps what the VAE says of each picture, which then is decoded and encoded once: exact, since a step
    samples from it anew. SD1.5 takes 64 KiB a picture in bf16 (SDXL 256), twice that in fp32; default: none is kept."""
    log_with: str = ""
    """Tracker of accelerate: tensorboard, wandb, …"""
    tracker_project: str = "reward_model"
    """The tracker's project."""
    tracker_entity: str = ""
    """The tracker's team (wandb)."""
    run_name: str = ""
    """The run's name in the tracker; default: the tracker's choice."""

@dataclass(frozen=True)
class Demo:
    """Both stages on the embedded world: train an LRM, align the tiny pipeline with it, count the right pictures."""

    out: str = "runs/demo"
    """Run directory; an earlier demo there is replaced."""
    seed: int = 0
    """All randomness is a function of it."""
    pictures: int = 200
    """Pictures of held-out captions that are judged before and after."""

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
                warmup_steps=20, warmup="linear", validate_steps=125, save_steps=125, num_workers=0,
                eval_on_start=False),
        replace(recipe.lpo, seed=0, epochs=1, max_batches=8, batch_size=32, guidance_scale=2.25, rank=16,
                learning_rate=7e-4, train_batch_size=32),
    )
