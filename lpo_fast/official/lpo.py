"""Translate the official LPO launch line to our settings: --config FILE.py [--config.a.b=value …] [our own
flags].

FILE.py is code and runs, as with the official script, because the user names it on the command line.
FILE.toml, .yaml or .json holds the same keys as data (keys whose value is None are omitted), and no code
runs. Every key is adopted, refused by name, or (dataloader workers) reported to have no effect here.
"""

import ast
import difflib
import os
import runpy
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from lpo_fast import cli
from lpo_fast.config import LPO, Precision
from lpo_fast.errors import InputError
from lpo_fast.official.lrm import flat, typed
from lpo_fast.system import reading

# Official keys whose value sets a field unchanged, and those fields.
SAME = {
    "seed": "seed", "allow_tf32": "tf32", "resume_from": "resume_from",
    "save_interval": "save_epochs", "run_name": "run_name", "wandb_project_name": "tracker_project",
    "pretrained.model": "model", "pretrained.vae_model_name_or_path": "vae", "lora_rank": "rank",
    "preference_model_func_cfg.ft_model_path": "lrm",
    "preference_model_func_cfg.multi_scale_cfg": "lrm_multi_scale_cfg",
    "dataset_cfg.meta_json_path": "prompts", "dataset_cfg.caption_key": "caption_key",
    "dataloader_shuffle": "shuffle", "dataloader_drop_last": "drop_last", "num_epochs": "epochs",
    "sample.num_steps": "num_steps", "sample.eta": "eta", "sample.guidance_scale": "guidance_scale",
    "sample.sample_batch_size": "batch_size", "sample.num_sample_each_step": "num_candidates",
    "train.train_batch_size": "train_batch_size", "train.gradient_accumulation_steps": "accumulate",
    "train.learning_rate": "learning_rate", "train.adam_beta1": "adam_beta1",
    "train.adam_beta2": "adam_beta2", "train.adam_weight_decay": "weight_decay",
    "train.adam_epsilon": "adam_epsilon", "train.max_grad_norm": "max_grad_norm", "train.cfg": "train_cfg",
    "train.beta": "beta", "train.eps": "clip_eps", "num_validation_images": "validation_pictures",
    "eval_interval": "validate_epochs",
}
# Keys that ``settings`` translates.
WORKED_OUT = {
    "num_checkpoint_limit", "use_checkpointing", "use_xformers", "logdir", "use_wandb", "wandb_entity_name",
    "use_lora", "dynamic_beta", "preference_model_func_cfg.type", "preference_model_func_cfg.multi_scale",
    "preference_model_func_cfg.guidance_scale", "compare_func_cfg.type", "compare_func_cfg.threshold",
    "compare_func_cfg.dynamic_threshold", "compare_func_cfg.threshold_min", "compare_func_cfg.threshold_max",
    "dataset_cfg.type", "dataset_cfg.pretrained_tokenzier_path", "train.use_8bit_adam",
    "sample.num_inner_step", "sample.inner_start_step", "validation_prompts", "train.divert_start_step",
    "train.divert_end_step",
}
IDLE = {"dataloader_num_workers": "prompts are encoded once for the run",
        "dataloader_pin_memory": "no prompt batch is copied"}
SHAPES = ("none", "linear", "sigma", "variance")
NAMES = {"compare_func_cfg.type": "preference_score_compare", "dataset_cfg.type": "PromptDataset"}
DATA = (".toml", ".yaml", ".yml", ".json")
MODELS = ("sd15_preference_model_func", "sdxl_preference_model_func")
CLIP_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # same ids as Stable Diffusion 1.5's


def is_launch(argv: list[str]) -> bool:
    """Return whether a command line is that of the official LPO script."""
    return any(a == "--config" or a.startswith(("--config=", "--config.")) for a in argv)


def split(argv: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """Return the config file, the overrides of its keys, and the remaining arguments, which are our own
    flags.
    """
    file, changes, rest, words = "", {}, [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config" or name.startswith("--config."):
            value = value if equals else next(words, None)
            if value is None:
                raise InputError("(none)", "has no value", f"write {name}=VALUE", name)
            if name == "--config":
                file = value
            else:
                changes[name.removeprefix("--config.")] = value
        else:
            rest.append(word)
    if not file:
        raise InputError("(none)", "names no config file", "add --config FILE.py", "--config")
    return file, changes, rest


def load(file: str) -> dict:
    """Load an official config file.

    A .py file runs and may import from the current directory; the result is what its get_config() returns,
    or, without one (exp_config.py, the record of a run), its names. Other files hold data. Raises InputError
    if the file cannot be used.
    """
    kind = Path(file).suffix
    if not Path(file).is_file():
        raise InputError(file, "no such file", "name an official config file", "--config")
    if kind in DATA:
        return reading.read_config(Path(file), "--config")
    if kind != ".py":
        raise InputError(file, f"unknown file type {kind!r}",
                         f"use .py, which runs, or {', '.join(DATA)}, which do not", "--config")
    sys.path.insert(0, os.getcwd())
    try:
        found = runpy.run_path(file)
        config = (found["get_config"]() if "get_config" in found else
                  {k: v for k, v in found.items() if k[:2] != "__"})
        return plain(config.to_dict() if hasattr(config, "to_dict") else config)
    except ModuleNotFoundError as error:
        remedy = ("pip install 'lpo_fast[official]'" if error.name in ("ml_collections", "absl") else
                  "run the command in the directory from which the official code runs it (lpo/)")
        raise InputError(file, f"imports {error.name}, which cannot be found", remedy, "--config") from error
    except Exception as error:  # the user's code
        raise InputError(file, f"its get_config() fails ({type(error).__name__}: {error})", "fix it",
                         "--config") from error
    finally:
        sys.path.remove(os.getcwd())


def plain(value: object) -> dict:
    """Return nested mappings as dicts."""
    return {key: plain(item) if isinstance(item, Mapping) else item for key, item in value.items()}


def override(config: dict[str, object], changes: dict[str, str],
             others: Collection[str] = ()) -> dict[str, object]:
    """Return the config with values from the command line, each parsed as the type of the file's value.

    others: keys that the file may lack. Raises InputError for an unknown key or a value of another type.
    """
    config = dict.fromkeys(others) | config
    for key, text in changes.items():
        flag = f"--config.{key}"
        if key not in config:
            near = difflib.get_close_matches(key, config, 1)
            raise InputError(text, "no such key in the config file", f"did you mean --config.{near[0]}?"
                             if near else f"it has {', '.join(sorted(config))}", flag)
        before = config[key]
        try:
            value = (text if isinstance(before, str) else
                     {"true": True, "false": False}.get(text.lower(), text))
            if not isinstance(before, str) and isinstance(value, str):
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if isinstance(before, float) and type(value) is int:
            value = float(value)
        if (before is not None and type(value) is not type(before)
                and {type(value), type(before)} != {list, tuple}):
            raise InputError(text, f"is not of type {type(before).__name__}", f"write it like {before!r}",
                             flag)
        config[key] = value
    return config


def settings(config: dict[str, object]) -> tuple[LPO, list[str]]:
    """Return our settings for a flat official config, and notes about what differs here.

    Raises InputError, which names the key, for an unknown key or a value that is not supported.
    """
    known = SAME.keys() | WORKED_OUT | IDLE.keys()
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise InputError(str(config[key]), "is a key that the official code does not have", "remove it" +
                             (f", or did you mean {near[0]}?" if near else ""), f"config.{key}")
    notes = [f"{key} has no effect here: {why}" for key, why in IDLE.items() if key in config]
    for key, only in NAMES.items():
        if config.get(key, only) != only:
            raise InputError(str(config[key]), "is unknown", f"use {only}", f"config.{key}")
    config = {key: value for key, value in config.items() if value is not None}  # as omitted in data files

    def of(key: str, kind: type, default: object) -> Any:
        return typed(f"config.{key}", config.get(key, default), kind)
    if config.get("dynamic_beta"):
        raise InputError("True", "has no effect in the official code", "set it to False",
                         "config.dynamic_beta")
    if of("sample.num_inner_step", int, 0) > 0:
        raise InputError(str(config["sample.num_inner_step"]), "has no effect in the official code",
                         "set it to 0", "config.sample.num_inner_step")
    kind = config.get("preference_model_func_cfg.type")
    if kind not in MODELS:
        raise InputError(str(kind), "is not a known reward model", f"use {' or '.join(MODELS)}",
                         "config.preference_model_func_cfg.type")
    guidance = of("preference_model_func_cfg.guidance_scale", float, 7.5)
    multi_scale = of("preference_model_func_cfg.multi_scale", bool, True)
    lrm = Path(of("preference_model_func_cfg.ft_model_path", str, ""))
    if (lrm.is_file() or (lrm / "state_dict.pt").is_file()) and is_multi_scale(lrm) != multi_scale:
        raise InputError(str(multi_scale), f"the reward model in {lrm} was trained with {not multi_scale}",
                         "use that value", "config.preference_model_func_cfg.multi_scale")
    shape = of("compare_func_cfg.dynamic_threshold", str, "none")
    if shape not in SHAPES:
        raise InputError(shape, "is not a known threshold", f"use {', '.join(SHAPES)}",
                         "config.compare_func_cfg.dynamic_threshold")
    low, high = (of("compare_func_cfg.threshold_min", float, 0.2),
                 of("compare_func_cfg.threshold_max", float, 0.5))
    if shape == "none":
        low = high = of("compare_func_cfg.threshold", float, 0.3)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "auto")
    if precision not in get_args(Precision):
        raise InputError(precision, "is not a precision of LPO training", "launch with fp16, bf16 or no",
                         "ACCELERATE_MIXED_PRECISION")
    first, end = (of(f"train.divert_{name}_step", int, 0) for name in ("start", "end"))
    tokenizer = of("dataset_cfg.pretrained_tokenzier_path", str, CLIP_TOKENIZER)
    prompts = config.get("validation_prompts", ())
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(str(prompts), "is not a list of strings", "use a list of prompts",
                         "config.validation_prompts")
    name = of("run_name", str, "test")
    if not reading.component(name):  # must not leave logdir
        raise InputError(name, "is not the name of a directory in logdir",
                         "use a name without / and .., and set the directory with --config.logdir",
                         "config.run_name")
    kinds = {field.name: type(field.default) for field in fields(LPO)} | {"lrm_multi_scale_cfg": bool}
    values = {field: typed(f"config.{key}", config[key], kinds[field]) for key, field in SAME.items()
              if key in config} | {
        "out": str(Path(of("logdir", str, "logs/lpo")) / name),
        "keep_checkpoints": of("num_checkpoint_limit", int, 0),
        "checkpointing": "full" if of("use_checkpointing", bool, False) else "none",
        "attention": attention(notes) if of("use_xformers", bool, False) else "sdpa",
        "log_with": "wandb" if of("use_wandb", bool, False) else "",
        "tracker_entity": of("wandb_entity_name", str, ""), "full": not of("use_lora", bool, True),
        "lrm_guidance": (guidance,), "threshold_shape": shape, "threshold_min": low, "threshold_max": high,
        "lrm_tokenizer": "" if tokenizer == CLIP_TOKENIZER or kind == MODELS[1] else tokenizer,
        "optimizer": "adamw8bit" if of("train.use_8bit_adam", bool, False) else "adamw",
        "validation_prompts": tuple(prompts), "mixed_precision": precision,
        "pictures": 0, "steps_used": f"{first}:{end}" if first or end else "",
    }
    if values.get("guidance_scale", 5.0) <= 1:
        values["guidance_scale"] = 1.0  # official: no guidance
    return replace(LPO(), **values), notes


def is_multi_scale(lrm: Path) -> bool:
    """Return whether an LRM, a directory or a single file, projects more features than its mid block gives.
    """
    from lpo_fast.lrm import checkpoint
    from lpo_fast.models import configs
    if not lrm.is_file():
        channels = configs.denoiser(lrm, "--lrm")["block_out_channels"]
        return checkpoint.read_heads(lrm, channels)["visual_projection"]["weight"].shape[1] > channels[-1]
    state = reading.read_pickle(lrm, "--lrm", mmap=True)
    try:
        return (state["visual_projection.weight"].shape[1]
                > len(state["unet.mid_block.resnets.0.conv1.weight"]))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(str(lrm), f"is not a reward model ({error})", "name the single file of an LRM-XL",
                         "--lrm") from error


def attention(notes: list[str]) -> str:
    """Return "xformers" where it runs, else "auto", which then selects PyTorch's memory-efficient attention.

    Both compute the same. notes: gets an entry if xformers does not run.
    """
    from lpo_fast.models.attention import xformers_problem
    if not xformers_problem():
        return "xformers"
    notes.append("use_xformers: xformers does not run here; PyTorch's memory-efficient attention computes "
                 "the same")
    return "auto"


def parse(argv: list[str]) -> tuple[LPO, list[str]]:
    """Return settings and notes for an official launch line; our own flags take precedence over the file."""
    file, changes, rest = split(argv)
    config, notes = settings(override(flat(load(file)), changes,
                                      SAME.keys() | WORKED_OUT if Path(file).suffix in DATA else ()))
    if rest:
        given = cli.parse(LPO, rest, "train --config FILE.py", default=config)
        cli.lora_flags(given, config)
        config = given
    return config, notes


def render(config: LPO, lrm: Any) -> str:
    """Return exp_config.py as the official script writes it: a run's settings under the official keys, all of
    them.

    lrm: the run's LatentRewardModel. If its guidance changes over the timesteps, the record holds the first
    value.
    """
    values = {key: getattr(config, field) for key, field in SAME.items()} | {
        "logdir": str(Path(config.out).parent), "run_name": Path(config.out).name,
        "num_checkpoint_limit": config.keep_checkpoints or None, "use_xformers": config.attention != "sdpa",
        "use_checkpointing": config.checkpointing != "none", "use_wandb": config.log_with == "wandb",
        "wandb_entity_name": config.tracker_entity or None, "use_lora": not config.full,
        "dynamic_beta": False, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
        "preference_model_func_cfg.type": MODELS[lrm.family.time_ids],
        "preference_model_func_cfg.multi_scale": lrm.multi_scale,
        "preference_model_func_cfg.multi_scale_cfg": lrm.multi_scale_cfg,
        "preference_model_func_cfg.guidance_scale": lrm.guidance_scale[0], "sample.num_inner_step": 0,
        "sample.inner_start_step": 0, "compare_func_cfg.type": NAMES["compare_func_cfg.type"],
        "compare_func_cfg.threshold": config.threshold_min, "compare_func_cfg.dynamic_threshold":
            None if config.threshold_shape == "none" else config.threshold_shape,
        "compare_func_cfg.threshold_min": config.threshold_min,
        "compare_func_cfg.threshold_max": config.threshold_max,
        "dataset_cfg.type": NAMES["dataset_cfg.type"], "train.use_8bit_adam": config.optimizer == "adamw8bit",
        "dataset_cfg.pretrained_tokenzier_path": config.lrm_tokenizer or CLIP_TOKENIZER,
        "validation_prompts": list(config.validation_prompts), "train.divert_start_step": config.window[0],
        "train.divert_end_step": config.window[1] % config.num_steps}
    groups: dict[str, dict] = {}
    for key, value in sorted(values.items()):
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    lines = [f"{name} = {value!r}" for name, value in groups.pop("").items()]
    lines += [f"{group} = dict({', '.join(f'{n}={v!r}' for n, v in inner.items())})"
              for group, inner in groups.items()]
    return "\n".join(lines) + "\n"
