"""python tests/tools/golden_subset.py DIR: copy from a whole directory of golden vectors what the tests need, below 8 MB.

Left out: the LRMs' up blocks (never used), the LRM directory (the same LRM), all but the first steps of the sampling runs,
all but one of the DDIM candidates, one of two clip widths.
"""

import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

STEPS = 8
HERE = Path(__file__).parent.parent / "golden"
UP = ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.")


def copy(source: Path, name: str, change) -> None:
    """A safetensors file with its metadata; change maps (name, tensor) to a tensor, or None to leave it out."""
    with safe_open(source / name, "pt") as file:
        metadata = file.metadata()
    tensors = {key: change(key, tensor) for key, tensor in load_file(source / name).items()}
    save_file({key: t.contiguous() for key, t in tensors.items() if t is not None}, HERE / name, metadata)


def main(source: Path) -> None:
    for name in ("configs.json", "pseudo_preference.csv", "pseudo_preference_kept.json",
                 "pytorch_lora_weights.safetensors", "lrm_loss.safetensors", "pair_selection.safetensors",
                 "lrm_sd15_io.safetensors", "lrm_sdxl_io.safetensors", "lpo_sd15_weights.safetensors",
                 "lpo_sdxl_weights.safetensors"):
        shutil.copyfile(source / name, HERE / name)
    shutil.copytree(source / "lpo_sd15_checkpoint", HERE / "lpo_sd15_checkpoint", dirs_exist_ok=True,
                    copy_function=shutil.copyfile)
    for family in ("sd15", "sdxl"):
        copy(source, f"lrm_{family}_weights.safetensors", lambda key, t: None if key.startswith(UP) else t)
        times = load_file(source / f"lpo_{family}_io.safetensors")["valid/timesteps"][:, 0]
        early = times >= sorted(set(range(1, 1000, 50)), reverse=True)[STEPS - 1]

        def shorten(key, tensor, early=early):
            if key in ("candidate_noise", "chosen_candidate", "scores"):
                return tensor[:STEPS]
            return tensor[early] if key.startswith("valid/") else tensor
        copy(source, f"lpo_{family}_io.safetensors", shorten)
    copy(source, "ddim.safetensors", lambda key, t: t[:1] if t.ndim in (2, 5) else t)
    copy(source, "pairwise_loss.safetensors", lambda key, t: None if "/eps0.001/" in key else t)
    print(sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
