"""Refuse settings that cannot work, each with its key and a remedy, before anything is read or written.

Checks that depend on files are in the other modules of preflight/.
"""

import math
import re

from lpo_fast import cli
from lpo_fast.config import LPO, LRM, Demo
from lpo_fast.errors import InputError
from lpo_fast.system import reading


def lpo(config: LPO) -> None:
    """Raise InputError for a setting of an LPO run that cannot work."""
    _finite(config)
    _names(config)
    _at_least(config, 1, "epochs", "batch_size", "num_steps", "train_batch_size", "accumulate", "save_epochs",
              "save_steps", "validation_pictures", "validate_epochs")
    _at_least(config, 2, "num_candidates")
    _at_least(config, 0, "resolution", "max_batches", "pictures", "seed", "weight_decay", "adam_beta1",
              "learning_rate", "guidance_scale", "alpha", "threshold_min", "ema_decay", "adam_beta2",
              "keep_checkpoints")
    _above(config, 0, "eta", "beta", "clip_eps", "max_grad_norm", "adam_epsilon")
    _below(config, 1, "threshold_min", "threshold_max", "ema_decay", "adam_beta1", "adam_beta2")
    if config.num_steps > 999:
        _refuse(config, "num_steps", "is not below the 1000 training timesteps", "use at most 999")
    if config.threshold_shape != "none" and config.threshold_min > config.threshold_max:
        _refuse(config, "threshold_min", f"is above --threshold-max {config.threshold_max}", "swap the two")
    if not re.fullmatch(r"([0-9]{0,3}:[0-9]{0,3})?", config.steps_used):
        _refuse(config, "steps_used", "is not FIRST:END",
                "use two step numbers, such as 0:5, or leave it out for all steps")
    first, end = config.window
    if end > config.num_steps:
        _refuse(config, "steps_used", f"ends beyond the {config.num_steps} steps",
                "end it at --num-steps or earlier")
    if first >= end:
        _refuse(config, "steps_used", f"leaves no step before step {end}", "use a smaller FIRST")
    if not 0 <= config.preempt_exit_code <= 255:
        _refuse(config, "preempt_exit_code", "is not an exit code", "use 0 to 255")
    if config.lrm_guidance and min(config.lrm_guidance) < 0:
        _refuse(config, "lrm_guidance", "are not numbers of at least 0", "use 7.5, or 1 for no guidance")
    if not all(prompt.strip() for prompt in config.validation_prompts):
        _refuse(config, "validation_prompts", "one is blank", "remove it")
    if config.resume and config.resume_from:
        _refuse(config, "resume_from", "--resume continues from the run directory", "drop one of the two")
    if config.lora and config.resume_from:
        _refuse(config, "resume_from", "--lora starts from other weights", "drop one of the two")
    if config.deterministic and config.attention != "sdpa":
        _refuse(config, "attention", "is not deterministic, or is chosen by timing",
                "use sdpa, or drop --deterministic")
    if config.full and config.lora:
        _refuse(config, "lora", "full fine-tuning has no LoRA to start from", "drop --lora or --full")
    if config.shard and not config.full:
        _refuse(config, "shard", "a LoRA is small and is not sharded", "drop --shard, or use --full")
    if config.shard and config.compile in ("default", "max"):
        _refuse(config, "compile", "cannot be combined with --shard", "use auto or none, or drop --shard")
    if config.shard and config.optimizer != "adamw":
        _refuse(config, "optimizer", "keeps no state that can be sharded", "use adamw, or drop --shard")
    if not config.full:
        _at_least(config, 1, "rank")


def lrm(config: LRM) -> None:
    """Raise InputError for a setting of an LRM run that cannot work."""
    _finite(config)
    _names(config)
    _at_least(config, 1, "batch_size", "max_steps", "validate_steps", "save_steps", "accumulate",
              "timestep_interval")
    _at_least(config, 0, "seed", "resolution", "warmup_steps", "weight_decay", "num_workers", "learning_rate",
              "limit_examples_per_prompt", "aux_loss_coeff", "noise_offset", "max_corrupt",
              "keep_checkpoints")
    if not config.guidance_scale or min(config.guidance_scale) < 0:
        _refuse(config, "guidance_scale", "is not one or more numbers of at least 0",
                "use 7.5, or 1 for no guidance")
    _above(config, 0, "max_grad_norm")
    if not 1 <= config.largest_timestep <= 999:
        _refuse(config, "largest_timestep", "is not a training timestep", "use 1 to 999")
    if not 0 <= config.constant_timestep <= 999:
        _refuse(config, "constant_timestep", "is not a timestep", "use 0 to 999")
    if config.batch_size % config.accumulate:
        _refuse(config, "accumulate", f"does not divide --batch-size {config.batch_size}",
                "use a divisor of it")
    if config.compare_between_timestep and not config.variable_timestep:
        _refuse(config, "compare_between_timestep", "there is only one timestep", "use --variable-timestep")
    count = len(range(1, config.largest_timestep + 1, 50))
    if config.compare_between_timestep and 2 * config.timestep_interval > count:
        _refuse(config, "timestep_interval", f"is more than half of the {count} training timesteps",
                "use a smaller one")
    if config.cache_latents and config.hflip:
        _refuse(config, "cache_latents",
                "cannot be combined with --hflip: a mirrored picture has different latents",
                "drop one of the two")
    if config.warmup_steps >= config.max_steps:
        _refuse(config, "warmup_steps", f"the run ends at step {config.max_steps}",
                "use fewer than --max-steps")


def demo(config: Demo) -> None:
    """Raise InputError for a setting of the demo that cannot work."""
    _at_least(config, 0, "seed")
    _at_least(config, 1, "pictures")


def _finite(config: LPO | LRM) -> None:
    for key, value in vars(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            _refuse(config, key, "is not a finite number", "use a finite number")


def _names(config: LPO | LRM) -> None:
    """Refuse names with which a tracker would create directories outside of the run."""
    for key in ("tracker_project", "run_name"):
        if (name := getattr(config, key)) and not reading.component(name):
            _refuse(config, key, "is not the name of a directory", "use a name without / and ..")


def _refuse(config: LPO | LRM | Demo, key: str, problem: str, remedy: str) -> None:
    raise InputError(str(getattr(config, key)), problem, remedy, cli.flag(key))


def _at_least(config: LPO | LRM | Demo, bound: float, *keys: str) -> None:
    for key in keys:
        if not getattr(config, key) >= bound:
            _refuse(config, key, f"is below {bound}", f"use {bound} or more")


def _above(config: LPO | LRM | Demo, bound: float, *keys: str) -> None:
    for key in keys:
        if not getattr(config, key) > bound:
            _refuse(config, key, f"is not above {bound}", f"use a number above {bound}")


def _below(config: LPO | LRM | Demo, bound: float, *keys: str) -> None:
    for key in keys:
        if not getattr(config, key) < bound:
            _refuse(config, key, f"is not below {bound}", f"use a number below {bound}")
