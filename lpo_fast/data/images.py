"""Decode pictures to tensors, within limits on format and size."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS, which would run Ghostscript
LARGEST_PICTURE = 2**26  # pixels: 8,192 × 8,192, 200 MB as RGB


def opened(file: Path | io.BytesIO) -> Image.Image:
    """Open a picture and read only its header.

    Raises ValueError if it is too large, and whatever Pillow raises for other files.
    """
    picture = Image.open(file, formats=FORMATS)
    if picture.width * picture.height > LARGEST_PICTURE:
        raise ValueError(f"{picture.width} × {picture.height} pixels are more than {LARGEST_PICTURE:,}")
    return picture


def picture(encoded: bytes) -> Image.Image:
    """Decode a picture to RGB, upright: the first frame, without transparency.

    Raises the same errors as ``opened``.
    """
    return upright(opened(io.BytesIO(encoded)))


def upright(picture: Image.Image) -> Image.Image:
    """Return the picture in RGB, rotated according to its EXIF orientation."""
    if picture.mode.startswith("I;16"):  # Pillow would clip it at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels of 32 bits (mode {picture.mode}) have no known range")
    return ImageOps.exif_transpose(picture).convert("RGB")


def decode(encoded: bytes, resolution: int) -> Tensor:
    """Decode a picture to fp32 [3, r, r] in [−1, 1], upright and resized to the square."""
    return pixels(opened(io.BytesIO(encoded)), resolution)


def pixels(picture: Image.Image, resolution: int) -> Tensor:
    """Return fp32 [3, r, r] in [−1, 1] of a picture, as ``decode`` does for an encoded one."""
    picture = upright(picture)
    if picture.size != (resolution, resolution):
        picture = picture.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
