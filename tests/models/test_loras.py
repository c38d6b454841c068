"""LoRA files survive the round trip, in every form compute what they did, and foreign ones are refused."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpo_fast import export
from lpo_fast.errors import InputError
from lpo_fast.models import loras
from tests.helpers.models import GOLDEN

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def with_lora(folder: Path, rank: int = 4, alpha: float = 4, seed: int = 0,
              targets: tuple[str, ...] = TARGETS) -> UNet2DConditionModel:
    """A U-Net with an adapter that does something."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    loras.add_lora(unet, rank, alpha, targets, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return unet


@torch.no_grad()
def output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)
    return unet(x, torch.tensor([801, 51]), context).sample


def test_a_fresh_lora_changes_nothing_and_alone_trains(tiny_sd: Path) -> None:
    plain = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").eval()
    before, state = output(plain), torch.random.get_rng_state()
    loras.add_lora(plain, 4, 4, TARGETS, seed=3)
    assert torch.allclose(output(plain), before, atol=1e-6)
    assert torch.equal(torch.random.get_rng_state(), state)
    training = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert training and all("lora_" in name for name in training)
    first = torch.cat([p.flatten() for name, p in training.items() if "lora_A" in name])
    assert first.std().item() == pytest.approx(1 / 4, rel=0.05) and first.mean().abs() < 0.02
    assert not any(p.any() for name, p in training.items() if "lora_B" in name)
    modules = {name.partition(".lora_")[0].rpartition("attn")[2][2:] for name in training}
    assert modules == set(TARGETS)


def test_adapters_are_off_within_the_block_alone(tiny_sd: Path) -> None:
    plain, unet = (output(UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").eval()),
                   with_lora(tiny_sd))
    adapted, training = output(unet), [p.requires_grad for p in unet.parameters()]
    assert (adapted - plain).abs().max() > 1e-2
    with loras.adapters_off(loras.adapters(unet)):
        assert torch.allclose(output(unet), plain, atol=1e-6)
    assert torch.allclose(output(unet), adapted, atol=1e-6)
    with pytest.raises(KeyboardInterrupt), loras.adapters_off(loras.adapters(unet)):
        raise KeyboardInterrupt
    assert torch.allclose(output(unet), adapted, atol=1e-6)
    assert [p.requires_grad for p in unet.parameters()] == training
    assert loras.trainable(unet) == [p for p, train in zip(unet.parameters(), training, strict=True) if train]


def test_lora_starts_from_the_seed(tiny_sd: Path) -> None:
    states = []
    for seed in (1, 1, 2):
        unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
        loras.add_lora(unet, 2, 2, TARGETS, seed)
        states.append(torch.cat([t.flatten() for t in loras.lora_state(unet).values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("rank, alpha", [(4, 4), (4, 8), (2, 1)])
def test_diffusers_reads_the_exported_lora(tiny_sd: Path, tmp_path: Path, rank: int, alpha: float) -> None:
    unet = with_lora(tiny_sd, rank, alpha)
    loras.save_lora(unet, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    plain = output(pipeline.unet)
    pipeline.load_lora_weights(tmp_path)
    assert (output(unet) - plain).abs().max() > 1e-2
    assert torch.allclose(output(pipeline.unet), output(unet), atol=1e-5)


@pytest.mark.parametrize("form", ["diffusers", "official"])
@pytest.mark.parametrize("folder", [False, True])
def test_lora_round_trip(tiny_sd: Path, tmp_path: Path, form: str, folder: bool) -> None:
    unet = with_lora(tiny_sd, 4, 8)
    file = tmp_path / (loras.LORA_DIFFUSERS if form == "diffusers" else loras.LORA_OFFICIAL)
    if form == "diffusers":
        loras.save_lora(unet, tmp_path)
    else:
        torch.save(loras.lora_state(unet), file)
    other = with_lora(tiny_sd, 4, 8, seed=1)
    assert not torch.allclose(output(other), output(unet), atol=1e-3)
    loras.load_lora(other, tmp_path if folder else file)
    assert torch.allclose(output(other), output(unet), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(
        loras.lora_state(other).values(), loras.lora_state(unet).values(), strict=True))


def test_exported_lora_is_overwritten_whole(tiny_sd: Path, tmp_path: Path) -> None:
    for rank in (4, 2):
        loras.save_lora(with_lora(tiny_sd, rank, rank), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [loras.LORA_DIFFUSERS]
    with safe_open(tmp_path / loras.LORA_DIFFUSERS, "pt") as file:
        assert ({file.get_slice(n).get_shape()[0] for n in file.keys() if "lora_A" in n or ".down." in n}
                == {2})


def test_lora_of_another_shape(tiny_sd: Path, tmp_path: Path) -> None:
    loras.save_lora(with_lora(tiny_sd, 4), tmp_path)
    with pytest.raises(InputError,
                       match=r"tensors differ .* \(4, \d+\) in the file, \(2, \d+\) expected") as caught:
        loras.load_lora(with_lora(tiny_sd, 2, 4), tmp_path)
    assert "--rank" in caught.value.remedy and caught.value.key == "--lora"
    with pytest.raises(InputError, match="absent expected"):
        loras.load_lora(with_lora(tiny_sd, 4, targets=("to_q",)), tmp_path)
    loras.save_lora(with_lora(tiny_sd, 4, targets=("to_q", "to_v")), tmp_path)
    with pytest.raises(InputError, match="absent in the file"):
        loras.load_lora(with_lora(tiny_sd, 4), tmp_path)


@pytest.mark.parametrize("form", ["ours", "recorded alpha", "official"])
def test_a_lora_computes_the_same_with_another_alpha(tiny_sd: Path, tmp_path: Path, form: str) -> None:
    unet = with_lora(tiny_sd, 4, 6)
    if form == "ours":
        loras.save_lora(unet, tmp_path)
    elif form == "official":
        torch.save(loras.lora_state(unet), tmp_path / loras.LORA_OFFICIAL)
    else:
        unet.save_lora_adapter(tmp_path)  # diffusers' own, with its metadata
        (file,) = tmp_path.iterdir()
        tensors = {f"unet.{name}": tensor for name, tensor in load_file(file).items()}
        file.unlink()
        save_file(tensors, tmp_path / loras.LORA_DIFFUSERS,
                  {"lora_adapter_metadata": '{"unet.lora_alpha": 6}'})
    for alpha in (6, 4, 1.5):
        other = with_lora(tiny_sd, 4, alpha, seed=1)
        loras.load_lora(other, tmp_path)
        assert torch.allclose(output(other), output(unet), atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "rslora", "alpha_pattern", "rank_pattern", "rslora and patterns",
                                  "kohya", "kohya alphas", "diffusers' names with alphas"])
def test_a_lora_computes_what_diffusers_loads(tiny_sd: Path, tmp_path: Path, form: str) -> None:
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "init_lora_weights": "gaussian"}
    config |= {"use_rslora": True} if "rslora" in form else {}
    config |= {"alpha_pattern": {"to_q": 3, "attn2.to_v": 20}} if form in (
        "alpha_pattern", "rslora and patterns", "kohya alphas") else {}
    config |= {"rank_pattern": {"to_k": 2}} if "rank_pattern" in form or "patterns" in form else {}
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").eval()
    unet.add_adapter(LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    state = get_peft_model_state_dict(unet)
    if form.startswith("kohya"):
        tensors = {}
        for module in {name.partition(".lora_")[0] for name in state}:
            alpha = unet.peft_config["default"].alpha_pattern.get(
                "to_q" if module.endswith("to_q") else module[-10:], 8.0)
            short = f"lora_unet_{module.replace('.', '_')}"
            tensors |= {f"{short}.lora_down.weight": state[f"{module}.lora_A.weight"],
                        f"{short}.lora_up.weight": state[f"{module}.lora_B.weight"],
                        f"{short}.alpha": torch.tensor(alpha)}
        save_file(tensors, tmp_path / loras.LORA_DIFFUSERS)
    elif form == "diffusers' names with alphas":
        alphas = {f"unet.{name.removesuffix('.lora_B.weight')}.alpha": torch.tensor(8.0) for name in state
                  if "lora_B" in name}
        save_file({f"unet.{name}": t for name, t in state.items()} | alphas, tmp_path / loras.LORA_DIFFUSERS)
    else:
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=convert_state_dict_to_diffusers(state),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())
    if "alphas" not in form:  # which diffusers reads wrongly (kohya's, if they differ) or not at all
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
        pipeline.load_lora_weights(tmp_path)
        unet = pipeline.unet.eval()
    merged = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").eval()
    plain = output(merged)
    export.merge(merged, export.read(str(tmp_path)))
    assert (output(unet) - plain).abs().max() > 1e-2
    assert torch.allclose(output(merged), output(unet), rtol=1e-4, atol=1e-4)
    if "rank_pattern" not in form and "patterns" not in form:
        other = with_lora(tiny_sd, 4, 6, seed=1)
        loras.load_lora(other, tmp_path)
        assert torch.allclose(output(other), output(unet), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tensors, recorded", [
    ({}, '{"unet.use_dora": true}'), ({}, '{"unet.lora_bias": true}'),
    ({}, "{"), ({}, "[]"), ({}, '{"unet.lora_alpha": "x"}'),
    ({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.dora_scale": torch.ones(4, 1)}, "{}"),
])
def test_a_lora_that_is_more_than_two_matrices(tmp_path: Path, tensors: dict, recorded: str) -> None:
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}
    save_file(pair | tensors, tmp_path / loras.LORA_DIFFUSERS, {"lora_adapter_metadata": recorded})
    with pytest.raises(InputError, match="cannot be read as a LoRA") as caught:
        loras.read_lora(tmp_path, "--given")
    assert caught.value.key == "--given"


def test_files_hold_no_alpha(tiny_sd: Path, tmp_path: Path) -> None:
    """diffusers before 0.35 and the official form know no alpha but the rank:
    the files compute B·A without it."""
    unet = with_lora(tiny_sd, 4, 6)
    loras.save_lora(unet, tmp_path)
    with safe_open(tmp_path / loras.LORA_DIFFUSERS, "pt") as file:
        assert "lora_adapter_metadata" not in (file.metadata() or {})
    bare = with_lora(tiny_sd, 4, 4)
    tensors = convert_unet_state_dict_to_peft(load_file(tmp_path / loras.LORA_DIFFUSERS))
    set_peft_model_state_dict(bare, {name.removeprefix("unet."): tensor for name, tensor in tensors.items()})
    assert torch.allclose(output(bare), output(unet), atol=1e-5)
    set_peft_model_state_dict(bare, loras.lora_state(unet))
    assert torch.allclose(output(bare), output(unet), atol=1e-5)


def test_no_lora(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.pt"):
        with pytest.raises(InputError, match="no LoRA there"):
            loras.read_lora(path)


def test_official_and_diffusers_file_hold_the_same() -> None:
    official = loras.read_lora(GOLDEN / "lpo_sd15_checkpoint")
    diffusers = loras.read_lora(GOLDEN / loras.LORA_DIFFUSERS)
    assert (official.keys() == diffusers.keys()
            and all(torch.equal(official[n], diffusers[n]) for n in official))


@pytest.mark.parametrize("content", [torch.zeros(3), [1], {"a": 1}, "text"])
def test_a_lora_file_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "unet_lora.pt")
    with pytest.raises(InputError, match="--lora"):
        loras.read_lora(tmp_path)
