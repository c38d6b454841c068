"""Choose device, precision, text placement, determinism and memory format, in one place for the whole
project.
"""

import os
from typing import Any

import torch

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


def numerics(deterministic: bool, tf32: bool | None = None) -> None:
    """Set how operations compute.

    deterministic: repeat a run bit for bit on one GPU; operations without a deterministic form raise
    RuntimeError (see ``optimization.explained_errors``). CPUs always repeat. tf32: use TensorFloat-32 in fp32
    operations; None: as it is.
    """
    if tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)  # with warn_only attention's backward pass would not


def layout(unet: Any) -> Any:
    """Convert a network to channels-last on a GPU, where convolutions are faster in it; return it."""
    return unet.to(memory_format=torch.channels_last) if torch.cuda.is_available() else unet
