"""Hostile files: none runs code, names another library or another directory, or gets into a page, a table or a tracker."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

import lpo_fast
from lpo_fast import config, evaluate, report
from lpo_fast.config import LPO, LRM
from lpo_fast.data import tables
from lpo_fast.errors import InputError
from lpo_fast.evaluation import scorers
from lpo_fast.lpo import checkpoints
from lpo_fast.lrm import checkpoint
from lpo_fast.models import denoisers, families, locate, loras, texts, vaes
from lpo_fast.official import lpo, lrm
from lpo_fast.preflight import meta, models
from lpo_fast.preflight import settings as preflight_settings
from lpo_fast.run import environment, logs, states
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
    "LRM directory": ("state_dict.pt", lambda a: {"visual_projection": a}, lambda f: checkpoint.read_heads(f.parent, [8, 8])),
    "LRM-XL .pt": ("lrm.pt", lambda a: {"unet.x": a}, lambda f: checkpoint.load_lrm(f, f.parent)),
    "unet_lora.pt": ("unet_lora.pt", lambda a: {"x.lora_A.weight": a}, loras.read_lora),
    "state.pt": ("state.pt", parts, lambda f: states.load_state(f, {})),
    "state.pt, average": ("state.pt", lambda a: {"at": {}, "ema": {"shadow_params": [a]}},
                          lambda f: states.load_state(f, {})),
    "pytorch_model.bin of --clip": ("pytorch_model.bin", lambda a: {"text_projection.weight": a},
                                    lambda f: checkpoint.read_text_projection(str(f.parent))),
    "single .ckpt": ("model.ckpt", lambda a: {"state_dict": {}, "callbacks": a}, lambda f: locate.locate(str(f), "--model")),
}


@pytest.mark.parametrize("protocol", ["zip", "old"])
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_runs_nothing(name: str, protocol: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(InputError, match="global_step.json: has no global_step"):
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


@pytest.mark.parametrize("part, load", [
    ("unet", denoisers.load_unet), ("vae", vaes.load_vae), ("text_encoder", lambda p: texts.load_text(p, families.SD))])
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
        for word in ("trust_remote_code", "import pickle", "yaml.load", "joblib", "marshal", "shell=True", "os.system"):
            assert word not in source, (name, word)
    running = re.compile(r"\brunpy\.|\bexec\(|(?<![.\w])eval\(")
    assert [name for name, source in text.items() if running.search(source)] == ["official/lpo.py"]


# Names inside files


def test_libraries_of_a_model_index_are_not_imported(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     trace: Path) -> None:
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
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: pytest.fail("fetched"))
    encoder = texts.load_text(folder, families.SD)[0]
    assert encoder.config._attn_implementation == "sdpa"
    assert meta.built(type(encoder), folder / "text_encoder").config._attn_implementation == "sdpa"
    models.pipeline(str(folder), "--model")


@pytest.mark.parametrize("shard", ["../../evil.safetensors", "/etc/passwd", "x.bin", "gone.safetensors", 3])
def test_shards_lie_beside_their_index(shard: object, tiny_sd: Path, copied) -> None:
    folder = copied(tiny_sd)
    (folder.parent / "evil.safetensors").touch()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    with pytest.raises(InputError, match="names the shard .* which is not next to it"):
        models.pipeline(str(folder), "--model")


@pytest.mark.parametrize("settings", [
    {"base": 3}, {"guidance_scale": "7"}, {"guidance_scale": []}, {"resolution": 10**9}, {"multi_scale_cfg": 1}, {"unet": "x"},
    {"guidance_scale": [float("nan")]}])
def test_an_lrm_json_of_something_else(settings: dict, tiny_sd: Path, tiny_lrm: Path, copied) -> None:
    folder = copied(tiny_lrm)
    (folder / "lrm.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"lrm.json: {next(iter(settings))} is"):
        models.reward_model(LPO(model=str(tiny_sd), lrm=str(folder)))
    with pytest.raises(InputError, match=f"lrm.json: {next(iter(settings))} is"):
        checkpoint.load_lrm(folder)


@pytest.mark.parametrize("part, changes", [
    ("unet", {"layers_per_block": 10**9}), ("unet", {"block_out_channels": "abc"}), ("unet", {"in_channels": None}),
    ("unet", {"block_out_channels": [8] * 1000}), ("unet", {"act_fn": "evil"}), ("text_encoder", {"num_hidden_layers": 10**9}),
    ("text_encoder", {"hidden_size": "x"}), ("vae", {"block_out_channels": []}), ("vae", {"norm_num_groups": 7}),
    ("scheduler", {"num_train_timesteps": 10**12}), ("scheduler", {"beta_schedule": "evil"}),
    ("scheduler", {"prediction_type": "evil"})])
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
    for check, settings in ((preflight_settings.lpo, config.sd15().lpo), (preflight_settings.lrm, config.sd15().lrm)):
        for key in ("tracker_project", "run_name"):
            if name:
                with pytest.raises(InputError, match="is not the name of a directory"):
                    check(replace(settings, **{key: name}))
    assert lpo.settings(flat | {"run_name": "v1.0 β"})[0].out == "logs/lpo/v1.0 β"


# Pages, tables, trackers

PROMPTS = ['</title><script>alert(1)</script>', '" onload="alert(1)', "' onerror='alert(1)' x='", "javascript:alert(1)",
           "<img src=x onerror=alert(1)>", "</figcaption></svg><a href='javascript:alert(1)'>", "&lt;b&gt;", "$body ${title}",
           "a\nb, \"c\"", "]]><!-- ", "\ud83d"]


OWNED = "document.body.append('has been ' + 'owned')"


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.seen, self.text, self.values = [], "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value for _, value in attrs if value]

    def handle_data(self, text: str) -> None:
        self.text += text

    def handle_comment(self, text: str) -> None:
        self.seen.append(("comment", ()))


def run_page(folder: Path, prompts: list[str]) -> str:
    """report.html of a run whose every text is a prompt."""
    (pictures := folder / "pictures").mkdir(parents=True)
    for i, _ in enumerate(prompts):
        for when in ("before", "after"):
            Image.new("RGB", (8, 8)).save(pictures / f"{i:03d}_{when}.png")
    Image.new("RGB", (8, 8)).save(pictures / "validation_0.png")
    (pictures / "captions.json").write_text(json.dumps([{"caption": prompt} for prompt in prompts]))
    (pictures / "validation.json").write_text(json.dumps(prompts))
    named = {f"{i}{prompt}": prompt for i, prompt in enumerate(prompts)}
    (folder / "config.json").write_text(json.dumps({"model": prompts[0], "prompts": named}))
    (folder / "environment.json").write_text(json.dumps({"date": prompts[1], "command": " ".join(prompts)}))
    return report.write(folder).read_text(encoding="utf-8")


def evaluation(folder: Path, prompts: list[str]) -> str:
    """page.html of an evaluation of these prompts, whose model is called like one."""
    rows = []
    for i, prompt in enumerate(prompts):
        row = {"item": i, "prompt": prompt}
        for side in ("base", "tuned"):
            (folder / side).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / side / f"{i}.png")
            row |= {side: f"{side}/{i}.png", f"{side} {prompts[2]}": 0.5}
        rows.append(row)
    settings = evaluate.Evaluate(model=prompts[0], lora=prompts[1], out=str(folder))
    evaluate.write(settings, rows, [prompts[2]], len(prompts))
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [run_page, evaluation])
def test_no_element_or_attribute_of_a_page_comes_from_a_prompt(make, tmp_path: Path) -> None:
    prompts = PROMPTS if make is run_page else PROMPTS[:-1]  # read_prompts refuses lone surrogates
    hostile = Elements(make(tmp_path / "hostile", prompts))
    harmless = Elements(make(tmp_path / "harmless", [f"word {i}" for i in range(len(prompts))]))
    assert hostile.seen == harmless.seen
    assert {tag for tag, _ in hostile.seen} & {"script", "a", "iframe", "object", "form", "link"} == set()
    assert not any(name.startswith("on") for _, names in hostile.seen for name in names)
    assert not any("javascript:" in value or "alert" in value for value in hostile.values)
    assert all(prompt in hostile.text for prompt in prompts[:8])
    policy = next(value for value in hostile.values if "default-src" in value)
    assert policy.startswith("default-src 'none'")  # were there a script, it would not run


def browser(page: Path) -> Elements:
    """What Chromium has made of a page when its scripts, if any, have run."""
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([*line, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    return Elements(done.stdout.replace("<tbody>", ""))  # which browsers add


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
@pytest.mark.parametrize("make, name", [(run_page, "report.html"), (evaluation, "page.html")])
def test_a_browser_sees_the_same_elements_and_runs_nothing(make, name: str, tmp_path: Path) -> None:
    attacks = [f"{end}{how}" for how in (f"<script>{OWNED}</script>", f'<img src=x onerror="{OWNED}">',
                                         f"<svg onload='{OWNED}'>") for end in ("", '">', "</title>", "</style>", "</td>")]
    written, seen = Elements(make(tmp_path / "page", attacks)), browser(tmp_path / "page" / name)
    assert seen.seen == written.seen and "owned" in seen.text and "has been owned" not in seen.text
    (tmp_path / "raw.html").write_text(f"<!doctype html><html><head></head><body>{attacks[5]}</body></html>")
    assert "has been owned" in browser(tmp_path / "raw.html").text  # the attacks are real ones


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    prompts = [*PROMPTS[:-1], "=1+1", "a;b", "\r\n", '""']
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    evaluation(tmp_path / "out", prompts)
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == prompts
    rows = [{"prompt": prompt, "image": "x.png"} for prompt in prompts]
    for suffix in (".csv", ".jsonl", ".parquet"):
        tables.write(rows, torch.zeros(len(rows)), tmp_path / f"t{suffix}", "score")
        assert tables.read(str(tmp_path / f"t{suffix}"), "prompt", "image", "new")[1] == prompts


@pytest.mark.parametrize("given, kept", [
    ("train lpo --hub-token hf_abcdefghijklmnopqrst --out x", "train lpo --hub-token *** --out x"),
    ("--config.api_key=s3cret --seed 1", "--config.api_key=*** --seed 1"),
    ("--model https://user:pass@host/x", "--model https://***@host/x"),
    ("--lrm-tokenizer DIR --out hf_short", "--lrm-tokenizer DIR --out hf_short"),
    ("x=very-secret-value", "x=***"), ("--out a@b/c", "--out a@b/c")])
def test_credentials_are_not_recorded(given: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-value")
    assert environment.redacted(given) == kept


@pytest.mark.parametrize("settings", [LPO(model="m"), LRM(model="m")])
def test_trackers_and_run_directories_get_no_environment(settings: LPO | LRM, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {name: f"secret-of-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lpo_fast.train", *secrets.values()])
    sent = []

    def send(*words, **named) -> None:
        sent.append(repr((words, named)))
    monkeypatch.setattr(logs, "Accelerator", lambda **_: SimpleNamespace(
        init_trackers=send, trackers=[1], log=send, end_training=lambda: None))
    run = logs.RunLog(replace(settings, out=str(tmp_path / "run"), log_with="wandb", model="https://me:secret-of-HF_TOKEN@host/m"))
    run.log("train", 1, loss=1.0, note="text")
    run.close()
    assert len(sent) == 2 and "note" not in sent[1]
    written = "".join(file.read_text() for file in (tmp_path / "run").iterdir() if file.name != "config.json")
    for text in (*sent, written):
        assert "secret-of" not in text and not any(name in text for name in secrets)
