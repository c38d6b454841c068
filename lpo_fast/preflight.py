"""Whatever can be refused is refused here, before a model is loaded or a file written: paths, parts, widths, records."""

import json
import os
from pathlib import Path

import numpy as np

from lpo_fast import backbone, checkpoint, data
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError


def lpo(config: LPO) -> list[str]:
    """Check an LPO run; its prompts."""
    config.check()
    unet, lrm = pipeline(config.model, "--model"), reward_model(config)
    families = [backbone.family_of(u) for u in (unet, lrm)]
    if families[0] != families[1] or unet["in_channels"] != lrm["in_channels"]:
        raise InputError(config.lrm, f"scores {families[1].name} latents, the model makes {families[0].name} latents",
                         "use an LRM trained for this kind of model", "--lrm")
    prompts = data.read_prompts(config.prompts, config.caption_key)
    if config.lora:
        checkpoint.read_lora(Path(config.lora))
    directory(config)
    return prompts


def lrm(config: LRM) -> np.ndarray | None:
    """Check an LRM run; the rows of the pairs that the score table keeps, or None for all."""
    config.check()
    pipeline(config.model, "--model")
    if config.clip:
        width = checkpoint.read_text_projection(config.clip).shape[1]
        wanted = read_config(Path(config.model) / "text_encoder", "--model")["hidden_size"]
        if width != wanted:
            raise InputError(config.clip, f"projects {width} features, the model's text encoder gives {wanted}",
                             "use the CLIP that the model was made with", "--clip")
    keep = data.mpcf(Path(config.scores), config.filter_strategy) if config.scores else None
    pairs(config.pairs, "--pairs", keep)
    if config.validation_pairs:
        pairs(config.validation_pairs, "--validation-pairs")
    directory(config)
    return keep


def read_config(folder: Path, flag: str) -> dict:
    """A model's config.json."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(str(file.parent.parent), f"{folder.name}/config.json is missing",
                         "name the top directory of a whole download", flag) from error
    except (ValueError, OSError) as error:
        raise InputError(str(file), "cannot be read as JSON", "download it again", flag) from error


def pipeline(model: str, flag: str) -> dict:
    """The U-Net config of a diffusers directory, all parts of which are there."""
    path = Path(model)
    if not model or not path.is_dir():
        raise InputError(model or "(none)", "no such directory",
                         "name a Stable Diffusion directory in diffusers layout", flag)
    unet = read_config(path / "unet", flag)
    family = backbone.family_of(unet)
    for part in ("unet", "vae", *(name for name, _ in family.encoders)):
        read_config(path / part, flag)
        if not backbone.weight_files(path / part):
            raise InputError(model, f"{part}/ holds no .safetensors", "download the safetensors weights", flag)
    for part in (*family.tokenizers, "scheduler"):
        if not (path / part).is_dir():
            raise InputError(model, f"is no whole pipeline: {part}/ is missing", "download all of it", flag)
    return unet


def reward_model(config: LPO) -> dict:
    """The U-Net config of the LRM's directory, whose widths fit together."""
    path = Path(config.lrm)
    if not config.lrm or not path.is_dir():
        raise InputError(config.lrm or "(none)", "no such directory",
                         "train one with `python -m lpo_fast.train lrm`, or download casiatao/LRM", "--lrm")
    unet = read_config(path / "unet", "--lrm")
    if not (path / "state_dict.pt").is_file():
        raise InputError(config.lrm, "is no latent reward model: state_dict.pt is missing",
                         "name its top directory", "--lrm")
    if config.lrm_base:
        pipeline(config.lrm_base, "--lrm-base")
    heads = checkpoint.read_heads(path, unet["block_out_channels"])
    base = Path(config.lrm_base or config.model)
    if "text_projection" in heads:
        source = path if (path / "text_encoder").is_dir() else base
        width = read_config(source / "text_encoder", "--lrm")["hidden_size"]
        if heads["text_projection"]["weight"].shape[1] != width:
            raise InputError(config.lrm, f"its text projection takes {heads['text_projection']['weight'].shape[1]} "
                             f"features, its text encoder gives {width}", "name the LRM's own --lrm-base", "--lrm")
    return unet


def pairs(path: str, flag: str, keep: np.ndarray | None = None) -> None:
    """Columns, labels, and that the first pictures decode."""
    if not path or not Path(path).exists():
        raise InputError(path or "(none)", "no such file", "name a .parquet file of preference pairs", flag)
    dataset = data.PairDataset(Path(path), 8, keep, flag)
    try:
        dataset[0]
    except Exception as error:  # Pillow raises many kinds for what is no picture
        raise InputError(path, f"the pictures of row {dataset.rows[0]} do not decode ({error})",
                         "store encoded JPEG or PNG bytes", flag) from error


def directory(config: LPO | LRM) -> None:
    """Refuse a run directory that cannot be written, or that holds a run, or (to resume) holds none."""
    out = existing = Path(config.out)
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(config.out, "cannot be written", "choose a directory of your own", "--out")
    if config.resume and not (out / checkpoint.STATE).is_file():
        raise InputError(config.out, f"holds no {checkpoint.STATE} to go on from", "drop --resume, or name the run",
                         "--out")
    if not config.resume and (out / "metrics.jsonl").exists():
        raise InputError(config.out, "holds a run already", "choose another directory, or go on with --resume", "--out")
