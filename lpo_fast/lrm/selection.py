"""Select the checkpoints that an LRM run keeps, write checkpoint-final, and check the disk space for them."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from lpo_fast.config import LRM, Selection
from lpo_fast.data.dataset import Corrupt
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.run import logs, optimization, session, states
from lpo_fast.system import console, distributed, writing


@dataclass
class Progress(session.Progress):
    """Hold the progress of an LRM run.

    step: optimizer steps taken. checkpoints: (step, validation accuracy) of the kept checkpoints. stage: the
    contents of training_stage.json. corrupt: pairs left out, by use. pairs: digest of the training pairs.
    untrained: validation accuracy before the first step.
    """

    checkpoints: list[tuple[int, float]] = field(default_factory=list)
    stage: dict[str, Any] = field(default_factory=lambda: {"metrics": {}})
    corrupt: dict[str, Corrupt] = field(default_factory=dict)
    pairs: str = ""
    untrained: float = 0.0

    def state(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return super().state() | {"corrupt": {use: sorted(found.rows) for use, found in self.corrupt.items()}}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the fields from what ``state`` returned."""
        corrupt = self.corrupt
        super().load(saved)
        self.corrupt = corrupt
        for use, rows in saved["corrupt"].items():
            corrupt[use].rows = set(rows)

    def stepped(self, rate: float, epoch: int) -> None:
        """Record an optimizer step in ``stage``. rate: its learning rate. epoch: steps per epoch."""
        number = self.step - 1
        self.stage |= {"epoch": number // epoch, "step": number % epoch + 1, "lr": rate,
                       "global_step": self.step}


FINAL, CHECKPOINT = "checkpoint-final", "checkpoint-gstep{}"


def restore(lrm: LatentRewardModel, folder: Path) -> None:
    """Load the weights of a checkpoint in every process; only the main process reads the directory."""
    if distributed.is_main():
        lrm.load_state_dict(checkpoint.load_lrm(folder).state_dict())
    distributed.broadcast(lrm.parameters())


def keep(config: Selection, lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], at: Progress) -> None:
    """Save the LRM that was just validated, and select the checkpoints to keep; ``prune`` removes the others.

    With --save-only-if-best it is saved unless an earlier checkpoint is better; if they are equal, it is
    saved. The best checkpoint is always kept if it will become checkpoint-final.
    """
    out = Path(config.out)
    accuracy = at.stage["metrics"]["accuracy"]
    if config.save_only_if_best and any(accuracy < known for _, known in at.checkpoints):
        return
    at.checkpoints = [*(known for known in at.checkpoints if known[0] != at.step), (at.step, accuracy)]
    if distributed.is_main():
        save(lrm, tokenizers, out / CHECKPOINT.format(at.step), at.stage)
    order = sorted(at.checkpoints, key=lambda known: (known[1] if config.keep_best else 0, known[0]),
                   reverse=True)
    best = [max(order, key=lambda known: (known[1], known[0]))] if config.final_checkpoint == "best" else []
    at.checkpoints = sorted({*order[:config.keep_checkpoints or len(order)], *best})


def prune(out: Path, at: Progress) -> None:
    """Remove the checkpoints that the run does not keep. The main process does so, after saving a state.

    A state that was saved earlier may name them, so they must remain until then.
    """
    if not distributed.is_main():
        return
    kept = {CHECKPOINT.format(step) for step, _ in at.checkpoints}
    for folder in out.glob(CHECKPOINT.format("*")):
        if folder.name not in kept:
            writing.discard(folder)


def save(lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], folder: Path, stage: dict) -> None:
    """Write an LRM directory with the official training_stage.json. Raises InputError if a write fails."""
    with writing.replacing(folder) as aside:
        checkpoint.save_lrm(lrm, tokenizers, aside)
        logs.write_json(aside / "training_stage.json", stage)


def require_disk_space(out: Path, lrm: LatentRewardModel, config: LRM, validated: bool) -> None:
    """Raise InputError if the disk is too small for the states and checkpoints yet to be written.

    The main process checks. validated: whether the run validates, and so writes checkpoints before the final
    one. The state counts three times: the current one, the previous one, and the next one while it is
    written. With --save-only-if-best, only one checkpoint counts, because later ones may never be written.
    """
    if not distributed.is_main():
        return
    with torch.device("meta"):
        denoiser: Any = UNet2DConditionModel.from_config(lrm.unet.config)
    rest = denoiser.num_parameters() - lrm.unet.num_parameters()
    complete = 4 * (rest + sum(p.numel() for p in lrm.parameters()))  # bytes, with the up blocks, fp32
    trained = [p for p in lrm.parameters() if p.requires_grad]
    state = sum(p.numel() * p.element_size() + writing.RECORD for p in trained)
    state += optimization.optimizer_state(config.optimizer, trained)
    times = -(-config.max_steps // config.validate_steps) if validated else 0
    if config.save_only_if_best:
        times = min(times, 1)
    if config.keep_checkpoints:
        times = min(times, config.keep_checkpoints + 1)  # the new one is written before the oldest is removed
    existing = len(list(out.glob(CHECKPOINT.format("*"))))
    size = (3 - len(states.saved_states(out))) * state + (max(times - existing, 0) + 1) * complete
    writing.require_disk_space(
        out, size, "free disk space, limit --keep-checkpoints, or choose a directory on another disk")


def export_final(config: Selection, lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer],
                 at: Progress) -> int:
    """Write checkpoint-final, the best checkpoint or the current LRM (--final-checkpoint); return its step.

    Prints a warning if no validation accuracy is above the one before the first step. Raises InputError if a
    write fails.
    """
    out = Path(config.out)
    last = config.final_checkpoint == "last" or not at.checkpoints
    step = at.step if last else max(at.checkpoints, key=lambda known: (known[1], known[0]))[0]
    if distributed.is_main() and last:
        save(lrm, tokenizers, out / FINAL, at.stage)
    elif distributed.is_main():
        with writing.replacing(out / FINAL) as aside:
            shutil.copytree(out / CHECKPOINT.format(step), aside)
    distributed.barrier()
    best = max((accuracy for _, accuracy in at.checkpoints), default=1)
    if best <= at.untrained:
        console.say(f"warning: no validation accuracy (best {best:.3f}) is above the one before the first "
                    f"step ({at.untrained:.3f}): this reward model has learned nothing useful")
    return step
