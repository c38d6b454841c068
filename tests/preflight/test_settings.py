"""Settings do something: one step of a tiny run each,
which differs from the default's run in the way that the field says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from lpo_fast import config, train_lpo, train_lrm
from lpo_fast.lpo import checkpoints, judging
from lpo_fast.lrm import checkpoint, selection
from lpo_fast.models import texts
from lpo_fast.shapes import world
from tests.helpers.models import two_stages
from tests.helpers.pairs import encoded, table

RATE, DECAY, VISUAL, TEXT = 1e-3, 0.3, "visual_projection.weight", "text_encoders.0"


class Run(NamedTuple):
    """The metrics of a run's first step (or prompt batch), and its weights (or its optimizer's settings)
    at the end."""

    row: dict
    end: dict


@pytest.fixture(scope="module")
def model(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_sd`` with a denoiser of two stages, and vae2/, another VAE of the same shape."""
    folder = tmp_path_factory.mktemp("small")
    for part in tiny_sd.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "unet").unlink()
    torch.manual_seed(0)
    UNet2DConditionModel(**two_stages("unet_sd15")).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_sd / "vae")).save_pretrained(folder / "vae2")
    return folder


# The reward model


@pytest.fixture(scope="module")
def lrm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """lrm(**changes): a run of one step."""
    folder, draw = tmp_path_factory.mktemp("lrm"), np.random.default_rng(0)
    sides = [[encoded(Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))) for _ in range(4)]
             for _ in range(2)]
    pairs = table(folder / "p.parquet", list("aabc"), jpg_0=sides[0], jpg_1=sides[1])
    default = config.LRM(model=str(model), pairs=str(pairs), batch_size=4, max_steps=1, warmup_steps=0,
                         learning_rate=RATE, weight_decay=DECAY, num_workers=0, final_checkpoint="last")

    def run(**changes) -> Run:
        out = train_lrm.train(replace(default, out=str(folder / str(len(list(folder.iterdir())))), **changes))
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        return Run(row, checkpoint.load_lrm(out / selection.FINAL).state_dict())
    return run


@pytest.fixture(scope="module")
def trained(lrm: Callable[..., Run]) -> Run:
    return lrm()


@pytest.fixture(scope="module")
def start(model: Path) -> dict[str, torch.Tensor]:
    return checkpoint.new_lrm(model, generator=torch.Generator().manual_seed(42)).state_dict()


def another_loss(run: Run, default: Run, start: dict) -> bool:
    """The setting changes what the first step computes, of the same weights."""
    return abs(run.row["loss"] - default.row["loss"]) > 1e-5


def moved(run: Run, start: dict) -> float:
    return (run.end[VISUAL] - start[VISUAL]).abs().max().item()


def same_loss(run: Run, default: Run) -> bool:
    return run.row["loss"] == default.row["loss"]


LRM = {
    "freeze_text_encoder":
        ({"freeze_text_encoder": True}, lambda run, default, start: same_loss(run, default) and all(
            torch.equal(run.end[name], x) for name, x in start.items() if name.startswith(TEXT)) and not all(
            torch.equal(default.end[name], x) for name, x in start.items() if name.startswith(TEXT))),
    "logit_scale": ({"logit_scale": 1.0},
                    lambda run, default, start: abs(run.row["logit_scale"] - np.e) < 0.01),
    "noise_offset": ({"noise_offset": 0.5}, another_loss),
    "hflip": ({"hflip": True}, another_loss),
    "vae": ({"vae": "vae2"}, another_loss),
    "resolution": ({"resolution": 32}, another_loss),
    "largest_timestep": ({"largest_timestep": 51}, another_loss),
    "constant_timestep": ({"variable_timestep": False, "constant_timestep": 301}, another_loss),
    "multi_scale_cfg": ({"multi_scale_cfg": True}, another_loss),
    "guidance_scale": ({"guidance_scale": (1.0,)}, another_loss),
    "loss_type": ({"loss_type": "both"}, another_loss),
    "batch_coeff": ({"loss_type": "both", "batch_coeff": 0.0}, lambda run, default, start: run.row["loss"]
                    == pytest.approx(default.row["loss"], rel=1e-5)),
    "multi_scale": ({"multi_scale": False},
                    lambda run, default, start: run.end[VISUAL].shape[1] < start[VISUAL].shape[1]),
    "seed": ({"seed": 43},
             lambda run, default, start: not torch.allclose(run.end[VISUAL], default.end[VISUAL], atol=0.01)),
    "weight_decay":
        ({"weight_decay": 0.0}, lambda run, default, start: same_loss(run, default) and torch.allclose(
            run.end[VISUAL] - default.end[VISUAL], RATE * DECAY * start[VISUAL], rtol=1e-2, atol=1e-8)),
    "learning_rate": ({"learning_rate": RATE / 10}, lambda run, default, start: moved(run, start)
                      == pytest.approx(moved(default, start) / 10, rel=1e-2)),
    "max_grad_norm": ({"max_grad_norm": 1e-9}, lambda run, default, start: same_loss(run, default) and (
        moved(run, start) < moved(default, start) / 5)),  # far below AdamW's epsilon
}


@pytest.mark.parametrize("name", LRM)
def test_lrm(name: str, lrm: Callable[..., Run], trained: Run, start: dict, model: Path) -> None:
    changes, holds = LRM[name]
    run = lrm(**{key: str(model / value) if key == "vae" else value for key, value in changes.items()})
    assert holds(run, trained, start)


# LPO


@pytest.fixture(scope="module")
def lpo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """lpo(**changes): a run of one prompt batch."""
    folder = tmp_path_factory.mktemp("lpo")
    reward = checkpoint.new_lrm(model, generator=torch.Generator().manual_seed(1))
    checkpoint.save_lrm(reward, texts.load_tokenizers(model, reward.family), folder / "reward")
    (folder / "p.json").write_text(json.dumps(world.captions(held_out=False)[:2]))
    default = config.LPO(model=str(model), lrm=str(folder / "reward"), prompts=str(folder / "p.json"),
                         epochs=1, batch_size=2, num_steps=2, num_candidates=2, threshold_min=0.0,
                         threshold_max=1e-6, pictures=0)

    def run(**changes) -> Run:
        out = train_lpo.train(replace(default, out=str(folder / str(len(list(folder.iterdir())))), **changes))
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return Run(next(rows), torch.load(out / "checkpoint_0" / checkpoints.OPTIMIZER)["param_groups"][0])
    return run


@pytest.fixture(scope="module")
def aligned(lpo: Callable[..., Run]) -> Run:
    return lpo()


def other_scores(run: Run, default: Run) -> bool:
    return abs(run.row["preference_scores_mean"] - default.row["preference_scores_mean"]) > 1e-4


LPO = {
    "adam_betas": ({"adam_beta1": 0.7, "adam_beta2": 0.8},
                   lambda run, default: run.end["betas"] == (0.7, 0.8)),
    "adam_epsilon": ({"adam_epsilon": 1e-5}, lambda run, default: run.end["eps"] == 1e-5),
    "weight_decay": ({"weight_decay": 0.25}, lambda run, default: run.end["weight_decay"] == 0.25),
    "learning_rate": ({"learning_rate": 0.125}, lambda run, default: run.end["lr"] == 0.125),
    "lrm_guidance": ({"lrm_guidance": (1.0,)}, other_scores),
    "lrm_multi_scale_cfg": ({"lrm_multi_scale_cfg": True}, other_scores),
    "eta": ({"eta": 0.5}, other_scores),
    "guidance_scale": ({"guidance_scale": 1.0}, other_scores),
    "resolution": ({"resolution": 32}, other_scores),
    "num_candidates": ({"num_candidates": 3}, other_scores),
    "num_steps": ({"num_steps": 3}, lambda run, default: run.row["pairs_possible"] == 6),
    "threshold": ({"threshold_min": 0.9, "threshold_max": 0.99}, lambda run, default:
                  run.row["total_valid_samples_num"] < default.row["total_valid_samples_num"]),
}


@pytest.mark.parametrize("name", LPO)
def test_lpo(name: str, lpo: Callable[..., Run], aligned: Run) -> None:
    changes, holds = LPO[name]
    assert holds(lpo(**changes), aligned)


def test_the_reward_model_is_told_the_resolution(tiny_sdxl: Path, tmp_path: Path) -> None:
    """SDXL's time ids."""
    reward = checkpoint.new_lrm(tiny_sdxl, generator=torch.Generator().manual_seed(1))
    checkpoint.save_lrm(reward, texts.load_tokenizers(tiny_sdxl, reward.family), tmp_path / "reward")
    for resolution, pixels in ((0, 16), (32, 32)):
        judge = judging.load_score(config.LPO(model=str(tiny_sdxl), lrm=str(tmp_path / "reward"),
                                              resolution=resolution), ["a"], torch.device("cpu"))
        assert judge.lrm.sizes.tolist() == [[pixels, pixels, 0, 0, pixels, pixels]]
