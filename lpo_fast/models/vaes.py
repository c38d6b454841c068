"""The VAE of a model: where it lies, its config, how many pixels a latent stands for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from lpo_fast.models import families


def vae_folder(path: Path) -> Path:
    """Where the VAE lies: below a pipeline, or ``path`` itself."""
    return path / "vae" if (path / "vae").is_dir() else path


def vae_config(path: Path) -> dict:
    """The VAE's config.json, with diffusers' default of what old ones lack. Nothing is loaded."""
    return {"scaling_factor": 0.18215} | json.loads((vae_folder(path) / "config.json").read_text())


def load_vae(path: Path) -> AutoencoderKL:
    """The VAE of a pipeline, or a directory of its own; frozen, fp32."""
    folder = vae_folder(path)
    vae = AutoencoderKL.from_pretrained(folder, variant=families.variant(folder), torch_dtype=torch.float32, use_safetensors=True)
    return vae.requires_grad_(False).eval()


def pixels(path: Path, unet_config: dict, resolution: int = 0) -> int:
    """Height and width of the pictures of a denoiser whose VAE is below ``path``: ``resolution``, or 0 for its own."""
    return resolution or unet_config["sample_size"] * pixels_per_latent(path)


def pixels_per_latent(path: Path) -> int:
    """How many pixels a latent stands for in each direction: 8, unless the VAE below ``path`` says otherwise."""
    config = path / "vae" / "config.json"
    stages = len(json.loads(config.read_text())["block_out_channels"]) if config.is_file() else 4
    return 2 ** (stages - 1)
