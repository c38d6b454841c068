"""Write and read the official form of LPO checkpoints, checkpoint_{epoch}/, and export the final weights."""

import json
import math
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from lpo_fast.config import LPO, Weights
from lpo_fast.errors import InputError
from lpo_fast.lpo import batches
from lpo_fast.lpo.batches import Progress
from lpo_fast.models import denoisers, loras, sharding
from lpo_fast.run import optimization, states
from lpo_fast.system import checksums, console, distributed, reading, writing

STEP, OPTIMIZER = "global_step.json", "optimizer.bin"


def save_checkpoint(out: Path, epoch: int, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer,
                    config: LPO, step: int) -> None:
    """Write checkpoint_{epoch}/, and remove the oldest ones above --keep-checkpoints.

    It holds unet_lora.pt or unet/, optimizer.bin, global_step.json, and their checksums. The main process
    writes; if the denoiser is sharded, all processes must call this. Raises InputError if a write fails.
    """
    unet, state = sharding.unsharded(unet), sharding.gathered(optimizer.state_dict())
    if not distributed.is_main():
        return
    with writing.replacing(out / f"checkpoint_{epoch}") as aside:
        aside.mkdir()
        if config.full:
            unet.save_pretrained(aside / "unet")
        else:
            writing.save_pickle(loras.lora_state(unet), aside / loras.LORA_OFFICIAL)
        writing.save_pickle(state, aside / OPTIMIZER)
        (aside / STEP).write_text(json.dumps({"global_step": step}))
        checksums.seal(aside)
    if config.keep_checkpoints:
        for old in checkpoints(out)[:-config.keep_checkpoints]:
            writing.discard(old)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint_{epoch} directories in ``folder``, sorted by epoch."""
    found = [path for path in folder.glob("checkpoint_*")
             if path.name.removeprefix("checkpoint_").isdecimal()]
    return sorted(found, key=epoch_of)


def epoch_of(folder: Path) -> int:
    """Return the epoch after which a checkpoint was written."""
    return int(folder.name.removeprefix("checkpoint_"))


def find_checkpoint(path: Path, full: bool) -> Path:
    """Return ``path`` if it is a checkpoint directory, else the newest intact checkpoint in it.

    Reads all files of a checkpoint, to compare checksums, and prints a warning for each damaged one. full:
    whether unet/ is expected, rather than unet_lora.pt. Raises InputError if there is no intact checkpoint
    with these weights.
    """
    found = [path] if path.is_dir() and path.name.startswith("checkpoint_") else checkpoints(path)
    if not found or not found[-1].name.removeprefix("checkpoint_").isdecimal():
        raise InputError(str(path), "has no checkpoint_{epoch} directory",
                         "name a checkpoint, or a directory that holds some", "--resume-from")
    weights = "unet" if full else loras.LORA_OFFICIAL
    if not any((folder / weights).exists() for folder in found):
        raise InputError(str(found[-1]), f"holds no {weights}",
                         "use the same --full as the run that wrote it", "--resume-from")
    damaged: dict[Path, str] = {}
    for folder in reversed(found):
        missing = "" if (folder / weights).exists() else f"holds no {weights}"
        if not (what := checksums.damage(folder) or missing):
            for newer, damage in damaged.items():
                console.say(f"warning: {newer} is damaged ({damage}); the run starts from {folder.name}")
            return folder
        damaged[folder] = what
    reasons = "; ".join(f"{folder.name}: {what}" for folder, what in damaged.items())
    raise InputError(str(path), f"has no intact checkpoint ({reasons})", "name another, or start without one",
                     "--resume-from")


def start_from(folder: Path, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, at: Progress,
               config: LPO, prompts: int) -> None:
    """Load a checkpoint, and set the run's progress to the epoch after it.

    prompts: the number of training prompts. Raises InputError if a file does not fit.
    """
    found = resume_from(folder, unet, optimizer)
    at.epoch, at.step = found["epoch"], found["step"]
    at.done = at.start = at.epoch * batches.per_epoch(config, prompts)


def resume_from(folder: Path, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Load a checkpoint's weights and, if present, optimizer moments; return the next epoch and its step.

    folder: a checkpoint that ``find_checkpoint`` returned. The learning rate, weight decay, betas and eps
    remain those of this run. Raises InputError if a file does not fit.
    """
    if not hasattr(unet, "peft_config"):
        states.Trained(unet).load_state_dict(denoisers.load_unet(folder).state_dict())
    else:
        loras.load_lora(unet, folder / loras.LORA_OFFICIAL, "--resume-from")
    if (folder / OPTIMIZER).is_file():
        own = [{key: value for key, value in group.items() if key != "params"}
               for group in optimizer.param_groups]
        state = reading.read_pickle(folder / OPTIMIZER, "--resume-from", mmap=distributed.world_size() > 1)
        try:
            sharding.load(optimizer, state)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise InputError(str(folder / OPTIMIZER), f"is another optimizer's ({error})",
                             "use the --optimizer that wrote it", "--resume-from") from error
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)
    step = 0
    if (folder / STEP).is_file():
        step = reading.read_json(folder / STEP, "--resume-from").get("global_step")
        if type(step) is not int or not 0 <= step < 2**53:
            raise InputError(str(folder / STEP), "has no valid global_step", "copy the checkpoint again",
                             "--resume-from")
    return {"epoch": epoch_of(folder) + 1, "step": step}


def require_disk_space(out: Path, unet: UNet2DConditionModel, config: LPO, epoch_batches: int,
                       shape: tuple[int, int, int]) -> None:
    """Raise InputError if the disk is too small for the states, checkpoints and weights yet to be written.

    The main process checks. epoch_batches: prompt batches per epoch. shape: (C, H, W) of the latents. The
    state counts three times: the current one, the previous one, and the next one while it is written.
    """
    if not distributed.is_main():
        return
    parameters = loras.trainable(unet)
    trained = sum(p.numel() * p.element_size() for p in parameters)
    moments = optimization.optimizer_state(config.optimizer, parameters) + writing.RECORD * len(parameters)
    latents = 12 * math.prod(shape)  # bytes of a pair's 3 fp32 latents
    pairs = config.batch_size * distributed.world_size() * config.num_steps * latents
    state = trained * (2 if config.ema_decay else 1) + moments + pairs
    weights = sum(p.numel() * 4 for p in unet.parameters()) if config.full else trained
    epochs = min(config.epochs, config.max_batches // epoch_batches if config.max_batches else config.epochs)
    kept = epochs // config.save_epochs
    if config.keep_checkpoints:
        kept = min(kept, config.keep_checkpoints + 1)  # the new one is written before the oldest is removed
    new = max(kept - len(checkpoints(out)), 0)
    size = (3 - len(states.saved_states(out))) * state + new * (weights + moments) + weights
    writing.require_disk_space(
        out, size, "free disk space, limit --keep-checkpoints, or choose a directory on another disk")


def export(out: Path, unet: UNet2DConditionModel, config: Weights) -> None:
    """Write the final weights: pytorch_lora_weights.safetensors, or unet/ if all weights were trained.

    The main process writes; if the denoiser is sharded, all processes must call this. Raises InputError if a
    write fails.
    """
    unet = sharding.unsharded(unet)
    if not distributed.is_main():
        return
    if config.full:
        with writing.replacing(out / "unet") as aside:
            unet.save_pretrained(aside)
    else:
        loras.save_lora(unet, out)
