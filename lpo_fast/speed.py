"""Precision, attention, memory format, compilation and optimizer: every such choice of the project is made here."""

from collections.abc import Callable, Iterable

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import is_xformers_available
from torch import nn

from lpo_fast.errors import InputError

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


def xformers_runs() -> bool:
    """Whether xformers' attention runs on this device."""
    if not (torch.cuda.is_available() and is_xformers_available()):
        return False
    from xformers.ops import memory_efficient_attention
    try:
        q = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cuda")
        memory_efficient_attention(q, q, q)
    except (NotImplementedError, RuntimeError):  # built for another torch or GPU
        return False
    return True


def attention(unet: UNet2DConditionModel, name: str) -> None:
    """PyTorch's attention ("sdpa") or xformers' in every transformer of a denoiser. Raises InputError where it cannot run."""
    if name == "xformers":
        if not xformers_runs():
            raise InputError(name, "does not run here", "use sdpa, which computes the same", "--attention")
        unet.enable_xformers_memory_efficient_attention()


def optimizer(name: str, parameters: Iterable[nn.Parameter], **settings) -> torch.optim.Optimizer:
    """AdamW (fused on CUDA) or bitsandbytes' 8-bit AdamW over the parameters that train."""
    parameters = [p for p in parameters if p.requires_grad]
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise InputError(name, "bitsandbytes is not installed", "pip install bitsandbytes, or use adamw",
                             "--optimizer") from error
        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=torch.cuda.is_available(), **settings)


def learning_rate(warmup: str, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Factor of the peak rate at optimizer step k = 0, 1, …: warm-up, then linear decay to 0 at max_steps."""
    def factor(k: int) -> float:
        if k < warmup_steps and warmup == "linear":
            return (k + 1) / warmup_steps
        if k < warmup_steps:  # DeepSpeed's logarithmic warm-up
            return float(torch.log(torch.tensor(k + 1.0)) / torch.log(torch.tensor(max(warmup_steps, 2.0))))
        return max(max_steps - k, 0) / max(max_steps - warmup_steps, 1)
    return factor
