"""python tests/tools/golden_subset.py DIR: copy what the tests need to tests/golden, below 8 MB.

Left out: the LRMs' up blocks (never used), the LRM directory (the same LRM), the later steps of the
sampling runs with their kept pairs, all but one of the DDIM candidates, and one of two clip widths of the
pair loss on its own. The LoRA steps are complete: both clip widths, in float32 (``train``) and float64
(``train64``).
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

STEPS = 6  # of the sampling runs; the first four make the pairs of the LoRA steps
LIMIT = 8_000_000  # bytes
HERE = Path(__file__).parent.parent / "golden"
UP = ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.")
WHOLE = ("configs.json", "pseudo_preference.csv", "pseudo_preference_kept.json", "lrm_loss.safetensors",
         "pair_selection.safetensors", "lrm_sd15_io.safetensors", "lrm_sdxl_io.safetensors",
         "lpo_sd15_weights.safetensors", "lpo_sdxl_weights.safetensors",
         "lpo_sd15_checkpoint/global_step.json", "lpo_sd15_checkpoint/unet_lora.pt",
         "pytorch_lora_weights.safetensors")


def copy(source: Path, name: str, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """Copy a safetensors file with its metadata. change: maps a tensor to another, or to None."""
    with safe_open(source / name, "pt") as file:
        metadata = file.metadata()
    tensors = {key: change(key, tensor) for key, tensor in load_file(source / name).items()}
    save_file({key: t.contiguous() for key, t in tensors.items() if t is not None}, HERE / name, metadata)


def shorten(source: Path, family: str) -> None:
    """Copy a recorded run with its first steps, the pairs that they kept, and all of its LoRA steps."""
    name = f"lpo_{family}_io.safetensors"
    io = load_file(source / name)
    times = io["valid/timesteps"][:, 0]
    early = times > times.max() - STEPS * 1000 // len(io["scores"])

    def change(key: str, tensor: Tensor) -> Tensor:
        if key in ("candidate_noise", "chosen_candidate", "scores"):
            return tensor[:STEPS]
        return tensor[early] if key.startswith("valid/") else tensor
    copy(source, name, change)


def main(source: Path) -> None:
    """Replace tests/golden; exit with an error if it is too large."""
    shutil.rmtree(HERE, ignore_errors=True)
    for name in WHOLE:
        (HERE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, HERE / name)
    for family in ("sd15", "sdxl"):
        copy(source, f"lrm_{family}_weights.safetensors", lambda key, t: None if key.startswith(UP) else t)
        shorten(source, family)
    copy(source, "ddim.safetensors", lambda key, t: t[:1] if t.ndim in (2, 5) else t)
    copy(source, "pairwise_loss.safetensors", lambda key, t: None if "/eps0.001/" in key else t)
    size = sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file())
    print(size, "bytes")
    if size > LIMIT:
        sys.exit(f"tests/golden is larger than {LIMIT} bytes: lower STEPS")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
