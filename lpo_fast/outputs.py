"""What an LPO run writes beside its log: checkpoints in the official form, the final weights, pictures."""

import json
import math
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from lpo_fast import backbone, checkpoint, files, models, ranks, runs, shard, speed
from lpo_fast import policy as policies
from lpo_fast.config import LPO
from lpo_fast.errors import InputError
from lpo_fast.policy import Policy
from lpo_fast.schedule import Schedule

STEP, OPTIMIZER = "global_step.json", "optimizer.bin"


def save_checkpoint(out: Path, epoch: int, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, config: LPO,
                    step: int) -> None:
    """checkpoint_{epoch}/ in the official form: unet_lora.pt or unet/, optimizer.bin, global_step.json, and their checksums;
    old ones go.

    The main process writes; if the denoiser is sharded, all processes call it.
    """
    unet, state = shard.uncut(unet), shard.whole(optimizer.state_dict())
    if not ranks.main():
        return
    with checkpoint.replacing(out / f"checkpoint_{epoch}") as aside:
        aside.mkdir()
        if config.full:
            unet.save_pretrained(aside / "unet")
        else:
            files.save_pickle(checkpoint.lora_state(unet), aside / checkpoint.LORA_OFFICIAL)
        files.save_pickle(state, aside / OPTIMIZER)
        (aside / STEP).write_text(json.dumps({"global_step": step}))
        files.seal(aside)
    if config.keep_checkpoints:
        for old in checkpoints(out)[:-config.keep_checkpoints]:
            files.discard(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint_{epoch} directories in ``folder``, by epoch."""
    found = [path for path in folder.glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdecimal()]
    return sorted(found, key=epoch_of)


def epoch_of(folder: Path) -> int:
    """The epoch after which a checkpoint was written."""
    return int(folder.name.removeprefix("checkpoint_"))


def find_checkpoint(path: Path, full: bool) -> Path:
    """``path`` itself if it is a checkpoint directory, else the newest in it that is not damaged; says which are.

    Reads all of it. Raises InputError if there is none, or if it holds other weights.
    """
    found = [path] if path.is_dir() and path.name.startswith("checkpoint_") else checkpoints(path)
    if not found or not found[-1].name.removeprefix("checkpoint_").isdecimal():
        raise InputError(str(path), "no checkpoint_{epoch} directory there", "name one, or a directory of them",
                         "--resume-from")
    weights = "unet" if full else checkpoint.LORA_OFFICIAL
    if not any((folder / weights).exists() for folder in found):
        raise InputError(str(found[-1]), f"holds no {weights}", "resume with the --full of the run that wrote it",
                         "--resume-from")
    wrong = {}
    for folder in reversed(found):
        if not (what := files.damage(folder) or ("" if (folder / weights).exists() else f"holds no {weights}")):
            for newer, harm in wrong.items():
                runs.say(f"warning: {newer} is damaged ({harm}); the run starts from {folder.name}")
            return folder
        wrong[folder] = what
    whole = "; ".join(f"{folder.name}: {what}" for folder, what in wrong.items())
    raise InputError(str(path), f"no whole checkpoint there ({whole})", "name another, or start without one", "--resume-from")


def resume_from(folder: Path, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Take weights, the optimizer's moments if they are there, and the step from a checkpoint, which ``find_checkpoint`` found
    whole; go on with the next epoch. Rate, weight decay, betas and eps stay this run's.
    """
    if not hasattr(unet, "peft_config"):
        checkpoint.Trained(unet).load_state_dict(backbone.load_unet(folder).state_dict())
    else:
        checkpoint.load_lora(unet, folder / checkpoint.LORA_OFFICIAL, "--resume-from")
    if (folder / OPTIMIZER).is_file():
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        state = checkpoint.read_pickle(folder / OPTIMIZER, "--resume-from", mmap=ranks.count() > 1)
        try:
            shard.load(optimizer, state)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise InputError(str(folder / OPTIMIZER), f"is another optimizer's ({error})", "use the --optimizer that wrote it",
                             "--resume-from") from error
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)
    step = 0
    if (folder / STEP).is_file():
        step = files.read_json(folder / STEP, "--resume-from").get("global_step")
        if type(step) is not int or not 0 <= step < 2**53:
            raise InputError(str(folder / STEP), "has no global_step", "copy the checkpoint again", "--resume-from")
    return {"epoch": epoch_of(folder) + 1, "step": step}


def check_room(out: Path, unet: UNet2DConditionModel, config: LPO, batches: int, shape: tuple[int, int, int]) -> None:
    """Raise InputError unless there is room for what the run will yet write, at most: states, checkpoints, final weights.

    batches: prompt batches an epoch. The state counts three times: it, the one before, and the next one while it is written.
    """
    parameters = policies.trainable(unet)
    trained = sum(p.numel() * p.element_size() for p in parameters)
    moments = speed.optimizer_state(config.optimizer, parameters) + files.RECORD * len(parameters)
    pairs = config.batch_size * ranks.count() * config.num_steps * 12 * math.prod(shape)  # three fp32 latents
    state = trained * (2 if config.ema_decay else 1) + moments + pairs
    weights = sum(p.numel() * 4 for p in unet.parameters()) if config.full else trained
    epochs = min(config.epochs, config.max_batches // batches if config.max_batches else config.epochs)
    kept, there = epochs // config.save_epochs, len(checkpoints(out))
    if config.keep_checkpoints:
        kept = min(kept, config.keep_checkpoints + 1)  # the new one is there before the oldest goes
    size = (3 - len(checkpoint.states(out))) * state + max(kept - there, 0) * (weights + moments) + weights
    files.check_room(out, size, "make room, limit --keep-checkpoints, or choose a directory on another disk")


def export(out: Path, unet: UNet2DConditionModel, config: LPO) -> None:
    """The final weights: pytorch_lora_weights.safetensors, or unet/. The main process writes; all call it, as above."""
    unet = shard.uncut(unet)
    if not ranks.main():
        return
    if config.full:
        with checkpoint.replacing(out / "unet") as aside:
            unet.save_pretrained(aside)
    else:
        checkpoint.save_lora(unet, out)


class Pictures:
    """Draws with the policy. Prompts: those that train, then validation's.

    The main process writes; if the denoiser is sharded, the others draw too, since all run it together.
    """

    def __init__(self, config: LPO, policy: Policy, sched: Schedule, prompts: list[str], shape: tuple[int, int, int]):
        self.config, self.policy, self.sched, self.prompts, self.shape = config, policy, sched, prompts, shape
        self.folder, self.draws = Path(config.out) / "pictures", ranks.main() or config.shard

    @torch.no_grad()
    def _draw(self, prompts: Tensor) -> list[Image.Image]:
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        pixels = policies.pictures(self.policy.predict, self.sched, models.vae(self.config), prompts, self.shape,
                                   guidance=self.config.guidance_scale, seed=self.config.seed, batch=self.config.batch_size,
                                   bring=self.policy.bring)
        return [Image.fromarray(picture.numpy()) for picture in pixels]

    def compared(self, when: str) -> None:
        """The first prompts, with the same noise ``when`` it is "before" and "after", for the report."""
        count = min(self.config.pictures, len(self.prompts))
        pictures = self._draw(torch.arange(count)) if count and self.draws else []
        if pictures and ranks.main():
            with files.writing(self.folder):
                for i, picture in enumerate(pictures):
                    picture.save(self.folder / f"{i:03d}_{when}.png")
            runs.write_json(self.folder / "captions.json", [{"caption": prompt} for prompt in self.prompts[:count]])

    def validation(self, epoch: int) -> list[Image.Image]:
        """validation_{epoch}.png: a row a validation prompt, the same noise every time; the single pictures."""
        each, prompts = self.config.validation_pictures, self.config.validation_prompts
        if not prompts or not self.draws:
            return []
        pictures = self._draw(len(self.prompts) + torch.arange(len(prompts)).repeat_interleave(each))
        if not ranks.main():
            return []
        width, height = pictures[0].size
        grid = Image.new("RGB", (each * width, len(prompts) * height))
        for i, picture in enumerate(pictures):
            grid.paste(picture, (i % each * width, i // each * height))
        with files.writing(self.folder):
            grid.save(self.folder / f"validation_{epoch}.png")
        runs.write_json(self.folder / "validation.json", list(prompts))
        return pictures
