"""Find and load a model's VAE, and return its config and the number of pixels per latent."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from lpo_fast.models import families


def vae_folder(path: Path) -> Path:
    """Return the folder of the VAE: below a pipeline, or ``path`` itself."""
    return path / "vae" if (path / "vae").is_dir() else path


def vae_config(path: Path) -> dict:
    """Return the VAE's config.json, with diffusers' default for keys that old configs lack.

    No weights are loaded.
    """
    return {"scaling_factor": 0.18215} | json.loads((vae_folder(path) / "config.json").read_text())


def load_vae(path: Path, weights: bool = True) -> AutoencoderKL:
    """Load the VAE of a pipeline or of a separate directory: frozen, fp32;
    without weights on the meta device."""
    folder = vae_folder(path)
    if weights:
        vae = AutoencoderKL.from_pretrained(folder, variant=families.variant(folder),
                                            torch_dtype=torch.float32, use_safetensors=True)
    else:
        vae = families.without_weights(AutoencoderKL, folder)
    return vae.requires_grad_(False).eval()


def pixels(path: Path, unet_config: dict, resolution: int = 0) -> int:
    """Return height and width in pixels of the pictures of a denoiser with the VAE below ``path``.

    resolution: that size, or 0 for the denoiser's own.
    """
    return resolution or unet_config["sample_size"] * pixels_per_latent(path)


def pixels_per_latent(path: Path) -> int:
    """Return the number of pixels per latent in each direction: 8, unless the config of the VAE below
    ``path`` differs.
    """
    config = path / "vae" / "config.json"
    stages = len(json.loads(config.read_text())["block_out_channels"]) if config.is_file() else 4
    return 2 ** (stages - 1)
