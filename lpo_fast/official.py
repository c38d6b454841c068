"""The official LPO launch line as settings of ours: --config FILE.py [--config.a.b=value …] [our own flags].

FILE.py is code and runs, as with the official script, because the command line names it. Every key of its config is taken
over, refused by name, or (dataloader workers) said to have nothing to do here.
"""

import ast
import difflib
import os
import runpy
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lpo_fast.config import LPO
from lpo_fast.errors import InputError

# Official keys and the fields that they set, where the value is taken over as it is.
SAME = {
    "seed": "seed", "allow_tf32": "tf32", "use_checkpointing": "checkpointing", "resume_from": "resume_from",
    "save_interval": "save_epochs", "run_name": "run_name", "wandb_project_name": "tracker_project",
    "pretrained.model": "model", "pretrained.vae_model_name_or_path": "vae", "lora_rank": "rank",
    "preference_model_func_cfg.ft_model_path": "lrm", "preference_model_func_cfg.multi_scale_cfg": "lrm_multi_scale_cfg",
    "dataset_cfg.meta_json_path": "prompts", "dataset_cfg.caption_key": "caption_key", "dataloader_shuffle": "shuffle",
    "dataloader_drop_last": "drop_last", "num_epochs": "epochs", "sample.num_steps": "num_steps", "sample.eta": "eta",
    "sample.guidance_scale": "guidance_scale", "sample.sample_batch_size": "batch_size",
    "sample.num_sample_each_step": "num_candidates", "train.train_batch_size": "train_batch_size",
    "train.gradient_accumulation_steps": "accumulate", "train.learning_rate": "learning_rate",
    "train.adam_beta1": "adam_beta1", "train.adam_beta2": "adam_beta2", "train.adam_weight_decay": "weight_decay",
    "train.adam_epsilon": "adam_epsilon", "train.max_grad_norm": "max_grad_norm", "train.cfg": "train_cfg",
    "train.beta": "beta", "train.eps": "clip_eps", "num_validation_images": "validation_pictures",
    "eval_interval": "validate_epochs",
}
# Keys that ``settings`` works out.
WORKED_OUT = {
    "num_checkpoint_limit", "use_xformers", "logdir", "use_wandb", "wandb_entity_name", "use_lora", "dynamic_beta",
    "preference_model_func_cfg.type", "preference_model_func_cfg.multi_scale", "preference_model_func_cfg.guidance_scale",
    "compare_func_cfg.type", "compare_func_cfg.threshold", "compare_func_cfg.dynamic_threshold",
    "compare_func_cfg.threshold_min", "compare_func_cfg.threshold_max", "dataset_cfg.type",
    "dataset_cfg.pretrained_tokenzier_path", "train.use_8bit_adam", "sample.num_inner_step", "sample.inner_start_step",
    "validation_prompts", "train.divert_start_step", "train.divert_end_step",
}
IDLE = {"dataloader_num_workers": "prompts are encoded once for the run", "dataloader_pin_memory": "no prompt batch is copied"}
NAMES = {"compare_func_cfg.type": "preference_score_compare", "dataset_cfg.type": "PromptDataset"}
MODELS = ("sd15_preference_model_func", "sdxl_preference_model_func")
CLIP_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # gives the ids of every Stable Diffusion 1.5's own tokenizer


def is_launch(argv: list[str]) -> bool:
    """Whether a command line is the official LPO script's."""
    return any(a == "--config" or a.startswith(("--config=", "--config.")) for a in argv)


def split(argv: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """The config file, the overrides of its keys, and what is left: our own flags."""
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
    """What get_config() of a config file returns, as nested dicts; it may import from the current directory."""
    if not Path(file).is_file():
        raise InputError(file, "no such file", "name an official config file", "--config")
    sys.path.insert(0, os.getcwd())
    try:
        config = runpy.run_path(file)["get_config"]()
        return plain(config.to_dict() if hasattr(config, "to_dict") else config)
    except ModuleNotFoundError as error:
        remedy = ("pip install 'lpo_fast[official]'" if error.name in ("ml_collections", "absl") else
                  "run the command in the directory that official runs it in (lpo/)")
        raise InputError(file, f"imports {error.name}, which is not there", remedy, "--config") from error
    except Exception as error:  # it is somebody's code
        raise InputError(file, f"its get_config() fails ({type(error).__name__}: {error})", "mend it", "--config") from error
    finally:
        sys.path.remove(os.getcwd())


def plain(value: object) -> dict:
    """Nested mappings as dicts."""
    return {key: plain(item) if isinstance(item, Mapping) else item for key, item in value.items()}


def flat(config: dict, prefix: str = "") -> dict[str, object]:
    """Nested dicts as one, with dotted keys."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def override(config: dict[str, object], changes: dict[str, str]) -> dict[str, object]:
    """Values of the command line in place of the file's, read as the kind of value that stands there."""
    config = dict(config)
    for key, text in changes.items():
        flag = f"--config.{key}"
        if key not in config:
            near = difflib.get_close_matches(key, config, 1)
            raise InputError(text, "no such key in the config file", f"did you mean --config.{near[0]}?" if near else
                             f"it has {', '.join(sorted(config))}", flag)
        before = config[key]
        try:
            value = text if isinstance(before, str) else {"true": True, "false": False}.get(text.lower(), text)
            if not isinstance(before, str) and isinstance(value, str):
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if isinstance(before, float) and type(value) is int:
            value = float(value)
        if before is not None and type(value) is not type(before) and {type(value), type(before)} != {list, tuple}:
            raise InputError(text, f"is no {type(before).__name__}", f"write it as {before!r} is", flag)
        config[key] = value
    return config


def settings(config: dict[str, object]) -> tuple[LPO, list[str]]:
    """Our settings for a flat official config, and sentences about what is different here. Raises InputError for a key
    that is unknown or whose value cannot be honoured, naming it."""
    known = SAME.keys() | WORKED_OUT | IDLE.keys()
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise InputError(str(config[key]), "is a key that the official code does not have", "drop it" +
                             (f", or did you mean {near[0]}?" if near else ""), f"config.{key}")
    notes = [f"{key} has nothing to do here: {why}" for key, why in IDLE.items() if key in config]
    for key, only in NAMES.items():
        if config.get(key, only) != only:
            raise InputError(str(config[key]), "is not known", f"use {only}", f"config.{key}")
    if config.get("dynamic_beta"):
        raise InputError("True", "has no effect in the official code", "set it to False", "config.dynamic_beta")
    if config.get("sample.num_inner_step", 0) > 0:
        raise InputError(str(config["sample.num_inner_step"]), "has no effect in the official code", "set it to 0",
                         "config.sample.num_inner_step")
    kind = config.get("preference_model_func_cfg.type")
    if kind not in MODELS:
        raise InputError(str(kind), "is no known reward model", f"use {' or '.join(MODELS)}",
                         "config.preference_model_func_cfg.type")
    guidance = config.get("preference_model_func_cfg.guidance_scale", 7.5)
    multi_scale = config.get("preference_model_func_cfg.multi_scale", True)
    heads = Path(str(config.get("preference_model_func_cfg.ft_model_path", ""))) / "state_dict.pt"
    if heads.is_file():
        from lpo_fast import checkpoint, preflight
        channels = preflight.read_config(heads.parent / "unet", "--lrm")["block_out_channels"]
        width = checkpoint.read_heads(heads.parent, channels)["visual_projection"]["weight"].shape[1]
        if (width > channels[-1]) != multi_scale:
            raise InputError(str(multi_scale), f"the reward model in {heads.parent} says {not multi_scale}",
                             "set it to that", "config.preference_model_func_cfg.multi_scale")
    shape = config.get("compare_func_cfg.dynamic_threshold")
    low, high = config.get("compare_func_cfg.threshold_min", 0.2), config.get("compare_func_cfg.threshold_max", 0.5)
    if shape is None:
        low = high = config["compare_func_cfg.threshold"]
    first, end = (int(config.get(f"train.divert_{name}_step", 0)) for name in ("start", "end"))
    tokenizer = config.get("dataset_cfg.pretrained_tokenzier_path", CLIP_TOKENIZER)
    values = {field: config[key] for key, field in SAME.items() if key in config} | {
        "out": str(Path(config.get("logdir", "logs/lpo")) / config.get("run_name", "test")),
        "keep_checkpoints": config.get("num_checkpoint_limit") or 0,
        "attention": attention(notes) if config.get("use_xformers") else "sdpa",
        "log_with": "wandb" if config.get("use_wandb") else "",
        "tracker_entity": config.get("wandb_entity_name") or "",
        "full": not config.get("use_lora", True),
        "lrm_guidance": (float(guidance),),
        "threshold_shape": shape or "none", "threshold_min": low, "threshold_max": high,
        "lrm_tokenizer": "" if tokenizer == CLIP_TOKENIZER or kind == MODELS[1] else tokenizer,
        "optimizer": "adamw8bit" if config.get("train.use_8bit_adam") else "adamw",
        "validation_prompts": tuple(config.get("validation_prompts") or ()),
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "auto"),
        "pictures": 0, "steps_used": f"{first}:{end}" if first or end else "",
    }
    if values.get("guidance_scale", 5.0) <= 1:
        values["guidance_scale"] = 1.0  # official: no guidance
    return replace(LPO(), **values), notes


def attention(notes: list[str]) -> str:
    """xformers where it runs; else PyTorch's memory-efficient attention, which computes the same."""
    from lpo_fast import speed
    if not speed.xformers_problem():
        return "xformers"
    notes.append("use_xformers: xformers does not run here, PyTorch's memory-efficient attention computes the same")
    return "sdpa"


def parse(argv: list[str]) -> tuple[LPO, list[str]]:
    """Settings and notes of an official launch line; our own flags win over the file."""
    import tyro
    file, changes, rest = split(argv)
    config, notes = settings(override(flat(load(file)), changes))
    if rest:
        config = tyro.cli(LPO, args=rest, default=config, prog="python -m lpo_fast.train --config FILE.py",
                          config=(tyro.conf.FlagCreatePairsOff,))
    return config, notes


def render(config: LPO) -> str:
    """exp_config.py, as the official script writes it: a run's settings under the official keys."""
    values = {key: getattr(config, field) for key, field in SAME.items()} | {
        "logdir": str(Path(config.out).parent), "run_name": Path(config.out).name,
        "num_checkpoint_limit": config.keep_checkpoints or None, "use_xformers": config.attention == "xformers",
        "use_wandb": config.log_with == "wandb", "wandb_entity_name": config.tracker_entity or None,
        "use_lora": not config.full, "preference_model_func_cfg.guidance_scale": (config.lrm_guidance or (7.5,))[0],
        "compare_func_cfg.type": NAMES["compare_func_cfg.type"], "compare_func_cfg.threshold": config.threshold_min,
        "compare_func_cfg.dynamic_threshold": None if config.threshold_shape == "none" else config.threshold_shape,
        "compare_func_cfg.threshold_min": config.threshold_min, "compare_func_cfg.threshold_max": config.threshold_max,
        "dataset_cfg.type": NAMES["dataset_cfg.type"], "train.use_8bit_adam": config.optimizer == "adamw8bit",
        "dataset_cfg.pretrained_tokenzier_path": config.lrm_tokenizer or CLIP_TOKENIZER,
        "validation_prompts": list(config.validation_prompts), "train.divert_start_step": config.window[0],
        "train.divert_end_step": config.window[1] % config.num_steps}
    groups: dict[str, dict] = {}
    for key, value in sorted(values.items()):
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    lines = [f"{name} = {value!r}" for name, value in groups.pop("").items()]
    lines += [f"{group} = dict({', '.join(f'{n}={v!r}' for n, v in inner.items())})" for group, inner in groups.items()]
    return "\n".join(lines) + "\n"
