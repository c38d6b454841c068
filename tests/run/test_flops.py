"""Operations of a prompt batch in real sizes, ours against the official statement,
both counted on the meta device."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from bench.official import loop as official_loop
from bench.official.loop import Official, Random
from bench.support import random_models
from lpo_fast import config
from lpo_fast.config import LPO
from lpo_fast.models import denoisers, families
from lpo_fast.models.families import without_weights
from lpo_fast.preflight import dry_run, meta
from lpo_fast.preflight.meta import META, empty, on_cuda

MOST = {"sd15": 0.72, "sdxl": 0.66}
PROMPTS = 2  # a batch; half of its pairs are valid: one a step


def ours(settings: LPO) -> float:
    """TFLOP a prompt, half of the pairs valid, as --dry-run counts them from the run's own functions."""
    row, = (line for line in dry_run.report(settings) if line.startswith("total, if half are valid"))
    return float(row.split()[-2].replace(",", ""))


def statement(settings: LPO) -> Official:
    """The official run on the meta device."""
    model = Path(settings.model)
    unet = without_weights(UNet2DConditionModel, model / "unet").requires_grad_(False).eval()
    family = families.family_of(unet.config)
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    scheduler.set_timesteps(settings.num_steps)
    ids = [empty(PROMPTS, 77, dtype=torch.int64) for _ in family.encoders]
    null = [i[:1] for i in ids]
    if family.time_ids:  # the official configuration of SDXL recomputes activations
        unet.enable_gradient_checkpointing(partial(meta.checkpointed, "no", "full"))
    sizes = denoisers.size_conditions(model, family, unet)
    sizes = None if sizes is None else sizes.to(META)
    return Official(settings, family, unet, [without_weights(kind, model / name).requires_grad_(False).eval()
                                             for name, kind in family.encoders],
                    meta.scorer(settings), scheduler, sizes, (ids, null),
                    (ids, null))


def batch(official: Official, steps: int) -> int:
    """Operations of a prompt batch with so many denoising steps: sampling, and training on half of the pairs.
    """
    everything, size = official.scheduler.timesteps, official.unet.config.sample_size
    official.scheduler.timesteps = everything[:steps]
    draw = Random((PROMPTS, 4, size, size), official.config.num_candidates, META, torch.float32)
    with torch.enable_grad(), meta.Tally() as tally:
        pairs, _ = official.sample(empty(PROMPTS, dtype=torch.int64), draw)
        assert len(pairs.t) == steps * PROMPTS // 2
        official.train(pairs)
    official.scheduler.timesteps = everything
    return tally.flops


def skeleton(module: nn.Module, folder: Path, stem: str) -> None:
    """A network's directory, whose weights nobody reads."""
    random_models.save_config(module, folder)
    (folder / f"{stem}.safetensors").touch()


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without contents a mask takes the first half of the pairs, and what the host reads is 1."""
    def take(pairs: official_loop.Pairs, index: Tensor | slice) -> official_loop.Pairs:
        some = slice(len(index) // 2) if isinstance(index, Tensor) and index.dtype == torch.bool else index
        return official_loop.Pairs(*(field[some] for field in pairs))
    monkeypatch.setattr(official_loop.Pairs, "take", take)
    monkeypatch.setattr(Tensor, "item", lambda _: 1.0)


@pytest.mark.parametrize("family", MOST)
def test_operations_of_a_prompt(family: str, tmp_path: Path, halves: None) -> None:
    """Estimated beforehand for the official code: 177 TFLOP a prompt for SD1.5, 1,840 for SDXL, whose
    activations its configuration computes twice. Ours keeps them where memory allows."""
    model = random_models.make(family, tmp_path / "model", skeleton)
    lrm = random_models.make_lrm(model, tmp_path / "lrm")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo\n")
    recipe = {"sd15": config.sd15, "sdxl": config.sdxl}[family]().lpo
    settings = replace(recipe, model=str(model), lrm=str(lrm), prompts=str(tmp_path / "prompts.txt"),
                       batch_size=2, train_batch_size=1, pictures=0)
    official = statement(settings)
    with on_cuda():
        first, second = batch(official, 1), batch(official, 2)
    whole = (first + (settings.num_steps - 1) * (second - first)) / PROMPTS / 1e12
    assert whole == pytest.approx({"sd15": 177, "sdxl": 1840}[family], rel=0.03)
    assert ours(settings) < MOST[family] * whole
