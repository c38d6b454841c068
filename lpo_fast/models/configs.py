"""The configs of a model's parts, read and checked before anything is built from them."""

from pathlib import Path

from torch.utils._pytree import tree_leaves

from lpo_fast.errors import InputError
from lpo_fast.system import reading


def read_config(folder: Path, flag: str, name: str = "config.json") -> dict:
    """Read a model's config.json. Raises InputError if it is missing or damaged."""
    try:
        return reading.read_json(folder / name, flag)
    except FileNotFoundError as error:
        raise InputError(str(folder.parent), f"{folder.name}/{name} is missing",
                         "name the top directory of a complete download", flag) from error


def positive_int(config: dict, key: str, folder: Path, flag: str, most: int = 2**20) -> int:
    """Return a whole number, or a list of at most 16, from a model's config.json.

    Raises InputError for anything else, and for values above ``most``, whose network would take hours to
    build.
    """
    value = config.get(key)
    numbers = tree_leaves(value)
    if not 1 <= len(numbers) <= 16 or not all(type(n) is int and 1 <= n <= most for n in numbers):
        raise InputError(str(folder / "config.json"), f"{key} is {str(value)[:80]!r}", "download it again",
                         flag)
    return value


def denoiser(path: Path, flag: str) -> dict:
    """Return the U-Net config below ``path``, with its numbers checked."""
    folder, unet = path / "unet", read_config(path / "unet", flag)
    if missing := [key for key in ("in_channels", "cross_attention_dim", "block_out_channels")
                   if key not in unet]:
        raise InputError(str(path), f"unet/config.json has no {missing[0]}",
                         "name a Stable Diffusion directory", flag)
    for key in ("in_channels", "cross_attention_dim", "block_out_channels"):
        positive_int(unet, key, folder, flag)
    for key in ("layers_per_block", "transformer_layers_per_block"):
        positive_int({key: 1} | unet, key, folder, flag, most=100)
    return unet
