"""Attach, read, scale and write LoRAs, in the official and the diffusers format."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from lpo_fast.errors import InputError
from lpo_fast.system.reading import parse_json, read_pickle, read_safetensors
from lpo_fast.system.writing import replacing

LORA_OFFICIAL, LORA_DIFFUSERS = "unet_lora.pt", "pytorch_lora_weights.safetensors"
NAME = re.compile(r"\^?[\w.]+")  # module names in a LoRA's config


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float, targets: tuple[str, ...],
             seed: int) -> None:
    """Attach a new LoRA, the only trainable parameters: A is Gaussian (standard deviation 1/rank), B is zero.
    """
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian",
                                    target_modules=list(targets)))


def lora_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Return the adapter's tensors in the official format, on the CPU, with alpha / rank multiplied into B.
    """
    return scaled(get_peft_model_state_dict(unet), scaling(unet))


def scaling(unet: UNet2DConditionModel) -> float:
    """Return alpha / rank of the attached adapter."""
    attached = unet.peft_config["default"]
    return attached.lora_alpha / attached.r


def scaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return adapter tensors on the CPU, with every B multiplied by a factor."""
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    return {name: tensor * factor if name.endswith(".lora_B.weight") else tensor
            for name, tensor in tensors.items()}


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, with which ``load_lora_weights`` of every diffusers version
    gives the same pictures.
    """
    write_lora(lora_state(unet), folder)


def write_lora(state: dict[str, Tensor], folder: Path) -> None:
    """Write adapter tensors to pytorch_lora_weights.safetensors."""
    with replacing(folder / LORA_DIFFUSERS) as aside:
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=convert_state_dict_to_diffusers(state), weight_name=aside.name)


def read_lora(path: Path, key: str = "--lora") -> dict[str, Tensor]:
    """Read the adapter tensors (official names) of a LoRA file, or of its folder, in the official or the
    diffusers format.

    Alphas in the file, as tensors or in peft's config, are multiplied into B. Raises InputError for an
    adapter that is more than two matrices per module.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / n for n in (LORA_DIFFUSERS, LORA_OFFICIAL) if (file / n).is_file()), file)
    if not file.is_file():
        raise InputError(str(path), "no LoRA there",
                         f"name {LORA_DIFFUSERS}, {LORA_OFFICIAL} or their folder", key)
    if file.suffix != ".safetensors":
        state = read_pickle(file, key)
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
            raise InputError(str(file), "holds something other than named tensors", f"use a {LORA_OFFICIAL}",
                             key)
        return state
    tensors, metadata = read_safetensors(file, key)
    try:
        if any("dora_scale" in name for name in tensors):
            raise ValueError("it is a DoRA")
        config = lora_config(metadata)
        if alphas := {name: tensors.pop(name) for name in list(tensors) if name.endswith(".alpha")}:
            config = {}
        for name, alpha in alphas.items():
            module = name.removesuffix(".alpha")
            up = next(up for end in ("lora_up", "lora_B", "lora.up")
                      if (up := f"{module}.{end}.weight") in tensors)
            tensors[up] = tensors[up] * (float(alpha) / tensors[up].shape[1])
        tensors, _ = StableDiffusionPipeline.lora_state_dict(tensors)  # accepts kohya's names too
        state = {name.removeprefix("unet."): tensor
                 for name, tensor in convert_unet_state_dict_to_peft(tensors).items()}
        if scalars := [name for name, tensor in state.items() if tensor.dim() < 2]:
            raise ValueError(f"{scalars[0]!r} is not a matrix")
        return {name: tensor * lora_scale(config, name.removesuffix(".lora_B.weight"), tensor.shape[1])
                if config and name.endswith(".lora_B.weight") else tensor for name, tensor in state.items()}
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, RuntimeError, StopIteration,
            OverflowError) as error:
        raise InputError(str(file), f"cannot be read as a LoRA ({error})",
                         f"merge it with the program that wrote it, or use a plain {LORA_DIFFUSERS}",
                         key) from error


def lora_config(metadata: dict[str, str]) -> dict:
    """Return peft's LoraConfig of the denoiser's adapter as recorded by diffusers; {} if none is recorded.

    Raises ValueError for a kind of adapter, or an alpha, that is not supported.
    """
    recorded = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    found = {name.removeprefix("unet."): value for name, value in recorded.items()
             if name.startswith("unet.")}
    if other := next((name for name in ("use_dora", "lora_bias", "use_qalora") if found.get(name)), None):
        raise ValueError(f"it was trained with {other}")
    pattern = found.get("alpha_pattern") or {}
    for name, alpha in [("lora_alpha", found.get("lora_alpha", 1)), *pattern.items()]:
        # The name must be a plain one, because peft interprets it as a regular expression.
        if type(alpha) not in (int, float) or not math.isfinite(alpha) or not NAME.fullmatch(name):
            raise ValueError(f"its alpha for {name!r} is {alpha!r}")
    return found


def lora_scale(config: dict, module: str, rank: int) -> float:
    """Return the factor of a module's B·A: alpha / rank, or alpha / √rank with use_rslora.

    rank_pattern is not needed: the tensors' shapes already contain the rank.
    """
    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern, module), config.get("lora_alpha", LoraConfig().lora_alpha))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def load_lora(unet: UNet2DConditionModel, path: Path, key: str = "--lora") -> None:
    """Load a LoRA into the attached adapter; B is rescaled if the adapter has another alpha, so that it
    computes the same.

    Raises InputError unless names and shapes are the same.
    """
    state, own = read_lora(path, key), lora_state(unet)
    wrong = sorted(n for n in state.keys() | own.keys()
                   if n not in own or n not in state or state[n].shape != own[n].shape)
    if wrong:
        name = wrong[0]
        shapes = [str(tuple(s[name].shape)) if name in s else "absent" for s in (state, own)]
        raise InputError(str(path),
                         f"{len(wrong)} tensors differ from the adapter of this run, the first {name!r}: "
                         f"{shapes[0]} in the file, {shapes[1]} expected",
                         "match --rank and --targets to the file", key)
    set_peft_model_state_dict(unet, scaled(state, 1 / scaling(unet)))


def adapters(unet: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers that have a LoRA."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_off(layers: list[BaseTunerLayer]) -> Iterator[None]:
    """Disable the LoRA in these layers.

    Unlike peft's ``disable_adapters`` this leaves requires_grad unchanged.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def trainable(unet: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters."""
    return [p for p in unet.parameters() if p.requires_grad]
