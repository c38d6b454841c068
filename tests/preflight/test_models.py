"""Every model and every file that a run cannot use is refused with its key and a remedy,
before a file is written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from lpo_fast import config, train_lpo, train_lrm
from lpo_fast.config import LPO, LRM
from lpo_fast.preflight import runs
from tests.helpers.pairs import BLUE, HEADER, RED, scores
from tests.helpers.preflight import Bench, clip, refused

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
    (lambda b: b.with_config(b.sd, "unet", addition_embed_type="text_time"),
     "text_encoder_2/config.json is missing"),
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
    (lambda b: b.with_config(b.lrm, "unet", addition_embed_type="text_time"),
     "scores sdxl latents, the model makes"),
    (lambda b: b.with_config(b.lrm, "unet", in_channels=16),
     "scores latents of 16 channels, the model makes 4"),
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
    refused(train_lpo.train, replace(lpo, lrm=folder, lrm_base=text), "--lrm-base",
            "its text encoders give 24 features")
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
    refused(train_lpo.train, replace(lpo, lora=bench.file("bad.pt", "bad")), "--lora",
            "cannot be read safely")
    two = bench.lora(2)
    refused(train_lpo.train, replace(lpo, lora=two), "--lora", "tensors differ from the adapter")
    refused(train_lpo.train, replace(lpo, targets=("to_q", "nope")), "--targets",
            "is not the name of a module of the denoiser")


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
    refused(train_lrm.train, replace(lrm, pairs=bench.captions_alone()),
            "--columns.jpg-0", "which has caption")
    refused(train_lrm.train, replace(lrm, columns=config.Columns(caption="text")), "--columns.caption",
            "which has caption, jpg_0")


def test_pairs_are_needed(lrm: LRM) -> None:
    refused(train_lrm.train, replace(lrm, pairs=""), "--pairs", "no .parquet there")


def test_score_table(bench: Bench, lrm: LRM) -> None:
    keep = (1, 1, 1, 1)
    refused(train_lrm.train, replace(lrm, scores=str(bench.tmp / "nowhere.csv")),
            "--scores", "cannot be read")
    too_long = scores(bench.tmp / "long.csv", [keep] * 3, HEADER)
    refused(train_lrm.train, replace(lrm, scores=str(too_long)), "--scores", "has 3 rows, ")
    swapped = scores(bench.tmp / "ties.csv", [(0, 0, 0, 0)] * 2, HEADER)
    refused(train_lrm.train, replace(lrm, scores=str(swapped)), "--scores",
            "different_flag contradicts the labels in 2 of 2")
    none = scores(bench.tmp / "none.csv", [(1, -9, 1, 1)] * 2, HEADER)
    refused(train_lrm.train, replace(lrm, scores=str(none)), "--scores",
            "the filter keeps none of its 2 rows")


def test_clip(bench: Bench, lrm: LRM) -> None:
    refused(train_lrm.train, replace(lrm, clip=str(bench.tmp / "nowhere.bin")),
            "--clip", "is not a CLIP checkpoint")
    refused(train_lrm.train, replace(lrm, clip=clip(bench, 17)), "--clip", "projects 17 features")
