"""Precision, attention, memory format, compilation and optimizer: every such choice of the project is made here."""

import os

import torch
import torch._functorch.config
from torch import nn

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(setting: str, on_cuda: str) -> str:
    """"auto" becomes ``on_cuda`` on a GPU and "no" elsewhere."""
    return (on_cuda if torch.cuda.is_available() else "no") if setting == "auto" else setting


def autocast(setting: str) -> torch.autocast:
    """The context in which networks run; latents, densities and scores stay in fp32 around it."""
    return torch.autocast(device().type, DTYPES[setting], enabled=setting != "no")


def text_placement(size: int) -> torch.device:
    """Where ``size`` bytes of text features are kept: on the GPU if they take a quarter of its free memory at most."""
    if torch.cuda.is_available() and size > torch.cuda.mem_get_info()[0] // 4:
        return torch.device("cpu")
    return device()


def numerics(deterministic: bool, tf32: bool | None = None) -> None:
    """Set how operations compute.

    deterministic: repeat a run bit for bit on one GPU; operations without a deterministic form raise RuntimeError (see
    ``optimization.explained_errors``). CPUs always repeat. tf32: use TensorFloat-32 in fp32 operations; None: as it is.
    """
    if tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)  # with warn_only attention's backward pass would not


def layout(unet: nn.Module) -> nn.Module:
    """Channels-last on a GPU, whose convolutions want it."""
    return unet.to(memory_format=torch.channels_last) if torch.cuda.is_available() else unet
