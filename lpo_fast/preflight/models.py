"""Refuse models that cannot work, before a model is loaded or a file is written: paths, parts, widths,
records.

Checks that need no model come first, because a model may have to be downloaded or converted.
"""

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ConfigMixin, UNet2DConditionModel
from torch.utils._pytree import tree_leaves

from lpo_fast.config import Model, Reward
from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.method import schedule
from lpo_fast.models import configs, families, locate, vaes
from lpo_fast.system import reading


def targets(unet: dict, names: tuple[str, ...]) -> None:
    """Raise InputError unless every LoRA target is the end of some module's name."""
    with torch.device("meta"):
        modules = [name for name, _ in UNet2DConditionModel.from_config(unet).named_modules()]
    for target in names or ("",):
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise InputError(target, "is not the name of a module of the denoiser",
                             "use to_q, to_k, to_v, to_out.0, …", "--targets")


def buildable(config: dict, name: str, flag: str, part: str = "unet",
              kind: type = UNet2DConditionModel) -> None:
    """Refuse a model's part that cannot be built from its config. kind: its class, which no file chooses."""
    folder = Path(name) / part
    for key, most in (("num_hidden_layers", 100), ("num_train_timesteps", 10_000)):
        configs.positive_int({key: 1} | config, key, folder, flag, most)
    try:
        with torch.device("cpu" if part == "scheduler" else "meta"):
            if part == "scheduler":
                schedule.from_config(config, 1)
            elif issubclass(kind, ConfigMixin):
                kind.from_config(config)
            else:
                kind(kind.config_class.from_dict(config, attn_implementation="sdpa"))
    except Exception as error:  # diffusers raises many kinds
        raise InputError(name, f"its {part}/ cannot be built from its config ({type(error).__name__}: "
                         f"{(str(error).splitlines() or [''])[0][:160]})", "download it again",
                         flag) from error


def picture(config: Model, unet: dict) -> None:
    """Refuse a VAE whose latents the denoiser cannot take, and a resolution that the denoiser cannot halve
    often enough.
    """
    if config.vae:
        path = locate.vae(config)
        if not path.is_dir():
            raise InputError(config.vae, "no such directory", "name a VAE's directory or hub name", "--vae")
        if not (vaes.vae_folder(path) / "config.json").is_file():
            raise InputError(config.vae, "holds no VAE: config.json is missing",
                             "name a VAE's directory or a complete pipeline", "--vae")
        channels = configs.read_config(vaes.vae_folder(path), "--vae").get("latent_channels")
        if channels != unet["in_channels"]:
            raise InputError(config.vae, f"makes latents of {channels} channels, the denoiser takes "
                             f"{unet['in_channels']}", "use a VAE of the same family", "--vae")
        weights(path, vaes.vae_folder(path), "--vae")
    each = vaes.pixels_per_latent(locate.model(config)) * 2 ** (len(unet["block_out_channels"]) - 1)
    if config.resolution % each:
        raise InputError(str(config.resolution),
                         f"is not a multiple of {each}, the factor by which VAE and denoiser reduce it",
                         f"use {max(config.resolution // each, 1) * each}, or 0 for the denoiser's own",
                         "--resolution")


def weights(path: Path, folder: Path, flag: str) -> None:
    """Refuse a model's folder without weights that can be read without running code."""
    if not families.weight_files(folder):
        raise InputError(str(path), f"{folder.name}/ holds no .safetensors",
                         "download these weights, or convert them: "
                         "DiffusionPipeline.from_pretrained(NAME).save_pretrained(DIR)", flag)
    for index in folder.glob("*.safetensors.index.json"):
        for name in {str(name) for name in tree_leaves(reading.read_json(index, flag).get("weight_map"))}:
            if (not name.endswith(".safetensors") or not reading.component(name)
                    or not (folder / name).is_file()):
                raise InputError(str(index), f"names the shard {name[:160]!r}, which is not next to it",
                                 "download it again", flag)


def pipeline(model: str, flag: str, revision: str = "") -> dict:
    """Return the U-Net config of a diffusers pipeline.

    Raises InputError if one of its parts is missing or does not fit.
    """
    if not model:
        raise InputError("(none)", "is required",
                         "name a Stable Diffusion directory in diffusers layout, or a hub name", flag)
    path = locate.locate(model, flag, revision)
    if not path.is_dir():
        raise InputError(model, "is not a model" if path.exists() else "no such directory",
                         "name a Stable Diffusion directory "
                         "in diffusers layout, a hub name, or a .safetensors checkpoint", flag)
    unet = configs.denoiser(path, flag)
    family = families.family_of(unet)
    for part in ("unet", "vae", *(name for name, _ in family.encoders)):
        configs.read_config(path / part, flag)
        weights(path, path / part, flag)
    scheduler = configs.read_config(path / "scheduler", flag, "scheduler_config.json")
    for part in family.tokenizers:
        if not (path / part).is_dir() or not any((path / part).iterdir()):
            raise InputError(model, f"is not a complete pipeline: {part}/ is missing", "download all of it",
                             flag)
    widths = [configs.positive_int(configs.read_config(path / name, flag), "hidden_size", path / name, flag)
              for name, _ in family.encoders]
    if sum(widths) != unet["cross_attention_dim"]:
        raise InputError(model, f"its text encoders give {sum(widths)} features, its denoiser takes "
                         f"{unet['cross_attention_dim']}", "use parts that belong together", flag)
    configs.positive_int(vae := configs.read_config(path / "vae", flag), "block_out_channels", path / "vae",
                         flag)
    buildable(unet, model, flag)
    buildable(vae, model, flag, "vae", AutoencoderKL)
    buildable(scheduler, model, flag, "scheduler")
    for name, kind in family.encoders:
        buildable(configs.read_config(path / name, flag), model, flag, name, kind)
    return unet


def reward_place(config: Reward) -> Path:
    """Return the path of the LRM. Raises InputError if there is none."""
    if not config.lrm:
        raise InputError("(none)", "is required",
                         "train one with `python -m lpo_fast.train lrm`, or use casiatao/LRM", "--lrm")
    path = locate.lrm(config)
    if not path.exists() or path.is_file() and path.suffix not in (".pt", ".pth", ".bin"):
        raise InputError(config.lrm, "is not a model" if path.exists() else "no such directory",
                         "train one with `python -m lpo_fast.train lrm`, or download casiatao/LRM", "--lrm")
    return path


def reward_model(config: Reward) -> dict:
    """Return the U-Net config of the LRM. Raises InputError if the widths of its parts differ."""
    path = reward_place(config)
    if config.lrm_base:
        pipeline(config.lrm_base, "--lrm-base")
    base = locate.base(config)
    unet = configs.denoiser(base, "--lrm-base") if path.is_file() else reward_directory(path)
    heads = checkpoint.read_heads(path, unet["block_out_channels"])
    own = path.is_file() or config.lrm_base or config.lrm_tokenizer or (path / "tokenizer").is_dir()
    if (not own and unet["cross_attention_dim"]
            != configs.read_config(base / "unet", "--model")["cross_attention_dim"]):
        raise InputError(config.lrm, "has no tokenizer, and the model's belongs to another family",
                         "name the LRM's base directory with --lrm-base, or its --lrm-tokenizer", "--lrm")
    if "text_projection" in heads:
        source = path if (path / "text_encoder").is_dir() else base
        width = configs.positive_int(configs.read_config(source / "text_encoder", "--lrm"), "hidden_size",
                                     source / "text_encoder", "--lrm")
        if heads["text_projection"]["weight"].shape[1] != width:
            raise InputError(config.lrm,
                             f"its text projection takes {heads['text_projection']['weight'].shape[1]} "
                             f"features, its text encoder gives {width}", "name the LRM's own --lrm-base",
                             "--lrm")
    return unet


def tokenizer(config: Reward, family: families.Family) -> None:
    """Raise InputError unless --lrm-tokenizer holds the tokenizers of the LRM's family."""
    path = locate.tokenizer(config)
    if not path.is_dir():
        raise InputError(config.lrm_tokenizer, "no such directory",
                         "name a tokenizer's directory or hub name", "--lrm-tokenizer")
    own = [path] if len(family.tokenizers) == 1 and not (path / family.tokenizers[0]).is_dir() else [
        path / name for name in family.tokenizers]
    for folder in own:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            wanted = " and ".join(f"{name}/" for name in family.tokenizers)
            raise InputError(config.lrm_tokenizer,
                             f"{folder.name}/ holds no tokenizer; an LRM of the {family.name} family "
                             f"has {len(family.tokenizers)}", f"name a directory with {wanted}",
                             "--lrm-tokenizer")


def reward_directory(path: Path) -> dict:
    """Return the U-Net config of an LRM directory. Raises InputError if a part is missing."""
    if (path / "checkpoint-final").is_dir():
        raise InputError(str(path), "is a run directory", f"name {path / 'checkpoint-final'}", "--lrm")
    unet = configs.denoiser(path, "--lrm")
    checkpoint.recorded_settings(path)
    for part in (part for part in ("unet", "text_encoder", "text_encoder_2") if (path / part).is_dir()):
        weights(path, path / part, "--lrm")
    if not (path / "state_dict.pt").is_file():
        raise InputError(str(path), "is not a latent reward model: state_dict.pt is missing",
                         "name its top directory", "--lrm")
    return unet


def writable(out: Path, flag: str = "--out") -> None:
    """Raise InputError for a directory that cannot be created or written."""
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(str(out), "cannot be written", "choose a directory where you may write", flag)
