"""End to end on tiny models: both loops, the command line, resume, interruption, bad input,
and the official metric names."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lpo_fast import config, errors, train, train_lpo, train_lrm
from lpo_fast.lpo import judging, policies
from lpo_fast.lpo import sampling as lpo_sampling
from lpo_fast.lpo.sampling import CounterNoise
from lpo_fast.lrm import checkpoint, selection
from lpo_fast.lrm import steps as lrm_steps
from lpo_fast.method import select
from lpo_fast.models import loras, texts
from lpo_fast.run import states
from lpo_fast.shapes import PIPELINE, evaluate, world
from tests.helpers.runs import OFFICIAL, OFFICIAL_BATCH, rows


@pytest.fixture(scope="module")
def lrm_run(tmp_path_factory) -> Path:
    """A short LRM training on the embedded world."""
    out = tmp_path_factory.mktemp("lrm")
    evaluate.write_pairs(out / "train.parquet", 200, 0, held_out=False)
    evaluate.write_pairs(out / "held_out.parquet", 24, 0, held_out=True)
    code = train.main(["lrm", "--model", str(PIPELINE), "--pairs", str(out / "train.parquet"),
                       "--validation-pairs", str(out / "held_out.parquet"), "--out", str(out / "run"),
                       "--max-steps", "6", "--warmup-steps", "2", "--batch-size", "16",
                       "--validate-steps", "3", "--save-steps", "3", "--learning-rate", "1e-3",
                       "--weight-decay", "0.01", "--num-workers", "0"])
    assert code == 0
    return out / "run"


@pytest.fixture(scope="module")
def lrm(lrm_run) -> Path:
    return lrm_run / selection.FINAL


@pytest.fixture
def settings(tmp_path, lrm) -> config.LPO:
    """LPO on the embedded world, two prompt batches of three prompts."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"caption": c} for c in world.captions(held_out=False)[:6]]))
    return replace(config.shapes().lpo, model=str(PIPELINE), lrm=str(lrm), prompts=str(prompts),
                   out=str(tmp_path / "run"), batch_size=3, max_batches=2, num_steps=4, train_batch_size=5,
                   threshold_min=0.0, threshold_max=0.001, pictures=2, mixed_precision="no")


def test_lrm_run_directory(lrm_run):
    assert len(rows(lrm_run, "train")) == 6
    assert [row["global_step"] for row in rows(lrm_run, "validation")] == [0, 3, 6, 6]
    _, *during, last = rows(lrm_run, "validation")
    assert last["accuracy"] == last["accuracy_by_timestep"]["1"] and len(last["accuracy_by_timestep"]) == 20
    assert (lrm_run / "report.html").is_file() and (lrm_run / "config.json").is_file()
    best = max(during, key=lambda row: (row["accuracy"], row["global_step"]))
    stage = json.loads((lrm_run / selection.FINAL / "training_stage.json").read_text())
    assert (stage["global_step"] == best["global_step"] == last["checkpoint"]
            and best["accuracy"] == last["accuracy"])
    assert len(list(lrm_run.glob("checkpoint-gstep*"))) == 1


def test_lrm_learning_rate_is_warmed_up_and_decays_to_zero(lrm_run):
    rates = [row["lr"] for row in rows(lrm_run, "train")]
    assert rates[0] == 0 and rates[1] == pytest.approx(1e-3) == max(rates)
    assert rates[2:] == pytest.approx([1e-3 * (6 - k) / 4 for k in range(2, 6)])


def test_lrm_resume_is_exact(tmp_path, lrm_run, monkeypatch):
    recorded = json.loads((lrm_run / "config.json").read_text())
    whole = config.LRM(**recorded
                       | {"out": str(tmp_path / "run"), "columns": config.Columns(**recorded["columns"])})
    steps = []

    class Stop(Exception):
        pass

    step = lrm_steps.train_step

    def killed(*args):
        steps.append(args[3])
        if args[3] == 4 and len(steps) == 5:
            raise Stop  # after the state of step 3
        return step(*args)

    monkeypatch.setattr(lrm_steps, "train_step", killed)
    with pytest.raises(Stop):
        train_lrm.train(whole)
    train_lrm.train(replace(whole, resume=True))
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (lrm_run / "metrics.jsonl").read_bytes()
    first, second = (checkpoint.load_lrm(run / selection.FINAL) for run in (lrm_run, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_lpo_run_directory_and_official_names(settings):
    out = train_lpo.train(replace(settings, save_epochs=1))
    trained, batches = rows(out, "train"), rows(out, "batch")
    assert OFFICIAL <= trained[0].keys() and OFFICIAL_BATCH <= batches[0].keys()
    assert len(batches) == 2 and batches[0]["pairs_possible"] == 12
    assert sum(-(-row["total_valid_samples_num"] // 5) for row in batches) == len(trained)
    assert sum(batches[0]["valid_by_timestep"]) == batches[0]["total_valid_samples_num"] > 0
    # exactly, before the first update
    assert trained[0]["train_ratio_win"] == trained[0]["train_ratio_lose"] == 1.0
    assert trained[0]["train_loss"] == pytest.approx(0.693147, abs=1e-6) and trained[0]["implicit_acc"] == 0
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "environment.json", "pytorch_lora_weights.safetensors", "checkpoint_0",
            "pictures"} <= names
    assert ({p.name for p in (out / "checkpoint_0").iterdir()}
            == {"unet_lora.pt", "optimizer.bin", "global_step.json", "checksums.json"})
    assert len(list((out / "pictures").glob("*.png"))) == 4


def test_same_seed_same_bytes(settings, tmp_path):
    runs = [train_lpo.train(replace(settings, out=str(tmp_path / name))) for name in "ab"]
    assert (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()
    weights = [loras.read_lora(run) for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resume_is_exact(settings, tmp_path):
    """Stopped in the middle of the second epoch."""
    settings = replace(settings, epochs=3, ema_decay=0.9, learning_rate=1e-2)
    whole = train_lpo.train(replace(settings, max_batches=5, out=str(tmp_path / "whole")))
    part = replace(settings, max_batches=3, out=str(tmp_path / "part"))
    train_lpo.train(part)
    assert len(rows(tmp_path / "part", "batch")) == 3
    train_lpo.train(replace(part, max_batches=5, resume=True))
    assert len(rows(tmp_path / "part", "batch")) == 5
    assert (whole / "metrics.jsonl").read_bytes() == (tmp_path / "part" / "metrics.jsonl").read_bytes()
    first, second = loras.read_lora(whole), loras.read_lora(tmp_path / "part")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prompt_batches_of_any_size_give_the_same_pairs(settings):
    """At learning rate 0 nothing but rounding depends on how prompts are split into batches."""
    captions = world.captions(held_out=False)[:20]
    device = torch.device("cpu")
    model, sched = policies.load(settings, captions, device)
    score = judging.load_score(settings, captions, device)
    gap = select.gaps(sched, "sigma", 0.0, 0.001)
    shape = (4, 8, 8)

    def pairs(size: int) -> tuple[lpo_sampling.LatentPairs, torch.Tensor]:
        made = []
        for index in torch.arange(20).split(size):
            draw = CounterNoise(7, 3, index, shape)
            made.append(lpo_sampling.trajectory(model.predict, score, sched, gap, draw, index, guidance=3.0,
                                                num_candidates=3))
        steps = len(sched.timesteps)
        parts = [lpo_sampling.LatentPairs(*(f.view(steps, -1, *f.shape[1:]) for f in p)) for p, _ in made]
        joined = lpo_sampling.LatentPairs(*(torch.cat(field, 1).flatten(0, 1)
                                            for field in zip(*parts, strict=True)))
        return joined, torch.cat([s for _, s in made], 2)

    whole, scores = pairs(20)
    limit = gap[whole.t]
    ranked = scores.transpose(0, 1).flatten(1).sort(0).values
    clear = (ranked[1] - ranked[0] > 1e-4) & (ranked[-1] - ranked[-2] > 1e-4)
    clear &= (ranked[-1] - ranked[0] - limit).abs() > 1e-4
    assert clear.sum() > 40
    for size in (5, 1):
        split, _ = pairs(size)
        assert torch.equal(split.t, whole.t) and torch.equal(split.prompt, whole.prompt)
        assert torch.equal(split.valid[clear], whole.valid[clear])
        for mine, theirs in zip(split[:3], whole[:3], strict=True):
            assert (mine[clear] - theirs[clear]).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_exported_lora_draws_the_same_pictures_in_diffusers(settings, alpha):
    out = train_lpo.train(replace(settings, rank=6, alpha=alpha, learning_rate=1e-2, pictures=0))
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None)
    pipe.load_lora_weights(out)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([301, 301])
    captions = world.captions(held_out=False)[:2]
    resumed, _ = policies.load(replace(settings, rank=6, alpha=alpha, lora=str(out)), captions,
                               torch.device("cpu"))
    with torch.no_grad():
        context = pipe.text_encoder(texts.tokenize([pipe.tokenizer], captions)[0]).last_hidden_state
        theirs = pipe.unet(x, t, context).sample
        ours = resumed.predict(x, t, torch.arange(2)).chunk(2)[1]
        base = resumed.reference(x, t, torch.arange(2)).chunk(2)[1]
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - base).abs().max() > 1e-3  # the LoRA does something


def test_full_fine_tuning_keeps_its_reference(settings):
    out = train_lpo.train(replace(settings, full=True, learning_rate=1e-3, pictures=0))
    assert rows(out, "train")[0]["train_ratio_win"] == 1.0
    assert rows(out, "train")[-1]["train_win_prob_policy"] != rows(out, "train")[-1]["train_win_prob_ref"]
    assert (out / "unet" / "config.json").is_file()


def test_gradients_are_clipped(settings, monkeypatch):
    """The norm that is logged is the one before clipping; the one after is at most max_grad_norm."""
    after = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        after.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    out = train_lpo.train(replace(settings, max_grad_norm=1e-3, pictures=0))
    assert max(after) <= 1e-3 * (1 + 1e-4) < min(row["grad_norm"] for row in rows(out, "train"))


def test_accumulation_and_partial_batches_leave_the_step_unchanged(settings, tmp_path):
    """5 pairs a pass, 3 passes a step = 15 pairs a pass, the last one partial:
    the same weights but for rounding."""
    one = train_lpo.train(replace(settings, train_batch_size=15, out=str(tmp_path / "one"), pictures=0))
    three = train_lpo.train(replace(settings, train_batch_size=5, accumulate=3, out=str(tmp_path / "three"),
                                    pictures=0))
    assert len(rows(one, "train")) == len(rows(three, "train"))
    for a, b in zip(rows(one, "train"), rows(three, "train"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_one_policy_and_one_reference_evaluation_a_pair(settings, monkeypatch):
    sizes = {"policy": 0, "reference": 0}
    evaluate_ = policies.Policy._evaluate

    def count(self, unet, x_t, t, prompts):
        if unet.training is False and torch.is_grad_enabled():
            sizes["policy"] += len(x_t)
        elif any(getattr(m, "_disable_adapters", False) is True for m in unet.modules()):
            sizes["reference"] += len(x_t)
        return evaluate_(self, unet, x_t, t, prompts)
    monkeypatch.setattr(policies.Policy, "_evaluate", count)
    out = train_lpo.train(replace(settings, pictures=0))
    padded = 5 * len(rows(out, "train"))
    assert sizes == {"policy": padded, "reference": padded}


def test_text_encoders_never_run_inside_the_loop(settings, monkeypatch):
    calls = []
    encode = texts.encode
    monkeypatch.setattr(texts, "encode", lambda *a: calls.append(sampling) or encode(*a))
    sampling = False
    trajectory = lpo_sampling.trajectory

    def inside(*args, **kwargs):
        nonlocal sampling
        sampling = True
        return trajectory(*args, **kwargs)
    monkeypatch.setattr(lpo_sampling, "trajectory", inside)
    train_lpo.train(replace(settings, pictures=0))
    assert calls and not any(calls)


def test_eight_bit_optimizer(settings):
    assert rows(train_lpo.train(replace(settings, optimizer="adamw8bit", pictures=0)), "train")


def test_trackers_write_and_a_missing_one_only_warns(settings, tmp_path, capsys):
    out = train_lpo.train(replace(settings, log_with="tensorboard", pictures=0))
    assert list(out.rglob("events.out.tfevents*"))
    train_lpo.train(replace(settings, log_with="aim", out=str(tmp_path / "b"), pictures=0))
    assert "warning: --log-with aim" in capsys.readouterr().err
    with pytest.raises(errors.InputError, match="--log-with nonesuch: no such tracker"):
        train_lpo.train(replace(settings, log_with="nonesuch", out=str(tmp_path / "c"), pictures=0))


def test_no_valid_pair_is_no_failure(settings, capsys):
    out = train_lpo.train(replace(settings, threshold_min=0.998, threshold_max=0.999, pictures=0))
    assert rows(out, "train") == [] and len(rows(out, "batch")) == 2
    assert "nothing was trained" in capsys.readouterr().out


def test_too_long_prompts_are_counted_once(settings, tmp_path, capsys):
    prompts = tmp_path / "long.txt"
    prompts.write_text("a (red:1.3) circle, \N{DRAGON} 龍\n" + "a red circle " * 40 + "\nمرحبا [blue]\n")
    train_lpo.train(replace(settings, prompts=str(prompts), pictures=0,
                            validation_prompts=("a red circle " * 40,)))
    said = capsys.readouterr().out
    assert said.count("prompts exceed 16 tokens") == 1 and "2 of 3 prompts exceed" in said


def test_command_line_lpo(settings, capsys):
    code = train.main(["lpo", "--model", settings.model, "--lrm", settings.lrm, "--prompts", settings.prompts,
                       "--out", settings.out, "--max-batches", "1", "--batch-size", "2", "--num-steps", "2",
                       "--pictures", "1", "--threshold-min", "0"])
    assert code == 0 and "pytorch_lora_weights.safetensors" in capsys.readouterr().out
    assert (Path(settings.out) / "report.html").is_file()
    assert json.loads((Path(settings.out) / "config.json").read_text())["learning_rate"] == 6e-5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(settings, number, tmp_path):
    """A real process, a real signal: exit code 128 + n, a state to go on from,
    and the same end as without it."""
    argv = ["lpo", "--model", settings.model, "--lrm", settings.lrm, "--prompts", settings.prompts, "--out",
            settings.out, "--batch-size", "3", "--num-steps", "4", "--pictures", "0", "--threshold-min", "0",
            "--threshold-max", "0.001", "--max-batches", "8", "--save-steps", "1000", "--epochs", "9"]
    process = subprocess.Popen([sys.executable, "-m", "lpo_fast.train", *argv], stdout=subprocess.PIPE,
                               text=True, env=os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"})
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 128 + number and "--resume" in rest
    state = torch.load(Path(settings.out) / states.STATE, weights_only=True)
    assert 1 <= state["at"]["batch"] + 2 * state["at"]["epoch"] < 8
    assert train.main([*argv, "--resume"]) == 0
    assert train.main([*argv[:8], str(tmp_path / "whole"), *argv[9:]]) == 0
    assert ((tmp_path / "whole" / "metrics.jsonl").read_bytes()
            == (Path(settings.out) / "metrics.jsonl").read_bytes())


def test_a_resumed_run_keeps_its_settings(settings, capsys):
    out = train_lpo.train(replace(settings, pictures=0))
    recorded = (out / "config.json").read_bytes()
    for change in ({"seed": 1}, {"learning_rate": 1.0}, {"num_candidates": 3}, {"rank": 3}):
        with pytest.raises(errors.InputError, match=next(iter(change)).replace("_", "-")):
            train_lpo.train(replace(settings, pictures=0, resume=True, **change))
    assert (out / "config.json").read_bytes() == recorded


def test_weights_stored_as_float16_are_trained_in_float32(settings, lrm, tmp_path):
    """Many published directories name float16 in their configs."""
    model = Path(shutil.copytree(PIPELINE, tmp_path / "half"))
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float16"}))
    reward = checkpoint.new_lrm(model, generator=torch.Generator().manual_seed(0))
    assert {p.dtype for p in reward.parameters()} == {torch.float32}
    assert rows(train_lpo.train(replace(settings, model=str(model), pictures=1)), "train")


@pytest.mark.parametrize("precision, full", [("bf16", False), ("fp16", False), ("bf16", True)])
def test_mixed_precision_trains_float32_parameters(settings, precision, full):
    out = train_lpo.train(replace(settings, mixed_precision=precision, full=full, pictures=0))
    # policy and reference take the same path, so the ratio is 1 in any precision
    first = rows(out, "train")[0]
    assert first["train_ratio_win"] == first["train_ratio_lose"] == 1.0
    if not full:
        assert {t.dtype for t in loras.read_lora(out).values()} == {torch.float32}
