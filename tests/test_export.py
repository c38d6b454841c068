"""Merged models and converted LoRAs against diffusers' own loader, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lpo_fast import errors, export
from lpo_fast.models import loras
from lpo_fast.preflight import models
from tests.helpers.models import pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def adapted(model: Path, rank: int, alpha: float, targets: tuple[str, ...] = TARGETS) -> UNet2DConditionModel:
    """A denoiser with a LoRA that changes much."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    loras.add_lora(unet, rank, alpha, targets, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora" in name:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    return unet


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    out = pipe(["a red circle", "two"], num_inference_steps=4, guidance_scale=5.0, eta=1.0, output_type="pt",
               generator=torch.Generator().manual_seed(3))
    return out.images


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("alpha", [4, 3])
def test_the_merged_model_draws_what_diffusers_draws_with_the_lora(request, tmp_path, family, alpha):
    model = request.getfixturevalue(f"tiny_{family}")
    loras.save_lora(adapted(model, 4, alpha), tmp_path / "lora")
    assert export.main(["--model", str(model), "--lora", str(tmp_path / "lora"), "--out",
                        str(tmp_path / "merged")]) == 0
    theirs = pipeline(model)
    base = draw(theirs)
    theirs.load_lora_weights(tmp_path / "lora")
    wanted, merged = draw(theirs), draw(pipeline(tmp_path / "merged"))
    assert (merged - wanted).abs().max() < 1e-3 < 1e-2 < (base - wanted).abs().max()


def test_a_whole_directory_with_other_parts_unchanged(tiny_sd, tmp_path, copied):
    model = copied(tiny_sd)
    (model / "v1-5-pruned.ckpt").write_bytes(b"gigabytes")
    (model / ".cache").mkdir()
    (model / "LICENSE").write_text("of the weights")
    loras.save_lora(adapted(model, 2, 2), tmp_path)
    (tmp_path / "merged").mkdir()  # empty: allowed
    assert (export.main(["--model", str(model), "--lora", str(tmp_path), "--out", str(tmp_path / "merged")])
            == 0)
    files = {str(f.relative_to(tmp_path / "merged")): f for f in (tmp_path / "merged").rglob("*")
             if f.is_file()}
    wanted = {str(f.relative_to(tiny_sd)) for f in tiny_sd.rglob("*") if f.is_file()} | {"LICENSE"}
    assert set(files) == wanted
    assert all(f.read_bytes() == (model / name).read_bytes() for name, f in files.items()
               if not name.startswith("unet/"))
    models.pipeline(str(tmp_path / "merged"), "--model")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None).unet is not None


@pytest.mark.parametrize("place", ["", "unet"])
def test_full_fine_tuning_becomes_a_whole_directory(tiny_sd, tmp_path, place, capsys):
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    with torch.no_grad():
        unet.conv_in.bias += 1
    unet.save_pretrained(tmp_path / "run" / "unet")
    (tmp_path / "run" / "config.json").write_text("{}")
    argv = ["--model", str(tiny_sd), "--out", str(tmp_path / "whole")]
    assert (export.main([*argv, "--lora", str(tmp_path / "run")]) == 2
            and "use --tuned for it" in capsys.readouterr().err)
    for wrong in (["--lora", "x"], ["--form", "lora"]):
        assert export.main([*argv, "--tuned", str(tmp_path / "run"), *wrong]) == 2
    assert export.main([*argv, "--tuned", str(tmp_path / "run" / place)]) == 0
    files = {str(f.relative_to(tmp_path / "whole")) for f in (tmp_path / "whole").rglob("*") if f.is_file()}
    assert files == {str(f.relative_to(tiny_sd)) for f in tiny_sd.rglob("*") if f.is_file()}
    assert not any(f.is_symlink() for f in (tmp_path / "whole").rglob("*"))
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    assert torch.equal(whole.unet.conv_in.bias, unet.conv_in.bias)
    models.pipeline(str(tmp_path / "whole"), "--model")


@pytest.mark.parametrize("targets", [TARGETS, ("conv1", "proj_in", "to_q")])
def test_merged_weights_are_peft_s(tiny_sd, tmp_path, targets):
    unet = adapted(tiny_sd, 3, 5, targets)
    state = get_peft_model_state_dict(unet)
    lora = export.Lora({n.removesuffix(export.A): (t, 5 / 3 * state[n.removesuffix(export.A) + export.B])
                        for n, t in state.items() if n.endswith(export.A)})
    plain = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    export.check_fit(lora, plain, "")
    export.merge(plain, lora)
    unet.fuse_lora()
    unet.unload_lora()
    theirs = unet.state_dict()
    assert all(torch.allclose(theirs[name], tensor, atol=1e-6) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("dtype, torch_dtype",
                         [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_dtype_is_the_saved_one(tiny_sd, tmp_path, dtype, torch_dtype):
    loras.save_lora(adapted(tiny_sd, 2, 2), tmp_path)
    argv = ["--model", str(tiny_sd), "--lora", str(tmp_path), "--out", str(tmp_path / dtype),
            "--dtype", dtype]
    assert export.main(argv) == 0
    saved = load_file(tmp_path / dtype / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch_dtype}
    plain = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    export.merge(plain, export.read(str(tmp_path)))
    name = next(name for name in saved if "to_q" in name)
    assert torch.equal(saved[name], plain.state_dict()[name].to(torch_dtype))


@pytest.mark.parametrize("official", [True, False])
def test_the_form_that_diffusers_reads(tiny_sd, tmp_path, official):
    unet = adapted(tiny_sd, 4, 6)
    source = tmp_path / "checkpoint_3"
    source.mkdir()
    if official:
        torch.save(loras.lora_state(unet), source / "unet_lora.pt")
    else:
        loras.save_lora(unet, source)
    assert export.main(["--lora", str(source), "--out", str(tmp_path / "out"), "--form", "lora"]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = pipeline(tiny_sd)
    pipe.load_lora_weights(tmp_path / "out")
    x, t, text = (torch.randn(2, 4, 8, 8), torch.tensor([301, 1]),
                  torch.randn(2, 16, unet.config.cross_attention_dim))
    with torch.no_grad():
        wanted, got = unet(x, t, text).sample, pipe.unet(x, t, text).sample
    assert (wanted - got).abs().max() < 1e-5


def test_ranks_may_differ_without_alpha(tiny_sd, tmp_path):
    state = loras.lora_state(adapted(tiny_sd, 4, 4))
    first = next(iter(state)).removesuffix(export.A)
    state[first + export.A], state[first + export.B] = (state[first + export.A][:2],
                                                        state[first + export.B][:, :2])
    torch.save(state, tmp_path / "unet_lora.pt")
    lora = export.read(str(tmp_path))
    with pytest.raises(errors.InputError, match="different ranks"):
        lora.rank  # noqa: B018
    assert (export.main(["--model", str(tiny_sd), "--lora", str(tmp_path), "--out", str(tmp_path / "merged")])
            == 0)


@pytest.fixture
def bad(tiny_sd, tmp_path) -> dict[str, str]:
    """Paths by name."""
    loras.save_lora(adapted(tiny_sd, 2, 2), tmp_path / "good")
    state = loras.lora_state(adapted(tiny_sd, 2, 2))
    (name, tensor), *rest = state.items()
    odd = {"half": dict(rest), "dora": state | {"x.lora_magnitude_vector": tensor}, "none": {}, "list": [1],
           "wide": {n: torch.cat([t, t], 1) if n.endswith(export.A) else t for n, t in state.items()},
           "other": {f"middle.{n}": t for n, t in state.items()}}
    for key, value in odd.items():
        torch.save(value, tmp_path / f"{key}.pt")
    save_file({"text_encoder.q.lora_linear_layer.down.weight": torch.zeros(2, 2)},
              tmp_path / "text.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("else")
    return {"sd": str(tiny_sd), "dir": str(tmp_path)}


@pytest.mark.parametrize("argv, message", [
    (["--out", "{dir}/o", "--model", "{sd}"], "--lora (none)"),
    (["--out", "{dir}/o", "--lora", "{dir}/good"], "--model (none)"),
    (["--lora", "{dir}/good", "--model", "{sd}"], "--out (none)"),
    (["--lora", "{dir}/good", "--model", "{dir}/nowhere", "--out", "{dir}/o"],
     "--model {dir}/nowhere: no such directory"),
    (["--lora", "{dir}/nowhere", "--model", "{sd}", "--out", "{dir}/o"], "no LoRA there"),
    (["--lora", "{dir}/good", "--model", "{sd}", "--out", "{dir}/full"], "--out {dir}/full: is not empty"),
    (["--lora", "{dir}/good", "--model", "{sd}", "--out", "{dir}/half.pt/o"], "cannot be written"),
    *[(["--lora", f"{{dir}}/{name}", "--model", "{sd}", "--out", "{dir}/o"], message) for name, message in [
        ("half.pt", "is not an adapter"), ("dora.pt", "is not an adapter"), ("none.pt", "is not an adapter"),
        ("list.pt", "not a dictionary"), ("wide.pt", "which is ("), ("other.pt", "which is absent"),
        ("text.safetensors", "is not an adapter"), ("damaged.safetensors", "cannot be read")]],
])
def test_bad_input_is_one_line_and_exit_code_2(bad, argv, message, capsys):
    assert export.main([part.format(**bad) for part in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(**bad) in error and error.count("\n") == 1
    assert not (Path(bad["dir"]) / "o").exists()


def test_a_lora_for_another_family_is_refused(tiny_sd, tiny_sdxl, tmp_path, capsys):
    loras.save_lora(adapted(tiny_sd, 2, 2), tmp_path)
    assert (export.main(["--model", str(tiny_sdxl), "--lora", str(tmp_path), "--out", str(tmp_path / "o")])
            == 2)
    assert "name the model on which it was trained" in capsys.readouterr().err


def test_nothing_is_left_of_a_failed_export(tiny_sd, tmp_path, monkeypatch):
    loras.save_lora(adapted(tiny_sd, 2, 2), tmp_path / "lora")
    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", lambda *a, **k: json.loads(""))
    with pytest.raises(json.JSONDecodeError):
        export.main(["--model", str(tiny_sd), "--lora", str(tmp_path / "lora"), "--out", str(tmp_path / "o")])
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
