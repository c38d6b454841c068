"""Pictures of two models from the same noise, intervals and win rates against known truths, resuming,
ranks, refusals."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from lpo_fast import evaluate, export
from lpo_fast.evaluation import compare
from lpo_fast.lpo import drawing, policies
from lpo_fast.lpo.sampling import CounterNoise
from lpo_fast.method import noise, schedule
from lpo_fast.models import loras
from lpo_fast.score import Scorer
from tests.helpers.processes import processes

PROMPTS = ["a red circle", "<b>a blue square</b> & more", "three cats", "a red circle", "a green cross"]


def brightness(pictures: list[Image.Image], prompts: list[str]) -> list[float]:
    """A scorer, called as tests.test_evaluate:brightness."""
    return [float(np.asarray(picture).mean()) for picture in pictures]


def ties(pictures: list[Image.Image], prompts: list[str]) -> list[int]:
    return [len(prompt) for prompt in prompts]


def short(pictures: list[Image.Image], prompts: list[str]) -> list[float]:
    return [1.0]


@pytest.fixture
def argv(tmp_path: Path, tiny_sd: Path) -> list[str]:
    """An evaluation of a LoRA that changes much; a quick one."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    loras.add_lora(unet, 3, 5, ("to_q", "to_v"), 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    loras.save_lora(unet, tmp_path / "lora")
    (tmp_path / "prompts.json").write_text(json.dumps([{"caption": prompt} for prompt in PROMPTS]))
    return ["--model", str(tiny_sd), "--lora", str(tmp_path / "lora"), "--prompts",
            str(tmp_path / "prompts.json"), "--out", str(tmp_path / "out"), "--steps", "3",
            "--batch-size", "2"]


def with_(argv: list[str], **changes: object) -> list[str]:
    """The command line with other values; None drops a setting."""
    pairs = (dict(zip(argv[::2], argv[1::2], strict=True))
             | {f"--{k.replace('_', '-')}": v for k, v in changes.items()})
    return [str(part) for key, value in pairs.items() if value is not None for part in (key, value)]


def rows(out: Path) -> list[dict]:
    with open(out / "scores.csv", newline="") as f:
        return list(csv.DictReader(f))


def pixels(out: Path, side: str) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted((out / side).glob("*.png"))}


@torch.no_grad()
def by_hand(model: Path, lora: Path | None, prompts: list[str], items: list[int],
            steps: int = 3) -> np.ndarray:
    """The pictures one by one, with merged weights, parts loaded by their own classes,
    and the plain mean and noise."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    if lora:
        export.merge(unet, export.read(str(lora)))
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    encoder, tokenizer = (c.from_pretrained(model, subfolder=s) for c, s in ((CLIPTextModel, "text_encoder"),
                                                                             (CLIPTokenizer, "tokenizer")))
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    sched, drawn = schedule.from_config(config, steps), []
    for prompt, item in zip(prompts, items, strict=True):
        ids = tokenizer(["", prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = encoder(ids).last_hidden_state
        draw = CounterNoise(0, drawing.PICTURE_EPOCH, torch.tensor([item]), (4, 8, 8))
        x = draw.initial()
        for t, (counter, _) in zip(sched.timesteps, draw.steps(steps), strict=True):
            null, cond = unet(torch.cat([x, x]), t, text).sample.chunk(2)
            mean = schedule.mean(sched, x, null + 5 * (cond - null), t[None])
            z = noise.normal(0, drawing.PICTURE_EPOCH, counter.items, int(counter.step), 1, (4, 8, 8))[0]
            x = mean + sched.sigmas[t] * z
        image = vae.decode(x / vae.config.scaling_factor).sample[0]
        drawn.append(((image.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy())
    return np.stack(drawn)


def test_another_size_and_vae(argv, tmp_path, tiny_sd, tiny_lrm, capsys):
    torch.manual_seed(5)
    AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_sd / "vae")).save_pretrained(tmp_path / "vae")
    assert evaluate.main(with_(argv, number=2, resolution=32, lrm=tiny_lrm, lrm_base=tiny_sd)) == 0
    first = pixels(tmp_path / "out", "tuned")
    assert {picture.shape for picture in first.values()} == {(32, 32, 3)}
    # other pictures lie there
    assert evaluate.main(with_(argv, number=2, resolution=32, vae=tmp_path / "vae")) == 2
    assert "drawn with other vae" in capsys.readouterr().err
    assert (evaluate.main(with_(argv, number=2, resolution=32, vae=tmp_path / "vae", out=tmp_path / "other"))
            == 0)
    assert np.abs(pixels(tmp_path / "other", "tuned")["00000.png"] - first["00000.png"]).max() > 5
    assert (evaluate.main(with_(argv, resolution=24)) == 2
            and "not a multiple of 16" in capsys.readouterr().err)


def test_the_whole_command(argv, tmp_path, tiny_sd, tiny_lrm, capsys):
    scorers = ["--scorer", "tests.test_evaluate:brightness", "--scorer", "tests.test_evaluate:ties"]
    assert evaluate.main([*with_(argv, lrm=tiny_lrm), *scorers]) == 0
    shown, out = capsys.readouterr().out, tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"base", "tuned", "scores.csv", "summary.json", "settings.json",
                                               "page.html"}
    table = rows(out)
    assert ([row["prompt"] for row in table] == PROMPTS
            and [int(row["item"]) for row in table] == [0, 1, 2, 3, 4])
    for side, lora in (("base", None), ("tuned", tmp_path / "lora")):
        drawn = pixels(out, side)
        wanted = by_hand(tiny_sd, lora, PROMPTS, list(range(5)))
        assert np.abs(np.stack(list(drawn.values())) - wanted).max() <= 1
        files = [out / row[side] for row in table]
        assert ([float(row[f"{side} brightness"]) for row in table]
                == brightness([Image.open(f) for f in files], PROMPTS))
        scores = Scorer(tiny_lrm, base=tiny_sd)(files, PROMPTS).tolist()
        assert [float(row[f"{side} lrm"]) for row in table] == pytest.approx(scores, abs=1e-4)
    assert np.abs(pixels(out, "base")["00000.png"] - pixels(out, "tuned")["00000.png"]).max() > 5
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["prompts"] == summary["pictures"] == 5
            and list(summary["scores"]) == ["lrm", "brightness", "ties"])
    gap = [float(row["tuned brightness"]) - float(row["base brightness"]) for row in table]
    found = summary["scores"]["brightness"]
    assert found["difference"]["mean"] == pytest.approx(np.mean(gap))
    assert found["win_rate"]["mean"] == np.mean(np.array(gap) > 0)
    assert summary["scores"]["ties"]["win_rate"]["mean"] == 0.5
    assert "| ties | " in shown and "| 50.0% [" in shown
    page = (out / "page.html").read_text()
    assert "&lt;b&gt;a blue square&lt;/b&gt; &amp; more" in page and "<b>a blue" not in page
    assert page.count("<img") == 10 and not re.search(r'(src|href)="(?!data:)', page)


def test_same_prompts_differ_and_pictures_per_prompt(argv, tmp_path):
    assert evaluate.main(with_(argv, pictures_per_prompt=2, number=2)) == 0
    out = tmp_path / "out"
    drawn = pixels(out, "base")
    assert list(drawn) == [f"{i:05d}.png" for i in range(4)]
    assert (drawn["00000.png"] != drawn["00001.png"]).any()
    assert [row["prompt"] for row in rows(out)] == [p for p in PROMPTS[:2] for _ in range(2)]
    assert evaluate.main(with_(argv, out=tmp_path / "other", number=4)) == 0
    other = pixels(tmp_path / "other", "base")
    assert (other["00000.png"] != other["00003.png"]).any()  # the same prompt twice
    assert np.abs(other["00001.png"] - drawn["00001.png"]).max() > 1  # same noise, another prompt


def test_drawn_pictures_are_kept_and_missing_ones_come_back_the_same(argv, tmp_path, monkeypatch):
    assert evaluate.main(with_(argv, number=3)) == 0
    out = tmp_path / "out"
    before = pixels(out, "base") | {f"t{k}": v for k, v in pixels(out, "tuned").items()}
    (out / "tuned" / "00001.png").unlink()
    marked = out / "base" / "00002.png"
    Image.new("RGB", (16, 16)).save(marked)
    assert evaluate.main(with_(argv, number=5, batch_size=3)) == 0
    after = pixels(out, "base") | {f"t{k}": v for k, v in pixels(out, "tuned").items()}
    assert len(after) == 10 and (after["00002.png"] == 0).all()  # not drawn again
    assert all(np.abs(after[name] - value).max() <= 1 for name, value in before.items()
               if name != "00002.png")
    monkeypatch.setattr(policies, "load",
                        lambda *a: pytest.fail("a model was loaded though all pictures are there"))
    assert evaluate.main([*argv, "--scorer", "tests.test_evaluate:brightness"]) == 0


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 4}, {"guidance": 4.0}, {"eta": 0.5},
                                    {"pictures_per_prompt": 2}, {"lora": None}])
def test_other_settings_do_not_mix_with_drawn_pictures(argv, tmp_path, capsys, change):
    assert evaluate.main(with_(argv, number=1)) == 0
    assert evaluate.main(with_(argv, **change)) == 2
    assert f"drawn with other {next(iter(change)).replace('_', ' ')}" in capsys.readouterr().err


def test_changed_weights_or_prompts_do_not_mix_either(argv, tmp_path, capsys):
    assert evaluate.main(with_(argv, number=1)) == 0
    os.utime(tmp_path / "lora" / loras.LORA_DIFFUSERS, (1, 1))
    assert evaluate.main(argv) == 2 and "other weights" in capsys.readouterr().err
    (tmp_path / "prompts.json").write_text('["else"]')
    assert evaluate.main(argv) == 2 and "other prompts" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["whole", "run", "unet"])
def test_a_tuned_directory(argv, tmp_path, tiny_sd, form):
    """The LoRA merged: as a whole model, as a run with unet/, as a U-Net alone."""
    assert evaluate.main(with_(argv, number=2)) == 0
    assert export.main(["--model", str(tiny_sd), "--lora", str(tmp_path / "lora"), "--out",
                        str(tmp_path / "whole")]) == 0
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "whole" / "unet", tmp_path / "run" / "unet")
    tuned = {"whole": tmp_path / "whole", "run": tmp_path / "run", "unet": tmp_path / "run" / "unet"}[form]
    assert evaluate.main(with_(argv, lora=None, tuned=tuned, out=tmp_path / "merged", number=2)) == 0
    for side in compare.SIDES:
        wanted, got = pixels(tmp_path / "out", side), pixels(tmp_path / "merged", side)
        assert all(np.abs(got[name] - value).max() <= 1 for name, value in wanted.items())


def test_a_model_alone(argv, tmp_path, capsys):
    assert evaluate.main([*with_(argv, lora=None), "--scorer", "tests.test_evaluate:brightness"]) == 0
    assert not (tmp_path / "out" / "tuned").exists()
    assert "| scorer | base |" in capsys.readouterr().out


def test_sdxl_scored_by_a_reward_model_of_another_family(argv, tmp_path, tiny_sd, tiny_sdxl, tiny_lrm):
    """What travels is pictures, so nothing but the LRM and its own base must share latents."""
    assert (evaluate.main(with_(argv, model=tiny_sdxl, lora=None, number=1, lrm=tiny_lrm, lrm_base=tiny_sd))
            == 0)
    assert np.isfinite(float(rows(tmp_path / "out")[0]["base lrm"]))
    assert pixels(tmp_path / "out", "base")["00000.png"].shape == (16, 16, 3)


def test_two_ranks_give_what_one_gives(argv, tmp_path):
    argv = [*argv, "--scorer", "tests.test_evaluate:brightness"]
    assert evaluate.main(argv) == 0
    two = [*with_(argv[:-2], out=tmp_path / "two"), *argv[-2:]]
    done = processes(2, "-m", "lpo_fast.evaluate", *two, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for side in compare.SIDES:
        one, other = pixels(tmp_path / "out", side), pixels(tmp_path / "two", side)
        assert list(one) == list(other) and all(np.abs(one[name] - other[name]).max() <= 1 for name in one)
    assert [row["prompt"] for row in rows(tmp_path / "two")] == PROMPTS
    assert done.stdout.count("| brightness |") == 1


# Statistics


def test_bootstrap_intervals_cover_the_mean_of_a_known_distribution(monkeypatch):
    monkeypatch.setattr(compare, "ROUNDS", 400)
    generator, covered, widths = np.random.default_rng(0), 0, []
    for trial in range(300):
        found = compare.bootstrap(generator.normal(3.0, 2.0, 60), seed=trial)
        covered += found["low"] <= 3.0 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.90 <= covered / 300 <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2.0 / np.sqrt(60), rel=0.05)


def test_of_one_value_there_is_no_interval():
    assert (compare.bootstrap(np.array([2.0]))["mean"] == 2.0
            and np.isnan(compare.bootstrap(np.array([2.0]))["low"]))
    assert "[" not in compare.table({"s": {"base": compare.bootstrap(np.array([2.0]))}})


def test_win_rate_of_hand_made_scores():
    base, tuned = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[2.0], [2.0], [1.0], [5.0]])
    found = compare.summary({"base": base, "tuned": tuned})
    assert found["win_rate"]["mean"] == 2.5 / 4 and found["difference"]["mean"] == 0
    assert found["base"]["mean"] == found["tuned"]["mean"] == 2.5
    all_won = compare.summary({"base": base, "tuned": base + 1})["win_rate"]
    # four wins prove little
    assert all_won["mean"] == 1 and all_won["high"] == 1 and 0.4 < all_won["low"] < 1
    reverse = compare.summary({"base": tuned, "tuned": base})["win_rate"]
    assert (reverse["mean"] == pytest.approx(1 - 2.5 / 4)
            and reverse["low"] == pytest.approx(1 - found["win_rate"]["high"]))


def test_what_is_resampled_is_prompts():
    """Pictures of a prompt that score alike tell no more than one of them."""
    one = np.random.default_rng(0).normal(size=(50, 1))
    alone, copied = (compare.summary({"base": x, "tuned": x + 0.1})["base"]
                     for x in (one, np.repeat(one, 10, 1)))
    assert alone == pytest.approx(copied)


def test_a_paired_difference_is_narrower_than_its_parts():
    base = np.random.default_rng(0).normal(size=(100, 1))
    tuned = base + 0.1 + 0.01 * np.random.default_rng(1).normal(size=(100, 1))
    found = compare.summary({"base": base, "tuned": tuned})
    assert found["difference"]["low"] > 0.09 and found["base"]["high"] - found["base"]["low"] > 0.3


BAD = [
    ({"model": None}, "--model (none): is required"), ({"prompts": None}, "--prompts (none): is required"),
    ({"model": "nowhere"}, "--model nowhere: no such directory"),
    ({"prompts": "nowhere.txt"}, "--prompts nowhere.txt"),
    ({"lora": "nowhere"}, "no LoRA there"), ({"tuned": "{sd}"}, "--lora is given as well"),
    ({"lora": None, "tuned": "nowhere"}, "--tuned nowhere: no such directory"),
    ({"lora": None, "tuned": "{dir}/lora"}, "holds no unet/"), ({"lrm": "nowhere"}, "--lrm nowhere"),
    ({"lrm": "{sd}"}, "state_dict.pt is missing"), ({"scorer": "nothing"}, "--scorer nothing"),
    ({"scorer": "no_module:f"}, "cannot be imported"),
    ({"out": "{dir}/lora"}, "holds something other than an evaluation"),
    ({"out": "{dir}/prompts.json/x"}, "cannot be written"), ({"steps": 0}, "--steps 0"),
    ({"steps": 1000}, "--steps 1000"), ({"eta": 2.0}, "--eta 2.0"), ({"eta": "nan"}, "--eta nan"),
    ({"guidance": -1.0}, "--guidance -1"), ({"number": -1}, "--number -1"),
    ({"batch_size": 0}, "--batch-size 0"), ({"pictures_per_prompt": 0}, "--pictures-per-prompt"),
    ({"seed": -1}, "--seed -1"), ({"caption_key": "text"}, "has no 'text'"), ({"model": "{sdxl}"}, "--lora"),
    ({"lora": None, "tuned": "{sdxl}", "lrm": "{lrm}", "lrm_base": "{sdxl}", "model": "{sdxl}"},
     "scores sd latents"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input_is_one_line_and_exit_code_2(argv, tmp_path, tiny_sd, tiny_sdxl, tiny_lrm, capsys, change,
                                               message):
    names = {"dir": tmp_path, "sd": tiny_sd, "sdxl": tiny_sdxl, "lrm": tiny_lrm}
    change = {key: value.format(**names) if isinstance(value, str) else value
              for key, value in change.items()}
    assert evaluate.main(with_(argv, **change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_scorer_that_returns_too_little(argv, tmp_path, capsys):
    assert evaluate.main([*argv, "--scorer", "tests.test_evaluate:short"]) == 2
    assert "--scorer short: gave 1 numbers for 2 pictures" in capsys.readouterr().err
    assert len(pixels(tmp_path / "out", "tuned")) == 5  # the pictures are kept


def test_models_of_other_latents_are_not_compared(argv, tmp_path, tiny_sd, copied, capsys):
    other = copied(tiny_sd)
    file = other / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 16}))
    assert evaluate.main(with_(argv, lora=None, tuned=other)) == 2
    assert "its sample_size is 16, the base's 8" in capsys.readouterr().err


def test_scores_are_keyed_by_the_picture_s_number(tmp_path, tiny_sd, tiny_lrm, monkeypatch):
    """However pictures are dealt out to processes; each is scored for its own prompt."""
    asked = []

    def reward(files, texts, rows):
        asked.append((texts, rows))
        return torch.tensor([float(row) for row in rows])
    monkeypatch.setattr(evaluate, "Scorer", lambda *_, **__: reward)
    settings = evaluate.Evaluate(model=str(tiny_sd), lrm=str(tiny_lrm), out=str(tmp_path),
                                 pictures_per_prompt=2)
    rows = evaluate.score(settings, ["a", "b"], [1, 2], {})
    assert asked == [(["a", "b"], [1, 2])] and [row["base lrm"] for row in rows] == [1.0, 2.0]
