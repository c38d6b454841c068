"""Choose device, precision, text placement, determinism and memory format, in one place for the whole
project.
"""

import os

import torch
import torch._functorch.config
from torch import nn

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(setting: str, on_cuda: str) -> str:
    """Return ``setting``, or for "auto" ``on_cuda`` on a GPU and "no" elsewhere."""
    return (on_cuda if torch.cuda.is_available() else "no") if setting == "auto" else setting


def autocast(setting: str) -> torch.autocast:
    """Return the autocast context in which networks run; latents, densities and scores stay in fp32 outside
    of it.
    """
    return torch.autocast(device().type, DTYPES[setting], enabled=setting != "no")


def text_placement(size: int) -> torch.device:
    """Return where ``size`` bytes of text features are kept: on the GPU if they take at most a quarter of its
    free memory.
    """
    if torch.cuda.is_available() and size > torch.cuda.mem_get_info()[0] // 4:
        return torch.device("cpu")
    return device()


def deterministic(setting: bool) -> None:
    """Make runs on one GPU bit-identical, if ``setting`` is True.

    Operations then use their deterministic variant, and those without one raise RuntimeError (see
    ``optimization.explained_errors``). CPUs need nothing.
    """
    if setting:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(setting)  # warn_only would leave attention's backward pass as it is


def layout(unet: nn.Module) -> nn.Module:
    """Convert a network to channels-last on a GPU, where convolutions are faster in it; return it."""
    return unet.to(memory_format=torch.channels_last) if torch.cuda.is_available() else unet
