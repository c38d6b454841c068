"""Encoded pictures to tensors, within bounds."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS, which runs Ghostscript
LARGEST_PICTURE = 2**26  # pixels, 8,192 × 8,192: RGB of it has 200 MB


def opened(file: Path | io.BytesIO) -> Image.Image:
    """A picture, nothing but its header read. Raises ValueError if it is huge, and whatever Pillow raises for what is none."""
    picture = Image.open(file, formats=FORMATS)
    if picture.width * picture.height > LARGEST_PICTURE:
        raise ValueError(f"{picture.width} × {picture.height} pixels are more than {LARGEST_PICTURE:,}")
    return picture


def picture(encoded: bytes) -> Image.Image:
    """Encoded picture → RGB, upright: the first frame, without transparency. Raises as ``opened`` does."""
    return upright(opened(io.BytesIO(encoded)))


def upright(picture: Image.Image) -> Image.Image:
    """As its EXIF orientation says, in RGB."""
    if picture.mode.startswith("I;16"):  # which Pillow cuts off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels of 32 bits (mode {picture.mode}) have no known range")
    return ImageOps.exif_transpose(picture).convert("RGB")


def decode(encoded: bytes, resolution: int) -> Tensor:
    """Encoded picture → fp32 [3, r, r] in [−1, 1], upright and resized to the square."""
    return pixels(opened(io.BytesIO(encoded)), resolution)


def pixels(picture: Image.Image, resolution: int) -> Tensor:
    """What ``decode`` makes of a picture: fp32 [3, r, r]."""
    picture = upright(picture)
    if picture.size != (resolution, resolution):
        picture = picture.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
