"""Read golden vectors, and measure how far results are from them: max|a − b| / max|b|."""

import json
import math
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig

from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel

FLOAT64, NETWORK = 1e-10, 2e-5  # formulas in float64; one evaluation of a network in float32
TRAJECTORY, EXACT = 1e-4, 1e-9  # a complete sampling run in float32; a LoRA step in float64
ROUNDING = 4 * torch.finfo(torch.float32).eps  # coefficients in float32, each of a few operations
CLEAR = 1e-4  # choices are compared where scores differ by more than this
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
VALUES = ("loss", "ratio_win", "ratio_lose")  # of a LoRA step, besides its gradients
RECORDED = Path(__file__).with_name("recorded_inputs.safetensors")  # see recorded_inputs

Check = tuple[str, float, float]  # what, error, tolerance


def error(a: Tensor, b: Tensor) -> float:
    """Return max|a − b| / max|b|; infinite where shapes differ or a is not finite."""
    if a.shape != b.shape or not a.isfinite().all():
        return math.inf
    scale = b.abs().max().item() if b.numel() else 0.0
    return ((a - b).abs().max().item() / scale) if scale else (0.0 if not a.any() else math.inf)


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the largest error of several tensors."""
    return max(error(a.detach(), b) for a, b in pairs)


def mismatches(a: Tensor, b: Tensor) -> float:
    """Return how many entries differ; infinite where shapes differ."""
    return float((a != b).sum()) if a.shape == b.shape else math.inf


class Golden:
    """Read a directory of golden vectors; models become directories, so that the real loaders read them."""

    def __init__(self, root: Path, scratch: Path):
        self.root, self.scratch = root, scratch
        self.configs = json.loads((root / "configs.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a safetensors file."""
        return load_file(self.root / f"{name}.safetensors")

    def metadata(self, name: str) -> dict[str, str]:
        """Return its metadata."""
        with safe_open(self.root / f"{name}.safetensors", "pt") as file:
            return file.metadata() or {}

    def lrm(self, family: str, multi_scale: bool = True, **settings) -> LatentRewardModel:
        """Return the golden LRM of a family, read through an official directory and ``load_lrm``."""
        weights = self.tensors(f"lrm_{family}_weights")
        folder = self.scratch / f"lrm_{family}_{multi_scale}"
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor.clone()
        configs = {"unet": f"unet_{family}", "text_encoder": "text_encoder",
                   "text_encoder_2": "text_encoder_2"}
        for part in configs.keys() & parts.keys():
            (folder / part).mkdir(parents=True, exist_ok=True)
            config = dict(self.configs[configs[part]])
            if part != "unet":
                config = CLIPTextConfig(**config).to_dict()
            (folder / part / "config.json").write_text(json.dumps(config))
            file = "diffusion_pytorch_model.safetensors" if part == "unet" else "model.safetensors"
            save_file(parts[part], folder / part / file, {"format": "pt"})
        heads = {"visual_projection": parts["visual_projection" if multi_scale else "visual_projection_mid"],
                 "logit_scale": weights["logit_scale"]}
        if "text_projection" in parts:
            heads["text_projection"] = parts["text_projection"]
        torch.save(heads, folder / "state_dict.pt")
        return checkpoint.load_lrm(folder, **settings)

    def unet(self, family: str) -> UNet2DConditionModel:
        """Return the golden policy's denoiser."""
        unet = UNet2DConditionModel(**self.configs[f"unet_{family}"])
        weights = self.tensors(f"lpo_{family}_weights")
        unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()})
        return unet.eval()
