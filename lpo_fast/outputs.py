"""What an LPO run writes beside its log: checkpoints in the official form, the final weights, pictures."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from lpo_fast import checkpoint, models, ranks, runs, shard
from lpo_fast import policy as policies
from lpo_fast.config import LPO
from lpo_fast.errors import InputError
from lpo_fast.policy import Policy
from lpo_fast.schedule import Schedule

STEP, OPTIMIZER = "global_step.json", "optimizer.bin"


def save_checkpoint(out: Path, epoch: int, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, config: LPO,
                    step: int) -> None:
    """checkpoint_{epoch}/ in the official form: unet_lora.pt or unet/, optimizer.bin, global_step.json; old ones go.

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
            torch.save(checkpoint.lora_state(unet), aside / checkpoint.LORA_OFFICIAL)
        torch.save(state, aside / OPTIMIZER)
        (aside / STEP).write_text(json.dumps({"global_step": step}))
    if config.keep_checkpoints:
        for old in checkpoints(out)[:-config.keep_checkpoints]:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint_{epoch} directories in ``folder``, by epoch."""
    found = [path for path in folder.glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint_")))


def find_checkpoint(path: Path, full: bool) -> Path:
    """``path`` itself if it is a checkpoint directory, else the newest in it; raises InputError if there is none."""
    found = [path] if path.is_dir() and path.name.startswith("checkpoint_") else checkpoints(path)
    if not found or not found[-1].name.removeprefix("checkpoint_").isdecimal():
        raise InputError(str(path), "no checkpoint_{epoch} directory there", "name one, or a directory of them",
                         "--resume-from")
    weights = "unet" if full else checkpoint.LORA_OFFICIAL
    if not (found[-1] / weights).exists():
        raise InputError(str(found[-1]), f"holds no {weights}", "resume with the --full of the run that wrote it",
                         "--resume-from")
    return found[-1]


def resume_from(path: Path, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Take weights, the optimizer's moments if they are there, and the step from a checkpoint; go on with the next epoch.

    Rate, weight decay, betas and eps stay this run's.
    """
    full = not hasattr(unet, "peft_config")
    folder = find_checkpoint(path, full)
    if full:
        checkpoint.Trained(unet).load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
    else:
        checkpoint.load_lora(unet, folder / checkpoint.LORA_OFFICIAL, "--resume-from")
    if (folder / OPTIMIZER).is_file():
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        try:
            shard.load(optimizer, checkpoint.read_pickle(folder / OPTIMIZER, "--resume-from", mmap=ranks.count() > 1))
        except (KeyError, ValueError) as error:
            raise InputError(str(folder / OPTIMIZER), f"is another optimizer's ({error})", "use the --optimizer that wrote it",
                             "--resume-from") from error
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)
    step = folder / STEP
    return {"epoch": int(folder.name.removeprefix("checkpoint_")) + 1,
            "step": json.loads(step.read_text())["global_step"] if step.is_file() else 0}


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
        grid.save(self.folder / f"validation_{epoch}.png")
        runs.write_json(self.folder / "validation.json", list(prompts))
        return pictures
