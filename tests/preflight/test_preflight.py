"""Every setting that cannot work is refused with its key and a remedy, before a file is written."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lpo_fast import config, evaluate, train_lpo, train_lrm
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.models import locate, texts
from lpo_fast.preflight import runs, settings
from lpo_fast.run import optimization, states
from lpo_fast.system import writing
from tests.helpers.pairs import HEADER, scores
from tests.helpers.preflight import Bench, clip, refused


def test_good_settings_pass_and_write_nothing(bench: Bench, lpo: LPO, lrm: LRM) -> None:
    assert runs.lpo(lpo)[0] == ["a red circle", "two"]
    assert runs.lrm(lrm)["train"].rows.tolist() == [0, 1]
    table_of_scores = scores(bench.tmp / "s.csv", [(1, 1, 1, 1), (1, -9, 1, 1)], HEADER)
    with_all = replace(lrm, scores=str(table_of_scores), clip=clip(bench, 16), validation_pairs=lrm.pairs)
    used = runs.lrm(replace(with_all, test_pairs=lrm.pairs, vae=str(bench.sd)))
    assert ({use: pairs.rows.tolist() for use, pairs in used.items()}
            == {"train": [0], "validation": [0, 1], "test": [0, 1]})
    assert runs.lpo(replace(lpo, lora=bench.lora(4), lrm_base=str(bench.sd)))[0] == ["a red circle", "two"]
    assert not (bench.tmp / "runs").exists()


@pytest.mark.parametrize("use, end", [("validation", "and it selects the best LRM"),
                                      ("test", "says little about other pairs")])
def test_a_warning_where_training_pairs_are_held_out(bench: Bench, lrm: LRM, use: str, end: str,
                                                     capsys) -> None:
    (bench.tmp / "link.parquet").symlink_to(lrm.pairs)
    runs.lrm(replace(lrm, **{f"{use}_pairs": str(bench.tmp / "link.parquet")}))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: --{use}-pairs shares rows with --pairs (") and line.endswith(end)
    runs.lrm(replace(lrm, **{f"{use}_pairs": bench.pairs("others.parquet")}))
    assert not capsys.readouterr().out


def test_a_model_is_located_last(bench: Bench, lpo: LPO, lrm: LRM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have to be downloaded or converted: other settings are refused before."""
    monkeypatch.setattr(locate, "model", lambda config: pytest.fail("located"))
    monkeypatch.setattr(locate, "single_file", lambda *_: pytest.fail("converted"))
    one = {"model": bench.file("one.safetensors", "x")}
    for changes in ({"prompts": "no.txt"}, {"lora": "/no/where"}, {"resume_from": "/no/where"},
                    {"lrm": "/no/where"}, {"out": bench.file("a_file")}, {"log_with": "nothing"}):
        with pytest.raises(InputError):
            runs.lpo(replace(lpo, **one | changes))
    for changes in ({"pairs": "/no/where"}, {"scores": "/no/where"}, {"validation_pairs": "/no/where"},
                    {"batch_size": 3,
                     "accumulate": 2}, {"out": bench.file("a_file")}):
        with pytest.raises(InputError):
            runs.lrm(replace(lrm, **one | changes))
    with pytest.raises(InputError):
        evaluate.run(evaluate.Evaluate(prompts="/no/where", **one))


def test_sdxl_passes(bench: Bench, lpo: LPO, lrm: LRM, tiny_sdxl: Path) -> None:
    model = checkpoint.new_lrm(tiny_sdxl, generator=torch.Generator())
    checkpoint.save_lrm(model, texts.load_tokenizers(tiny_sdxl, model.family), bench.tmp / "lrm_xl")
    good = replace(lpo, model=str(tiny_sdxl), lrm=str(bench.tmp / "lrm_xl"))
    assert runs.lpo(good)[0] == ["a red circle", "two"]
    assert len(runs.lrm(replace(lrm, model=str(tiny_sdxl)))["train"]) == 2
    refused(train_lpo.train, replace(good, lrm=str(bench.lrm)), "--lrm",
            "scores sd latents, the model makes sdxl")
    for part in ("tokenizer_2", "text_encoder_2"):
        broken = bench.without(tiny_sdxl, part)
        refused(train_lpo.train, replace(good, model=broken), "--model", "is missing")
        writing._remove(Path(broken))


@pytest.mark.parametrize("stage", ["lpo", "lrm"])
@pytest.mark.parametrize("changes, flag, message", [
    ({"resolution": 24}, "--resolution", "is not a multiple of 16"),
    ({"vae": "/no/where"}, "--vae", "no such directory"),
    ({"vae": "no/vae"}, "--vae", "not in the Hugging Face cache"),
    ({"revision": "abc"}, "--revision", "is not a hub name"),
])
def test_pictures(stage: str, changes: dict, flag: str, message: str, request: pytest.FixtureRequest) -> None:
    """The tiny VAE halves once, the denoiser three times."""
    settings = request.getfixturevalue(stage)
    train = {"lpo": train_lpo.train, "lrm": train_lrm.train}[stage]
    refused(train, replace(settings, **changes), flag, message)
    {"lpo": runs.lpo, "lrm": runs.lrm}[stage](replace(settings, resolution=32,
                                                      vae=str(Path(settings.model) / "vae")))


def test_a_vae_of_another_family(bench: Bench, lpo: LPO) -> None:
    vae = bench.with_config(bench.sd, "vae", latent_channels=16) + "/vae"
    problem = refused(train_lpo.train, replace(lpo, vae=vae), "--vae",
                      "latents of 16 channels, the denoiser takes 4")
    assert problem.value == vae
    for part, message in (("config.json", "config.json is missing"),
                          ("diffusion_pytorch_model.safetensors", "holds no")):
        (Path(vae) / "config.json").write_text((bench.sd / "vae" / "config.json").read_text())
        writing._remove(Path(vae) / part)
        refused(train_lpo.train, replace(lpo, vae=vae), "--vae", message)


def test_a_directory_without_a_vae_is_named_as_it_was_typed(bench: Bench, lpo: LPO,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.sd)
    problem = refused(train_lpo.train, replace(lpo, vae="tokenizer"), "--vae", "holds no VAE")
    assert problem.value == "tokenizer" and "a VAE's directory or a complete pipeline" in problem.remedy


@pytest.mark.parametrize("name, package", [("adamw8bit", "bitsandbytes"), ("paged_adamw8bit", "bitsandbytes"),
                                           ("adafactor", "transformers")])
def test_an_optimizer_that_is_not_installed(lpo: LPO, lrm: LRM, name: str, package: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    runs.lpo(replace(lpo, optimizer=name))
    monkeypatch.setattr(optimization, "find_spec", lambda wanted: None if wanted == package else wanted)
    for train, given in ((train_lpo.train, lpo), (train_lrm.train, lrm)):
        problem = refused(train, replace(given, optimizer=name), "--optimizer", f"{package} is not installed")
        assert f"pip install {package}" in problem.remedy


def test_families_do_not_mix(bench: Bench, lpo: LPO, tiny_sdxl: Path, tiny_sd21: Path) -> None:
    """The latent spaces of SD and SDXL differ, those of SD1.5 and SD2.1 do not."""
    problem = refused(train_lpo.train, replace(lpo, model=str(tiny_sdxl)), "--lrm",
                      "scores sd latents, the model makes sdxl")
    assert "latent spaces, differ" in problem.problem
    runs.lpo(replace(lpo, model=str(tiny_sd21)))
    bare = bench.without(bench.lrm, "tokenizer")
    refused(train_lpo.train, replace(lpo, model=str(tiny_sd21), lrm=bare), "--lrm", "has no tokenizer")
    runs.lpo(replace(lpo, model=str(tiny_sd21), lrm=bare, lrm_base=str(bench.sd)))


BAD_NUMBERS = [
    ("epochs", 0), ("batch_size", 0), ("num_steps", 0),
    ("num_steps", 1000), ("train_batch_size", 0), ("accumulate", 0),
    ("save_epochs", 0), ("save_steps", 0), ("num_candidates", 1), ("max_batches", -1), ("pictures", -1),
    ("seed", -1), ("weight_decay", -0.1), ("learning_rate", -1e-5), ("guidance_scale", -1.0), ("alpha", -1.0),
    ("threshold_min", -0.1), ("eta", 0.0), ("beta", 0.0), ("clip_eps", 0.0), ("max_grad_norm", 0.0),
    ("adam_epsilon", 0.0), ("threshold_min", 1.0), ("threshold_max", 1.0), ("ema_decay", 1.0),
    ("adam_beta1", 1.0), ("adam_beta2", 1.0), ("rank", 0), ("learning_rate", float("nan")),
    ("eta", float("nan")), ("beta", float("nan")), ("threshold_max", float("nan")), ("beta", float("inf")),
    ("adam_beta1", -0.1), ("adam_beta2", -0.1), ("ema_decay", -0.1),
]


@pytest.mark.parametrize("key, value", BAD_NUMBERS)
def test_lpo_numbers(lpo: LPO, key: str, value: float) -> None:
    problem = refused(train_lpo.train, replace(lpo, **{key: value}), "--" + key.replace("_", "-"), "")
    assert problem.value == str(value)


@pytest.mark.parametrize("changes, flag, message", [
    ({"threshold_min": 0.5, "threshold_max": 0.35}, "--threshold-min", "above --threshold-max 0.35"),
    ({"steps_used": "0:21"}, "--steps-used", "beyond the 20 steps"),
    ({"steps_used": "20:"}, "--steps-used", "leaves no step before step 20"),
    ({"steps_used": "5:5"}, "--steps-used", "leaves no step before step 5"),
    ({"steps_used": "5"}, "--steps-used", "is not FIRST:END"),
    ({"steps_used": "-1:5"}, "--steps-used", "is not FIRST:END"),
    ({"full": True, "lora": "x"}, "--lora", "full fine-tuning has no LoRA"),
    ({"shard": True}, "--shard", "a LoRA is small"),
    ({"full": True, "shard": True, "compile": "max"}, "--compile", "cannot be combined with --shard"),
    ({"deterministic": True, "attention": "auto"}, "--attention",
     "is not deterministic, or is chosen by timing"),
    ({"full": True, "shard": True, "optimizer": "adamw8bit"}, "--optimizer", "can be sharded"),
    ({"full": True, "shard": True, "optimizer": "adafactor"}, "--optimizer", "can be sharded"),
    ({"full": True, "shard": True, "mixed_precision": "fp16"}, "--mixed-precision", "means fp16 here"),
])
def test_lpo_settings_that_contradict(lpo: LPO, changes: dict, flag: str, message: str) -> None:
    refused(train_lpo.train, replace(lpo, **changes), flag, message)


def test_settings_that_only_look_wrong(lpo: LPO) -> None:
    for changes in ({"threshold_shape": "none", "threshold_min": 0.5, "threshold_max": 0.3},
                    {"full": True, "rank": 0}, {"steps_used": "4:5"}, {"steps_used": ":5"},
                    {"steps_used": ":"}, {"threshold_min": 0.4, "threshold_max": 0.4}, {"clip_eps": 5.0},
                    {"guidance_scale": 0.0}, {"num_steps": 999},
                    {"full": True, "shard": True, "mixed_precision": "bf16", "ema_decay": 0.9}):
        runs.lpo(replace(lpo, **changes))


@pytest.mark.parametrize("changes, flag, message", [
    ({"batch_size": 0}, "--batch-size", "below 1"), ({"max_steps": 0}, "--max-steps", "below 1"),
    ({"validate_steps": 0}, "--validate-steps", "below 1"), ({"seed": -1}, "--seed", "below 0"),
    ({"resolution": -1}, "--resolution", "below 0"), ({"warmup_steps": -1}, "--warmup-steps", "below 0"),
    ({"weight_decay": -1.0}, "--weight-decay", "below 0"), ({"num_workers": -1}, "--num-workers", "below 0"),
    ({"guidance_scale": (7.5, -1.0)}, "--guidance-scale", "at least 0"),
    ({"guidance_scale": ()}, "--guidance-scale", "at least 0"),
    ({"guidance_scale": (1.0, float("inf"))}, "--guidance-scale", "not a finite number"),
    ({"learning_rate": -1.0}, "--learning-rate", "below 0"),
    ({"max_grad_norm": 0.0}, "--max-grad-norm", "not above 0"),
    ({"largest_timestep": 0}, "--largest-timestep", "not a training timestep"),
    ({"largest_timestep": 1000}, "--largest-timestep", "not a training timestep"),
    ({"max_steps": 10, "warmup_steps": 10}, "--warmup-steps", "ends at step 10"),
])
def test_lrm_numbers(lrm: LRM, changes: dict, flag: str, message: str) -> None:
    refused(train_lrm.train, replace(lrm, **changes), flag, message)


@pytest.mark.parametrize("stage", ["lpo", "lrm"])
def test_run_directory(bench: Bench, stage: str, request: pytest.FixtureRequest) -> None:
    settings = request.getfixturevalue(stage)
    train = {"lpo": train_lpo.train, "lrm": train_lrm.train}[stage]
    file = bench.file("a_file", "mine")
    refused(train, replace(settings, out=file), "--out", "cannot be written")
    refused(train, replace(settings, out=file + "/below/it"), "--out", "cannot be written")
    assert Path(file).read_text() == "mine"
    run, check = Path(settings.out), {"lpo": runs.lpo, "lrm": runs.lrm}[stage]
    # what a restart script says, also if there is nothing to go on from yet,
    check(replace(settings, resume=True))
    run.mkdir(parents=True)
    for name in (".lock", ".config.json.new"):  # if the run was killed before it had written its settings,
        (run / name).touch()
    check(replace(settings, resume=True))
    (run / "config.json").write_text(json.dumps(asdict(replace(settings, seed=7))))
    check(replace(settings, resume=True))  # or before its first state
    for path in run.iterdir():
        path.unlink()
    (run / states.STATE).write_text("not looked at")
    (run / "config.json").write_text(json.dumps(asdict(settings)))
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(InputError, match="already holds a run"):
        train(settings)
    for change in ({"seed": 7}, {"learning_rate": 0.5}, {"batch_size": 3},
                   {"model": str(bench.copy(bench.sd))}):
        (key,) = change
        with pytest.raises(InputError, match="was started with") as caught:
            train(replace(settings, resume=True, **change))
        assert caught.value.key == "--" + key.replace("_", "-")
    check(replace(settings, resume=True, log_with="tensorboard"))  # this may change
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_recipes_are_valid() -> None:
    for recipe in (config.sd15(), config.sd21(), config.sdxl(), config.shapes()):
        settings.lpo(recipe.lpo)
        settings.lrm(recipe.lrm)
    settings.demo(config.Demo())
    (lrm15, sd15), (lrm_xl, sdxl) = config.sd15(), config.sdxl()
    assert (sd15.rank, sd15.learning_rate, sd15.threshold_min, sd15.threshold_max) == (4, 6e-5, 0.35, 0.5)
    assert (sdxl.rank, sdxl.learning_rate, sdxl.threshold_min, sdxl.threshold_max) == (64, 1e-5, 0.45, 0.6)
    assert (sdxl.batch_size, sdxl.train_batch_size) == (4, 4)
    assert (sd15.batch_size, sd15.train_batch_size, sd15.beta, sd15.clip_eps) == (5, 10, 500, 0.1)
    assert (sd15.num_steps, sd15.num_candidates, sd15.guidance_scale, sd15.epochs) == (20, 4, 5.0, 5)
    assert ((lrm15.max_steps, lrm15.batch_size, lrm15.warmup_steps, lrm15.weight_decay)
            == (4000, 128, 500, 0.3))
    assert (lrm_xl.max_steps, lrm_xl.batch_size, lrm_xl.warmup_steps) == (8000, 32, 1000)


def test_pictures_of_odd_sizes_and_kinds_are_no_error(bench: Bench, lrm: LRM) -> None:
    Image.new("L", (3, 50)).save(bench.tmp / "x.jpg")
    runs.lrm(replace(lrm, pairs=bench.pairs(jpg_0=[(bench.tmp / "x.jpg").read_bytes()] * 2)))
