"""The embedded world: its renderer, its measure, its pipeline, and the evaluation's arithmetic."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lpo_fast import config
from lpo_fast.config import Demo
from lpo_fast.models import vaes
from lpo_fast.shapes import PIPELINE, evaluate, pretrain, world


def test_measure_reads_back_what_was_rendered():
    rng = np.random.default_rng(5)
    wanted = world.COMBINATIONS[rng.integers(len(world.COMBINATIONS), size=500)]
    pictures = world.render(wanted, rng)
    captions = [world.caption(a) for a in wanted]
    assert world.right(pictures, captions).mean() >= 0.98
    others = [world.caption(world.COMBINATIONS[(i + 7) % len(world.COMBINATIONS)]) for i in range(500)]
    different = np.array([a != b for a, b in zip(captions, others, strict=True)])
    assert world.right(pictures, others)[different].mean() <= 0.02


def test_measure_knows_no_answer_where_there_is_none():
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    assert (world.measure(noise) == -1).any(1).all()
    assert (world.measure(np.full((1, 32, 32, 3), 128, np.uint8)) == -1).any()


def test_held_out_combinations_are_never_trained_on():
    train, held_out = set(world.captions(False)), set(world.captions(True))
    assert not train & held_out and train | held_out == set(world.captions())
    assert 0.2 <= len(held_out) / len(train | held_out) <= 0.25
    pairs = world.pairs(300, 0)
    assert set(pairs["caption"]) <= train
    shown = {world.caption(a) for i in (0, 1) for a in world.measure(pairs[f"picture_{i}"]) if (a >= 0).all()}
    assert len(shown & held_out) == 0


def test_pairs_prefer_the_right_picture():
    pairs = world.pairs(200, 1, held_out=True)
    right = [world.right(pairs[f"picture_{i}"], pairs["caption"]) for i in (0, 1)]
    first = pairs["label_0"] == 1
    assert (pairs["label_0"] + pairs["label_1"] == 1).all() and 60 < first.sum() < 140
    assert (np.where(first, right[0], right[1]).mean() > 0.98
            and np.where(first, right[1], right[0]).mean() < 0.02)


def test_the_vae_keeps_pictures_right():
    vae = vaes.load_vae(PIPELINE)
    rng = np.random.default_rng(2)
    captions = [world.captions(True)[i % 20] for i in range(200)]
    pictures = torch.from_numpy(world.render(captions, rng)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    decoded = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert world.right(decoded, captions).mean() >= 0.95


def test_the_pipeline_is_a_pipeline_of_at_most_4_mb():
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None)
    assert len(pipe.unet.config.down_block_types) == 4
    assert sum(f.stat().st_size for f in PIPELINE.rglob("*.safetensors")) <= 4_000_000
    picture = pipe("a red circle on a blue background", num_inference_steps=2, output_type="np",
                   generator=torch.Generator().manual_seed(0)).images
    assert picture.shape == (1, 32, 32, 3)


def test_pretraining_makes_the_same_layout(tmp_path, monkeypatch):
    """A step of every stage, on 500 pictures: what it writes has the committed pipeline's files and shapes.
    """
    monkeypatch.setattr(pretrain, "train_denoiser", partial(pretrain.train_denoiser, pictures=500))
    pretrain.main(["--out", str(tmp_path / "pipeline"), "--steps", "1", "1", "1", "--pictures", "4"])
    made, committed = ({str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()}
                       for root in (tmp_path / "pipeline", PIPELINE))
    assert made == committed
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (json.loads((root / part / "config.json").read_text())
                        for root in (tmp_path / "pipeline", PIPELINE))
        assert ours == theirs


def test_the_base_pipeline_is_wrong_on_purpose():
    pictures, captions = evaluate.draw(None, 100, seed=3)
    assert 0.3 < world.right(pictures, captions).mean() < 0.8


def test_judge_counts_and_measures_diversity():
    rng = np.random.default_rng(0)
    captions = world.captions(True)[:2] * 6
    pictures = world.render(captions, rng)
    wrong = world.render([world.captions(False)[0]], rng)
    judged = evaluate.judge(np.concatenate([pictures, wrong]), [*captions, captions[0]])
    assert judged["right"] == 12 and judged["by_attribute"].keys() == {"shape", "colour", "background"}
    same = evaluate.judge(np.repeat(pictures[:1], 3, 0), captions[:1] * 3)
    assert same["diversity"] == 0 < judged["diversity"]


def test_shuffled_scores_are_the_same_scores():
    scores = torch.arange(12.0)
    dealt = evaluate.shuffled(lambda x, t, prompts: scores)(None, None, None).view(4, 3)
    assert torch.equal(dealt.sort(0).values, scores.view(4, 3)) and not torch.equal(dealt, scores.view(4, 3))


@pytest.fixture
def tiny_recipe(monkeypatch):
    """The embedded world's recipe, but over in seconds."""
    recipe = config.shapes()
    tiny = config.Recipe(
        config.replace(recipe.lrm, max_steps=2, warmup_steps=1, batch_size=8, validate_steps=2),
        config.replace(recipe.lpo, max_batches=1, batch_size=2, num_steps=3, threshold_min=0.0,
                       threshold_max=0.001))
    monkeypatch.setattr(config, "shapes", lambda: tiny)
    monkeypatch.setattr(evaluate, "LRM_PAIRS", 16)
    monkeypatch.setattr(evaluate, "VALIDATION_PAIRS", 8)


def test_demo_writes_a_whole_run(tiny_recipe, tmp_path):
    result, out = evaluate.demo(Demo(out=str(tmp_path / "demo"), pictures=4))
    assert (result["n"] == 4
            and set(result["seconds"]) == {"latent reward model", "preference optimization", "evaluation"})
    was, now = result["before"]["right"], result["after"]["right"]
    assert now - was == result["gained"] - result["lost"]
    assert f"{was} before" in evaluate.verdict(result) and f"{now} after" in evaluate.verdict(result)
    assert len(list((out / "pictures").glob("*.png"))) == 8 and (out / "lrm" / "metrics.jsonl").is_file()
    evaluate.demo(Demo(out=str(tmp_path / "demo"), pictures=4))  # an earlier demo is replaced


def test_evaluate_prints_a_row_a_run(tiny_recipe, tmp_path, capsys):
    assert evaluate.main(["--seeds", "4", "--n", "4", "--out", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-2:]
    assert lines[0].startswith("| 4 | LPO |") and lines[1].startswith("| 4 | shuffled |")
