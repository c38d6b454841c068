"""What differs between SD1.5, SD2.1 and SDXL: tokens, sizes, VAEs, precision of the files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from lpo_fast import train_lpo, train_lrm
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.lpo import judging, policies
from lpo_fast.lrm import checkpoint, encoding, selection
from lpo_fast.models import denoisers, families, locate, loras, texts, vaes
from lpo_fast.preflight import runs
from lpo_fast.shapes import evaluate
from tests.helpers.models import make_sd21

PROMPTS = ["a red circle", "two"]


@pytest.fixture
def settings(tmp_path: Path, tiny_sd: Path, tiny_lrm: Path) -> LPO:
    """A run of two steps in which every pair is valid."""
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return LPO(model=str(tiny_sd), lrm=str(tiny_lrm), prompts=str(tmp_path / "prompts.json"),
               out=str(tmp_path / "run"), epochs=1, batch_size=2, num_steps=2, num_candidates=2,
               train_batch_size=4, threshold_min=0, threshold_max=0, pictures=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def lrm_xl(tiny_sdxl: Path) -> Path:
    lrm = checkpoint.new_lrm(tiny_sdxl, generator=torch.Generator().manual_seed(1))
    checkpoint.save_lrm(lrm, texts.load_tokenizers(tiny_sdxl, lrm.family), tiny_sdxl.parent / "lrm_xl")
    return tiny_sdxl.parent / "lrm_xl"


def test_sd21_that_predicts_noise_trains(settings: LPO, tmp_path: Path) -> None:
    """The base model of SD2.1; SD1.5, SD2.1 itself and SDXL go through test_end_to_end.py."""
    out = train_lpo.train(replace(settings, model=str(make_sd21(tmp_path / "sd21", "epsilon"))))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["kind"] == "train")
    assert first["train_ratio_win"] == first["train_ratio_lose"] == 1.0 and first["grad_norm"] > 0
    weights = load_file(out / loras.LORA_DIFFUSERS)
    assert any(t.any() for name, t in weights.items() if "lora_B" in name or ".up." in name)
    assert {p.name for p in (out / "pictures").iterdir()} == {"000_before.png", "000_after.png",
                                                              "captions.json"}


def test_the_reward_model_reads_its_own_tokens(settings: LPO, tiny_sd: Path, tiny_sd21: Path, copied,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """SD2.1 pads with "!" (id 0), SD1.5 with <|endoftext|>: each network sees the ids of its own tokenizer.
    """
    seen, encode = [], texts.encode
    monkeypatch.setattr(texts, "encode",
                        lambda family, encoders, ids: seen.extend(ids) or encode(family, encoders, ids))
    config = replace(settings, model=str(tiny_sd21))
    expected = {}
    for name, folder, pad in (("policy", tiny_sd21, 0), ("lrm", tiny_sd, 562)):
        (tokenizer,) = texts.load_tokenizers(folder, families.SD)
        expected[name] = tokenizer(PROMPTS, padding="max_length", truncation=True,
                                   return_tensors="pt").input_ids
        assert expected[name][:, -1].eq(pad).all()
    policies.load(config, PROMPTS, torch.device("cpu"))
    assert torch.equal(seen[0], expected["policy"]) and not torch.equal(seen[0], expected["lrm"])
    bare = copied(Path(settings.lrm))
    for file in (bare / "tokenizer").iterdir():
        file.unlink()
    (bare / "tokenizer").rmdir()
    for lrm in (config, replace(config, lrm=str(bare), lrm_base=str(tiny_sd))):
        seen.clear()
        judging.load_score(lrm, PROMPTS, torch.device("cpu"))
        assert torch.equal(seen[0], expected["lrm"])
        assert seen[1].tolist() == [[561, 562, *[562] * 14]]  # ""
    config = replace(config, lrm=str(bare), lrm_tokenizer=str(tiny_sd / "tokenizer"))
    for tokenizer in (tiny_sd / "tokenizer", tiny_sd):
        seen.clear()
        runs.lpo(replace(config, lrm_tokenizer=str(tokenizer)))
        judging.load_score(replace(config, lrm_tokenizer=str(tokenizer)), PROMPTS, torch.device("cpu"))
        assert torch.equal(seen[0], expected["lrm"])


def test_a_tokenizer_by_hub_name(settings: LPO, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(locate, "download",
                        lambda repo, *rest: asked.append((repo, rest[2])) or tiny_sd / "tokenizer")
    config = replace(settings, lrm_tokenizer="org/tokenizer")
    runs.lpo(config)
    judging.load_score(config, PROMPTS, torch.device("cpu"))
    assert set(asked) == {("org/tokenizer", locate.TOKENIZER)}


def test_an_lrm_of_two_tokenizers(settings: LPO, tiny_sdxl: Path, lrm_xl: Path) -> None:
    config = replace(settings, model=str(tiny_sdxl), lrm=str(lrm_xl), lrm_tokenizer=str(tiny_sdxl))
    runs.lpo(config)
    judging.load_score(config, PROMPTS, torch.device("cpu"))
    with pytest.raises(InputError, match="an LRM of the sdxl family has 2") as caught:
        runs.lpo(replace(config, lrm_tokenizer=str(tiny_sdxl / "tokenizer")))
    assert caught.value.key == "--lrm-tokenizer"


@pytest.mark.parametrize("resolution, pixels", [(0, 16), (32, 32)])
def test_the_reward_model_is_told_the_size_of_what_it_scores(settings: LPO, tiny_sdxl: Path, tmp_path: Path,
                                                             resolution: int, pixels: int) -> None:
    """Whatever it was trained at."""
    lrm = checkpoint.new_lrm(tiny_sdxl, generator=torch.Generator(), resolution=64)
    checkpoint.save_lrm(lrm, texts.load_tokenizers(tiny_sdxl, lrm.family), tmp_path / "lrm")
    config = replace(settings, model=str(tiny_sdxl), lrm=str(tmp_path / "lrm"), resolution=resolution)
    model, _ = policies.load(config, PROMPTS, torch.device("cpu"))
    judge = judging.load_score(config, PROMPTS, torch.device("cpu"))
    assert judge.lrm.sizes.tolist() == model.sizes.tolist() == [[pixels, pixels, 0, 0, pixels, pixels]]
    assert policies.latent_shape(config, model.unet)[1] == pixels // 2


def test_resolution_moves_shapes_and_sizes(settings: LPO, tiny_sdxl: Path, lrm_xl: Path) -> None:
    config = replace(settings, model=str(tiny_sdxl), lrm=str(lrm_xl), resolution=32)
    model, _ = policies.load(config, PROMPTS, torch.device("cpu"))
    assert model.sizes.tolist() == [[32, 32, 0, 0, 32, 32]]
    assert policies.latent_shape(config, model.unet) == (4, 16, 16)
    assert policies.latent_shape(replace(config, resolution=0), model.unet) == (4, 8, 8)
    # recorded: there is no VAE beside it
    assert checkpoint.load_lrm(lrm_xl).sizes.tolist() == [[16, 16, 0, 0, 16, 16]]
    assert checkpoint.load_lrm(lrm_xl, resolution=32).sizes.tolist() == [[32, 32, 0, 0, 32, 32]]
    out = train_lpo.train(config)
    assert Image.open(out / "pictures" / "000_after.png").size == (32, 32)


def test_another_vae_decodes_and_encodes(settings: LPO, tiny_sd: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_sd / "vae"))
    vae.save_pretrained(tmp_path / "vae")
    shown = []
    for name, path in (("own", ""), ("same", str(tiny_sd / "vae")), ("other", str(tmp_path / "vae"))):
        out = train_lpo.train(replace(settings, vae=path, out=str(tmp_path / name)))
        shown.append((out / "pictures" / "000_before.png").read_bytes())
    assert shown[0] == shown[1] != shown[2]
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator())
    config = LRM(model=str(tiny_sd), vae=str(tmp_path / "vae"))
    encoder = encoding.Encoder(tiny_sd, lrm, 0, "no", locate.vae(config))
    pixels = torch.rand(2, 1, 3, 16, 16)
    expected = vae.encode(pixels.flatten(0, 1)).latent_dist
    for made, of in zip(encoder.posterior({"pixels": pixels}), (expected.mean, expected.std), strict=True):
        assert torch.allclose(made, of.unflatten(0, (2, 1)), atol=1e-6)


def test_lrm_training_at_another_resolution(tiny_sdxl: Path, tmp_path: Path) -> None:
    evaluate.write_pairs(tmp_path / "pairs.parquet", 4, 0, held_out=False)
    out = train_lrm.train(LRM(model=str(tiny_sdxl), pairs=str(tmp_path / "pairs.parquet"),
                              out=str(tmp_path / "run"), batch_size=2, max_steps=1, warmup_steps=0,
                              num_workers=0, resolution=8 * 4))
    recorded = json.loads((out / selection.FINAL / "lrm.json").read_text())
    assert recorded["resolution"] == 32 and recorded["base"] == str(tiny_sdxl)
    assert checkpoint.load_lrm(out / selection.FINAL).sizes.tolist() == [[32, 32, 0, 0, 32, 32]]


def test_half_precision_directories(settings: LPO, tiny_sd: Path, copied) -> None:
    """Directories that hold .fp16 files alone are read like others, in fp32."""
    folder = copied(tiny_sd)
    for file in [*folder.glob("*/diffusion_pytorch_model.safetensors"), *folder.glob("*/model.safetensors")]:
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert all(families.variant(folder / part) == "fp16" for part in ("unet", "vae", "text_encoder"))
    loaded = (denoisers.load_unet(folder), vaes.load_vae(folder), *texts.load_text(folder, families.SD))
    assert {p.dtype for module in loaded for p in module.parameters()} == {torch.float32}
    train_lpo.train(replace(settings, model=str(folder)))


def test_text_encoders_must_be_whole(tiny_sd: Path, copied) -> None:
    from safetensors.torch import save_file
    folder = copied(tiny_sd)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "final_layer_norm.weight" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(InputError,
                       match="lacks 1 weights, the first 'final_layer_norm.weight'|lacks 1 weights"):
        texts.load_text(folder, families.SD)
