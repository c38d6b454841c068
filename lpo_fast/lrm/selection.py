"""What an LRM run keeps: the checkpoints that deserve it, checkpoint-final, and whether the disk has room for them."""

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from lpo_fast.config import LRM, Selection
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.run import logs, optimization, states
from lpo_fast.system import distributed, writing

FINAL, CHECKPOINT = "checkpoint-final", "checkpoint-gstep{}"


def restore(lrm: LatentRewardModel, folder: Path) -> None:
    """Weights of a checkpoint in every process, of which the main one alone need see the directory."""
    if distributed.is_main():
        lrm.load_state_dict(checkpoint.load_lrm(folder).state_dict())
    distributed.broadcast(lrm.parameters())


def keep(config: Selection, lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], at: dict) -> None:
    """Save the LRM just validated unless an earlier one (after step 0) is better, so of equals the later is kept; forget
    checkpoints that are too many, which ``prune`` removes. The best one stays in any case if it becomes checkpoint-final."""
    out, accuracy = Path(config.out), at["stage"]["metrics"]["accuracy"]
    if config.save_only_if_best and any(accuracy < known for _, known in at["checkpoints"]):
        return
    at["checkpoints"] = [*(known for known in at["checkpoints"] if known[0] != at["step"]), (at["step"], accuracy)]
    if distributed.is_main():
        save(lrm, tokenizers, out / CHECKPOINT.format(at["step"]), at["stage"])
    order = sorted(at["checkpoints"], key=lambda known: (known[1] if config.keep_best else 0, known[0]), reverse=True)
    best = [max(order, key=lambda known: (known[1], known[0]))] if config.final_checkpoint == "best" else []
    at["checkpoints"] = sorted({*order[:config.keep_checkpoints or len(order)], *best})


def prune(out: Path, at: dict) -> None:
    """Remove checkpoints that the run does not keep, once no saved state names them."""
    kept = {CHECKPOINT.format(step) for step, _ in at["checkpoints"]}
    for folder in out.glob(CHECKPOINT.format("*")):
        if folder.name not in kept:
            writing.discard(folder)


def save(lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], folder: Path, stage: dict) -> None:
    """An LRM's directory with the official training_stage.json."""
    with writing.replacing(folder) as aside:
        checkpoint.save_lrm(lrm, tokenizers, aside)
        logs.write_json(aside / "training_stage.json", stage)


def require_disk_space(out: Path, lrm: LatentRewardModel, config: LRM, validated: bool) -> None:
    """Raise InputError unless there is room for what the run will yet write, at most: states, checkpoints, checkpoint-final.

    validated: whether there are checkpoints. The state counts three times: it, the one before, and the next one while it is
    written. Checkpoints that are written only if they are the best are counted as if the first were.
    """
    with torch.device("meta"):
        rest = UNet2DConditionModel.from_config(lrm.unet.config).num_parameters() - lrm.unet.num_parameters()
    whole = 4 * (rest + sum(p.numel() for p in lrm.parameters()))  # with the up blocks, fp32
    trained = [p for p in lrm.parameters() if p.requires_grad]
    state = sum(p.numel() * p.element_size() + writing.RECORD for p in trained)
    state += optimization.optimizer_state(config.optimizer, trained)
    times = -(-config.max_steps // config.validate_steps) if validated else 0
    if config.save_only_if_best:
        times = min(times, 1)
    if config.keep_checkpoints:
        times = min(times, config.keep_checkpoints + 1)  # the new one is there before the oldest goes
    there = len(list(out.glob(CHECKPOINT.format("*"))))
    size = (3 - len(states.states(out))) * state + (max(times - there, 0) + 1) * whole
    writing.require_disk_space(out, size, "make room, limit --keep-checkpoints, or choose a directory on another disk")


def export_final(config: Selection, lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], at: dict) -> None:
    """Write checkpoint-final: the best of the checkpoints, or the LRM as it is."""
    out = Path(config.out)
    last = config.final_checkpoint == "last" or not at["checkpoints"]
    at["exported"] = at["step"] if last else max(at["checkpoints"], key=lambda known: (known[1], known[0]))[0]
    if distributed.is_main() and last:
        save(lrm, tokenizers, out / FINAL, at["stage"])
    elif distributed.is_main():
        with writing.replacing(out / FINAL) as aside:
            shutil.copytree(out / CHECKPOINT.format(at["exported"]), aside)
    distributed.barrier()
