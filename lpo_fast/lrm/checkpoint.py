"""LRM directories, official ones and ours: new, loaded, and saved."""

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
    """Make an LRM to be trained from a diffusers model directory: W_v ~ N(0, 0.02²), logit_scale 2.6592.

    clip: file or directory with the ``text_projection.weight`` that initializes W_t (SD1.5: CLIP ViT-L/14's);
    None: the identity. Families whose pooled text is already a projection have no W_t. resolution: of the
    pictures, in pixels; 0: the denoiser's own. weights: False leaves the networks on the meta device.
    """
    unet = denoisers.load_down_mid(base / "unet", weights=weights)
    family = families.family_of(unet.config)
    encoders: list[Any] = texts.load_text(base, family, weights=weights)
    width = encoders[-1].config.hidden_size
    if family.time_ids:
        text_projection, dim = None, encoders[-1].config.projection_dim
    else:
        text_projection = torch.eye(width) if clip is None else read_text_projection(clip)
        dim = len(text_projection)
    multi_scale = settings.get("multi_scale", True)
    visual = torch.randn(dim, sum(feature_widths(unet, multi_scale)), generator=generator) * 0.02
    resolution = vaes.pixels(base, unet.config, resolution)
    return LatentRewardModel(family, unet, encoders, visual, text_projection,
                             torch.tensor(2.6592), resolution=resolution, base=locate.origin(base),
                             sizes=denoisers.size_conditions(base, family, unet, resolution), **settings)


def read_heads(path: Path, channels: list[int]) -> dict[str, Any]:
    """Read state_dict.pt of an LRM directory, or the same tensors of a single-file LRM.

    channels: of the denoiser's stages. Raises InputError if the projections do not fit them.
    """
    if path.is_file():
        state = read_pickle(path, "--lrm", mmap=True)
        heads: dict[str, Any] = {name: {"weight": state[f"{name}.weight"]}
                                 for name in ("visual_projection", "text_projection")
                                 if f"{name}.weight" in state} | {"logit_scale": state.get("logit_scale")}
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
                         "use an LRM's own file", "--lrm") from error
    width, multi, mid = (heads["visual_projection"]["weight"].shape[1], sum(channels) + channels[-1],
                         channels[-1])
    if width not in (multi, mid):
        raise InputError(str(path), f"its visual projection takes {width} features, its denoiser gives "
                         f"{multi} (multi-scale) or {mid}", "use an LRM whose parts belong together", "--lrm")
    return heads


def load_lrm(path: Path, base: Path | None = None, *, resolution: int = 0, weights: bool = True,
             **settings) -> LatentRewardModel:
    """Load an LRM: a directory, official or ours, or a single .pt file of the official module's state.

    ``base`` supplies what the LRM lacks: text encoders (official, if frozen), configs (a single file).
    guidance_scale and multi_scale_cfg come from ``settings``, else from the directory's record. resolution:
    of the pictures that it scores, in pixels; 0: that of its training, or the denoiser's own. weights: False
    leaves the networks on the meta device. Raises InputError if weights are missing or widths do not fit.
    """
    if single := path.is_file():
        if base is None:
            raise InputError(str(path), "is a single file, without configs and tokenizers",
                             "name the diffusers directory that it was made from with --lrm-base", "--lrm")
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
    lrm = LatentRewardModel(family, unet, texts.load_text(base or path, family, home, state, weights),
                            visual, text, heads["logit_scale"],
                            sizes=denoisers.size_conditions(base or path, family, unet, resolution),
                            **settings)
    return lrm.requires_grad_(False).eval()


def recorded_settings(path: Path) -> dict:
    """Return the checked contents of an LRM directory's lrm.json; {} if there is none.

    Keys: base, guidance_scale, multi_scale_cfg, resolution. Raises InputError for other keys or values.
    """
    file = path / "lrm.json"
    found = read_json(file, "--lrm") if file.is_file() else {}
    wanted = {"base": str, "guidance_scale": float | int | list, "multi_scale_cfg": bool, "resolution": int}
    for name, value in found.items():
        scales: list[Any] = value if isinstance(value, list) else [value]
        most = {"guidance_scale": 1e6, "resolution": 2**16}.get(name)
        if not isinstance(value, wanted.get(name, ())) or most is not None and not (
                scales and all(type(g) in (int, float) and 0 <= g <= most for g in scales)):
            raise InputError(str(file), f"{name} is {str(value)[:80]!r}", "use an LRM's own file", "--lrm")
    return found


def save_lrm(lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], path: Path) -> None:
    """Write an LRM directory that the official code reads too, with its tokenizers and settings beside it.

    The official loader wants a whole denoiser: the up blocks are carried over from the
    files that it came from.
    """
    with replacing(path) as aside:
        lrm.unet.save_config(aside / "unet")
        whole = lrm.unet.state_dict() | denoisers.up_blocks(lrm.unet)
        save_tensors(whole, aside / "unet" / "diffusion_pytorch_model.safetensors")
        for (name, _), encoder in zip(lrm.family.encoders, cast(Any, lrm.text_encoders), strict=True):
            encoder.config.save_pretrained(aside / name)
            # names of transformers < 5, which 5 reads too
            tensors = {n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}": t
                       for n, t in encoder.state_dict().items()}
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
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file,
              {"format": "pt"})


def feature_widths(unet: Any, multi_scale: bool) -> list[int]:
    """Return the channels of each pooled map."""
    channels = list(unet.config.block_out_channels)
    return [*(channels if multi_scale else []), channels[-1]]


def read_text_projection(path: str) -> Tensor:
    """Read ``text_projection.weight`` [P, E] of a CLIP checkpoint, a file or a directory.

    Raises InputError if there is none.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / n for n in ("model.safetensors", "pytorch_model.bin") if (file / n).is_file()),
                    file)
    if not file.is_file():
        raise InputError(path, "no CLIP checkpoint there",
                         "give CLIP's model.safetensors or pytorch_model.bin", "--clip")
    tensors = (read_safetensors(file, "--clip")[0] if file.suffix == ".safetensors" else
               read_pickle(file, "--clip"))
    weight = tensors.get("text_projection.weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise InputError(path, "has no text_projection.weight", "use a CLIP model with projections", "--clip")
    return weight.float()
