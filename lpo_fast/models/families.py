"""What differs between model families, as data; which files of a model's folder hold its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection


@dataclass(frozen=True)
class Family:
    """encoders: (subfolder, class) of each text encoder; its tokenizer lies in the subfolder of the same suffix.

    penultimate: the context is the hidden state before the last layer, else the final output. zero_null: the policy's
    null text is zeros, not the encoding of "" (a reward model always encodes ""). time_ids: the denoiser is also given
    pooled text and sizes; the pooled text is then a projection already and LRMs need no text projection of their own.
    """

    name: str
    encoders: tuple[tuple[str, type[nn.Module]], ...]
    penultimate: bool = False
    zero_null: bool = False
    time_ids: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Subfolders of the tokenizers, in the order of the encoders."""
        return tuple(name.replace("text_encoder", "tokenizer") for name, _ in self.encoders)

SD = Family("sd", (("text_encoder", CLIPTextModel),))
SDXL = Family("sdxl", (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)),
              penultimate=True, zero_null=True, time_ids=True)


def family_of(unet_config: dict) -> Family:
    """The family of a denoiser, from its config."""
    return SDXL if unet_config.get("addition_embed_type") == "text_time" else SD


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: all shards, of variants (.fp16, .non_ema) only if there is nothing else."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if "." not in file.stem] or [file for file in files if ".fp16" in file.stem]


def variant(folder: Path) -> str | None:
    """The variant that ``from_pretrained`` has to be asked for: None where full precision lies there."""
    return "fp16" if any(".fp16" in file.stem for file in weight_files(folder)) else None


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a submodule, without its name in front."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
