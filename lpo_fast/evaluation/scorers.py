"""Score pictures: with any function (pictures, prompts) → numbers, named ``module:function``, or a built-in
scorer.

| name        | score                                                            | weights                   |
|---|---|---|
| pickscore   | exp(logit_scale) · cos(picture, prompt) of PickScore v1          | hub, see HUB              |
| clipscore   | cos(picture, prompt) of CLIP ViT-L/14                            | hub                       |
| aesthetic   | LAION's linear head (sac+logos+ava1) on CLIP ViT-L/14; no prompt | hub, or a .pth file       |
| hpsv2       | HPSv2.1                                                          | from package hpsv2        |
| imagereward | ImageReward v1.0                                                 | from package image-reward |

Weights on the hub are not downloaded here: a scorer whose weights are not on this machine is refused with the
command that downloads them. The variable LPO_FAST_{NAME}_{PART}, for instance LPO_FAST_AESTHETIC_HEAD, names
a directory or file to use instead of the hub's.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from lpo_fast.errors import InputError
from lpo_fast.system import devices, reading

Score = Callable[[list[Image], list[str]], Sequence[float]]

CLIP_L = "openai/clip-vit-large-patch14"
HUB = {
    "pickscore": {"model": "yuvalkirstain/PickScore_v1",
                  "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    "clipscore": {"model": CLIP_L, "processor": CLIP_L},
    "aesthetic": {"model": CLIP_L, "processor": CLIP_L, "head": "trl-lib/ddpo-aesthetic-predictor"},
}
PACKAGES = {"hpsv2": ("hpsv2", "hpsv2"), "imagereward": ("ImageReward", "image-reward")}  # module, package


def resolve(spec: str) -> Score:
    """Return the scorer of that name, or ``module:function``.

    Raises InputError if it is not available; loads no weights.
    """
    name = spec.removeprefix(f"{__name__}:")
    if name in HUB or name in PACKAGES:
        require(name)
        return globals()[name]
    module, _, function = spec.partition(":")
    if not module or not function:
        raise InputError(spec, "is neither module:function nor a built-in scorer",
                         f"use module:function, or {', '.join([*HUB, *PACKAGES])}", "--scorer")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # importing runs whatever the module holds
        raise InputError(spec, f"{module} cannot be imported ({type(error).__name__}: {error})",
                         "check its name and PYTHONPATH", "--scorer") from error
    if not callable(found):
        raise InputError(spec, f"{module} has no function {function!r}", "check its name", "--scorer")
    return found


def call(score: Score, name: str, pictures: list[Image], prompts: list[str]) -> list[float]:
    """Return the scorer's numbers. Raises InputError unless there is one finite number per picture."""
    values = torch.as_tensor(score(pictures, prompts), dtype=torch.float64).flatten()
    if len(values) != len(pictures) or not values.isfinite().all():
        problem = "a number that is not finite" if len(values) == len(pictures) else f"{len(values)} numbers"
        raise InputError(name, f"gave {problem} for {len(pictures)} pictures",
                         "return one finite number per picture", "--scorer")
    return values.tolist()


def require(name: str) -> None:
    """Raise InputError if the weights or the package of a built-in scorer are not on this machine."""
    for part in HUB.get(name, ()):
        located(name, part)
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name][0]) is None:
        package = PACKAGES[name][1]
        raise InputError(name, f"the package {package} is not installed", f"pip install {package}",
                         "--scorer")


def located(name: str, part: str) -> Path:
    """Return the path of a part of a built-in scorer: from its variable, or in the hub's cache."""
    repository, variable = HUB[name][part], f"LPO_FAST_{name}_{part}".upper()
    if own := os.environ.get(variable):
        if not Path(own).exists():
            raise InputError(own, f"is set in {variable} and does not exist", "correct the variable",
                             "--scorer")
        return Path(own)
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError) as error:  # e.g. LocalEntryNotFoundError
        raise InputError(name, f"{repository} is not on this machine",
                         f"run `hf download {repository}`, or name its directory in {variable}",
                         "--scorer") from error


@cache
def clip(name: str) -> tuple[CLIPModel, CLIPProcessor]:
    """Load a built-in scorer's CLIP in fp32, once."""
    folder = located(name, "model")
    try:  # reads a pytorch_model.bin with weights_only
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                          attn_implementation="sdpa")
        processor = CLIPProcessor.from_pretrained(located(name, "processor"), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise InputError(str(folder), f"cannot be read safely as CLIP ({type(error).__name__})",
                         "download it again", "--scorer") from error
    return model.requires_grad_(False).eval().to(devices.device()), processor


@torch.no_grad()
def cosines(name: str, pictures: list[Image], prompts: list[str]) -> Tensor:
    """Return cos(picture, prompt), [N]."""
    model, processor = clip(name)
    inputs = processor(text=prompts, images=pictures, padding=True, truncation=True, return_tensors="pt",
                       max_length=model.config.text_config.max_position_embeddings).to(model.device)
    out = model(**inputs)
    return (F.normalize(out.image_embeds, dim=-1) * F.normalize(out.text_embeds, dim=-1)).sum(-1)


def pickscore(pictures: list[Image], prompts: list[str]) -> list[float]:
    """Return PickScore (Kirstain et al., 2023) of each picture."""
    return (clip("pickscore")[0].logit_scale.exp() * cosines("pickscore", pictures, prompts)).tolist()


def clipscore(pictures: list[Image], prompts: list[str]) -> list[float]:
    """Return CLIP's cosine of each picture; Hessel et al. (2021) multiply its positive part by 2.5."""
    return cosines("clipscore", pictures, prompts).tolist()


@torch.no_grad()
def aesthetic(pictures: list[Image], prompts: list[str]) -> list[float]:
    """Return the score of LAION's aesthetic predictor: linear layers on CLIP's picture embedding of unit
    length.

    The dropout between the layers acts in training only. The prompts are not used.
    """
    model, processor = clip("aesthetic")
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(model.device)
    x = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
    for weight, bias in head():
        x = F.linear(x, weight.to(x), bias.to(x))
    return x.squeeze(-1).tolist()


@cache
def head() -> list[tuple[Tensor, Tensor]]:
    """Load the layers of the aesthetic head, (weight, bias) each, from ``layers.{n}.weight`` and ``.bias``.
    """
    path = located("aesthetic", "head")
    file = (path if path.is_file() else
            next((f for kind in ("*.pth", "*.pt", "*.bin") for f in sorted(path.glob(kind))), path))
    state = reading.read_pickle(file, "--scorer")
    try:
        numbers = sorted(int(name.split(".")[1]) for name in state if name.endswith(".weight"))
        return [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in numbers]
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InputError(str(file), f"is not an aesthetic head ({error})",
                         "use sac+logos+ava1-l14-linearMSE.pth", "--scorer") from error


def hpsv2(pictures: list[Image], prompts: list[str]) -> list[float]:
    """Return HPSv2.1 of each picture.

    The package loads its checkpoint in every call, so it is called once per prompt.
    """
    package, scores = importlib.import_module("hpsv2"), [0.0] * len(pictures)
    for prompt in dict.fromkeys(prompts):
        numbers = [i for i, other in enumerate(prompts) if other == prompt]
        values = package.score([pictures[i] for i in numbers], prompt, hps_version="v2.1")
        for i, value in zip(numbers, values, strict=True):
            scores[i] = float(value)
    return scores


@cache
def _imagereward() -> object:
    return importlib.import_module("ImageReward").load("ImageReward-v1.0", device=str(devices.device()))


def imagereward(pictures: list[Image], prompts: list[str]) -> list[float]:
    """Return ImageReward (Xu et al., 2023) of each picture."""
    return [float(_imagereward().score(prompt, picture))
            for picture, prompt in zip(pictures, prompts, strict=True)]
