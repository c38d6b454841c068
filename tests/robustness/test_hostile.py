"""Hostile files: none runs code, names another library or another directory, or gets into a page,
a table or a tracker."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import lpo_fast
from lpo_fast import config
from lpo_fast.config import LPO
from lpo_fast.errors import InputError
from lpo_fast.evaluation import scorers
from lpo_fast.lpo import checkpoints
from lpo_fast.lrm import checkpoint
from lpo_fast.models import denoisers, families, locate, loras, texts, vaes
from lpo_fast.official import lpo, lrm
from lpo_fast.preflight import models
from lpo_fast.preflight import settings as preflight_settings
from lpo_fast.run import states
from tests.helpers.models import pictures
from tests.tools import fuzz

SOURCES = [file for file in Path(lpo_fast.__file__).parent.rglob("*.py")]


class Attack:
    """Unpickled without care it would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


@pytest.fixture
def trace(tmp_path: Path):
    """The file that an attack would create; it must not be there in the end."""
    yield (file := tmp_path / "trace")
    assert not file.exists()


# Pickles


def parts(attack: Attack) -> dict:
    return {"at": {"step": 1}, "lora": None, "ema": None, "optimizer": None, "random": attack}


READERS = {
    "LRM directory": ("state_dict.pt", lambda a: {"visual_projection": a},
                      lambda f: checkpoint.read_heads(f.parent, [8, 8])),
    "LRM-XL .pt": ("lrm.pt", lambda a: {"unet.x": a}, lambda f: checkpoint.load_lrm(f, f.parent)),
    "unet_lora.pt": ("unet_lora.pt", lambda a: {"x.lora_A.weight": a}, loras.read_lora),
    "state.pt": ("state.pt", parts, lambda f: states.load_state(f, {})),
    "state.pt, average": ("state.pt", lambda a: {"at": {}, "ema": {"shadow_params": [a]}},
                          lambda f: states.load_state(f, {})),
    "pytorch_model.bin of --clip": ("pytorch_model.bin", lambda a: {"text_projection.weight": a},
                                    lambda f: checkpoint.read_text_projection(str(f.parent))),
    "single .ckpt": ("model.ckpt", lambda a: {"state_dict": {}, "callbacks": a},
                     lambda f: locate.locate(str(f), "--model")),
}


@pytest.mark.parametrize("protocol", ["zip", "old"])
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_runs_nothing(name: str, protocol: str, trace: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate.constants, "HF_HOME", str(tmp_path / "home"))
    file, make, read = READERS[name]
    torch.save(make(Attack(trace)), tmp_path / file, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(InputError, match="cannot be read safely"):
        read(tmp_path / file)


def test_the_attack_is_a_real_one(tmp_path: Path) -> None:
    torch.save(Attack(tmp_path / "done"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "done").exists()


def test_an_optimizer_runs_nothing(tiny_sd: Path, trace: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    loras.add_lora(unet, 2, 2, ("to_q",), 0)
    (folder := tmp_path / "checkpoint_0").mkdir()
    torch.save(loras.lora_state(unet), folder / loras.LORA_OFFICIAL)
    torch.save({"state": {0: Attack(trace)}, "param_groups": []}, folder / checkpoints.OPTIMIZER)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])
    with pytest.raises(InputError, match="optimizer.bin cannot be read safely"):
        checkpoints.find_checkpoint(folder, full=False)
    with pytest.raises(InputError, match="optimizer.bin: cannot be read safely"):
        checkpoints.resume_from(folder, unet, optimizer)
    torch.save({"state": [], "param_groups": 3}, folder / checkpoints.OPTIMIZER)
    with pytest.raises(InputError, match="optimizer.bin: is another optimizer's"):
        checkpoints.resume_from(folder, unet, optimizer)
    os.remove(folder / checkpoints.OPTIMIZER)
    (folder / checkpoints.STEP).write_text('{"global_step": "7"}')
    with pytest.raises(InputError, match="global_step.json: has no valid global_step"):
        checkpoints.resume_from(folder, unet, optimizer)


def test_scorers_run_nothing(clips: Path, trace: Path) -> None:
    torch.save({"layers.0.weight": Attack(trace)}, clips / "head.pth")
    with pytest.raises(InputError, match="head.pth: cannot be read safely"):
        scorers.aesthetic(pictures(), ["a"] * 3)
    scorers.clip.cache_clear()
    os.remove(clips / "clip" / "model.safetensors")
    torch.save({"logit_scale": Attack(trace)}, clips / "clip" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read safely as CLIP"):
        scorers.clipscore(pictures(), ["a"] * 3)


@pytest.mark.parametrize("part, load", [("unet", denoisers.load_unet), ("vae", vaes.load_vae),
                                        ("text_encoder", lambda p: texts.load_text(p, families.SD))])
def test_models_are_read_from_safetensors_alone(part: str, load, tiny_sd: Path, copied, trace: Path) -> None:
    folder = copied(tiny_sd)
    for weights in (folder / part).glob("*.safetensors"):
        os.remove(weights)
        torch.save({"x": Attack(trace)}, weights.with_suffix(".bin"))
        torch.save({"x": Attack(trace)}, weights.with_name("pytorch_model.bin"))
    with pytest.raises(InputError, match=f"{part}/ holds no .safetensors"):
        models.pipeline(str(folder), "--model")
    with pytest.raises(OSError):
        load(folder)


def test_no_line_of_the_package_reads_code() -> None:
    text = {"/".join(file.parts[-2:]): file.read_text(encoding="utf-8") for file in SOURCES}
    for name, source in text.items():
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", source):
            assert "weights_only=True" in call, (name, call)
        for word in ("trust_remote_code", "import pickle", "yaml.load", "joblib", "marshal", "shell=True",
                     "os.system"):
            assert word not in source, (name, word)
    running = re.compile(r"\brunpy\.|\bexec\(|(?<![.\w])eval\(")
    assert [name for name, source in text.items() if running.search(source)] == ["official/lpo.py"]


# Names inside files


def test_libraries_of_a_model_index_are_not_imported(tiny_sd: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch, trace: Path) -> None:
    (tmp_path / "evil_library.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(locate.constants, "HF_HOME", str(tmp_path / "home"))
    save_file({"down.attn2.to_k.weight": torch.zeros(8, 8)}, tmp_path / "m.safetensors")
    shutil.copytree(tiny_sd, tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index | {"unet": ["evil_library", "Evil"]}))
    with pytest.raises(InputError, match="takes its unet from 'evil_library', which would be imported"):
        locate.locate(str(tmp_path / "m.safetensors"), "--model")
    models.pipeline(str(tmp_path / "m"), "--model")  # a directory's model_index.json is not read at all
    assert "evil_library" not in sys.modules


def test_attention_of_a_config_is_not_fetched(tiny_sd: Path, copied, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes "owner/name" there for code of the hub."""
    folder = copied(tiny_sd)
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "evil/kernel"}))
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention",
                        lambda *a, **k: pytest.fail("fetched"))
    encoder = texts.load_text(folder, families.SD)[0]
    assert encoder.config._attn_implementation == "sdpa"
    assert (families.without_weights(type(encoder), folder / "text_encoder").config._attn_implementation
            == "sdpa")
    models.pipeline(str(folder), "--model")


@pytest.mark.parametrize("shard", ["../../evil.safetensors", "/etc/passwd", "x.bin", "gone.safetensors", 3])
def test_shards_lie_beside_their_index(shard: object, tiny_sd: Path, copied) -> None:
    folder = copied(tiny_sd)
    (folder.parent / "evil.safetensors").touch()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    with pytest.raises(InputError, match="names the shard .* which is not next to it"):
        models.pipeline(str(folder), "--model")


@pytest.mark.parametrize("settings", [{"base": 3}, {"guidance_scale": "7"}, {"guidance_scale": []},
                                      {"resolution": 10**9}, {"multi_scale_cfg": 1}, {"unet": "x"},
                                      {"guidance_scale": [float("nan")]}])
def test_an_lrm_json_of_something_else(settings: dict, tiny_sd: Path, tiny_lrm: Path, copied) -> None:
    folder = copied(tiny_lrm)
    (folder / "lrm.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"lrm.json: {next(iter(settings))} is"):
        models.reward_model(LPO(model=str(tiny_sd), lrm=str(folder)))
    with pytest.raises(InputError, match=f"lrm.json: {next(iter(settings))} is"):
        checkpoint.load_lrm(folder)


@pytest.mark.parametrize("part, changes", [
    ("unet", {"layers_per_block": 10**9}), ("unet", {"block_out_channels": "abc"}),
    ("unet", {"in_channels": None}), ("unet", {"block_out_channels": [8] * 1000}),
    ("unet", {"act_fn": "evil"}), ("text_encoder", {"num_hidden_layers": 10**9}),
    ("text_encoder", {"hidden_size": "x"}), ("vae", {"block_out_channels": []}),
    ("vae", {"norm_num_groups": 7}), ("scheduler", {"num_train_timesteps": 10**12}),
    ("scheduler", {"beta_schedule": "evil"}), ("scheduler", {"prediction_type": "evil"})])
def test_configs_that_nothing_can_be_built_from(part: str, changes: dict, tiny_sd: Path, copied) -> None:
    folder = copied(tiny_sd)
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError) as caught:
        models.pipeline(str(folder), "--model")
    assert part in str(caught.value) and caught.value.key == "--model"


@pytest.mark.parametrize("name", ["../../x", "..", ".", "", "/x", "a/b", "a\\b", "a\0b"])
def test_a_run_stays_in_its_directory(name: str, tmp_path: Path) -> None:
    """logdir and --out are the user's choice; the names in a configuration choose no directory."""
    flat = lrm.flat(fuzz.official_config())
    with pytest.raises(InputError, match="config.run_name .*is not the name of a directory in logdir"):
        lpo.settings(flat | {"run_name": name})
    for check, settings in ((preflight_settings.lpo, config.sd15().lpo),
                            (preflight_settings.lrm, config.sd15().lrm)):
        for key in ("tracker_project", "run_name"):
            if name:
                with pytest.raises(InputError, match="is not the name of a directory"):
                    check(replace(settings, **{key: name}))
    assert lpo.settings(flat | {"run_name": "v1.0 β"})[0].out == "logs/lpo/v1.0 β"


# Pages, tables, trackers
