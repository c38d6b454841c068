"""LRM directories survive the round trip, and foreign ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import denoisers, families, loras, texts
from lpo_fast.models.families import SD, SDXL

PROMPTS = ["a red circle on a blue background", "two", ""]


@torch.no_grad()
def scores(lrm: LatentRewardModel, folder: Path) -> torch.Tensor:
    """Scores of fixed latents with the tokenizer of a directory."""
    text = texts.encode_prompts(lrm.family, texts.load_tokenizers(folder, lrm.family),
                                list(lrm.text_encoders), PROMPTS, zero_null=False)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return lrm.eval().score(x, torch.tensor([1, 501, 951]), text)


@pytest.mark.parametrize("settings", [
    {}, {"multi_scale": False}, {"guidance_scale": 3.0, "multi_scale_cfg": True}, {"guidance_scale": 1.0},
])
def test_lrm_round_trip(tiny_sd: Path, tmp_path: Path, settings: dict) -> None:
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(4), **settings)
    lrm.logit_scale.data.fill_(1.5)
    lrm.text_projection.weight.data.normal_()
    checkpoint.save_lrm(lrm, texts.load_tokenizers(tiny_sd, SD), tmp_path / "lrm")
    again = checkpoint.load_lrm(tmp_path / "lrm")
    assert torch.allclose(scores(lrm, tiny_sd), scores(again, tmp_path / "lrm"), rtol=1e-5)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in lrm.state_dict().items())
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert (again.guidance_scale, again.multi_scale, again.multi_scale_cfg) == (
        (settings.get("guidance_scale", 7.5),), settings.get("multi_scale", True),
        settings.get("multi_scale_cfg", False))
    parts = {"unet", "text_encoder", "tokenizer", "state_dict.pt", "lrm.json"}
    assert {p.name for p in (tmp_path / "lrm").iterdir()} == parts
    # what is asked for wins over what the directory records
    other = checkpoint.load_lrm(tmp_path / "lrm", guidance_scale=9.0)
    assert other.guidance_scale == (9.0,) and other.multi_scale_cfg == again.multi_scale_cfg


def test_sdxl_lrm_round_trip(tiny_sdxl: Path, tmp_path: Path) -> None:
    lrm = checkpoint.new_lrm(tiny_sdxl, generator=torch.Generator().manual_seed(4))
    assert lrm.text_projection is None and lrm.visual_projection.weight.shape == (12, 8 + 16 + 24 + 24)
    assert lrm.sizes.tolist() == [[16, 16, 0, 0, 16, 16]]  # 8 · 2
    tokenizers = texts.load_tokenizers(tiny_sdxl, SDXL)
    checkpoint.save_lrm(lrm, tokenizers, tmp_path / "lrm")
    again = checkpoint.load_lrm(tmp_path / "lrm", tiny_sdxl)
    assert torch.allclose(scores(lrm, tiny_sdxl), scores(again, tmp_path / "lrm"), rtol=1e-5)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in lrm.state_dict().items())
    heads = torch.load(tmp_path / "lrm" / "state_dict.pt", weights_only=True)
    assert set(heads) == {"visual_projection", "logit_scale"}


def test_new_lrm_starts_as_the_method_says(tiny_sd: Path, tmp_path: Path) -> None:
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(4))
    assert lrm.logit_scale.item() == pytest.approx(2.6592)
    assert lrm.visual_projection.weight.shape == (16, 8 + 16 + 16 + 24 + 24)
    assert lrm.visual_projection.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(lrm.text_projection.weight, torch.eye(16))
    again = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(4))
    assert torch.equal(again.visual_projection.weight, lrm.visual_projection.weight)
    weight = torch.randn(10, 16)
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        tensors = {"text_projection.weight": weight.half(), "visual_projection.weight": torch.zeros(3)}
        save_file(tensors,
                  folder / name) if name.endswith("safetensors") else torch.save(tensors, folder / name)
        for clip in (folder, folder / name):
            lrm = checkpoint.new_lrm(tiny_sd, clip=str(clip), generator=torch.Generator())
            assert torch.equal(lrm.text_projection.weight, weight.half().float())
            assert lrm.visual_projection.weight.shape == (10, 88)


def test_no_clip(tmp_path: Path) -> None:
    for clip in (tmp_path, tmp_path / "nowhere.bin"):
        with pytest.raises(InputError, match="is not a CLIP checkpoint"):
            checkpoint.read_text_projection(str(clip))
    torch.save({"other": torch.zeros(1)}, tmp_path / "clip.bin")
    with pytest.raises(InputError, match="has no text_projection.weight"):
        checkpoint.read_text_projection(str(tmp_path / "clip.bin"))


def test_a_directory_without_settings_tokenizer_and_text_encoder(tiny_sd: Path, tiny_lrm: Path,
                                                                 copied) -> None:
    """A frozen text encoder is not saved: it comes from the base, as do the tokenizers."""
    folder = copied(tiny_lrm)
    for name in ("tokenizer", "text_encoder"):
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
    (folder / "lrm.json").unlink()
    heads = torch.load(folder / "state_dict.pt", weights_only=True)
    # a float is one of the official forms
    torch.save(heads | {"logit_scale": 2.6592}, folder / "state_dict.pt")
    lrm = checkpoint.load_lrm(folder, tiny_sd, guidance_scale=7.5)
    assert torch.allclose(scores(lrm, tiny_sd), scores(checkpoint.load_lrm(tiny_lrm), tiny_lrm), rtol=1e-5)
    assert checkpoint.load_lrm(folder, tiny_sd, guidance_scale=2.0).guidance_scale == (2.0,)


def test_text_encoder_of_the_lrm_goes_before_the_base(tiny_sd: Path, tiny_lrm: Path, copied) -> None:
    folder = copied(tiny_lrm)
    file = folder / "text_encoder" / "model.safetensors"
    save_file({n: t + 0.1 for n, t in load_file(file).items()}, file, {"format": "pt"})
    lrm = checkpoint.load_lrm(folder, tiny_sd)
    own = scores(checkpoint.load_lrm(tiny_lrm, tiny_sd), tiny_sd)
    assert (scores(lrm, tiny_sd) - own).abs().max() > 1e-3


@pytest.mark.parametrize("heads, message", [
    ({"visual_projection": {"weight": torch.zeros(16, 87)}, "logit_scale": 1.0},
     "takes 87 features, .* gives 88"),
    ({"logit_scale": 1.0}, "holds no visual_projection.weight and logit_scale"),
    ({"visual_projection": {"weight": torch.zeros(16, 88)}},
     "holds no visual_projection.weight and logit_scale"),
    ([1, 2], "cannot be read safely .*it is not a dictionary"),
])
def test_heads_that_do_not_fit(tiny_lrm: Path, copied, heads: object, message: str) -> None:
    folder = copied(tiny_lrm)
    torch.save(heads, folder / "state_dict.pt")
    with pytest.raises(InputError, match=message):
        checkpoint.load_lrm(folder)


def test_the_official_loader_finds_what_it_needs(tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    """A whole denoiser whose up blocks are the base's, and text encoders under the names of transformers < 5.
    """
    for base in (tiny_sd, tiny_sdxl):
        lrm = checkpoint.new_lrm(base, generator=torch.Generator().manual_seed(4))
        lrm.unet.conv_in.weight.data.add_(1)
        folder = tmp_path / base.name
        checkpoint.save_lrm(lrm, texts.load_tokenizers(base, lrm.family), folder)
        whole, before = (UNet2DConditionModel.from_pretrained(f, subfolder="unet") for f in (folder, base))
        state, old = whole.state_dict(), before.state_dict()
        assert (state.keys() == old.keys()
                == load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").keys())
        up = [n for n in old if n.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))]
        assert up and all(torch.equal(state[n], old[n]) for n in up)
        assert torch.equal(state["conv_in.weight"], old["conv_in.weight"] + 1)
        assert not any(n.startswith("up_blocks") for n, _ in lrm.unet.named_parameters())
        for name, _ in lrm.family.encoders:
            names = set(load_file(folder / name / "model.safetensors"))
            assert "text_model.embeddings.token_embedding.weight" in names
            assert all(n.startswith(("text_model.", "text_projection.")) for n in names)
        again = checkpoint.load_lrm(folder)  # written again without the base at hand
        checkpoint.save_lrm(again, texts.load_tokenizers(folder, lrm.family), tmp_path / "again")
        second = load_file(tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(second[n], state[n]) for n in state)
        assert json.loads((tmp_path / "again" / "lrm.json").read_text())["base"] == str(base)


def test_an_lrm_without_up_blocks_is_still_written(tiny_lrm: Path, copied, tmp_path: Path) -> None:
    folder = copied(tiny_lrm)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(file).items()
               if not n.startswith(("up_", "conv_out", "conv_norm"))}, file)
    lrm = checkpoint.load_lrm(folder)
    checkpoint.save_lrm(lrm, texts.load_tokenizers(folder, SD), tmp_path / "out")
    assert load_file(tmp_path / "out" / "unet" / file.name).keys() == lrm.unet.state_dict().keys()


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_a_single_file_of_the_modules_state(family: str, tmp_path: Path,
                                            request: pytest.FixtureRequest) -> None:
    """Official LRM-XL: one .pt of the whole module, VAE included, under the names of transformers < 5."""
    base: Path = request.getfixturevalue(family)
    lrm = checkpoint.new_lrm(base, generator=torch.Generator().manual_seed(4))
    for encoder in lrm.text_encoders:
        for p in encoder.parameters():
            p.data.mul_(1.1)
    lrm.unet.conv_in.weight.data.mul_(1.2)
    checkpoint.save_lrm(lrm, texts.load_tokenizers(base, lrm.family), tmp_path / "lrm")
    state = {"vae.encoder.conv_in.weight": torch.zeros(3), "logit_scale": torch.tensor(1.5),
             "visual_projection.weight": lrm.visual_projection.weight.data}
    if lrm.text_projection is not None:
        state["text_projection.weight"] = lrm.text_projection.weight.data
    for part in ("unet", *(name for name, _ in lrm.family.encoders)):
        (file,) = (tmp_path / "lrm" / part).glob("*.safetensors")
        state |= {f"{part}.{name}": tensor for name, tensor in load_file(file).items()}
        if part != "unet":
            # older files hold it
            state[f"{part}.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(state, tmp_path / "lrm.pt")
    lrm.logit_scale.data.fill_(1.5)
    again = checkpoint.load_lrm(tmp_path / "lrm.pt", base)
    assert again.guidance_scale == (7.5,) and again.multi_scale
    assert torch.allclose(scores(lrm, base), scores(again, base), rtol=1e-5)
    with pytest.raises(InputError, match="is a single file, without configs") as caught:
        checkpoint.load_lrm(tmp_path / "lrm.pt")
    assert "--lrm-base" in caught.value.remedy
    frozen = {n: t for n, t in state.items() if not n.startswith("text_encoder")}  # the rest is the base's
    torch.save(frozen, tmp_path / "frozen.pt")
    own = checkpoint.load_lrm(tmp_path / "frozen.pt", base)
    expected = texts.load_text(base, lrm.family)
    assert all(torch.equal(a, b) for a, b in zip(own.text_encoders.parameters(),
                                                 torch.nn.ModuleList(expected).parameters(), strict=True))


@pytest.mark.parametrize("state", [{"unet.conv_in.bias": torch.zeros(8)},
                                   {"visual_projection.weight": torch.zeros(16, 88)}])
def test_a_single_file_of_something_else(tiny_sd: Path, tmp_path: Path, state: dict) -> None:
    torch.save(state, tmp_path / "lrm.pt")
    with pytest.raises(InputError, match="lrm.pt: holds no visual_projection.weight and logit_scale"):
        checkpoint.load_lrm(tmp_path / "lrm.pt", tiny_sd)


def test_missing_weights_of_the_denoiser(tiny_lrm: Path, copied) -> None:
    folder = copied(tiny_lrm)
    (file,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["conv_in.bias"], tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, file)
    with pytest.raises(InputError, match="lacks 2 weights, the first 'conv_in.bias'"):
        checkpoint.load_lrm(folder)


def test_full_precision_goes_before_the_variant(tiny_sd: Path, copied) -> None:
    folder = copied(tiny_sd) / "unet"
    (file,) = families.weight_files(folder)
    half = {n: t.half() for n, t in load_file(file).items()}
    variant = folder / "diffusion_pytorch_model.fp16.safetensors"
    save_file(half, variant)
    assert families.weight_files(folder) == [file]
    full = denoisers.load_down_mid(folder)
    file.unlink()
    assert families.weight_files(folder) == [variant]
    alone = denoisers.load_down_mid(folder)
    assert alone.conv_in.weight.dtype == torch.float32
    assert torch.equal(alone.conv_in.weight, full.conv_in.weight.half().float())


def test_shards_are_read_together(tiny_sd: Path, copied) -> None:
    folder = copied(tiny_sd) / "unet"
    (file,) = families.weight_files(folder)
    tensors = load_file(file)
    names, full = sorted(tensors), denoisers.load_down_mid(folder)
    file.unlink()
    for i in range(2):
        shard = folder / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in names[i::2]}, shard)
    again = denoisers.load_down_mid(folder)
    assert all(torch.equal(a, b)
               for a, b in zip(again.state_dict().values(), full.state_dict().values(), strict=True))


def test_size_conditions(tiny_sd: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    assert denoisers.size_conditions(tiny_sd, SD, unet) is None
    assert denoisers.size_conditions(tiny_sd, SDXL, unet).tolist() == [[16, 16, 0, 0, 16, 16]]  # 8 · 2
    without_vae = denoisers.size_conditions(tmp_path, SDXL, unet)
    assert without_vae.tolist() == [[64, 64, 0, 0, 64, 64]]  # 8 · 8, SDXL's VAE


def test_damaged_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"garbage")
    for read in (lambda: loras.read_lora(file), lambda: checkpoint.read_text_projection(str(tmp_path))):
        with pytest.raises(InputError, match="model.safetensors: cannot be read"):
            read()


def test_variants_are_no_shards(tmp_path: Path) -> None:
    plain = "diffusion_pytorch_model-00001-of-00002"
    for stem in (plain, "diffusion_pytorch_model.fp16-00001-of-00002", "diffusion_pytorch_model.non_ema"):
        (tmp_path / f"{stem}.safetensors").touch()
    assert [file.stem for file in families.weight_files(tmp_path)] == [plain]


@pytest.mark.parametrize("heads",
                         [torch.zeros(3), {"visual_projection": torch.zeros(3)}, [],
                          {"visual_projection": {"weight": torch.zeros(5)}, "logit_scale": torch.tensor(1.0)},
                          {"visual_projection": {"weight": torch.zeros(5, 88)}, "logit_scale": 1.0,
                           "text_projection": {"weight": torch.zeros(6, 16)}}])
def test_heads_that_are_none(tmp_path: Path, heads: object) -> None:
    torch.save(heads, tmp_path / "state_dict.pt")
    with pytest.raises(InputError, match="--lrm"):
        checkpoint.read_heads(tmp_path, [8, 16, 16, 24])
