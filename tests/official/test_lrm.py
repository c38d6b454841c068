"""The official LRM launch, key by key against semantics section 3; every refusal names its key and a remedy.
"""

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lpo_fast.config import LRM, Columns
from lpo_fast.errors import InputError
from lpo_fast.official import lrm
from lpo_fast.preflight import settings

HERE = str(Path(__file__).parent)
TABLE = "dataset.pseudo_preference_path=../vqa_aes_clip_score_mp.csv"  # as the official launch script says

# What the shipped files mean, SD1.5 and SDXL where they differ, on 8 processes.
SHIPPED = {
    "batch_size": (128, 32), "num_workers": 2, "pairs": "yuvalkirstain/pickapic_v1",
    "validation_pairs": "yuvalkirstain/pickapic_v1", "test_pairs": "yuvalkirstain/pickapic_v1",
    "cache_dir": "", "train_split": "train", "validation_split": "validation_unique",
    "test_split": "test_unique", "columns": Columns(), "constant_timestep": 1,
    "variable_timestep": True, "largest_timestep": 951, "keep_only_different": False,
    "keep_only_with_label": False, "keep_only_with_label_in_validation": True, "filter_strategy": 2,
    "scores": "../vqa_aes_clip_score_mp.csv", "compare_between_timestep": False, "timestep_interval": 1,
    "limit_examples_per_prompt": 0, "only_on_best": False, "hflip": False,
    "model": ("sd-legacy/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"),
    "clip": ("openai/clip-vit-large-patch14/pytorch_model.bin", ""),
    "vae": ("", "madebyollin/sdxl-vae-fp16-fix"), "logit_scale": 2.6592, "freeze_text_encoder": False,
    "multi_scale": True, "multi_scale_cfg": False, "guidance_scale": (7.5,), "noise_offset": 0.0,
    "loss_type": "pair", "batch_coeff": 1.0, "aux_loss_coeff": 1.0, "learning_rate": 1e-5,
    "weight_decay": 0.3, "warmup_steps": (500, 1000), "warmup": "log", "mixed_precision": "bf16",
    "tracker_project": "reward_model", "resume": False, "accumulate": 1, "max_steps": (4000, 8000),
    "validate_steps": 100, "save_steps": 100, "eval_on_start": True, "keep_checkpoints": 1,
    "save_only_if_best": True, "keep_best": True, "max_grad_norm": 1.0, "log_with": "wandb", "seed": 42,
    "run_name": ("step_sd15_variable-t_lr1e-5_step-4000_multiscale_cfg7.5_filter2_time951",
                 "step_sdxl_variable-t_lr1e-5_step-8000_multiscale_cfg7.5_filter2_time951"),
}
NOT_OFFICIAL = {"revision", "compile", "resolution", "optimizer", "fused_norms", "max_corrupt",
                "final_checkpoint", "tracker_entity", "out", "dry_run", "cache_latents", "deterministic"}


def parse(*overrides: str, name: str = "step_sd15", folder: str = HERE) -> LRM:
    return lrm.parse(["--config-path", folder, "--config-name", name, TABLE, *overrides])


@pytest.mark.parametrize("family", [0, 1])
def test_the_shipped_files(monkeypatch: pytest.MonkeyPatch, capsys, family: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    parsed = parse(name=("step_sd15", "step_sdxl_base")[family])
    expected = {key: value[family] if isinstance(value, tuple) and len(value) == 2 else value
                for key, value in SHIPPED.items()}
    assert {key: getattr(parsed, key) for key in expected} == expected
    assert parsed.out == f"logs/lrm/reward_model/{parsed.run_name}"
    assert SHIPPED.keys() | NOT_OFFICIAL == asdict(parsed).keys()  # no field is forgotten
    assert all(getattr(parsed, key) == getattr(LRM(), key) for key in NOT_OFFICIAL - {"out"})
    assert f"{expected['batch_size']} pairs per optimizer step" in capsys.readouterr().out
    settings.lrm(parsed)


@pytest.mark.parametrize("overrides", [(), (
    "dataset.batch_size=2", "accelerator.gradient_accumulation_steps=3", "dataset.processor.no_hflip=False",
    "dataset.keep_only_with_pesudo_preference=False", "dataset.limit_examples_per_prompt=7",
    "model.guidance_scale=1", "accelerator.mixed_precision=NO", "accelerator.limit_num_checkpoints=-1",
    "accelerator.log_with=null", "dataset.image_1_column_name=rejected", "accelerator.seed=3")])
@pytest.mark.parametrize("family", [0, 1])
def test_the_configuration_that_a_run_writes_is_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                        family: int, overrides: tuple[str, ...]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    parsed = parse(*overrides, *["model.noise_offset=True"] * family,
                   name=("step_sd15", "step_sdxl_base")[family])
    (tmp_path / "config.yaml").write_text(lrm.render(parsed, ("sd", "sdxl")[family], 2))
    assert lrm.parse(["--config-path", str(tmp_path), "--config-name", "config"]) == parsed


def test_our_recipe_is_the_shipped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults of LRM are what the shipped file says, but for where things lie and how they are logged.
    """
    monkeypatch.setenv("WORLD_SIZE", "8")
    places = {key: getattr(LRM(), key)
              for key in ("pairs", "validation_pairs", "test_pairs", "scores", "model", "clip", "out",
                          "log_with", "run_name", "mixed_precision")}
    assert replace(parse(), **places) == LRM()


@pytest.mark.parametrize("override, field, value", [
    ("dataset.batch_size=3", "batch_size", 3),
    ("accelerator.gradient_accumulation_steps=4", "batch_size", 64),
    ("accelerator.gradient_accumulation_steps=4", "accumulate", 4),
    ("dataset.num_workers=0", "num_workers", 0),
    ("dataset.dataset_name=pairs.parquet", "pairs", "pairs.parquet"),
    ("dataset.cache_dir=/c", "cache_dir", "/c"),
    ("dataset.valid_split_name=held", "validation_split", "held"),
    ("dataset.variable_timestep=False", "variable_timestep", False),
    ("dataset.caption_column_name='images[0]'", "columns", Columns(caption="images[0]")),
    ("dataset.image_1_column_name=rejected", "columns", Columns(jpg_1="rejected")),
    ("dataset.num_examples_per_prompt_column_name=n", "columns", Columns(num_example_per_prompt="n")),
    ("dataset.keep_only_with_label_in_non_train=false", "keep_only_with_label_in_validation", False),
    ("dataset.keep_only_with_pesudo_preference=False", "filter_strategy", 0),
    ("dataset.filter_strategy=3", "filter_strategy", 3),
    ("dataset.limit_examples_per_prompt=5", "limit_examples_per_prompt", 5),
    ("dataset.processor.no_hflip=False", "hflip", True),
    ("model.guidance_scale=1", "guidance_scale", (1.0,)), ("model.vae_path=/vae", "vae", "/vae"),
    ("optimizer.lr=3e-6", "learning_rate", 3e-6), ("accelerator.mixed_precision=NO", "mixed_precision", "no"),
    ("accelerator.log_with=null", "log_with", ""),
    ("accelerator.limit_num_checkpoints=-1", "keep_checkpoints", 0),
    ("accelerator.run_name=mine", "out", "logs/lrm/reward_model/mine"), ("output_dir=here", "out", "here"),
    ("++accelerator.seed=7", "seed", 7), ("accelerator.max_steps=2000", "max_steps", 2000),
    ("criterion.loss_type=both", "loss_type", "both"), ("accelerator.dynamo_backend=NO", "seed", 42),
    ("criterion.is_distributed=False", "seed", 42), ("dataset.processor.random_crop=True", "seed", 42),
    ("accelerator.deepspeed.zero_optimization.stage=2", "seed", 42), ("debug.port=5900", "seed", 42),
    ("accelerator.metric_mode=max", "seed", 42),
])
def test_overrides(override: str, field: str, value: object) -> None:
    assert getattr(parse(override), field) == value


def test_noise_offset_of_sdxl() -> None:
    for switch, expected in (("True", 0.1), ("False", 0.0)):
        parsed = parse(f"model.noise_offset={switch}", "model.noise_offset_coeff=0.1",
                       name="step_sdxl_base.yaml")
        assert parsed.noise_offset == expected


@pytest.mark.parametrize("override, key, message", [
    ("debug.activate=True", "debug.activate", "PyCharm"),
    ("accelerator.debug.activate=True", "accelerator.debug.activate", "PyCharm"),
    ("accelerator.dynamo_backend=INDUCTOR", "accelerator.dynamo_backend", "compilation"),
    ("accelerator.deepspeed.zero_optimization.stage=3",
     "accelerator.deepspeed.zero_optimization.stage", "without DeepSpeed"),
    ("accelerator.deepspeed.new=1", "accelerator.deepspeed.new", "is not an official key"),
    ("accelerator.metric_name=num_samples", "accelerator.metric_name", "validation accuracy"),
    ("accelerator.mixed_precision=FP16", "accelerator.mixed_precision", "is not a precision of LRM training"),
    ("lr_scheduler.total_num_steps=9", "lr_scheduler.total_num_steps", "falls to 0"),
    ("dataset.processor.tokenizer_subfolder=tok", "dataset.processor.tokenizer_subfolder", "own directory"),
    ("dataset.filter_strategy=4", "dataset.filter_strategy", "is not a strategy"),
    ("dataset.pseudo_preference_path=''", "dataset.pseudo_preference_path", "no score table"),
    ("dataset.from_disk=True", "dataset.dataset_name", "no such directory"),
    ("optimizer=adamw", "optimizer", "replaces a part"),
    ("model.noise_offset=True", "model.noise_offset", "is not an official key for sd"),
    ("criterion.loss_type=x", "criterion.loss_type", "is not a loss"),
    ("optimizer.lr=fast", "optimizer.lr", "is not a number"),
    ("accelerator.max_steps=null", "accelerator.max_steps", "is not a whole number"),
    ("accelerator.max_steps=1.5", "accelerator.max_steps", "is not a whole number"),
    ("model.multi_scale=7", "model.multi_scale", "is not True or False"),
    ("optimizer.lr=[", "optimizer.lr", "cannot be read"),
    ("output_dir=${nowhere}", "output_dir", "not a key that can be substituted"),
    ("output_dir=${output_dir}", "output_dir", "not a key that"),
    ("output_dir=${oc.env:HOME}", "output_dir", "not a key that can be substituted"),
    ("~dataset.batch_size", "", "is not key=value"), ("--multirun", "", "is not an option"),
])
def test_refusals(override: str, key: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(override)
    assert (caught.value.key == key and message in caught.value.problem and caught.value.remedy
            and caught.value.value)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(InputError,
                       match="dataset.pseudo_preference_pth .*the nearest is dataset.pseudo_preference_path"):
        parse("dataset.pseudo_preference_pth=x.csv")


def test_every_key_has_a_meaning_or_a_reason() -> None:
    ruled = {name for name, key in lrm.KEYS.items() if not (key.field or key.fixed or key.inert)}
    source = Path(lrm.__file__).read_text()
    assert all(f'"{name}"' in source.partition("def _settings")[2] for name in ruled)
    names = set(asdict(LRM())) | {f"columns.{name}" for name in asdict(Columns())}
    assert {key.field for key in lrm.KEYS.values() if key.field} <= names


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """../conf is meant from trainer/scripts; a directory that is there from here goes first."""
    (tmp_path / "trainer" / "conf").mkdir(parents=True)
    (tmp_path / "trainer" / "scripts").mkdir()
    (tmp_path / "trainer" / "conf" / "step_sd15.yaml").write_text((Path(HERE) / "step_sd15.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert parse(folder="../conf").largest_timestep == 951
    for argv in (["--config-path=../conf", "--config-name=step_sd15", TABLE],
                 ["-cp", "../conf", "-cn", "step_sd15", TABLE]):
        assert lrm.parse(argv) == parse(folder="../conf")
    with pytest.raises(InputError, match="--config-path .*no step_sd16.yaml there"):
        parse(name="step_sd16", folder="../conf")
    for argv, flag in ((["--config-path", "x"], "--config-name"), (["--config-name", "x"], "--config-path"),
                       (["--config-name"], "--config-name")):
        with pytest.raises(InputError) as caught:
            lrm.parse(argv)
        assert caught.value.key == flag


@pytest.mark.parametrize("text, message", [
    ("defaults: [", "is not valid YAML"), ("- a", "it is not a mapping"), ("a: 1", "its defaults are"),
        ("defaults: [clip]", "its defaults are"),
    ("defaults: [step_sd_config, {model: x}]", "its defaults are"), ("\xff", "it is not a mapping"),
])
def test_files_that_are_no_official_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        parse(name="c", folder=str(tmp_path))


def test_class_defaults_where_the_file_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("defaults: [step_sd_config]")
    parsed = parse(name="c", folder=str(tmp_path))
    assert ((parsed.batch_size, parsed.largest_timestep, parsed.variable_timestep, parsed.guidance_scale,
             parsed.learning_rate, parsed.filter_strategy, parsed.mixed_precision, parsed.out)
            == (4, 751, False, (1.0,), 3e-6, 0, "no", "outputs"))
    assert parsed.resume is False  # resume_from_checkpoint is True, and nothing is there
    os.mkdir("outputs")
    (tmp_path / "outputs" / "state.pt").write_text("a state")
    assert parse(name="c", folder=str(tmp_path)).resume is True
