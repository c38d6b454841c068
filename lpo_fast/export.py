"""Export a trained model: a LoRA merged into its model or converted to the diffusers format, or a fine-tuned
model.

Run as python -m lpo_fast.export.

    W' = W + B·A          for every layer that the LoRA adapts, in fp32; alpha / r is part of B
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lpo_fast import cli
from lpo_fast.errors import InputError
from lpo_fast.models import denoisers, locate, loras
from lpo_fast.preflight import models
from lpo_fast.system import writing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Export:
    """Export a complete model of a LoRA or of full fine-tuning, or convert a LoRA to
    pytorch_lora_weights.safetensors.
    """

    lora: str = ""
    """LoRA: a run directory, checkpoint_{n}/, unet_lora.pt or pytorch_lora_weights.safetensors."""
    tuned: str = ""
    """For full fine-tuning instead: its run directory, checkpoint_{n}/ or unet/."""
    model: str = ""
    """The model that was trained: a diffusers directory, a hub name,
    or a single file (optional with --form lora)."""
    out: str = ""
    """Directory to write; it must be empty or not exist."""
    form: Literal["merged", "lora"] = "merged"
    """merged: the complete model with the trained weights. lora: pytorch_lora_weights.safetensors."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision in which the denoiser is saved; bf16's rounding may hide small changes."""


@dataclass(frozen=True)
class Lora:
    """A LoRA with alpha equal to its rank: (A [r, in, …], B [out, r, …]) for each adapted module."""

    pairs: dict[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """Return the rank of all modules. Raises InputError if they differ."""
        ranks = sorted({len(a) for a, _ in self.pairs.values()})
        if len(ranks) > 1:
            raise InputError(f"ranks {ranks}", "the LoRA's modules have different ranks",
                             "merge it first: python -m lpo_fast.export", "--lora")
        return ranks[0]


def read(path: str) -> Lora:
    """Read a LoRA file or its folder. Raises InputError for tensors that are not a denoiser's adapter."""
    state = loras.read_lora(Path(path))
    names = dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in state)
    for name in names or ("",):
        a, b = state.get(name + A), state.get(name + B)
        if a is None or b is None or a.dim() < 2 or b.dim() < 2 or len(a) != b.shape[1]:
            raise InputError(path, f"{name!r} is not an adapter of two matrices of one rank",
                             "use a LoRA of the denoiser only", "--lora")
    return Lora({name: (state[name + A].float(), state[name + B].float()) for name in names})


def check_fit(lora: Lora, unet: nn.Module, path: str) -> None:
    """Raise InputError if the LoRA adapts a layer that ``unet`` (which may be on the meta device) does not
    have in this shape.
    """
    modules = dict(unet.named_modules())
    for name, (a, b) in lora.pairs.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != (len(b), *a.shape[1:]):
            there = "absent" if weight is None else str(tuple(weight.shape))
            raise InputError(path, f"adapts {name} of shape {(len(b), *a.shape[1:])}, which is {there} "
                             "in the model", "name the model on which it was trained", "--lora")


@torch.no_grad()
def merge(unet: nn.Module, lora: Lora) -> None:
    """Add the LoRA to the weights of linear layers and convolutions, in place; ``unet`` is in fp32."""
    for name, (a, b) in lora.pairs.items():
        weight = unet.get_submodule(name).weight
        weight += (b.to(weight.device).flatten(1) @ a.to(weight.device).flatten(1)).view_as(weight)


@contextmanager
def assembled(name: str, model: str | Path) -> Iterator[str]:
    """Yield a temporary directory of links to a complete tuned model: its own parts, and those of ``model``
    that it lacks.
    """
    tuned = Path(name)
    if not tuned.is_dir():
        raise InputError(name, "no such directory", "name a model, or a run with unet/", "--tuned")
    unet = tuned if (tuned / "config.json").is_file() and not (tuned / "unet").is_dir() else tuned / "unet"
    if not (unet / "config.json").is_file():
        raise InputError(name, "holds no unet/",
                         "name a model or a run of full fine-tuning; for a LoRA use --lora", "--tuned")
    with tempfile.TemporaryDirectory() as folder:
        for part in Path(model).iterdir():
            source = (unet if part.name == "unet" else tuned / part.name if (tuned / part.name).exists() else
                      part)
            os.symlink(source.absolute(), Path(folder) / part.name)
        yield folder


def save_merged(model: Path, lora: Lora | None, out: Path, dtype: str) -> None:
    """Write the model's directory with the LoRA merged into its denoiser; single-file checkpoints next to its
    parts are omitted.
    """
    unet = denoisers.load_unet(model)
    if lora:
        merge(unet, lora)
    with writing.replacing(out) as aside:
        aside.mkdir()
        for part in sorted(part for part in model.iterdir() if not part.name.startswith(".")):
            if part.is_dir() and part.name != "unet":
                shutil.copytree(part, aside / part.name)
            elif part.is_file() and part.suffix in (".json", ".md", ".txt", ""):
                shutil.copyfile(part, aside / part.name)
        unet.to(DTYPES[dtype]).save_pretrained(aside / "unet")


def save_lora(lora: Lora, out: Path) -> None:
    """Write pytorch_lora_weights.safetensors, with which every version of diffusers gives the same pictures.
    """
    loras.write_lora({name + suffix: tensor.contiguous() for name, pair in lora.pairs.items()
                           for suffix, tensor in zip((A, B), pair, strict=True)}, out)


def check(settings: Export) -> Lora | None:
    """Refuse settings that cannot work; return the LoRA, if there is one."""
    cli.required(settings, "out", *([] if settings.tuned else ["lora"]))
    if settings.tuned and (settings.lora or settings.form == "lora"):
        raise InputError(settings.tuned, "is full fine-tuning, not a LoRA",
                         "drop --tuned, or --lora and --form lora", "--tuned")
    unet = models.pipeline(settings.model, "--model") if settings.model or settings.form == "merged" else None
    place = Path(settings.lora)
    if settings.lora and (place / "unet").is_dir() and not any(
            (place / name).is_file() for name in (loras.LORA_DIFFUSERS, loras.LORA_OFFICIAL)):
        raise InputError(settings.lora, "is full fine-tuning, not a LoRA", "use --tuned for it", "--lora")
    lora = None if settings.tuned else read(settings.lora)
    if settings.tuned:
        with assembled(settings.tuned, locate.locate(settings.model, "--model")) as folder:
            models.pipeline(folder, "--tuned")
    elif unet:
        with torch.device("meta"):
            check_fit(lora, UNet2DConditionModel.from_config(unet), settings.lora)
    out = Path(settings.out)
    models.writable(out)
    if out.is_dir() and any(out.iterdir()):
        raise InputError(settings.out, "is not empty", "name another directory", "--out")
    return lora


def run(settings: Export) -> None:
    """Run the command."""
    lora, out = check(settings), Path(settings.out)
    if settings.tuned:
        with assembled(settings.tuned, locate.locate(settings.model, "--model")) as folder:
            save_merged(Path(folder), None, out, settings.dtype)
        print(f"model: {out}, denoiser in {settings.dtype}")
        return
    if settings.form == "lora":
        save_lora(lora, out)
        print(f"LoRA: {out / loras.LORA_DIFFUSERS}, {len(lora.pairs)} layers")
    else:
        save_merged(locate.locate(settings.model, "--model"), lora, out, settings.dtype)
        print(f"model: {out}, {len(lora.pairs)} layers merged, denoiser in {settings.dtype}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.command(Export, run, argv, "export")


if __name__ == "__main__":
    sys.exit(main())
