"""Reading and writing: LRM directories, LoRA files in the official and the diffusers form, resumable run states."""

import json
import math
import os
import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lpo_fast import backbone, models, ranks, runs, shard
from lpo_fast.errors import InputError
from lpo_fast.files import damage, parse_json, read_json, read_pickle, read_safetensors, replacing, save_pickle, sha256
from lpo_fast.reward import LatentRewardModel

LORA_OFFICIAL, LORA_DIFFUSERS = "unet_lora.pt", "pytorch_lora_weights.safetensors"
STATE, STATE_BEFORE, STATE_SUMS = "state.pt", "state.before.pt", "state.sha256"
SUMS = 100  # lines of STATE_SUMS: each save that fails leaves one of a state that never was
NAME = re.compile(r"\^?[\w.]+")  # of modules in a LoRA's config


# Latent reward models


def new_lrm(base: Path, *, clip: str | None = None, generator: torch.Generator, resolution: int = 0,
            **settings) -> LatentRewardModel:
    """An LRM to be trained, from a diffusers model directory: W_v ~ N(0, 0.02²), logit_scale 2.6592.

    clip: file or directory with the ``text_projection.weight`` that W_t starts from (SD1.5: CLIP ViT-L/14's); None is
    the identity. Families whose pooled text is projected already have no W_t. resolution: of pictures, 0: the denoiser's own.
    """
    unet = backbone.load_down_mid(base / "unet")
    family = backbone.family_of(unet.config)
    encoders = backbone.load_text(base, family)
    width = encoders[-1].config.hidden_size
    if family.time_ids:
        text_projection, dim = None, encoders[-1].config.projection_dim
    else:
        text_projection = torch.eye(width) if clip is None else read_text_projection(clip)
        dim = len(text_projection)
    multi_scale = settings.get("multi_scale", True)
    visual = torch.randn(dim, sum(feature_widths(unet, multi_scale)), generator=generator) * 0.02
    resolution = backbone.pixels(base, unet.config, resolution)
    return LatentRewardModel(
        family, unet, encoders, visual, text_projection, torch.tensor(2.6592), resolution=resolution, base=models.origin(base),
        sizes=size_conditions(base, family, unet, resolution), **settings)


def read_heads(path: Path, channels: list[int]) -> dict:
    """state_dict.pt of an LRM directory (or the same of an LRM in a single file), to fit the denoiser's channels."""
    if path.is_file():
        state = read_pickle(path, "--lrm", mmap=True)
        heads = {name: {"weight": state[f"{name}.weight"]} for name in ("visual_projection", "text_projection")
                 if f"{name}.weight" in state} | {"logit_scale": state.get("logit_scale")}
    else:
        heads = read_pickle(path / "state_dict.pt", "--lrm")
    try:
        if not math.isfinite(heads["logit_scale"]):
            raise ValueError(f"logit_scale {float(heads['logit_scale'])}")
        shapes = {name: tuple(heads[name]["weight"].shape) for name in heads if name.endswith("_projection")}
        outputs = {rows for rows, _ in shapes.values()}
        if "visual_projection" not in shapes or len(outputs) != 1:
            raise ValueError(f"projections {shapes}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise InputError(str(path if path.is_file() else path / "state_dict.pt"),
                         f"holds no visual_projection.weight and logit_scale ({error})",
                         "use an LRM's own file", "--lrm") from error
    width, multi, mid = heads["visual_projection"]["weight"].shape[1], sum(channels) + channels[-1], channels[-1]
    if width not in (multi, mid):
        raise InputError(str(path), f"its visual projection takes {width} features, its denoiser gives {multi} "
                         f"(multi-scale) or {mid}", "use an LRM whose parts belong together", "--lrm")
    return heads


def load_lrm(path: Path, base: Path | None = None, *, resolution: int = 0, **settings) -> LatentRewardModel:
    """An LRM: a directory, official or ours, or a single .pt file of the official module's state.

    ``base`` supplies what the LRM lacks: text encoders (official, if frozen), configs (a single file). guidance_scale and
    multi_scale_cfg are those of ``settings``, or else those that the directory records. resolution: of the pictures that it
    will score; 0: that of its training, or the denoiser's own. Raises InputError if weights are missing or widths do not fit.
    """
    if single := path.is_file():
        if base is None:
            raise InputError(str(path), "is a single file, without configs and tokenizers",
                             "name the diffusers directory that it was made from with --lrm-base", "--lrm")
    state = read_pickle(path, "--lrm", mmap=True) if single else {}
    home = base if single else path
    unet = backbone.load_down_mid(home / "unet", backbone.part(state, "unet"))
    family = backbone.family_of(unet.config)
    heads = read_heads(path, list(unet.config.block_out_channels))
    visual = heads["visual_projection"]["weight"]
    text = heads["text_projection"]["weight"] if "text_projection" in heads else None
    recorded = {} if single else recorded_settings(path)
    resolution = backbone.pixels(base or path, unet.config, resolution or recorded.get("resolution", 0))
    settings = {"guidance_scale": 7.5, "base": models.origin(base) if base else "", **recorded, **settings,
                "resolution": resolution, "multi_scale": visual.shape[1] == sum(feature_widths(unet, True))}
    lrm = LatentRewardModel(
        family, unet, backbone.load_text(base or path, family, home, state), visual, text, heads["logit_scale"],
        sizes=size_conditions(base or path, family, unet, resolution), **settings)
    return lrm.requires_grad_(False).eval()


def recorded_settings(path: Path) -> dict:
    """lrm.json of an LRM directory, {} if there is none: base, guidance_scale, multi_scale_cfg, resolution, checked."""
    file = path / "lrm.json"
    found = read_json(file, "--lrm") if file.is_file() else {}
    wanted = {"base": str, "guidance_scale": float | int | list, "multi_scale_cfg": bool, "resolution": int}
    for name, value in found.items():
        scales = value if isinstance(value, list) else [value]
        if not isinstance(value, wanted.get(name, ())) or name == "guidance_scale" and not (scales and all(
                type(g) in (int, float) and 0 <= g < 1e6 for g in scales)) or name == "resolution" and not 0 <= value <= 2**16:
            raise InputError(str(file), f"{name} is {str(value)[:80]!r}", "use an LRM's own file", "--lrm")
    return found


def save_lrm(lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], path: Path) -> None:
    """Write an LRM directory that the official code reads too, with its tokenizers and settings beside it.

    The official loader wants a whole denoiser: the up blocks are carried over from the files that it came from.
    """
    with replacing(path) as aside:
        lrm.unet.save_config(aside / "unet")
        whole = lrm.unet.state_dict() | backbone.up_blocks(lrm.unet)
        save_tensors(whole, aside / "unet" / "diffusion_pytorch_model.safetensors")
        for (name, _), encoder in zip(lrm.family.encoders, lrm.text_encoders, strict=True):
            encoder.config.save_pretrained(aside / name)
            tensors = {n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}": t
                       for n, t in encoder.state_dict().items()}  # names of transformers < 5, which 5 reads too
            save_tensors(tensors, aside / name / "model.safetensors")
        for name, tokenizer in zip(lrm.family.tokenizers, tokenizers, strict=True):
            tokenizer.save_pretrained(aside / name)
        heads = {"visual_projection": {"weight": lrm.visual_projection.weight.detach().cpu()},
                 "logit_scale": lrm.logit_scale.detach().cpu()}
        if lrm.text_projection is not None:
            heads["text_projection"] = {"weight": lrm.text_projection.weight.detach().cpu()}
        save_pickle(heads, aside / "state_dict.pt")
        settings = {"base": lrm.base, "guidance_scale": lrm.guidance_scale, "multi_scale_cfg": lrm.multi_scale_cfg,
                    "resolution": lrm.resolution}
        (aside / "lrm.json").write_text(json.dumps(settings, indent=1))


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A .safetensors file as diffusers and transformers write it."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def feature_widths(unet: nn.Module, multi_scale: bool) -> list[int]:
    """Channels of each pooled map."""
    channels = list(unet.config.block_out_channels)
    return [*(channels if multi_scale else []), channels[-1]]


def size_conditions(base: Path, family: backbone.Family, unet: nn.Module, resolution: int = 0) -> Tensor | None:
    """Time ids [1, 6] for a resolution in pixels (0: the denoiser's own), or None for families without."""
    if not family.time_ids:
        return None
    pixels = backbone.pixels(base, unet.config, resolution)
    return backbone.time_ids(pixels, pixels)


def read_text_projection(path: str) -> Tensor:
    """``text_projection.weight`` [P, E] of a CLIP checkpoint: a .bin/.pt/.safetensors file or a directory with one."""
    file = Path(path)
    if file.is_dir():
        file = next((file / n for n in ("model.safetensors", "pytorch_model.bin") if (file / n).is_file()), file)
    if not file.is_file():
        raise InputError(path, "no CLIP checkpoint there", "give CLIP's model.safetensors or pytorch_model.bin", "--clip")
    tensors = read_safetensors(file, "--clip")[0] if file.suffix == ".safetensors" else read_pickle(file, "--clip")
    weight = tensors.get("text_projection.weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise InputError(path, "has no text_projection.weight", "use a CLIP model with projections", "--clip")
    return weight.float()


# LoRA. Files hold no alpha: alpha / rank is multiplied into B. The official form has no place for it, and diffusers
# before 0.35 ignores a recorded one; so every reader computes the same.


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> None:
    """Attach a fresh LoRA: A Gaussian (std 1/rank), B zero; only its parameters will train."""
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian",
                                    target_modules=list(targets)))


def lora_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Adapter tensors in the official form, on the CPU, alpha / rank multiplied into B."""
    return scaled(get_peft_model_state_dict(unet), scaling(unet))


def scaling(unet: UNet2DConditionModel) -> float:
    """alpha / rank of the attached adapter."""
    attached = unet.peft_config["default"]
    return attached.lora_alpha / attached.r


def scaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Adapter tensors on the CPU, every B times a factor."""
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    return {name: tensor * factor if name.endswith(".lora_B.weight") else tensor for name, tensor in tensors.items()}


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, of which every diffusers' ``load_lora_weights`` makes the same pictures."""
    write_lora(lora_state(unet), folder)


def write_lora(state: dict[str, Tensor], folder: Path) -> None:
    """Adapter tensors as pytorch_lora_weights.safetensors."""
    with replacing(folder / LORA_DIFFUSERS) as aside:
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=convert_state_dict_to_diffusers(state), weight_name=aside.name)


def read_lora(path: Path, key: str = "--lora") -> dict[str, Tensor]:
    """Adapter tensors (official names) of an official or diffusers LoRA file or its folder.

    What the file says of alphas, in tensors or as peft's config, is multiplied into B. Raises InputError for what is more than
    two matrices a module.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / n for n in (LORA_DIFFUSERS, LORA_OFFICIAL) if (file / n).is_file()), file)
    if not file.is_file():
        raise InputError(str(path), "no LoRA there", f"give {LORA_DIFFUSERS}, {LORA_OFFICIAL} or their folder",
                         key)
    if file.suffix != ".safetensors":
        state = read_pickle(file, key)
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
            raise InputError(str(file), "holds something else than named tensors", f"use a {LORA_OFFICIAL}", key)
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
            up = next(up for end in ("lora_up", "lora_B", "lora.up") if (up := f"{module}.{end}.weight") in tensors)
            tensors[up] = tensors[up] * (float(alpha) / tensors[up].shape[1])
        tensors, _ = StableDiffusionPipeline.lora_state_dict(tensors)  # takes the names of kohya's programs too
        state = {name.removeprefix("unet."): tensor for name, tensor in convert_unet_state_dict_to_peft(tensors).items()}
        if scalars := [name for name, tensor in state.items() if tensor.dim() < 2]:
            raise ValueError(f"{scalars[0]!r} is no matrix")
        return {name: tensor * lora_scale(config, name.removesuffix(".lora_B.weight"), tensor.shape[1])
                if config and name.endswith(".lora_B.weight") else tensor for name, tensor in state.items()}
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, RuntimeError, StopIteration, OverflowError) as error:
        raise InputError(str(file), f"cannot be read as a LoRA ({error})", "merge it with the program that made it, or use a "
                         f"plain {LORA_DIFFUSERS}", key) from error


def lora_config(metadata: dict[str, str]) -> dict:
    """peft's LoraConfig of the denoiser's adapter as diffusers records it; {} if it does not. Raises ValueError."""
    recorded = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    found = {name.removeprefix("unet."): value for name, value in recorded.items() if name.startswith("unet.")}
    if other := next((name for name in ("use_dora", "lora_bias", "use_qalora") if found.get(name)), None):
        raise ValueError(f"it was trained with {other}")
    pattern = found.get("alpha_pattern") or {}
    for name, alpha in [("lora_alpha", found.get("lora_alpha", 1)), *pattern.items()]:
        if type(alpha) not in (int, float) or not math.isfinite(alpha) or not NAME.fullmatch(name):  # peft takes it for a regex
            raise ValueError(f"its alpha of {name!r} is {alpha!r}")
    return found


def lora_scale(config: dict, module: str, rank: int) -> float:
    """What a module's B·A is multiplied by: alpha / rank, or alpha / √rank with use_rslora. rank_pattern adds nothing to
    the tensors' shapes."""
    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern, module), config.get("lora_alpha", LoraConfig().lora_alpha))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def load_lora(unet: UNet2DConditionModel, path: Path, key: str = "--lora") -> None:
    """Put a LoRA into the attached adapter, whose alpha may be another: B is scaled so that it computes the same.

    Raises InputError unless names and shapes are the same.
    """
    state, own = read_lora(path, key), lora_state(unet)
    wrong = sorted(n for n in state.keys() | own.keys()
                   if n not in own or n not in state or state[n].shape != own[n].shape)
    if wrong:
        name = wrong[0]
        shapes = [str(tuple(s[name].shape)) if name in s else "absent" for s in (state, own)]
        raise InputError(str(path), f"{len(wrong)} tensors differ from the adapter of this run, the first {name!r}: "
                         f"{shapes[0]} in the file, {shapes[1]} wanted", "match --rank and --targets to the file", key)
    set_peft_model_state_dict(unet, scaled(state, 1 / scaling(unet)))


# Run states


class Trained:
    """The parameters of a module that train, as something with a state_dict."""

    def __init__(self, module: nn.Module):
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """Their values."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put values back. Raises ValueError unless names and shapes are the same."""
        if {n: p.shape for n, p in self.parameters.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError("other parameters train")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(shard.part(state[name], parameter))


def states(out: Path) -> list[Path]:
    """The states in a run directory that --resume may go on from, the newest first: the one before may be needed."""
    return [out / name for name in (STATE, STATE_BEFORE) if (out / name).is_file()]


def state_sums(out: Path) -> list[str]:
    """SHA-256 of the states that may lie in a run directory, the newest first; none of a run before there were any."""
    file = out / STATE_SUMS
    return file.read_text(encoding="utf-8", errors="replace").split() if file.is_file() else []


def save_state(file: Path, at: dict, parts: dict[str, object]) -> None:
    """All that a resumed run needs: where it stands, and the state_dict of each part (None: not in use).

    The state before becomes STATE_BEFORE. The main process writes; if the parts are sharded, all processes call it. Raises
    InputError if the disk refuses.
    """
    saved = {name: part and shard.whole(part.state_dict()) for name, part in parts.items()}
    if ranks.main():
        with replacing(file, file.with_name(STATE_BEFORE)) as aside:
            sums = [save_pickle({"at": at} | saved, aside), *state_sums(file.parent)]
            with replacing(file.with_name(STATE_SUMS)) as listed:  # first: if killed here, the two states that stay are in it
                listed.write_text("\n".join(sums[:SUMS]) + "\n", encoding="utf-8")


def load_state(file: Path, parts: dict[str, object]) -> dict:
    """Restore what ``save_state`` wrote into the parts; where the run stands. All processes call it.

    The state before is taken, and takes the newest one's place, if that is damaged or missing. Raises InputError if no state
    is whole, or if it is of other parts.
    """
    source = whole_state(file)
    state = read_pickle(source, "--out", mmap=ranks.count() > 1)  # no copy of it in the memory of each
    try:
        for name, part in parts.items():
            if (part is None) != (state[name] is None):
                raise ValueError(f"{name} was {'not ' if part else ''}in use")
            if part is not None:
                shard.load(part, state[name])
        at = state["at"]
    except (KeyError, ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise InputError(str(source), f"was saved with other settings ({error})", "resume with the run's own settings",
                         "--out") from error
    if source != file:
        ranks.wait()  # all have read it
        if ranks.main():  # else the next save would put the damaged one in the place of the whole one
            os.replace(source, file)
    return at


def whole_state(file: Path) -> Path:
    """The newest state that is as it was written."""
    sums, wrong = state_sums(file.parent), {}
    for state in states(file.parent):
        what = damage(state)
        if sums and not what and sha256(state) not in sums:
            what = f"{state.name} has changed since it was written"
        if not what:
            if wrong:
                runs.say(f"warning: {file}: {wrong[file]}; the run goes on from the state before it")
            return state
        wrong[state] = what
    raise InputError(str(file), "; ".join(wrong.values()) or "no state there", "start a new run in another directory, from a "
                     "checkpoint with --resume-from if there is one", "--out")
