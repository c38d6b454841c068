"""Describe the differences between model families as data, and find the weight files of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ConfigMixin
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection


@dataclass(frozen=True)
class Family:
    """Describe a model family.

    encoders: (subfolder, class) of each text encoder; its tokenizer is in the subfolder with the same suffix.
    penultimate: the context is the hidden state before the last layer, else the final output. zero_null: the
    policy's null text is zeros, not the encoding of "" (a reward model always encodes ""). time_ids: the
    denoiser also takes pooled text and sizes; its pooled text is already a projection, so LRMs of the family
    have no text projection of their own.
    """

    name: str
    encoders: tuple[tuple[str, type[nn.Module]], ...]
    penultimate: bool = False
    zero_null: bool = False
    time_ids: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Return the subfolders of the tokenizers, in the order of the encoders."""
        return tuple(name.replace("text_encoder", "tokenizer") for name, _ in self.encoders)


SD = Family("sd", (("text_encoder", CLIPTextModel),))
SDXL = Family("sdxl", (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)),
              penultimate=True, zero_null=True, time_ids=True)


def family_of(unet_config: dict) -> Family:
    """Return the family of a denoiser, given its config."""
    return SDXL if unet_config.get("addition_embed_type") == "text_time" else SD


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder: all shards.

    Variants (.fp16) are returned only if there are no other files.
    """
    files = sorted(folder.glob("*.safetensors"))
    return ([file for file in files if "." not in file.stem]
            or [file for file in files if ".fp16" in file.stem])


def without_weights(kind: type[nn.Module], folder: Path) -> nn.Module:
    """Build a network of diffusers or transformers from its config alone: fp32, on the meta device."""
    with torch.device("meta"):
        if issubclass(kind, ConfigMixin):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder, attn_implementation="sdpa"))


def variant(folder: Path) -> str | None:
    """Return the variant that ``from_pretrained`` must load: "fp16", or None where the folder has full
    precision.
    """
    return "fp16" if any(".fp16" in file.stem for file in weight_files(folder)) else None


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of a submodule, with its name removed from their names."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items()
            if key.startswith(f"{name}.")}
