"""The commands that a user types, one after the other, for SD1.5, SD2.1 and SDXL;
diffusers itself is the judge at the end."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from lpo_fast import evaluate, export, score, train
from lpo_fast.lpo import drawing
from lpo_fast.lrm import checkpoint, selection
from lpo_fast.method import noise
from lpo_fast.models import loras
from tests.helpers.models import pipeline
from tests.helpers.runs import rows

# In the manner of the paper's prompts: quotes, markup, weights, emoji, accents, ideographs, other spaces,
# far too many words.
PROMPTS = [
    'a sign with "u good?" written on it, artist\'s 4k <lora:x:0.8> & more',
    "a press photo of a rainbow frog 🐸 fighting the police",
    "architect，zaha，realistic",
    "  (masterpiece:1.3), [[blurry]], {x|y}\tportrait by Václav Brožík \\o/ ",
    "color photo of british soldiers, extremely high detail, photorealistic, cinematic lighting, artstation, "
    * 40,
    "a",
    'a sign with "u good?" written on it, artist\'s 4k <lora:x:0.8> & more',
]
# Gaps (aesthetic, CLIP score, VQA score) of win–lose pairs and of ties,
# and what the filter's second strategy makes of them.
GAPS = [(1, .5, .1, .1), (1, -.4, .1, .1), (1, -.5, .1, .1),
        (1, .5, 0, .1), (1, .5, .1, -.1), (0, .1, .01, .01),
        (0, .2, .01, .01), (0, .1, .03, .01), (0, .1, .01, .07), (1, 2, 1, 1), (1, 3, .2, .3), (0, 0, 0, 0)]
KEPT = [0, 1, 5, 9, 10, 11]
STEPS, GUIDANCE = 3, 4.0


def jpeg(seed: int) -> bytes:
    """A picture of some size and shape."""
    generator = np.random.default_rng(seed)
    file, shape = io.BytesIO(), (*generator.integers(9, 40, 2), 3)
    Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_pairs(folder: Path) -> None:
    """train.parquet, held_out.parquet and scores.csv, whose rows are in another order.
    Pairs to be filtered out are damaged."""
    for name, count in (("train", len(GAPS)), ("held_out", 4)):
        won = [gap[0] == 1 or name == "held_out" for gap in GAPS[:count]]
        first = [0.5 if not w else float(i % 2) for i, w in enumerate(won)]
        whole = [name == "held_out" or i in KEPT for i in range(count)]
        pq.write_table(pa.table({
            "caption": [PROMPTS[i % 5] for i in range(count)], **{f"jpg_{side}": [
                jpeg(2 * i + side) if ok else b"damaged" for i, ok in enumerate(whole)] for side in (0, 1)},
            **{f"image_{side}_uid": [f"{name}-{i}-{side}" for i in range(count)] for side in (0, 1)},
            "label_0": first, "label_1": [1 - label for label in first], "are_different": won,
            "has_label": [True] * count, "num_example_per_prompt": [1 + i % 3 for i in range(count)],
        }), folder / f"{name}.parquet")
    with open(folder / "scores.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image_1_uid", "image_0_uid", "different_flag", "aesthetic_gap", "clipscore_gap",
                        "vqascore_gap"])
        table.writerows([f"train-{i}-1", f"train-{i}-0", *GAPS[i]] for i in reversed(range(len(GAPS))))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the three models, as published ones look, pairs and prompts."""
    return tmp_path_factory.mktemp("desk")


@pytest.fixture(scope="module", params=["sd", "sd21", "sdxl"])
def family(request: pytest.FixtureRequest, desk: Path) -> str:
    """The family's model lies in the desk's directory of that name, its reward model, trained here,
    in lrm_{family}."""
    if not (desk / "prompts.json").is_file():
        write_pairs(desk)
        (desk / "prompts.json").write_text(json.dumps([{"caption": p, "trainset_idx": i}
                                                       for i, p in enumerate(PROMPTS)]))
    for name in dict.fromkeys(("sd" if request.param == "sd21" else request.param, request.param)):
        if not (desk / name).is_dir():
            pipeline(request.getfixturevalue(f"tiny_{name}")).save_pretrained(desk / name)
            train_reward(desk, name)
    return request.param


def train_reward(desk: Path, name: str) -> None:
    code = train.main([
        "lrm", "--model", str(desk / name), "--pairs", str(desk / "train.parquet"), "--scores",
        str(desk / "scores.csv"), "--validation-pairs", str(desk / "held_out.parquet"), "--out",
        str(desk / f"lrm_{name}"), "--batch-size", "4", "--max-steps", "3", "--warmup-steps", "1",
        "--validate-steps", "2", "--learning-rate", "1e-3", "--num-workers", "0", "--cache-dir",
        str(desk / "cache")])
    assert code == 0


@pytest.fixture(scope="module")
def tuned(family: str, desk: Path) -> Path:
    """The run directory of LPO. SD2.1 has SD1.5's reward model, as in the paper; alpha is not the rank."""
    lrm = desk / f"lrm_{'sd' if family == 'sd21' else family}" / selection.FINAL
    argv = ["lpo", "--model", str(desk / family), "--lrm", str(lrm), "--prompts", str(desk / "prompts.json"),
            "--batch-size", "4", "--train-batch-size", "4", "--num-steps", "2", "--num-candidates", "2",
            "--epochs", "1", "--threshold-min", "0", "--threshold-max", "0", "--learning-rate", "0.05",
            "--rank", "4", "--alpha", "6", "--pictures", "1", "--validation-prompts", PROMPTS[0], "two cats",
            "--validation-pictures", "1"]
    assert train.main([*argv, "--out", str(desk / f"whole_{family}")]) == 0
    out = desk / f"run_{family}"
    assert train.main([*argv, "--out", str(out), "--max-batches", "1"]) == 0
    assert len(rows(out, "batch")) == 1 and not (out / "checkpoint_0").exists()
    assert train.main([*argv, "--out", str(out), "--resume"]) == 0
    return out


def test_the_reward_model_learns_from_what_the_filter_keeps(desk: Path, family: str) -> None:
    run = desk / f"lrm_{family}"
    trained = rows(run, "train")
    assert len(trained) == 3 and all(row["corrupt"] == 0 for row in trained)  # no damaged pair was touched
    assert [row["n"] for row in rows(run, "validation")] == [4, 4, 4, 4]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in trained)
    first, best = (checkpoint.load_lrm(folder) for folder in (
        run / f"checkpoint-gstep{rows(run, 'validation')[-1]['checkpoint']}", run / selection.FINAL))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), best.parameters(), strict=True))
    assert json.loads((run / selection.FINAL / "lrm.json").read_text())["base"] == str(desk / family)


def test_a_resumed_run_is_the_whole_run(desk: Path, family: str, tuned: Path) -> None:
    whole = desk / f"whole_{family}"
    assert (tuned / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    first, second = (load_file(run / loras.LORA_DIFFUSERS) for run in (whole, tuned))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert [row["pairs_possible"] for row in rows(tuned, "batch")] == [8, 6]
    start = rows(tuned, "train")[0]
    assert start["train_ratio_win"] == start["train_ratio_lose"] == 1.0 and start["grad_norm"] > 0
    for file in ("validation_0.png", "000_before.png", "000_after.png"):
        assert (tuned / "pictures" / file).read_bytes() == (whole / "pictures" / file).read_bytes()
    assert Image.open(tuned / "pictures" / "validation_0.png").size == (16, 32)
    page = (tuned / "report.html").read_text()
    assert "<lora:x:0.8>" not in page and "&lt;lora:x:0.8&gt; &amp; more" in page


def test_the_pictures_are_diffusers_own(desk: Path, family: str, tuned: Path, tmp_path: Path, capsys) -> None:
    """evaluate without noise in its steps, against diffusers' pipelines:
    base, LoRA and merged, from the same first latents."""
    model, out = desk / family, tmp_path / "evaluation"
    assert evaluate.main(["--model", str(model), "--lora", str(tuned),
                          "--prompts", str(desk / "prompts.json"), "--out",
                          str(out), "--steps", str(STEPS), "--guidance", str(GUIDANCE), "--eta", "0",
                          "--batch-size", "3", "--lrm", str(desk / f"lrm_{family}" / selection.FINAL)]) == 0
    assert "pictures:" in capsys.readouterr().out
    assert export.main(["--model", str(model), "--lora", str(tuned), "--out", str(tmp_path / "merged")]) == 0
    assert export.main(["--lora", str(tuned / "checkpoint_0"), "--form", "lora", "--out",
                        str(tmp_path / "lora")]) == 0

    def draw(folder: Path, lora: Path | None = None) -> np.ndarray:
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        if lora:
            pipe.load_lora_weights(lora)
        latents = noise.normal(0, drawing.PICTURE_EPOCH, torch.arange(len(PROMPTS)), noise.INITIAL, 1,
                               (4, 8, 8))[0]
        return pipe(PROMPTS, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, eta=0.0,
                    output_type="np").images

    def drawn(side: str) -> np.ndarray:
        return (np.stack([np.asarray(Image.open(out / side / f"{i:05d}.png")) for i in range(len(PROMPTS))])
                / 255)

    base, lora = draw(model), draw(model, tuned)
    assert abs(lora - base).max() > 0.02
    assert abs(drawn("base") - base).max() < 1.01 / 255 and abs(drawn("tuned") - lora).max() < 1.01 / 255
    assert abs(draw(tmp_path / "merged") - lora).max() < 1e-3
    assert abs(draw(model, tmp_path / "lora") - lora).max() < 1e-3

    table = tmp_path / "scored.csv"
    assert score.main(["--lrm", str(desk / f"lrm_{family}" / selection.FINAL), "--table",
                       str(out / "scores.csv"), "--image-key", "tuned", "--out", str(table)]) == 0
    with open(table, newline="") as file:
        scored = list(csv.DictReader(file))
    assert [row["prompt"] for row in scored] == PROMPTS
    assert ([float(row["lrm_score"]) for row in scored]
            == pytest.approx([float(row["tuned lrm"]) for row in scored], abs=1e-4))
    assert score.main(["--lrm", str(desk / f"lrm_{family}" / selection.FINAL), "--prompt", PROMPTS[0],
                       str(out / "tuned" / "00000.png")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(re.match(r"-?\d+\.\d+", last)[0]) == pytest.approx(float(scored[0]["tuned lrm"]), abs=1e-3)
