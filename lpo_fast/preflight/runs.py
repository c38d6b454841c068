"""Check everything that a run needs, before a model is loaded or a file is written."""

import os
from dataclasses import asdict
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lpo_fast import cli
from lpo_fast.config import LPO, LRM, RunDirectory, renamed
from lpo_fast.data import dataset, latent_cache, mpcf, preferences
from lpo_fast.data.preferences import PairTable
from lpo_fast.data.prompts import read_prompts
from lpo_fast.errors import InputError
from lpo_fast.lpo import checkpoints
from lpo_fast.lrm import checkpoint
from lpo_fast.models import attention, configs, locate, loras
from lpo_fast.models.families import family_of
from lpo_fast.preflight import models, settings
from lpo_fast.run import optimization
from lpo_fast.run.directory import holder, in_use
from lpo_fast.run.states import saved_states
from lpo_fast.system import console, devices, distributed

TRACKERS = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
# Settings that a resumed run may change.
MAY_CHANGE = {"out", "resume", "epochs", "max_batches", "save_epochs", "save_steps", "keep_checkpoints",
              "preempt_exit_code", "pictures", "log_with", "tracker_project", "tracker_entity", "run_name",
              "num_workers", "cache_dir", "cache_latents", "max_corrupt", "shard", "dry_run", "checkpointing",
              "compile", "profile", "resume_from"}  # the saved state includes what came from a checkpoint


def lpo(config: LPO) -> tuple[list[str], Path | None]:
    """Check an LPO run; return its prompts, and the intact checkpoint that --resume-from names, if any.

    Raises InputError if the run cannot start.
    """
    settings.lpo(config)
    optimization.check_optimizer(config.optimizer)
    attention.check_attention(config.attention)
    if config.shard and devices.precision(config.mixed_precision, "fp16") == "fp16":
        raise InputError(config.mixed_precision, "means fp16 here, whose scaled loss --shard "
                         "does not support", "use bf16, or drop --shard", "--mixed-precision")
    prompts = read_prompts(config.prompts, config.caption_key)
    if config.lora:
        loras.read_lora(Path(config.lora))
    source = (checkpoints.find_checkpoint(Path(config.resume_from), config.full)
              if config.resume_from else None)
    if source and (done := checkpoints.epoch_of(source) + 1) >= config.epochs:
        raise InputError(config.resume_from, f"{source.name} has finished epoch {done - 1}",
                         f"use --epochs above {done}", "--resume-from")
    directory(config, source)
    models.reward_place(config)
    unet = models.pipeline(config.model, "--model", config.revision)
    models.picture(config, unet)
    lrm = models.reward_model(config)
    families = [family_of(u).name for u in (unet, lrm)]
    if families[0] != families[1]:
        raise InputError(config.lrm, f"scores {families[1]} latents, the model makes {families[0]} latents: "
                         "their VAEs, and so their latent spaces, differ",
                         "use an LRM trained for this kind of model", "--lrm")
    if unet["in_channels"] != lrm["in_channels"]:
        raise InputError(config.lrm, f"scores latents of {lrm['in_channels']} channels, the model makes "
                         f"{unet['in_channels']}", "use an LRM trained for this kind of model", "--lrm")
    models.buildable(lrm, config.lrm, "--lrm")
    if config.lrm_tokenizer:
        models.tokenizer(config, family_of(lrm))
    if not config.full:
        models.targets(unet, config.targets)
    same_models(config)
    return prompts, source


def lrm(config: LRM) -> dict[str, PairTable]:
    """Check an LRM run; return its pairs for "train" and, if requested, "validation" and "test".

    Raises InputError if the run cannot start.
    """
    settings.lrm(config)
    optimization.check_optimizer(config.optimizer)
    directory(config)
    if config.cache_latents:
        models.writable(Path(config.cache_latents), "--cache-latents")
    used = training_pairs(config)
    models.picture(config, models.pipeline(config.model, "--model", config.revision))
    if config.clip:
        width = checkpoint.read_text_projection(locate.clip(config)).shape[1]
        wanted = configs.read_config(locate.model(config) / "text_encoder", "--model")["hidden_size"]
        if width != wanted:
            raise InputError(config.clip, f"projects {width} features, the model's text encoder has {wanted}",
                             "use the CLIP that the model was trained with", "--clip")
    if config.cache_latents:
        latent_cache.check_space(config, used)
    same_models(config)
    return used


def training_pairs(config: LRM) -> dict[str, PairTable]:
    """Return the pairs by use. Raises InputError if they cannot be divided among the processes."""
    scores = mpcf.read_scores(config.scores) if config.scores else None
    used = {}
    for use, path, flag, split in (("train", config.pairs, "--pairs", config.train_split),
                                   ("validation", config.validation_pairs,
                                    "--validation-pairs", config.validation_split),
                                   ("test", config.test_pairs, "--test-pairs", config.test_split)):
        if path or use == "train":
            table = preferences.read(path, flag, config.columns, split, config.cache_dir)
            dataset.check_pictures(table)
            used[use] = preferences.choose(table, config, scores, training=use == "train")
    for use in used:
        if use != "train" and used[use].source.identity() & used["train"].source.identity():
            effect = ", and it selects the best LRM" if use == "validation" else ""
            console.say(f"warning: --{use}-pairs shares rows with --pairs ({config.pairs}): its accuracy "
                        f"says little about other pairs{effect}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if len(used["train"]) < processes:
        raise InputError(str(processes), f"processes, but there are {len(used['train'])} pairs to train on",
                         f"start at most {len(used['train'])}", "WORLD_SIZE")
    if config.batch_size % (config.accumulate * processes):
        raise InputError(str(config.batch_size), f"pairs cannot be divided evenly among {processes} "
                         f"processes and {config.accumulate} micro-batches",
                         f"use a multiple of {config.accumulate * processes}", "--batch-size")
    return used


def directory(config: LPO | LRM, source: Path | None = None) -> None:
    """Raise InputError if the run directory cannot be used.

    It must be writable and must not hold another run or its checkpoints, except for ``source``, from which
    --resume-from continues. If it holds the run to resume, the settings must be the same, except for
    MAY_CHANGE.

    Names that begin with a dot (a killed run's lock and unfinished files) are ignored. With --resume but
    without a saved state the run starts from the beginning.
    """
    out = Path(config.out)
    models.writable(out)
    if config.log_with and config.log_with not in TRACKERS:
        raise InputError(config.log_with, "no such tracker", f"use {', '.join(TRACKERS)}", "--log-with")
    if distributed.is_main() and (process := holder(out)):
        raise in_use(out, process)
    if source and config.in_place:
        if (last := checkpoints.checkpoints(out)[-1]) != source and not last.samefile(source):
            raise InputError(config.out, f"holds later checkpoints than {source.name}, up to {last.name}",
                             "continue from the last one, remove the later ones, or choose another directory",
                             "--out")
        return
    states = saved_states(out)
    if (out.is_dir() and not (out / "config.json").is_file()
            and not all(path.name.startswith(".") for path in out.iterdir())):
        raise InputError(config.out, "holds files that are not a run's", "choose a new or empty directory",
                         "--out")
    if not config.resume and states:
        raise InputError(config.out, "already holds a run",
                         "choose another directory, or continue it with --resume", "--out")
    if not config.resume and (found := sorted(path.name for path in out.glob("checkpoint[_-]*"))):
        raise InputError(config.out, f"holds {found[0]} of another run",
                         "choose another directory, continue that run with --resume, or remove its "
                         "checkpoints", "--out")
    if not config.resume or not states:
        return
    before = renamed(configs.read_config(out, "--out"))
    for key, value in asdict(config).items():
        value = list(value) if isinstance(value, tuple) else value
        if key not in MAY_CHANGE and before.get(key) != value:
            raise InputError(str(value), f"the run in {config.out} was started with {before.get(key)}",
                             "resume with the original value", cli.flag(key))


def same_models(config: RunDirectory) -> None:
    """Raise InputError if a hub model of a resumed run is not at the commit the run began with."""
    out = Path(config.out)
    if not config.resume or not saved_states(out) or not (out / "environment.json").is_file():
        return
    environment = configs.read_config(out, "--out", "environment.json")
    for name, commit in environment.get("models", {}).items():
        if locate.RESOLVED.get(name, commit) != commit:
            raise InputError(locate.RESOLVED[name], f"{name} has changed: the run in {config.out} "
                             f"used {commit}", "name that commit (--revision, or NAME@COMMIT)", "--out")
