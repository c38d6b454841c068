"""What an LPO run writes besides its log: checkpoints in the official form, and the final weights."""

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
    """Write checkpoint_{epoch}/ in the official form, with checksums, and remove the oldest ones.

    It holds unet_lora.pt or unet/, optimizer.bin, and global_step.json. Only the main process writes; if the
    denoiser is sharded, all ranks must call this.
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
    """Return ``path`` if it is a checkpoint directory, else the newest intact one in it; log damaged ones.

    Reads all files. Raises InputError if there is none, or if it holds other weights.
    """
    found = [path] if path.is_dir() and path.name.startswith("checkpoint_") else checkpoints(path)
    if not found or not found[-1].name.removeprefix("checkpoint_").isdecimal():
        raise InputError(str(path), "no checkpoint_{epoch} directory there",
                         "name one, or a directory of them", "--resume-from")
    weights = "unet" if full else loras.LORA_OFFICIAL
    if not any((folder / weights).exists() for folder in found):
        raise InputError(str(found[-1]), f"holds no {weights}",
                         "resume with the --full of the run that wrote it", "--resume-from")
    wrong = {}
    for folder in reversed(found):
        if not (what := checksums.damage(folder)
                or ("" if (folder / weights).exists() else f"holds no {weights}")):
            for newer, harm in wrong.items():
                console.say(f"warning: {newer} is damaged ({harm}); the run starts from {folder.name}")
            return folder
        wrong[folder] = what
    whole = "; ".join(f"{folder.name}: {what}" for folder, what in wrong.items())
    raise InputError(str(path), f"no intact checkpoint there ({whole})", "name another, or start without one",
                     "--resume-from")


def start_from(folder: Path, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, at: Progress,
               config: LPO, prompts: int) -> None:
    """Take weights, the optimizer's moments, and the place in the run from a checkpoint;
    continue with the next epoch."""
    found = resume_from(folder, unet, optimizer)
    at.epoch, at.step = found["epoch"], found["step"]
    at.done = at.start = at.epoch * len(batches.order(config, 0, prompts))


def resume_from(folder: Path, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Take weights, the optimizer's moments if they are there, and the step from a checkpoint, which
    ``find_checkpoint`` found whole; go on with the next epoch. Rate, weight decay, betas and eps stay this
    run's.
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
            raise InputError(str(folder / STEP), "has no global_step", "copy the checkpoint again",
                             "--resume-from")
    return {"epoch": epoch_of(folder) + 1, "step": step}


def require_disk_space(out: Path, unet: UNet2DConditionModel, config: LPO, an_epoch: int,
                       shape: tuple[int, int, int]) -> None:
    """Raise InputError unless the disk has room for the most that the run will still write.

    The main process checks. an_epoch: prompt batches per epoch. The state counts three times: the current
    one, the previous one, and the next one while it is written.
    """
    if not distributed.is_main():
        return
    parameters = loras.trainable(unet)
    trained = sum(p.numel() * p.element_size() for p in parameters)
    moments = optimization.optimizer_state(config.optimizer, parameters) + writing.RECORD * len(parameters)
    # three fp32 latents
    pairs = config.batch_size * distributed.world_size() * config.num_steps * 12 * math.prod(shape)
    state = trained * (2 if config.ema_decay else 1) + moments + pairs
    weights = sum(p.numel() * 4 for p in unet.parameters()) if config.full else trained
    epochs = min(config.epochs, config.max_batches // an_epoch if config.max_batches else config.epochs)
    kept, there = epochs // config.save_epochs, len(checkpoints(out))
    if config.keep_checkpoints:
        kept = min(kept, config.keep_checkpoints + 1)  # the new one is there before the oldest goes
    size = (3 - len(states.saved_states(out))) * state + max(kept - there, 0) * (weights + moments) + weights
    writing.require_disk_space(out, size,
                               "make room, limit --keep-checkpoints, or choose a directory on another disk")


def export(out: Path, unet: UNet2DConditionModel, config: Weights) -> None:
    """Write the final weights: pytorch_lora_weights.safetensors, or unet/.

    Only the main process writes; if the denoiser is sharded, all ranks must call this.
    """
    unet = sharding.unsharded(unet)
    if not distributed.is_main():
        return
    if config.full:
        with writing.replacing(out / "unet") as aside:
            unet.save_pretrained(aside)
    else:
        loras.save_lora(unet, out)
