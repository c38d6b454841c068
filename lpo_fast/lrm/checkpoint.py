"""Create LRMs from diffusion models, and read and write LRM directories in the official form."""

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from lpo_fast.errors import InputError
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import denoisers, families, locate, texts, vaes
from lpo_fast.system.reading import read_json, read_pickle, read_safetensors
from lpo_fast.system.writing import replacing, save_pickle


def new_lrm(base: Path, *, clip: str | None = None, generator: torch.Generator, resolution: int = 0,
            weights: bool = True, **settings) -> LatentRewardModel:
    """Create an LRM to be trained from a diffusers model directory.

    Initially, W_v ~ N(0, 0.02²) and logit_scale = 2.6592.

    clip: file or directory with the ``text_projection.weight`` from which W_t starts (for SD1.5, that of CLIP
    ViT-L/14); None: the identity. Families whose pooled text is already projected have no W_t. resolution: of
    the pictures, in pixels; 0: the denoiser's own. weights: False leaves the networks on the meta device.
    Raises InputError if files are missing or do not fit.
    """
    unet = denoisers.load_down_mid(base / "unet", weights=weights)
    family = families.family_of(unet.config)
    encoders: list[Any] = texts.load_text(base, family, weights=weights)
    width = encoders[-1].config.hidden_size
    if family.time_ids:
        text_projection = None
        dim = encoders[-1].config.projection_dim
    else:
        text_projection = torch.eye(width) if clip is None else read_text_projection(clip)
        dim = len(text_projection)
    multi_scale = settings.get("multi_scale", True)
    visual = torch.randn(dim, sum(feature_widths(unet, multi_scale)), generator=generator) * 0.02
    resolution = vaes.pixels(base, unet.config, resolution)
    return LatentRewardModel(
        family, unet, encoders, visual, text_projection, torch.tensor(2.6592), resolution=resolution,
        base=locate.origin(base), sizes=denoisers.size_conditions(base, family, unet, resolution), **settings)


def read_heads(path: Path, channels: list[int]) -> dict[str, Any]:
    """Return an LRM's projections and logit scale, from state_dict.pt of a directory or from its single file.

    channels: of the denoiser's blocks. Raises InputError if they are missing or their widths do not fit the
    denoiser.
    """
    if path.is_file():
        state = read_pickle(path, "--lrm", mmap=True)
        heads: dict[str, Any] = {name: {"weight": state[f"{name}.weight"]}
                                 for name in ("visual_projection", "text_projection")
                                 if f"{name}.weight" in state}
        heads |= {"logit_scale": state.get("logit_scale")}
    else:
        heads = read_pickle(path / "state_dict.pt", "--lrm")
    try:
        if not math.isfinite(heads["logit_scale"]):
            raise ValueError(f"logit_scale {float(heads['logit_scale'])}")
        shapes = {name: tuple(heads[name]["weight"].shape) for name in heads if name.endswith("_projection")}
        outputs = {rows for rows, _ in shapes.values()}
        if "visual_projection" not in shapes or len(outputs) != 1:
            raise ValueError(f"projections {shapes}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise InputError(str(path if path.is_file() else path / "state_dict.pt"),
                         f"holds no visual_projection.weight and logit_scale ({error})",
                         "use the file of an LRM, unchanged", "--lrm") from error
    width = heads["visual_projection"]["weight"].shape[1]
    multi, mid = sum(channels) + channels[-1], channels[-1]
    if width not in (multi, mid):
        raise InputError(str(path), f"its visual projection takes {width} features, its denoiser gives "
                         f"{multi} (multi-scale) or {mid}",
                         "use an LRM whose files come from one model", "--lrm")
    return heads


def load_lrm(path: Path, base: Path | None = None, *, resolution: int = 0, weights: bool = True,
             **settings) -> LatentRewardModel:
    """Load an LRM, in eval mode without gradients, from a directory or a .pt file of the official module.

    base: a diffusers directory, which supplies what the LRM lacks: the text encoders that official training
    left frozen, or a single file's configs. resolution: of the pictures to be scored, in pixels; 0: that of
    its training, or the denoiser's own. weights: False leaves the networks on the meta device. settings:
    guidance_scale and multi_scale_cfg; by default those that the directory records. Raises InputError if
    weights are missing or widths do not fit.
    """
    if single := path.is_file():
        if base is None:
            raise InputError(str(path), "is a single file, without configs and tokenizers",
                             "name the diffusers directory of its base model with --lrm-base", "--lrm")
    state = read_pickle(path, "--lrm", mmap=True) if single else {}
    home = base if single and base is not None else path
    unet: Any = denoisers.load_down_mid(home / "unet", families.part(state, "unet"), weights)
    family = families.family_of(unet.config)
    heads = read_heads(path, list(unet.config.block_out_channels))
    visual = heads["visual_projection"]["weight"]
    text = heads["text_projection"]["weight"] if "text_projection" in heads else None
    recorded = {} if single else recorded_settings(path)
    resolution = vaes.pixels(base or path, unet.config, resolution or recorded.get("resolution", 0))
    settings = {"guidance_scale": 7.5, "base": locate.origin(base) if base else "", **recorded, **settings,
                "resolution": resolution, "multi_scale": visual.shape[1] == sum(feature_widths(unet, True))}
    encoders = texts.load_text(base or path, family, home, state, weights)
    lrm = LatentRewardModel(
        family, unet, encoders, visual, text, heads["logit_scale"],
        sizes=denoisers.size_conditions(base or path, family, unet, resolution), **settings)
    return lrm.requires_grad_(False).eval()


def recorded_settings(path: Path) -> dict:
    """Return lrm.json of an LRM directory: base, guidance_scale, multi_scale_cfg, resolution; {} without one.

    Raises InputError if a value is not valid.
    """
    file = path / "lrm.json"
    found = read_json(file, "--lrm") if file.is_file() else {}
    wanted = {"base": str, "guidance_scale": float | int | list, "multi_scale_cfg": bool, "resolution": int}
    for name, value in found.items():
        numbers: list[Any] = value if isinstance(value, list) else [value]
        most = {"guidance_scale": 1e6, "resolution": 2**16}.get(name)
        valid = isinstance(value, wanted.get(name, ()))
        if valid and most is not None:
            valid = bool(numbers) and all(type(n) in (int, float) and 0 <= n <= most for n in numbers)
        if not valid:
            raise InputError(str(file), f"{name} is {str(value)[:80]!r}, which is not valid",
                             "use the file of an LRM, unchanged", "--lrm")
    return found


def save_lrm(lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], path: Path) -> None:
    """Write an LRM directory that the official code can read, with the tokenizers and settings.

    The official loader expects a complete denoiser, so the up blocks are copied from the model that the LRM
    was made from. Raises InputError if a write fails.
    """
    with replacing(path) as aside:
        lrm.unet.save_config(aside / "unet")
        complete = lrm.unet.state_dict() | denoisers.up_blocks(lrm.unet)
        save_tensors(complete, aside / "unet" / "diffusion_pytorch_model.safetensors")
        for (name, _), encoder in zip(lrm.family.encoders, cast(Any, lrm.text_encoders), strict=True):
            encoder.config.save_pretrained(aside / name)
            tensors = {n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}": t
                       for n, t in encoder.state_dict().items()}  # names of transformers < 5, also read by 5
            save_tensors(tensors, aside / name / "model.safetensors")
        for name, tokenizer in zip(lrm.family.tokenizers, tokenizers, strict=True):
            tokenizer.save_pretrained(aside / name)
        heads = {"visual_projection": {"weight": lrm.visual_projection.weight.detach().cpu()},
                 "logit_scale": lrm.logit_scale.detach().cpu()}
        if lrm.text_projection is not None:
            heads["text_projection"] = {"weight": lrm.text_projection.weight.detach().cpu()}
        save_pickle(heads, aside / "state_dict.pt")
        settings = {"base": lrm.base, "guidance_scale": lrm.guidance_scale,
                    "multi_scale_cfg": lrm.multi_scale_cfg, "resolution": lrm.resolution}
        (aside / "lrm.json").write_text(json.dumps(settings, indent=1))


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a .safetensors file in the form of diffusers and transformers."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})


def feature_widths(unet: Any, multi_scale: bool) -> list[int]:
    """Return the channels of each pooled map: of the down blocks if multi_scale, and of the mid block."""
    channels = list(unet.config.block_out_channels)
    return [*(channels if multi_scale else []), channels[-1]]


def read_text_projection(path: str) -> Tensor:
    """Return ``text_projection.weight``, fp32 [P, E], of a CLIP checkpoint.

    path: a .bin, .pt or .safetensors file, or a directory with one. Raises InputError if there is none.
    """
    file = Path(path)
    if file.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        file = next((file / name for name in names if (file / name).is_file()), file)
    if not file.is_file():
        raise InputError(path, "is not a CLIP checkpoint and holds none",
                         "name CLIP's model.safetensors or pytorch_model.bin", "--clip")
    if file.suffix == ".safetensors":
        tensors = read_safetensors(file, "--clip")[0]
    else:
        tensors = read_pickle(file, "--clip")
    weight = tensors.get("text_projection.weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise InputError(path, "has no text_projection.weight", "use a CLIP model with projections", "--clip")
    return weight.float()
