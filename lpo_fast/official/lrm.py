"""Translate the official LRM launch, --config-path DIR --config-name NAME key=value …, to our settings.

``KEYS`` lists every key of the official configuration with its default: what it becomes here, why it has no
effect here, or why only the default is accepted. No key is ignored silently.
"""

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lpo_fast.config import LRM, Columns
from lpo_fast.errors import InputError
from lpo_fast.system import reading

# Structured configs that a YAML lists in its defaults, and their families.
CONFIGS = {"step_sd_config": "sd", "step_sdxl_base_config": "sdxl"}
GROUPS = ("accelerator", "task", "model", "criterion", "dataset", "optimizer", "lr_scheduler")


class Key(NamedTuple):
    """Describe an official key.

    field: our setting ("": a rule in ``_settings``). fixed: why only the default is accepted. inert: why any
    value is accepted without effect. family: the only model family that has the key.
    """

    default: Any
    field: str = ""
    fixed: str = ""
    inert: str = ""
    family: str = ""


NO_DEEPSPEED = "this project runs without DeepSpeed; clipping, warm-up and sharding have their own settings"
INTERNAL = "a name inside the official program, not used here"
ELSEWHERE = "is read from the model's own directory"
KEYS = {
    "output_dir": Key("outputs", "out"),
    "dataset.batch_size": Key(4),
    "dataset.num_workers": Key(2, "num_workers"),
    "dataset.drop_last": Key(True, inert="the official code never reads it"),
    "dataset.dataset_name": Key("yuvalkirstain/pickapic_v1", "pairs"),
    "dataset.dataset_config_name": Key(None, inert="the official code never reads it"),
    "dataset.from_disk": Key(False),
    "dataset.cache_dir": Key(None, "cache_dir"),
    "dataset.train_split_name": Key("train", "train_split"),
    "dataset.valid_split_name": Key("validation_unique", "validation_split"),
    "dataset.test_split_name": Key("test_unique", "test_split"),
    **{f"dataset.{name}_column_name": Key(column, f"columns.{column}") for name, column in (
        ("caption", "caption"), ("image_0", "jpg_0"), ("image_1", "jpg_1"), ("label_0", "label_0"),
        ("label_1", "label_1"), ("are_different", "are_different"), ("has_label", "has_label"),
        ("num_examples_per_prompt", "num_example_per_prompt"))},
    **{f"dataset.{name}_column_name": Key(value, inert=INTERNAL) for name, value in (
        ("input_ids", "input_ids"), ("pixels_0", "pixel_values_0"), ("pixels_1", "pixel_values_1"),
        ("timestep", "timestep"), ("timestep_comparison", "timestep_comparison"))},
    "dataset.input_ids_2_column_name": Key("input_ids_2", inert=INTERNAL, family="sdxl"),
    "dataset.constant_timestep": Key(1, "constant_timestep"),
    "dataset.variable_timestep": Key(False, "variable_timestep"),
    "dataset.largest_timestep": Key(751, "largest_timestep"),
    "dataset.keep_only_different": Key(False, "keep_only_different"),
    "dataset.keep_only_with_label": Key(False, "keep_only_with_label"),
    "dataset.keep_only_with_label_in_non_train": Key(True, "keep_only_with_label_in_validation"),
    "dataset.keep_only_with_pesudo_preference": Key(False),
    "dataset.filter_strategy": Key(1),
    "dataset.pseudo_preference_path": Key("", "scores"),
    "dataset.compare_between_timestep": Key(False, "compare_between_timestep"),
    "dataset.timestep_interval": Key(1, "timestep_interval"),
    "dataset.limit_examples_per_prompt": Key(-1),
    "dataset.only_on_best": Key(False, "only_on_best"),
    "dataset.processor.random_crop": Key(
        False, inert="the official code resizes to the square first, so nothing is cropped"),
    "dataset.processor.no_hflip": Key(True),
    "dataset.processor.pretrained_model_name_or_path": Key("${model.pretrained_model_name_or_path}",
                                                           fixed=f"the tokenizer {ELSEWHERE}"),
    "dataset.processor.tokenizer_subfolder": Key("tokenizer", fixed=f"the tokenizer {ELSEWHERE}"),
    "model.pretrained_model_name_or_path": Key("runwayml/stable-diffusion-v1-5", "model"),
    "model.clip_ckpt_path": Key("openai/clip-vit-large-patch14/pytorch_model.bin", "clip", family="sd"),
    "model.vae_path": Key("", "vae", family="sd"),
    "model.pretrained_vae_name_or_path": Key("madebyollin/sdxl-vae-fp16-fix", "vae", family="sdxl"),
    **{f"model.{name}": Key(width, fixed=f"the width {ELSEWHERE}") for name, width in (
        ("vision_embed_dim", 1280), ("text_embed_dim", 768), ("projection_dim", 768))},
    "model.logit_scale_init_value": Key(2.6592, "logit_scale"),
    "model.freeze_text_encoder": Key(False, "freeze_text_encoder"),
    "model.multi_scale": Key(True, "multi_scale"),
    "model.multi_scale_cfg": Key(False, "multi_scale_cfg"),
    "model.guidance_scale": Key(1.0),
    "model.noise_offset": Key(False, family="sdxl"),
    "model.noise_offset_coeff": Key(0.05, family="sdxl"),
    "criterion.loss_type": Key("pair", "loss_type"),
    "criterion.batch_coeff": Key(1.0, "batch_coeff"),
    "criterion.aux_loss_coeff": Key(1.0, "aux_loss_coeff"),
    "criterion.is_distributed": Key(True, inert="loss weights always refer to the global batch"),
    "optimizer.lr": Key(3e-6, "learning_rate"),
    "optimizer.weight_decay": Key(0.3, "weight_decay"),
    "lr_scheduler.lr_warmup_steps": Key(500, "warmup_steps"),
    "lr_scheduler.lr": Key("${optimizer.lr}", fixed="the peak rate is optimizer.lr"),
    "lr_scheduler.total_num_steps": Key("${accelerator.max_steps}",
                                        fixed="the rate falls to 0 at accelerator.max_steps"),
    "accelerator.mixed_precision": Key("NO"),
    "accelerator.project_name": Key("reward", "tracker_project"),
    "accelerator.run_name": Key("default", "run_name"),
    "accelerator.output_dir": Key("${output_dir}", fixed="the run directory is output_dir"),
    "accelerator.resume_from_checkpoint": Key(True),
    "accelerator.metric_name": Key("accuracy",
                                   fixed="the best checkpoint is the one of the best validation accuracy"),
    "accelerator.metric_mode": Key("MAX",
                                   fixed="the best checkpoint is the one of the best validation accuracy"),
    "accelerator.gradient_accumulation_steps": Key(1, "accumulate"),
    "accelerator.max_steps": Key(4000, "max_steps"),
    "accelerator.num_epochs": Key(10, inert="the official code computes it from max_steps"),
    "accelerator.validate_steps": Key(100, "validate_steps"),
    "accelerator.generalization_validate_steps": Key(500, inert="the official code never reads it"),
    "accelerator.save_steps": Key(100, "save_steps"),
    "accelerator.eval_on_start": Key(True, "eval_on_start"),
    "accelerator.limit_num_checkpoints": Key(1),
    "accelerator.save_only_if_best": Key(True, "save_only_if_best"),
    "accelerator.keep_best_ckpts": Key(True, "keep_best"),
    "accelerator.max_grad_norm": Key(1.0, "max_grad_norm"),
    "accelerator.log_with": Key("wandb"),
    "accelerator.seed": Key(42, "seed"),
    "accelerator.dynamo_backend": Key("NO", fixed="compilation has its own setting here"),
    "accelerator.debug.activate": Key(False, fixed="there is no PyCharm debugger to attach"),
    "accelerator.debug.port": Key(5900, fixed="there is no PyCharm debugger to attach"),
    "debug.activate": Key(False, fixed="there is no PyCharm debugger to attach"),
    "debug.port": Key(5900, fixed="there is no PyCharm debugger to attach"),
    "accelerator.deepspeed_final": Key(None, fixed=NO_DEEPSPEED),
    **{f"accelerator.deepspeed.{name}": Key(value, fixed=NO_DEEPSPEED) for name, value in {
        "fp16.enabled": False, "bf16.enabled": False, "optimizer.type": "AdamW",
        "optimizer.params.lr": "auto", "optimizer.params.weight_decay": "auto",
        "optimizer.params.torch_adam": True, "optimizer.params.adam_w_mode": True,
        "scheduler.type": "WarmupDecayLR", "scheduler.params.warmup_min_lr": "auto",
        "scheduler.params.warmup_max_lr": "auto", "scheduler.params.warmup_num_steps": "auto",
        "scheduler.params.total_num_steps": "auto", "zero_optimization.stage": 2,
        "zero_optimization.allgather_partitions": True, "zero_optimization.allgather_bucket_size": 2e8,
        "zero_optimization.overlap_comm": True, "zero_optimization.reduce_scatter": True,
        "zero_optimization.reduce_bucket_size": 500000000, "zero_optimization.contiguous_gradients": True,
        "gradient_accumulation_steps": 16, "gradient_clipping": 1.0,
        "steps_per_print": 1, "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False}.items()},
    "task.limit_examples_to_wandb": Key(50, inert="pictures of single predictions are not uploaded"),
    "hydra.run.dir": Key(".", inert="this project never changes the working directory"),
}
SDXL = {"model.guidance_scale": 7.5, "model.pretrained_model_name_or_path": "stabilityai/sdxl-base-1",
        "model.text_embed_dim": 1280, "model.projection_dim": 1280,
        "accelerator.deepspeed.gradient_accumulation_steps": 4}  # defaults that differ


def parse(argv: list[str]) -> LRM:
    """Return settings for an official command line.

    Raises InputError, which names the key, the reason and a remedy.
    """
    options, overrides = _split(argv)
    given, family = _read(_find(options))
    for override in overrides:
        name, sign, text = override.partition("=")
        name = name.lstrip("+")
        if not sign or name.startswith("~"):
            raise InputError(override, "is not key=value", "write key=value, as for the official command")
        if name in GROUPS:
            raise InputError(override, "replaces a part of the official program",
                             "leave it out, and see --help for our settings", name)
        given[name] = _value(text, name)
    keys = {name: key for name, key in KEYS.items() if key.family in ("", family)}
    if unknown := [name for name in given if name not in keys]:
        near = difflib.get_close_matches(unknown[0], keys, 1, 0)
        raise InputError(str(given[unknown[0]]),
                         "is not an official key" + (f" for {family}" if unknown[0] in KEYS else ""),
                         f"the nearest is {near[0]}" if near else "leave it out", unknown[0])
    defaults = {name: key.default for name, key in keys.items()} | (SDXL if family == "sdxl" else {})
    values = {name: _resolve(name, defaults | given) for name in keys}
    for name, key in keys.items():
        expected = _resolve(name, defaults | {n: v for n, v in given.items() if n != name})
        if key.fixed and name in given and not _same(values[name], expected):
            raise InputError(str(values[name]), f"is not supported: {key.fixed}",
                             f"leave it out (its default: {expected})", name)
    return _settings(values, keys)


def _split(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return --config-path and --config-name (also -cp, -cn), and the overrides."""
    names = {"--config-path": "path", "-cp": "path", "--config-dir": "path", "--config-name": "name",
             "-cn": "name"}
    options, overrides, rest = {}, [], list(argv)
    while rest:
        word = rest.pop(0)
        flag, sign, value = word.partition("=")
        if flag in names:
            if not sign and not rest:
                raise InputError("(none)", "is required", "name it", flag)
            options[names[flag]] = value if sign else rest.pop(0)
        elif word.startswith("-"):
            raise InputError(word, "is not an option of the official LRM launch",
                             "use --config-path, --config-name and "
                             "key=value (launcher flags such as --use_deepspeed go before -m lpo_fast.train)")
        else:
            overrides.append(word)
    if missing := [name for name in ("path", "name") if name not in options]:
        raise InputError("(none)", "is required",
                         "name the directory and the file of the official configuration",
                         f"--config-{missing[0]}")
    return options, overrides


def _find(options: dict[str, str]) -> Path:
    """Return the YAML file: in DIR below the current directory, or below trainer/scripts, where hydra looks
    for it.
    """
    name = options["name"].removesuffix(".yaml") + ".yaml"
    folders = [Path(options["path"]), Path("trainer/scripts") / options["path"]]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise InputError(options["path"], f"no {name} there, nor in {folders[1]}",
                     "run it where the official command runs, or name the directory itself",
                     "--config-path")


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """Return the flat keys of a YAML file, and the family of the structured config that it names."""
    tree = reading.read_config(file, "--config-name")
    names = tree.pop("defaults", None)
    names = names if isinstance(names, list) else [names]
    families = [CONFIGS[name] for name in names if isinstance(name, str) and name in CONFIGS]
    if len(families) != 1 or not set(map(str, names)) <= {*CONFIGS, "_self_"}:
        raise InputError(str(file), f"its defaults are {names}",
                         f"list one of {', '.join(CONFIGS)} and _self_ there", "--config-name")
    return flat(tree), families[0]


def flat(tree: dict, before: str = "") -> dict[str, Any]:
    """Return nested dicts as one flat dict with dotted keys."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def _value(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(text, "cannot be read as a value", "quote it", name) from error


def _resolve(name: str, values: dict[str, Any], through: tuple[str, ...] = ()) -> Any:
    """Return a value with its ${other.key} references substituted."""
    value = values[name]
    if not isinstance(value, str) or "${" not in value:
        return value

    def inner(found: re.Match) -> Any:
        other = found[1].strip()
        if other not in values or other in (*through, name):
            raise InputError(value, f"${{{other}}} is not a key that can be substituted",
                             "write the value itself", name)
        return _resolve(other, values, (*through, name))
    pattern = r"\$\{([^${}]*)\}"
    reference = re.fullmatch(pattern, value)
    return inner(reference) if reference else re.sub(pattern, lambda found: str(inner(found)), value)


def _same(value: Any, default: Any) -> bool:
    if isinstance(default, str):
        return str(_word(value)).upper() == default.upper()
    return value == default


def _settings(values: dict[str, Any], keys: dict[str, Key]) -> LRM:
    """Return the LRM settings for resolved values: keys that have a field, and rules for those with another
    meaning.
    """
    settings, columns = {}, {}
    kinds = {field.name: type(getattr(LRM(), field.name)) for field in fields(LRM)}
    for name, key in keys.items():
        if key.field.startswith("columns."):
            columns[key.field.removeprefix("columns.")] = typed(name, values[name], str)
        elif key.field:
            settings[key.field] = typed(name, values[name], kinds[key.field])

    def of(name: str, kind: Callable) -> Any:
        return typed(name, values[name], kind)
    pairs, scores = settings["pairs"], settings["scores"]
    if of("dataset.from_disk", bool) and not Path(pairs).is_dir():
        raise InputError(pairs, "no such directory, and from_disk is set",
                         "name a directory written by save_to_disk", "dataset.dataset_name")
    if of("dataset.keep_only_with_pesudo_preference", bool):
        if not scores:
            raise InputError("(none)", "the filter is on but has no score table",
                             "name the .csv (python -m lpo_fast.score_table writes one), or set "
                             "dataset.keep_only_with_pesudo_preference=False",
                             "dataset.pseudo_preference_path")
        strategy = of("dataset.filter_strategy", int)
        if strategy not in (1, 2, 3):
            raise InputError(str(strategy), "is not a strategy", "use 1, 2 or 3", "dataset.filter_strategy")
    else:
        strategy = 0
    precision = {"NO": "no", "BF16": "bf16"}.get(str(_word(values["accelerator.mixed_precision"])).upper())
    if precision is None:
        raise InputError(str(values["accelerator.mixed_precision"]), "is not a precision of LRM training",
                         "use BF16 or NO", "accelerator.mixed_precision")
    if settings["loss_type"] not in ("pair", "batch", "both"):
        raise InputError(settings["loss_type"], "is not a loss", "use pair, batch or both",
                         "criterion.loss_type")
    processes, each = int(os.environ.get("WORLD_SIZE", "1")), of("dataset.batch_size", int)
    batch = each * processes * settings["accumulate"]
    if os.environ.get("RANK", "0") == "0":
        print(f"dataset.batch_size {each} is per process: {batch} pairs per optimizer step = {each} × "
              f"{processes} processes × {settings['accumulate']} passes")
    offset = of("model.noise_offset", bool) if "model.noise_offset" in values else False
    resume = of("accelerator.resume_from_checkpoint", bool) and any(Path(settings["out"]).glob("state*.pt"))
    log_with = values["accelerator.log_with"]
    return LRM(**settings | {
        "validation_pairs": pairs, "test_pairs": pairs,
        "columns": Columns(**columns), "filter_strategy": strategy,
        "limit_examples_per_prompt": max(of("dataset.limit_examples_per_prompt", int), 0),
        "hflip": not of("dataset.processor.no_hflip", bool),
        "guidance_scale": (of("model.guidance_scale", float),),
        "noise_offset": of("model.noise_offset_coeff", float) if offset else 0.0,
        "mixed_precision": precision,
        "batch_size": batch, "resume": resume, "log_with": str(log_with).lower() if log_with else "",
        "keep_checkpoints": max(of("accelerator.limit_num_checkpoints", int), 0)})


def render(config: LRM, family: str, processes: int) -> str:
    """Return config.yaml of the official code: its launch line with this file would repeat this run.

    family: "sd" or "sdxl".
    """
    keys = {name: key for name, key in KEYS.items() if key.family in ("", family)}
    values = {name: key.default for name, key in keys.items()} | (SDXL if family == "sdxl" else {})
    for name, key in keys.items():
        if key.field:
            first, _, column = key.field.partition(".")
            values[name] = getattr(config.columns, column) if column else getattr(config, first)
    guidance = config.guidance_scale
    values |= {
        "dataset.batch_size": config.batch_size // (processes * config.accumulate),
        "dataset.keep_only_with_pesudo_preference": config.filter_strategy > 0,
        "dataset.filter_strategy": max(config.filter_strategy, 1),
        "dataset.limit_examples_per_prompt": config.limit_examples_per_prompt or -1,
        "dataset.processor.no_hflip": not config.hflip,
        "model.guidance_scale": guidance[0] if len(guidance) == 1 else list(guidance),
        "accelerator.mixed_precision": {"no": "NO"}.get(config.mixed_precision, "BF16"),
        "accelerator.limit_num_checkpoints": config.keep_checkpoints or -1,
        "accelerator.log_with": config.log_with or None}
    if family == "sdxl":
        values |= {"model.noise_offset": config.noise_offset > 0,
                   "model.noise_offset_coeff":
                       config.noise_offset or KEYS["model.noise_offset_coeff"].default}
    tree: dict[str, Any] = {"defaults": [next(name for name, of in CONFIGS.items() if of == family),
                                         "_self_"]}
    for name, value in values.items():
        *groups, last = name.split(".")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = value
    return yaml.safe_dump(tree, sort_keys=False)


def _word(value: Any) -> Any:
    """Return "NO" for False, because YAML reads a bare NO as false."""
    return "NO" if value is False else value


def typed(name: str, value: Any, kind: Callable) -> Any:
    """Return a value converted to the type of its field: YAML reads 1e-5 as text, and null means empty text.

    Raises InputError, which names the key.
    """
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is str and not isinstance(value, list | dict):
            return "" if value is None else str(value)
        if kind in (int, float) and not isinstance(value, bool | None):
            number = float(value)
            if kind is float or number.is_integer():
                return kind(number)
    except (TypeError, ValueError, OverflowError):
        pass
    kinds = {bool: "True or False", str: "text", int: "a whole number", float: "a number"}
    raise InputError(str(value), f"is not {kinds[kind]}", f"use {kinds[kind]}", name)
