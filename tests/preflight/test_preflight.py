"""Every setting that cannot work is refused with its key and a remedy, before a file is written."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lpo_fast import config, evaluate, train_lpo, train_lrm
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.models import locate, loras, texts
from lpo_fast.preflight import runs, settings
from lpo_fast.run import optimization, states
from lpo_fast.system import writing
from tests.helpers.pairs import BLUE, HEADER, RED, scores, table


@dataclass
class Bench:
    """Where the settings of a case may point to."""

    tmp: Path
    sd: Path
    lrm: Path
    copy: Callable[[Path], Path]

    def file(self, name: str, content: str | bytes = "") -> str:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def without(self, folder: Path, part: str) -> str:
        """A copy of a directory without a file or a part."""
        copy = self.copy(folder)
        writing._remove(copy / part)
        return str(copy)

    def with_config(self, folder: Path, part: str, **changes) -> str:
        """A copy of a directory with a changed config.json."""
        copy = self.copy(folder)
        file = copy / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return str(copy)

    def with_heads(self, **heads) -> str:
        """A copy of the LRM with other heads."""
        copy = self.copy(self.lrm)
        torch.save(torch.load(copy / "state_dict.pt", weights_only=True) | heads, copy / "state_dict.pt")
        return str(copy)

    def broken(self, folder: Path, file: str, content: str = "{") -> str:
        copy = self.copy(folder)
        (copy / file).write_text(content)
        return str(copy)

    def pairs(self, name: str = "other.parquet", **changed) -> str:
        return str(table(self.tmp / name, ["a", "b"], **changed))

    def captions_alone(self) -> str:
        pq.write_table(pa.table({"caption": ["a"]}), self.tmp / "captions.parquet")
        return str(self.tmp / "captions.parquet")

    def lora(self, rank: int) -> str:
        from diffusers import UNet2DConditionModel
        unet = UNet2DConditionModel.from_pretrained(self.sd, subfolder="unet")
        loras.add_lora(unet, rank, rank, ("to_q", "to_k", "to_v", "to_out.0"), 0)
        loras.save_lora(unet, self.tmp / "lora")
        return str(self.tmp / "lora")


@pytest.fixture
def bench(tmp_path: Path, tiny_sd: Path, tiny_lrm: Path, copied) -> Bench:
    return Bench(tmp_path, tiny_sd, tiny_lrm, copied)


@pytest.fixture
def lpo(bench: Bench) -> LPO:
    """An LPO run that could start."""
    return LPO(model=str(bench.sd), lrm=str(bench.lrm), prompts=bench.file("prompts.txt", "a red circle\ntwo\n"),
               out=str(bench.tmp / "runs" / "out"), pictures=0, max_batches=1)


@pytest.fixture
def lrm(bench: Bench) -> LRM:
    """An LRM run that could start."""
    return LRM(model=str(bench.sd), pairs=bench.pairs("pairs.parquet"), out=str(bench.tmp / "runs" / "out"),
               max_steps=1, warmup_steps=0)


def clip(bench: Bench, width: int) -> str:
    torch.save({"text_projection.weight": torch.zeros(8, width)}, bench.tmp / "clip.bin")
    return str(bench.tmp / "clip.bin")


def refused(train: Callable, settings: LPO | LRM, flag: str, message: str) -> InputError:
    """The training function refuses the settings, and the run directory does not come to exist."""
    with pytest.raises(InputError) as caught:
        train(settings)
    problem = caught.value
    assert problem.key == flag and message in problem.problem and problem.remedy and problem.value
    assert str(problem).startswith(f"{flag} {problem.value}: ")
    assert not Path(settings.out).is_dir() and not (Path(settings.out).parent / "runs").exists()
    return problem


def test_good_settings_pass_and_write_nothing(bench: Bench, lpo: LPO, lrm: LRM) -> None:
    assert runs.lpo(lpo)[0] == ["a red circle", "two"]
    assert runs.lrm(lrm)["train"].rows.tolist() == [0, 1]
    table_of_scores = scores(bench.tmp / "s.csv", [(1, 1, 1, 1), (1, -9, 1, 1)], HEADER)
    with_all = replace(lrm, scores=str(table_of_scores), clip=clip(bench, 16), validation_pairs=lrm.pairs)
    used = runs.lrm(replace(with_all, test_pairs=lrm.pairs, vae=str(bench.sd)))
    assert {use: pairs.rows.tolist() for use, pairs in used.items()} == {"train": [0], "validation": [0, 1], "test": [0, 1]}
    assert runs.lpo(replace(lpo, lora=bench.lora(4), lrm_base=str(bench.sd)))[0] == ["a red circle", "two"]
    assert not (bench.tmp / "runs").exists()


@pytest.mark.parametrize("use, end", [("validation", "and chooses the best LRM"), ("test", "says little of other pairs")])
def test_a_warning_where_training_pairs_are_held_out(bench: Bench, lrm: LRM, use: str, end: str, capsys) -> None:
    (bench.tmp / "link.parquet").symlink_to(lrm.pairs)
    runs.lrm(replace(lrm, **{f"{use}_pairs": str(bench.tmp / "link.parquet")}))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: --{use}-pairs has rows of --pairs (") and line.endswith(end)
    runs.lrm(replace(lrm, **{f"{use}_pairs": bench.pairs("others.parquet")}))
    assert not capsys.readouterr().out


def test_a_model_is_located_last(bench: Bench, lpo: LPO, lrm: LRM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have to be downloaded or converted: other settings are refused before."""
    monkeypatch.setattr(locate, "model", lambda config: pytest.fail("located"))
    monkeypatch.setattr(locate, "single_file", lambda *_: pytest.fail("converted"))
    one = {"model": bench.file("one.safetensors", "x")}
    for changes in ({"prompts": "no.txt"}, {"lora": "/no/where"}, {"resume_from": "/no/where"}, {"lrm": "/no/where"},
                    {"out": bench.file("a_file")}, {"log_with": "nothing"}):
        with pytest.raises(InputError):
            runs.lpo(replace(lpo, **one | changes))
    for changes in ({"pairs": "/no/where"}, {"scores": "/no/where"}, {"validation_pairs": "/no/where"}, {"batch_size": 3,
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
    refused(train_lpo.train, replace(good, lrm=str(bench.lrm)), "--lrm", "scores sd latents, the model makes sdxl")
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
    {"lpo": runs.lpo, "lrm": runs.lrm}[stage](replace(settings, resolution=32, vae=str(Path(settings.model) / "vae")))


def test_a_vae_of_another_family(bench: Bench, lpo: LPO) -> None:
    vae = bench.with_config(bench.sd, "vae", latent_channels=16) + "/vae"
    problem = refused(train_lpo.train, replace(lpo, vae=vae), "--vae", "latents of 16 channels, the denoiser takes 4")
    assert problem.value == vae
    for part, message in (("config.json", "config.json is missing"), ("diffusion_pytorch_model.safetensors", "holds no")):
        (Path(vae) / "config.json").write_text((bench.sd / "vae" / "config.json").read_text())
        writing._remove(Path(vae) / part)
        refused(train_lpo.train, replace(lpo, vae=vae), "--vae", message)


def test_a_directory_without_a_vae_is_named_as_it_was_typed(bench: Bench, lpo: LPO, monkeypatch: pytest.MonkeyPatch) -> None:
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
    problem = refused(train_lpo.train, replace(lpo, model=str(tiny_sdxl)), "--lrm", "scores sd latents, the model makes sdxl")
    assert "latent spaces, differ" in problem.problem
    runs.lpo(replace(lpo, model=str(tiny_sd21)))
    bare = bench.without(bench.lrm, "tokenizer")
    refused(train_lpo.train, replace(lpo, model=str(tiny_sd21), lrm=bare), "--lrm", "has no tokenizer")
    runs.lpo(replace(lpo, model=str(tiny_sd21), lrm=bare, lrm_base=str(bench.sd)))


BAD_NUMBERS = [
    ("epochs", 0), ("batch_size", 0), ("num_steps", 0), ("num_steps", 1000), ("train_batch_size", 0), ("accumulate", 0),
    ("save_epochs", 0), ("save_steps", 0), ("num_candidates", 1), ("max_batches", -1), ("pictures", -1),
    ("seed", -1), ("weight_decay", -0.1), ("learning_rate", -1e-5),
    ("guidance_scale", -1.0), ("alpha", -1.0), ("threshold_min", -0.1), ("eta", 0.0), ("beta", 0.0), ("clip_eps", 0.0),
    ("max_grad_norm", 0.0), ("adam_epsilon", 0.0), ("threshold_min", 1.0), ("threshold_max", 1.0), ("ema_decay", 1.0),
    ("adam_beta1", 1.0), ("adam_beta2", 1.0), ("rank", 0), ("learning_rate", float("nan")), ("eta", float("nan")),
    ("beta", float("nan")), ("threshold_max", float("nan")), ("beta", float("inf")), ("adam_beta1", -0.1), ("adam_beta2", -0.1),
    ("ema_decay", -0.1),
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
    ({"steps_used": "5"}, "--steps-used", "is not FIRST:END"), ({"steps_used": "-1:5"}, "--steps-used", "is not FIRST:END"),
    ({"full": True, "lora": "x"}, "--lora", "full fine-tuning has no LoRA"),
    ({"shard": True}, "--shard", "a LoRA is small"),
    ({"full": True, "shard": True, "compile": "max"}, "--compile", "cannot be combined with --shard"),
    ({"deterministic": True, "attention": "auto"}, "--attention", "is not deterministic, or is chosen by timing"),
    ({"full": True, "shard": True, "optimizer": "adamw8bit"}, "--optimizer", "can be sharded"),
    ({"full": True, "shard": True, "optimizer": "adafactor"}, "--optimizer", "can be sharded"),
    ({"full": True, "shard": True, "mixed_precision": "fp16"}, "--mixed-precision", "means fp16 here"),
])
def test_lpo_settings_that_contradict(lpo: LPO, changes: dict, flag: str, message: str) -> None:
    refused(train_lpo.train, replace(lpo, **changes), flag, message)


def test_settings_that_only_look_wrong(lpo: LPO) -> None:
    for changes in ({"threshold_shape": "none", "threshold_min": 0.5, "threshold_max": 0.3}, {"full": True, "rank": 0},
                    {"steps_used": "4:5"}, {"steps_used": ":5"}, {"steps_used": ":"},
                    {"threshold_min": 0.4, "threshold_max": 0.4}, {"clip_eps": 5.0},
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


# What is wrong with the directory that --model or --lrm-base names: (what to do to a good one, message).
PIPELINES = [
    (lambda b: "", "is required"),
    (lambda b: str(b.tmp / "nowhere"), "no such directory"),
    (lambda b: b.file("file.txt"), "is not a model"),
    (lambda b: "no/such-model", "not in the Hugging Face cache, and HF_HUB_OFFLINE is set"),
    (lambda b: b.file("bad.safetensors", "bad"), "is not a checkpoint of"),
    (lambda b: b.file("bad.ckpt", "bad"), "cannot be read safely"),
    (lambda b: str(b.tmp), "unet/config.json is missing"),
    (lambda b: str(b.sd / "unet"), "unet/config.json is missing"),
    (lambda b: b.without(b.sd, "vae"), "vae/config.json is missing"),
    (lambda b: b.without(b.sd, "text_encoder"), "text_encoder/config.json is missing"),
    (lambda b: b.without(b.sd, "tokenizer"), "tokenizer/ is missing"),
    (lambda b: b.without(b.sd, "scheduler"), "scheduler/scheduler_config.json is missing"),
    (lambda b: b.without(b.sd, "unet/diffusion_pytorch_model.safetensors"), "unet/ holds no .safetensors"),
    (lambda b: b.without(b.sd, "vae/diffusion_pytorch_model.safetensors"), "vae/ holds no .safetensors"),
    (lambda b: b.without(b.sd, "text_encoder/model.safetensors"), "text_encoder/ holds no .safetensors"),
    (lambda b: b.broken(b.sd, "unet/config.json"), "cannot be read as JSON"),
    (lambda b: b.broken(b.sd, "unet/config.json", "[1]"), "cannot be read as JSON"),
    (lambda b: b.with_config(b.sd, "unet", addition_embed_type="text_time"), "text_encoder_2/config.json is missing"),
]


@pytest.mark.parametrize("make, message", PIPELINES, ids=[message for _, message in PIPELINES])
def test_no_pipeline(bench: Bench, lpo: LPO, lrm: LRM, make: Callable[[Bench], str], message: str) -> None:
    model = make(bench)
    refused(train_lpo.train, replace(lpo, model=model), "--model", message)
    refused(train_lrm.train, replace(lrm, model=model), "--model", message)
    if model:  # without it the model is the base
        refused(train_lpo.train, replace(lpo, lrm_base=model), "--lrm-base", message)


@pytest.mark.parametrize("make, message", [
    (lambda b: "", "is required"),
    (lambda b: str(b.tmp / "nowhere"), "no such directory"),
    (lambda b: str(b.tmp), "unet/config.json is missing"),
    (lambda b: str(b.sd), "is not a latent reward model: state_dict.pt is missing"),
    (lambda b: b.without(b.lrm, "state_dict.pt"), "state_dict.pt is missing"),
    (lambda b: b.broken(b.lrm, "state_dict.pt", "garbage"), "cannot be read safely"),
    (lambda b: b.with_heads(visual_projection={"weight": torch.zeros(16, 87)}), "takes 87 features"),
    (lambda b: b.with_heads(text_projection={"weight": torch.zeros(16, 17)}), "its text projection takes 17"),
    (lambda b: b.with_config(b.lrm, "unet", addition_embed_type="text_time"), "scores sdxl latents, the model makes"),
    (lambda b: b.with_config(b.lrm, "unet", in_channels=16), "scores latents of 16 channels, the model makes 4"),
    (lambda b: b.with_config(b.lrm, "unet", block_out_channels=[8, 16, 16, 32]), "its denoiser gives 104"),
    (lambda b: b.broken(b.lrm, "unet/config.json"), "cannot be read as JSON"),
    (lambda b: b.without(b.lrm, "unet/diffusion_pytorch_model.safetensors"), "unet/ holds no .safetensors"),
    (lambda b: b.file("lrm.txt"), "is not a model"),
    (lambda b: b.file("lrm.pt", "garbage"), "cannot be read safely"),
    (lambda b: "casiatao/LRM/lrm_sd15", "not in the Hugging Face cache, and HF_HUB_OFFLINE is set"),
])
def test_no_reward_model(bench: Bench, lpo: LPO, make: Callable[[Bench], str], message: str) -> None:
    refused(train_lpo.train, replace(lpo, lrm=make(bench)), "--lrm", message)


def test_the_policys_tokenizer_is_not_used_for_an_lrm_of_another_width(bench: Bench, lpo: LPO) -> None:
    """SD2.1 is aligned with an LRM of SD1.5, whose official directory holds no tokenizer."""
    bare = bench.without(bench.lrm, "tokenizer")
    runs.lpo(replace(lpo, lrm=bare))
    text = bench.with_config(bench.sd, "text_encoder", hidden_size=20)
    other = bench.with_config(Path(text), "unet", cross_attention_dim=20)
    refused(train_lpo.train, replace(lpo, lrm=bare, model=other), "--lrm", "has no tokenizer")
    runs.lpo(replace(lpo, lrm=bare, model=other, lrm_base=str(bench.sd)))
    runs.lpo(replace(lpo, model=other))


def test_text_projection_is_held_against_the_text_encoder_that_will_be_used(bench: Bench, lpo: LPO) -> None:
    folder = bench.without(bench.lrm, "text_encoder")
    runs.lpo(replace(lpo, lrm=folder))
    text = bench.with_config(bench.sd, "text_encoder", hidden_size=24)
    refused(train_lpo.train, replace(lpo, lrm=folder, lrm_base=text), "--lrm-base", "its text encoders give 24 features")
    base = bench.with_config(Path(text), "unet", cross_attention_dim=24)
    refused(train_lpo.train, replace(lpo, lrm=folder, lrm_base=base), "--lrm", "its text encoder gives 24")


@pytest.mark.parametrize("changes, message", [
    ({"prompts": ""}, "is required"), ({"prompts": "nowhere.json"}, "no such file"),
])
def test_prompts(lpo: LPO, changes: dict, message: str) -> None:
    refused(train_lpo.train, replace(lpo, **changes), "--prompts", message)


def test_prompts_without_the_caption_key(bench: Bench, lpo: LPO) -> None:
    file = bench.file("p.json", '[{"text": "a"}]')
    refused(train_lpo.train, replace(lpo, prompts=file), "--prompts", "record 0 has no 'caption'")
    assert runs.lpo(replace(lpo, prompts=file, caption_key="text"))[0] == ["a"]


def test_lora(bench: Bench, lpo: LPO) -> None:
    refused(train_lpo.train, replace(lpo, lora=str(bench.tmp / "nowhere")), "--lora", "no LoRA there")
    refused(train_lpo.train, replace(lpo, lora=bench.file("bad.pt", "bad")), "--lora", "cannot be read safely")
    two = bench.lora(2)
    refused(train_lpo.train, replace(lpo, lora=two), "--lora", "tensors differ from the adapter")
    refused(train_lpo.train, replace(lpo, targets=("to_q", "nope")), "--targets", "is not the name of a module of the denoiser")


@pytest.mark.parametrize("key", ["pairs", "validation_pairs", "test_pairs"])
@pytest.mark.parametrize("make, message", [
    (lambda b: str(b.tmp / "nowhere"), "no .parquet there"),
    (lambda b: b.file("empty/note.txt") and str(b.tmp / "empty"), "no .parquet there"),
    (lambda b: b.file("text.parquet", "text"), "is not a parquet file"),
    (lambda b: "owner/name", "cannot be loaded as a data set"),
    (lambda b: b.pairs(jpg_0=[b"no picture"] * 2), "a picture of row 0 cannot be decoded"),
    (lambda b: b.pairs(jpg_1=[RED[:40], BLUE[:40]]), "a picture of row 0 cannot be decoded"),
    (lambda b: b.pairs(jpg_1=pa.array([None, None], pa.binary())), "a picture of row 0 cannot be decoded"),
])
def test_pairs(bench: Bench, lrm: LRM, key: str, make: Callable[[Bench], str], message: str) -> None:
    refused(train_lrm.train, replace(lrm, **{key: make(bench)}), "--" + key.replace("_", "-"), message)


def test_columns(bench: Bench, lrm: LRM) -> None:
    refused(train_lrm.train, replace(lrm, pairs=bench.captions_alone()), "--columns.jpg-0", "which has caption")
    refused(train_lrm.train, replace(lrm, columns=config.Columns(caption="text")), "--columns.caption",
            "which has caption, jpg_0")


def test_pairs_are_needed(lrm: LRM) -> None:
    refused(train_lrm.train, replace(lrm, pairs=""), "--pairs", "no .parquet there")


def test_score_table(bench: Bench, lrm: LRM) -> None:
    keep = (1, 1, 1, 1)
    refused(train_lrm.train, replace(lrm, scores=str(bench.tmp / "nowhere.csv")), "--scores", "cannot be read")
    too_long = scores(bench.tmp / "long.csv", [keep] * 3, HEADER)
    refused(train_lrm.train, replace(lrm, scores=str(too_long)), "--scores", "has 3 rows, ")
    swapped = scores(bench.tmp / "ties.csv", [(0, 0, 0, 0)] * 2, HEADER)
    refused(train_lrm.train, replace(lrm, scores=str(swapped)), "--scores",
            "different_flag contradicts the labels in 2 of 2")
    none = scores(bench.tmp / "none.csv", [(1, -9, 1, 1)] * 2, HEADER)
    refused(train_lrm.train, replace(lrm, scores=str(none)), "--scores", "the filter keeps none of its 2 rows")


def test_clip(bench: Bench, lrm: LRM) -> None:
    refused(train_lrm.train, replace(lrm, clip=str(bench.tmp / "nowhere.bin")), "--clip", "no CLIP checkpoint")
    refused(train_lrm.train, replace(lrm, clip=clip(bench, 17)), "--clip", "projects 17 features")


@pytest.mark.parametrize("stage", ["lpo", "lrm"])
def test_run_directory(bench: Bench, stage: str, request: pytest.FixtureRequest) -> None:
    settings = request.getfixturevalue(stage)
    train = {"lpo": train_lpo.train, "lrm": train_lrm.train}[stage]
    file = bench.file("a_file", "mine")
    refused(train, replace(settings, out=file), "--out", "cannot be written")
    refused(train, replace(settings, out=file + "/below/it"), "--out", "cannot be written")
    assert Path(file).read_text() == "mine"
    run, check = Path(settings.out), {"lpo": runs.lpo, "lrm": runs.lrm}[stage]
    check(replace(settings, resume=True))  # what a restart script says, also if there is nothing to go on from yet,
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
    with pytest.raises(InputError, match="holds a run already"):
        train(settings)
    for change in ({"seed": 7}, {"learning_rate": 0.5}, {"batch_size": 3}, {"model": str(bench.copy(bench.sd))}):
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
    assert (lrm15.max_steps, lrm15.batch_size, lrm15.warmup_steps, lrm15.weight_decay) == (4000, 128, 500, 0.3)
    assert (lrm_xl.max_steps, lrm_xl.batch_size, lrm_xl.warmup_steps) == (8000, 32, 1000)


def test_pictures_of_odd_sizes_and_kinds_are_no_error(bench: Bench, lrm: LRM) -> None:
    Image.new("L", (3, 50)).save(bench.tmp / "x.jpg")
    runs.lrm(replace(lrm, pairs=bench.pairs(jpg_0=[(bench.tmp / "x.jpg").read_bytes()] * 2)))
