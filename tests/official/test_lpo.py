"""The official LPO launch line: every key of the three official configs, overrides, refusals, and a run."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lpo_fast import config, train
from lpo_fast.config import LPO
from lpo_fast.errors import InputError
from lpo_fast.lpo import checkpoints
from lpo_fast.models import families, loras
from lpo_fast.official import lpo
from lpo_fast.official import lrm as official_lrm
from lpo_fast.shapes import world

HERE = Path(__file__).parent
SHARED = {
    "seed": 42, "tf32": True, "keep_checkpoints": 0, "resume_from": "", "save_epochs": 1, "log_with": "wandb",
    "tracker_project": "lpo", "tracker_entity": "", "full": False,
    "lrm_guidance": (7.5,), "lrm_multi_scale_cfg": False, "threshold_shape": "sigma",
    "prompts": "prompts/4k_training_prompts.json", "caption_key": "caption", "shuffle": True,
    "drop_last": False, "epochs": 5, "num_steps": 20, "eta": 1.0, "guidance_scale": 5.0, "num_candidates": 4,
    "accumulate": 1, "optimizer": "adamw", "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 1e-4,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "train_cfg": True, "steps_used": "", "beta": 500.0,
    "clip_eps": 0.1, "validation_pictures": 2, "validate_epochs": 1, "lrm_tokenizer": "",
    "validation_prompts": ("A beautiful lake", "A photo of an astronaut riding a horse on mars",
                           "A cat jumps on a dog"),
}
SD = SHARED | {"rank": 4, "checkpointing": "none", "vae": "", "lrm": "lrm_sd15", "batch_size": 5,
               "train_batch_size": 10, "learning_rate": 6e-5, "threshold_min": 0.35, "threshold_max": 0.5}
EXPECTED = {
    "sd15": SD | {"model": "sd-legacy/stable-diffusion-v1-5", "run_name": "lpo_sd15_5ep_beta500.0",
                  "out": "logs/lpo/lpo_sd15_5ep_beta500.0"},
    "sd21": SD | {"model": "stabilityai/stable-diffusion-2-1-base", "run_name": "lpo_sd21_5ep_beta500.0",
                  "out": "logs/lpo/lpo_sd21_5ep_beta500.0"},
    "sdxl": SHARED | {"model": "stabilityai/stable-diffusion-xl-base-1.0",
                      "vae": "madebyollin/sdxl-vae-fp16-fix", "rank": 64, "checkpointing": "full",
                      "lrm": "lrm_sdxl", "batch_size": 4, "train_batch_size": 4, "learning_rate": 1e-5,
                      "threshold_min": 0.45, "threshold_max": 0.6, "run_name": "lpo_sdxl_5ep_beta500.0",
                      "out": "logs/lpo/lpo_sdxl_5ep_beta500.0"},
}


@pytest.fixture(autouse=True)
def in_the_official_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_key_of_the_official_configs(name: str) -> None:
    settings, notes = lpo.parse(["--config", f"configs/{name}.py"])
    found = asdict(settings)
    for key, value in EXPECTED[name].items():
        assert found[key] == value, key
    recipe = {"sd15": config.sd15, "sd21": config.sd21, "sdxl": config.sdxl}[name]().lpo
    same = asdict(recipe).keys() - EXPECTED[name].keys() - {"pictures", "attention"}
    # the rest is our recipe's
    assert {key: found[key] for key in same} == {key: asdict(recipe)[key] for key in same}
    assert (settings.attention in ("auto", "xformers") and [n.split()[0] for n in notes if "no effect" in n]
            == ["dataloader_num_workers", "dataloader_pin_memory"])


def test_every_official_key_is_known_and_no_other() -> None:
    documented = set(official_lrm.flat(lpo.load("configs/sdxl.py"))) | {"dataset_cfg.caption_key"}
    assert documented == lpo.SAME.keys() | lpo.WORKED_OUT | lpo.IDLE.keys()
    fields = set(LPO.__dataclass_fields__)
    assert set(lpo.SAME.values()) <= fields


def test_overrides_and_our_own_flags() -> None:
    settings, _ = lpo.parse([
        "--config=configs/sd15.py", "--config.train.beta=250", "--config.sample.num_steps", "10",
        "--config.use_lora=False", "--config.train.use_8bit_adam=true", "--config.logdir=elsewhere",
        "--config.run_name=mine", "--save-steps", "7", "--config.num_checkpoint_limit=3",
        "--config.validation_prompts=('a',)", "--lrm-base", "base", "--config.use_wandb=False",
        "--config.compare_func_cfg.dynamic_threshold=linear", "--config.wandb_entity_name=us"])
    assert ((settings.beta, settings.num_steps, settings.full, settings.optimizer)
            == (250.0, 10, True, "adamw8bit"))
    assert (settings.out, settings.save_steps, settings.lrm_base) == ("elsewhere/mine", 7, "base")
    assert (settings.keep_checkpoints, settings.validation_prompts, settings.log_with) == (3, ("a",), "")
    assert (settings.threshold_shape, settings.tracker_entity) == ("linear", "us")


def test_a_constant_threshold_and_the_launchers_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    flat = official_lrm.flat(lpo.load("configs/sd15.py")) | {"compare_func_cfg.dynamic_threshold": None}
    settings, _ = lpo.settings(flat)
    assert ((settings.threshold_shape, settings.threshold_min, settings.mixed_precision)
            == ("none", 0.3, "bf16"))
    del flat["compare_func_cfg.threshold"]
    assert lpo.settings(flat)[0].threshold_min == 0.3
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="fp8: is not a precision of LPO training"):
        lpo.settings(flat)


@pytest.mark.parametrize("argv, flag, message", [
    (["--config", "nowhere.py"], "--config", "no such file"),
    (["--config"], "--config", "has no value"),
    (["--config.seed=1"], "--config", "names no config file"),
    (["--config", "configs/sd15.py", "--config.train.betta=1"], "--config.train.betta",
     "did you mean --config.train.beta?"),
    (["--config", "configs/sd15.py", "--config.train.beta=high"], "--config.train.beta",
     "is not of type float"),
    (["--config", "configs/sd15.py", "--config.num_epochs=1.5"], "--config.num_epochs", "is not of type int"),
    (["--config", "configs/sd15.py", "--config.dynamic_beta=True"], "config.dynamic_beta", "has no effect"),
    (["--config", "configs/sdxl.py", "--config.sample.num_inner_step=2"], "config.sample.num_inner_step",
     "has no effect"),
    (["--config", "configs/sd15.py", "--config.compare_func_cfg.type=other"], "config.compare_func_cfg.type",
     "is unknown"),
    (["--config", "configs/sd15.py", "--config.preference_model_func_cfg.type=pick"],
     "config.preference_model_func_cfg.type", "is not a known reward model"),
])
def test_refusals_name_the_key(argv: list[str], flag: str, message: str,
                               capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        lpo.parse(argv)
    assert error.value.key == flag
    assert train.main(argv) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("code, message", [
    ("import nonesuch", "imports nonesuch, which cannot be found"),
    ("x = 1", "is a key that the official code does not have"),
    ("def get_config(): return {'speed': 1}",
     "is a key that the official code does not have; remove it, or did you mean seed"),
    ("def get_config(): return 1 / 0", "ZeroDivisionError"),
])
def test_config_files_that_cannot_be_used(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(InputError, match=re.escape(message)):
        lpo.parse(["--config", str(tmp_path / "bad.py")])


def test_a_reward_model_of_another_kind_is_refused(tiny_lrm: Path) -> None:
    argv = ["--config", "configs/sd15.py", f"--config.preference_model_func_cfg.ft_model_path={tiny_lrm}"]
    assert lpo.parse(argv)[0].lrm == str(tiny_lrm)
    with pytest.raises(InputError, match="was trained with True; use that value"):
        lpo.parse([*argv, "--config.preference_model_func_cfg.multi_scale=False"])


def test_a_reward_model_in_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    argv = ["--config", "configs/sdxl.py",
            f"--config.preference_model_func_cfg.ft_model_path={tmp_path / 'lrm.pt'}"]
    for width, multi_scale in ((8, False), (20, True)):
        torch.save({"visual_projection.weight": torch.zeros(4, width),
                    "unet.mid_block.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3)}, tmp_path / "lrm.pt")
        lpo.parse([*argv, f"--config.preference_model_func_cfg.multi_scale={multi_scale}"])
        with pytest.raises(InputError, match=f"was trained with {multi_scale}; use that value"):
            lpo.parse([*argv, f"--config.preference_model_func_cfg.multi_scale={not multi_scale}"])


def test_a_run_from_an_official_launch_line(tiny_sd: Path, tiny_lrm: Path, tmp_path: Path, capsys) -> None:
    """Its files, and a second run that goes on from its checkpoint."""
    (tmp_path / "prompts.json").write_text(json.dumps([{"caption": c}
                                                       for c in world.captions(held_out=False)[:4]]))
    argv = ["--config", "configs/sd15.py", f"--config.pretrained.model={tiny_sd}",
            "--config.sample.num_steps=3", f"--config.preference_model_func_cfg.ft_model_path={tiny_lrm}",
            f"--config.logdir={tmp_path}", f"--config.dataset_cfg.meta_json_path={tmp_path / 'prompts.json'}",
            "--config.use_wandb=False", "--config.compare_func_cfg.threshold_min=0.0",
            "--config.compare_func_cfg.threshold_max=0.001", "--config.train.train_batch_size=4"]
    assert train.main([*argv, "--config.num_epochs=2", "--config.run_name=two"]) == 0
    assert "note: dataloader_num_workers has no effect here" in capsys.readouterr().out
    out = tmp_path / "two"
    assert {"exp_config.py", "checkpoint_0", "checkpoint_1", "pytorch_lora_weights.safetensors"} <= {
        path.name for path in out.iterdir()}
    assert {path.name for path in (out / "checkpoint_1").iterdir()} == {
        "unet_lora.pt", "global_step.json", "optimizer.bin", "checksums.json"}
    assert ({path.name for path in (out / "pictures").glob("*.png")}
            == {"validation_0.png", "validation_1.png"})
    values: dict = {}
    exec((out / "exp_config.py").read_text(), {"dict": dict}, values)
    assert (values["train"]["beta"] == 500.0 and values["run_name"] == "two"
            and values["sample"]["num_steps"] == 3)

    assert train.main([*argv, "--config.num_epochs=2", "--config.run_name=on",
                       f"--config.resume_from={out / 'checkpoint_0'}"]) == 0
    first, second = (loras.read_lora(tmp_path / name) for name in ("two", "on"))
    assert all(torch.equal(first[name], second[name]) for name in first)  # the optimizer's state came along
    steps = [[json.loads(line)["global_step"]
              for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("two", "on")]
    assert steps[1] == steps[0][-len(steps[1]):] and len(steps[1]) < len(steps[0])


def test_checkpoints_are_found_and_limited(tmp_path: Path) -> None:
    for n in (2, 10, 9):
        (tmp_path / f"checkpoint_{n}").mkdir()
    assert ([path.name for path in checkpoints.checkpoints(tmp_path)]
            == ["checkpoint_2", "checkpoint_9", "checkpoint_10"])
    with pytest.raises(InputError, match="holds no unet_lora.pt"):
        checkpoints.find_checkpoint(tmp_path, full=False)
    torch.save({}, tmp_path / "checkpoint_10" / "unet_lora.pt")
    assert checkpoints.find_checkpoint(tmp_path, full=False).name == "checkpoint_10"
    for nothing in (tmp_path / "nowhere", tmp_path / "checkpoint_2" / "checkpoint_"):
        with pytest.raises(InputError, match="has no checkpoint_{epoch} directory"):
            checkpoints.find_checkpoint(nothing, full=False)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_record_is_a_config_of_the_same_run(name: str, tmp_path: Path) -> None:
    settings, _ = lpo.parse(["--config", f"configs/{name}.py"])
    lrm = SimpleNamespace(family=families.SDXL if name == "sdxl" else families.SD, multi_scale=True,
                          multi_scale_cfg=False, guidance_scale=(7.5,))
    for case in (settings, replace(settings, rank=7, full=True, threshold_shape="none", threshold_max=0.45,
                                   threshold_min=0.45, steps_used="0:5", optimizer="adamw8bit",
                                   keep_checkpoints=3, out="a/b", run_name="b")):
        (tmp_path / "exp_config.py").write_text(lpo.render(case, lrm))
        record = official_lrm.flat(lpo.load(str(tmp_path / "exp_config.py")))
        assert record.keys() == lpo.SAME.keys() | lpo.WORKED_OUT | lpo.IDLE.keys()
        assert lpo.settings(record)[0] == case
        assert lpo.parse(["--config", str(tmp_path / "exp_config.py"), "--config.train.beta=7"])[0].beta == 7
    assert record["lora_rank"] == 7 and record["use_xformers"]
