"""Draw pictures with a policy, for the report and for validation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lpo_fast.config import LPO
from lpo_fast.lpo import sampling
from lpo_fast.lpo.policies import Policy
from lpo_fast.lpo.sampling import CounterNoise, Predict
from lpo_fast.method.schedule import Schedule
from lpo_fast.models import locate, vaes
from lpo_fast.run import logs
from lpo_fast.system import distributed, writing


class Drawer:
    """Draw pictures of a run's prompts with its policy.

    prompts: the training prompts; in the policy's text features, those of validation follow. The main process
    writes; if the denoiser is sharded, the other processes draw too, because all must run it together.
    """

    def __init__(self, config: LPO, policy: Policy, sched: Schedule, prompts: list[str],
                 shape: tuple[int, int, int]):
        self.config, self.policy, self.sched, self.prompts, self.shape = config, policy, sched, prompts, shape
        self.folder = Path(config.out) / "pictures"
        self.draws = distributed.is_main() or config.shard

    @torch.no_grad()
    def _draw(self, prompts: Tensor) -> list[Image.Image]:
        with writing.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        pixels = pictures(self.policy.predict, self.sched, locate.vae(self.config), prompts, self.shape,
                          guidance=self.config.guidance_scale, seed=self.config.seed,
                          batch=self.config.batch_size, prefetch=self.policy.prefetch)
        return [Image.fromarray(picture.numpy()) for picture in pixels]

    def compared(self, when: str) -> None:
        """Write pictures of the first --pictures prompts for the report, with the same noise each time.

        when: "before" or "after" training. Raises InputError if a write fails.
        """
        count = min(self.config.pictures, len(self.prompts))
        pictures = self._draw(torch.arange(count)) if count and self.draws else []
        if pictures and distributed.is_main():
            with writing.writing(self.folder):
                for i, picture in enumerate(pictures):
                    picture.save(self.folder / f"{i:03d}_{when}.png")
            captions = [{"caption": prompt} for prompt in self.prompts[:count]]
            logs.write_json(self.folder / "captions.json", captions)

    def validation(self, epoch: int) -> list[Image.Image]:
        """Write validation_{epoch}.png, a grid with one row per validation prompt; return its pictures.

        The noise is the same in every epoch. Other processes than the main one return []. Raises InputError
        if a write fails.
        """
        each, prompts = self.config.validation_pictures, self.config.validation_prompts
        if not prompts or not self.draws:
            return []
        pictures = self._draw(len(self.prompts) + torch.arange(len(prompts)).repeat_interleave(each))
        if not distributed.is_main():
            return []
        width, height = pictures[0].size
        grid = Image.new("RGB", (each * width, len(prompts) * height))
        for i, picture in enumerate(pictures):
            grid.paste(picture, (i % each * width, i // each * height))
        with writing.writing(self.folder):
            grid.save(self.folder / f"validation_{epoch}.png")
        logs.write_json(self.folder / "validation.json", list(prompts))
        return pictures


PICTURE_EPOCH = 0xFFFFFFFF  # keys the pictures' noise; no epoch of a run has this number


@torch.no_grad()
def pictures(predict: Predict, sched: Schedule, model: Path, prompts: Tensor, shape: tuple[int, int, int], *,
             guidance: float, seed: int, batch: int, items: Tensor | None = None,
             prefetch: Callable[[Tensor], None] = lambda prompts: None) -> Tensor:
    """Return pictures, uint8 [N, H, W, 3] on the CPU, for prompt numbers int64 [N].

    model: a diffusers model directory, whose VAE decodes, or a VAE's directory. shape: (C, H, W) of the
    latents. batch: pictures drawn at a time. items: int64 [N], the numbers that key their noise (default: 0 …
    N−1). prefetch: ``Policy.prefetch``.
    """
    device = sched.table.device
    vae: Any = vaes.load_vae(model)
    vae.to(device)
    items = torch.arange(len(prompts)) if items is None else items
    drawn = []
    for index, item in zip(prompts.split(batch), items.to(device).split(batch), strict=True):
        prefetch(index)
        index = index.to(device)
        draw = CounterNoise(seed, PICTURE_EPOCH, item, shape)
        latents = sampling.generate(predict, sched, draw, index, guidance=guidance)
        for part in latents.split(4):  # decoding takes the most memory
            decoded = vae.decode(part / vae.config.scaling_factor).sample
            drawn.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(drawn)
