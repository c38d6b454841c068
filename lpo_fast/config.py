"""Every setting of a run as frozen dataclasses, and the recipes as functions:
shapes(), sd15(), sd21(), sdxl().

A stage's settings are the sum of small groups, so that a function can ask for the group that it needs. The
names of the fields are the names of the flags, and the string below a field is its --help text and its row in
docs/settings.md (python docs/generate_settings.py). preflight/settings.py refuses values that cannot work.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

Precision = Literal["auto", "no", "fp16", "bf16"]
Compile = Literal["auto", "none", "default", "max"]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor"]


# Groups of both stages


@dataclass(frozen=True, kw_only=True)
class Model:
    """The Stable Diffusion model that is trained."""

    model: str = ""
    """Stable Diffusion model: a diffusers directory, a hub name (ORG/NAME),
    or a single-file .safetensors or .ckpt checkpoint."""
    revision: str = ""
    """Branch, tag, or commit of a hub name; default: its main branch."""
    vae: str = ""
    """Another VAE: a directory or hub name (SDXL: madebyollin/sdxl-vae-fp16-fix); default: the model's own.
    """
    resolution: int = 0
    """Height and width of the pictures in pixels; 0: the denoiser's own."""


@dataclass(frozen=True, kw_only=True)
class Seed:
    """The source of all randomness."""

    seed: int = 42
    """Seed. Noise is a function of the seed and of what it is for (epoch or step, prompt or pair, candidate),
    so results do not depend on batch sizes or world size."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """Where a run writes, and how it resumes."""

    out: str = "runs/run"
    """Run directory."""
    resume: bool = False
    """Resume from the state saved in the run directory; without one, start from the beginning."""
    dry_run: bool = False
    """Check everything, print what the run would train, hold in memory, and compute, and exit."""
    save_steps: int = 50
    """Optimizer steps between saved states (for --resume)."""
    keep_checkpoints: int = 0
    """Number of checkpoints to keep; 0: all."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """The optimizer of both stages."""

    accumulate: int = 1
    """Forward and backward passes per optimizer step."""
    learning_rate: float = 6e-5
    """Learning rate."""
    optimizer: Optimizer = "adamw"
    """AdamW, 8-bit or paged 8-bit AdamW (bitsandbytes), or Adafactor (fixed learning rate, no momentum)."""
    weight_decay: float = 1e-4
    """Weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient norm to this value."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Precision and compilation."""

    mixed_precision: Precision = "auto"
    """Precision of the networks; auto: fp16 on CUDA, fp32 on a CPU."""
    fused_norms: bool = False
    """Use the fused channels-last GroupNorm kernel in the denoiser; no gain has been measured yet."""
    deterministic: bool = False
    """Repeat a run bit for bit on a GPU too, at a cost in speed (not measured); CPU runs always repeat."""
    compile: Compile = "auto"
    """Compile the steps: "default", "max" (searches longer), or "none"; auto: "default" on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """An experiment tracker beside the run's own files."""

    log_with: str = ""
    """Tracker supported by accelerate: tensorboard, wandb, ..."""
    tracker_project: str = ""
    """Project in the tracker."""
    tracker_entity: str = ""
    """Team in the tracker (wandb)."""
    run_name: str = ""
    """Name of the run in the tracker; default: the tracker's choice."""


# Groups of LPO


@dataclass(frozen=True, kw_only=True)
class Reward(Model):
    """The latent reward model that scores candidates."""

    lrm: str = ""
    """Latent reward model: a directory written by `lrm` or by the official code, an official single .pt file,
    or a hub name."""
    lrm_base: str = ""
    """Diffusers directory with what the LRM's directory lacks: tokenizer, a frozen text encoder; default:
    the model."""
    lrm_tokenizer: str = ""
    """The LRM's tokenizer, a directory or hub name (SDXL: with tokenizer/ and tokenizer_2/); default:
    its own or its base's."""
    lrm_guidance: tuple[float, ...] = ()
    """Guidance of the LRM's mid feature, as in LRM training; default: as recorded in its directory, or 7.5.
    """
    lrm_multi_scale_cfg: bool | None = None
    """Apply guidance to the LRM's down features too; default: as recorded in its directory, or off."""


@dataclass(frozen=True, kw_only=True)
class Prompts(Seed):
    """The prompts, and how they are dealt into batches."""

    prompts: str = ""
    """Prompts: .json (strings, or objects with the caption key), .jsonl, .txt (one per line), .csv,
    or .parquet."""
    caption_key: str = "caption"
    """Key or column of the prompt."""
    epochs: int = 5
    """Passes over the prompts."""
    max_batches: int = 0
    """Stop after this many prompt batches (with --resume-from, counted from there); 0: no limit."""
    batch_size: int = 5
    """Prompts per sampling batch and process."""
    shuffle: bool = True
    """Reorder the prompts in each epoch."""
    drop_last: bool = False
    """Drop an epoch's last prompt batch if it is smaller."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Seed):
    """Trajectories with K candidates per step, and which candidates make a pair."""

    num_steps: int = 20
    """Denoising steps T."""
    eta: float = 1.0
    """DDIM's eta; 1 is ancestral sampling."""
    guidance_scale: float = 5.0
    """Classifier-free guidance, in sampling and in training."""
    num_candidates: int = 4
    """Candidates K for the next latent at every step."""
    steps_used: str = ""
    """FIRST:END of the denoising steps, such as 0:5: candidates and pairs start at step FIRST, and the
    trajectory ends before END (official: divert_start_step, divert_end_step); default: all steps. An
    approximation: no pairs come from the other steps."""
    threshold_shape: Literal["none", "linear", "sigma", "variance"] = "sigma"
    """How the smallest score gap of a valid pair grows with the timestep; none: the constant threshold_min.
    """
    threshold_min: float = 0.35
    """Threshold at the least noisy timestep, as a difference of probabilities."""
    threshold_max: float = 0.5
    """Threshold at the noisiest timestep."""

    @property
    def window(self) -> tuple[int, int]:
        """Return the first step with candidates, and the step before which the trajectory ends."""
        first, _, end = self.steps_used.partition(":")
        return int(first or 0), int(end or 0) or self.num_steps


@dataclass(frozen=True, kw_only=True)
class Weights(Seed):
    """Which weights train: a LoRA, or all of them."""

    full: bool = False
    """Train all weights instead of a LoRA."""
    shard: bool = False
    """Shard weights, gradients, and optimizer state of --full across ranks (FSDP)."""
    rank: int = 4
    """LoRA rank."""
    alpha: float = 0.0
    """LoRA alpha; 0: the rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Modules that get a LoRA."""
    lora: str = ""
    """Start from this LoRA: official, diffusers, peft, or kohya form (not DoRA)."""


@dataclass(frozen=True, kw_only=True)
class PairLoss(Sampling):
    """Step-level DPO on pairs of latents (arXiv 2502.01051, equation 10)."""

    beta: float = 500.0
    """DPO's inverse temperature."""
    clip_eps: float = 0.1
    """Clamp ratios to 1 ± clip_eps."""
    train_cfg: bool = True
    """Use sampling's guidance in training too; otherwise only the text branch (guidance 1)."""

    @property
    def train_guidance(self) -> float:
        """Return the guidance of policy and reference in training."""
        return self.guidance_scale if self.train_cfg else 1.0


@dataclass(frozen=True, kw_only=True)
class Training(Optimization):
    """Batches and AdamW of LPO."""

    train_batch_size: int = 10
    """Pairs per forward and backward pass."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.999
    """AdamW's second beta."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    ema_decay: float = 0.0
    """Export an exponential moving average of the trained weights with this decay; 0:
    export the weights themselves."""


@dataclass(frozen=True, kw_only=True)
class Speed(Numerics):
    """Attention, recomputation, and profiling of LPO."""

    attention: Literal["sdpa", "xformers", "auto"] = "sdpa"
    """Attention of PyTorch or xformers; auto: time both on the policy when the run starts,
    and use the faster."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass of training, to save memory at the cost of time: all
    activations inside the denoiser's blocks (full), or all but the outputs of convolutions and attention
    (selective)."""
    tf32: bool = True
    """Use TensorFloat-32 for fp32 operations on CUDA."""
    profile: bool = False
    """Profile the third prompt batch, or the last of a shorter run;
    write profile/table.md and a trace to the run directory."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pictures for the report and for validation."""

    pictures: int = 16
    """Prompts to draw before and after training, for the report."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts to draw during training."""
    validation_pictures: int = 2
    """Pictures per validation prompt."""
    validate_epochs: int = 1
    """Epochs between drawings of the validation prompts."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints(RunDirectory):
    """Checkpoints of LPO, and starting from one."""

    out: str = "runs/lpo"
    """Run directory."""
    resume_from: str = ""
    """Start from a checkpoint_{epoch} directory (or the newest in a directory of them), official or ours: in
    a new run, or in the run directory --out itself, whose later epochs then run again."""
    save_epochs: int = 1
    """Epochs between checkpoints."""
    preempt_exit_code: int = 0
    """Exit code after SIGTERM or SIGINT; 0: 128 + the signal's number."""

    @property
    def in_place(self) -> bool:
        """Return whether --resume-from names a checkpoint in --out itself,
        as official launch lines do to continue."""
        out, source = Path(self.out).resolve(), Path(self.resume_from).resolve()
        return bool(self.resume_from) and out in (source, source.parent)


@dataclass(frozen=True, kw_only=True)
class LPO(Tracking, Drawing, Speed, Training, PairLoss, Weights, Prompts, Checkpoints, Reward):
    """Align a diffusion model with a latent reward model (arXiv 2502.01051, section 3.3)."""

    tracker_project: str = "lpo"
    """Project in the tracker."""

    @property
    def compiled(self) -> str:
        """Return --compile; "none" for sharded weights, which are gathered between the operations of a graph.
        """
        return "none" if self.shard else self.compile


# Groups of the LRM


@dataclass(frozen=True)
class Columns:
    """Names of the pairs' columns. A name may index a list: images[0]. An empty name: the column is not used.
    """

    caption: str = "caption"
    """The prompt."""
    jpg_0: str = "jpg_0"
    """First picture: encoded bytes, a {bytes, path} structure as stored by datasets, or a file name."""
    jpg_1: str = "jpg_1"
    """Second picture."""
    label_0: str = "label_0"
    """1, 0, or 0.5 for a tie. Empty: 1 minus the other label; both empty: the first picture is preferred."""
    label_1: str = "label_1"
    """The other picture's label."""
    are_different: str = "are_different"
    """Whether there is a preference; default where the column is absent: by the labels."""
    has_label: str = "has_label"
    """Whether the pair was judged; default where the column is absent: yes."""
    num_example_per_prompt: str = "num_example_per_prompt"
    """Pairs of this prompt; the inverse is the pair's weight. Counted where the column is absent."""
    image_0_uid: str = "image_0_uid"
    """Key of the first picture: for the score table and only_on_best."""
    image_1_uid: str = "image_1_uid"
    """Key of the second picture."""


@dataclass(frozen=True, kw_only=True)
class PairChoice:
    """Which rows of a table of pairs are used."""

    keep_only_different: bool = False
    """Drop ties."""
    keep_only_with_label: bool = False
    """Drop pairs that were not judged."""
    keep_only_with_label_in_validation: bool = True
    """Drop them from validation and test."""
    limit_examples_per_prompt: int = 0
    """Use at most this many pairs of each prompt, the first ones; 0: all."""
    only_on_best: bool = False
    """Replace the preferred picture with the best one of the chain of preferences that starts
    at the other picture."""
    compare_between_timestep: bool = False
    """Add to each win-lose pair one that compares the preferred picture at two timesteps;
    the less noisy is preferred."""
    filter_strategy: Literal[0, 1, 2, 3] = 2
    """Smallest aesthetic gap of a win-lose pair: 0, -0.5, -1 for strategies 1, 2, 3; 0: no filter, and the
    score table only marks ties."""


@dataclass(frozen=True, kw_only=True)
class PairData(PairChoice):
    """Preference pairs of pictures."""

    pairs: str = ""
    """Training pairs: a .parquet file, a directory of them, a directory of datasets' save_to_disk,
    or a hub data set."""
    validation_pairs: str = ""
    """Held-out pairs, in any of these forms; may be the same as --pairs if that has splits."""
    test_pairs: str = ""
    """Pairs on which the final LRM is tested, once, at the end."""
    train_split: str = "train"
    """Split of --pairs, if it has splits."""
    validation_split: str = "validation_unique"
    """Split of --validation-pairs, if it has splits."""
    test_split: str = "test_unique"
    """Split of --test-pairs, if it has splits."""
    cache_dir: str = ""
    """Where datasets stores downloads and conversions; default: its own cache."""
    columns: Columns = field(default_factory=Columns)
    """Names of the pairs' columns."""
    max_corrupt: int = 100
    """Pairs whose pictures do not decode are skipped and counted; a run with more of them stops."""
    scores: str = ""
    """Score table (.csv) of the multi-preference consistent filter: joined by image_0_uid and image_1_uid if
    both it and the pairs have them, else one row per training pair, in order; default: keep every pair."""


@dataclass(frozen=True, kw_only=True)
class Noising(Seed):
    """Timesteps and noise of the training pictures."""

    timestep_interval: int = 1
    """Training timesteps (of 50) between the two of a --compare-between-timestep pair."""
    hflip: bool = False
    """Mirror each training picture with probability 1/2."""
    noise_offset: float = 0.0
    """Add this multiple of one normal number per channel to the noise, in training and validation; 0: none.
    """
    largest_timestep: int = 951
    """Training timesteps are 1, 51, ... up to this."""
    variable_timestep: bool = True
    """Train at these timesteps and validate at t = 1; otherwise train and validate at constant_timestep."""
    constant_timestep: int = 1
    """The single timestep if variable_timestep is off."""


@dataclass(frozen=True, kw_only=True)
class RewardNetwork:
    """What the reward model is made of."""

    clip: str = ""
    """CLIP ViT-L/14 checkpoint whose text projection initializes W_t (SD1.5); default: the identity."""
    multi_scale: bool = True
    """Pool every down block, not only the mid block."""
    multi_scale_cfg: bool = False
    """Apply guidance to the down blocks' features too."""
    guidance_scale: tuple[float, ...] = (7.5,)
    """Guidance of the mid feature; 1 turns it off.
    Several numbers: interpolated over the timesteps, t = 0 to 999."""
    freeze_text_encoder: bool = False
    """Train only the denoiser and the projections."""
    logit_scale: float = 2.6592
    """Initial logarithm of the scale of scores."""


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """The reward model's loss."""

    loss_type: Literal["pair", "batch", "both"] = "pair"
    """Compare within pairs, across the batch, or both."""
    batch_coeff: float = 1.0
    """Weight of the batch loss in "both"."""
    aux_loss_coeff: float = 1.0
    """Weight of the loss of a --compare-between-timestep pair."""


@dataclass(frozen=True, kw_only=True)
class Selection(RunDirectory):
    """Which LRM a run keeps."""

    out: str = "runs/lrm"
    """Run directory."""
    eval_on_start: bool = True
    """Validate before the first step."""
    validate_steps: int = 100
    """Optimizer steps between validations."""
    save_steps: int = 100
    """Optimizer steps between saved states (for --resume)."""
    save_only_if_best: bool = True
    """Write checkpoint-gstep{N} only if no earlier validation after step 0 was better (of
    equals, the later counts)."""
    keep_checkpoints: int = 1
    """Number of checkpoints to keep; 0: all."""
    keep_best: bool = True
    """Keep the best checkpoints by validation accuracy; otherwise the newest (and the best, if it becomes
    checkpoint-final)."""
    final_checkpoint: Literal["best", "last"] = "best"
    """Which LRM becomes checkpoint-final: the best by validation accuracy (after step 0; of equals, the
    later), or the last, as in the official code."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How pictures reach the GPU."""

    num_workers: int = 2
    """Worker processes that decode pictures, per training process; 0: decode in the training process."""
    cache_latents: str = ""
    """Directory that caches the VAE's mean and log-variance of each picture, so that each is decoded and
    encoded once. Exact, since every step draws a new sample. SD1.5 takes 64 KiB per picture in bf16 (SDXL
    256), twice that in fp32; default: no cache."""


@dataclass(frozen=True, kw_only=True)
class LRM(Tracking, Loading, Selection, Numerics, RewardLoss, Optimization, Noising, RewardNetwork, PairData,
          Model):
    """Train a latent reward model from preference pairs (arXiv 2502.01051, section 3.2)."""

    batch_size: int = 128
    """Pairs per optimizer step, over all passes and processes."""
    accumulate: int = 1
    """Passes per optimizer step, to save memory; the loss is that of the whole batch (with loss_type pair).
    """
    max_steps: int = 4000
    """Optimizer steps."""
    learning_rate: float = 1e-5
    """Peak learning rate, decayed linearly to 0 at max_steps."""
    warmup_steps: int = 500
    """Warm-up steps."""
    warmup: Literal["log", "linear"] = "log"
    """Shape of the warm-up; log is the official one: lr·ln(k+1)/ln(steps)."""
    weight_decay: float = 0.3
    """Weight decay."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of the networks; auto: bf16 on CUDA, fp32 on a CPU."""
    tracker_project: str = "reward_model"
    """Project in the tracker."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run both stages on the embedded world: train an LRM, align the tiny pipeline,
    count the correct pictures."""

    out: str = "runs/demo"
    """Run directory; an earlier demo there is replaced."""
    seed: int = 0
    """Seed of all randomness."""
    pictures: int = 200
    """Pictures of held-out captions judged before and after."""


RENAMED = {"final_checkpoint": "handed_on"}  # settings that earlier versions saved under another name


def renamed(saved: dict[str, Any]) -> dict[str, Any]:
    """Return saved settings, possibly of an earlier version, under today's names."""
    old = {name: saved[before] for name, before in RENAMED.items() if before in saved}
    return {name: value for name, value in saved.items() if name not in RENAMED.values()} | old


class Recipe(NamedTuple):
    """The settings of both stages for one kind of model."""

    lrm: LRM
    lpo: LPO


def sd15() -> Recipe:
    """Return the paper's recipe for Stable Diffusion 1.5."""
    return Recipe(LRM(), LPO())


def sd21() -> Recipe:
    """Return the recipe for Stable Diffusion 2.1: aligned with an SD1.5 LRM, otherwise as SD1.5."""
    return sd15()


def sdxl() -> Recipe:
    """Return the paper's recipe for SDXL."""
    recipe = sd15()
    return Recipe(
        replace(recipe.lrm, batch_size=32, max_steps=8000, warmup_steps=1000),
        replace(recipe.lpo, batch_size=4, train_batch_size=4, rank=64, learning_rate=1e-5,
                threshold_min=0.45, threshold_max=0.6),
    )


def shapes() -> Recipe:
    """Return the recipe for the embedded world: both stages in minutes on two CPU cores."""
    recipe = sd15()
    return Recipe(
        replace(recipe.lrm, seed=0, batch_size=64, max_steps=250, learning_rate=1e-3, weight_decay=0.01,
                warmup_steps=20, warmup="linear", validate_steps=125, save_steps=125, num_workers=0,
                eval_on_start=False),
        replace(recipe.lpo, seed=0, epochs=1, max_batches=8, batch_size=32, guidance_scale=2.25, rank=16,
                learning_rate=7e-4, train_batch_size=32),
    )
