"""--dry-run against public figures, sums by hand, torch's own counter,
and what real runs of tiny models keep."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lpo_fast import train, train_lpo
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.lpo import policies
from lpo_fast.lrm import checkpoint
from lpo_fast.models import denoisers, families, loras, texts, vaes
from lpo_fast.official import lrm as official_lrm
from lpo_fast.preflight import dry_run, meta, runs
from lpo_fast.preflight.meta import META, empty, measure, on_cuda, training_pass
from lpo_fast.run import states
from lpo_fast.system import devices
from tests.helpers.models import TESTS, make_sd, two_stages
from tests.helpers.pairs import table


@pytest.fixture(scope="module")
def small_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.5 in miniature with two stages of one layer, and an LRM of it in the folder beside it."""
    return with_lrm(make_sd(tmp_path_factory.mktemp("dry") / "sd", **two_stages("unet_sd15")))


@pytest.fixture(scope="module")
def small_sdxl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of SDXL."""
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path_factory.mktemp("dry") / "sdxl"))
    UNet2DConditionModel(**two_stages("unet_sdxl")).save_pretrained(folder / "unet")
    return with_lrm(folder)


def with_lrm(model: Path) -> Path:
    judge = checkpoint.new_lrm(model, generator=torch.Generator())
    checkpoint.save_lrm(judge, texts.load_tokenizers(model, judge.family), model.parent / "lrm")
    return model


@pytest.fixture
def lpo(tmp_path: Path, small_sd: Path) -> LPO:
    """A run that could start."""
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo\n")
    return LPO(model=str(small_sd), lrm=str(small_sd.parent / "lrm"), prompts=str(tmp_path / "prompts.txt"),
               out=str(tmp_path / "runs" / "out"), num_steps=4, num_candidates=3, batch_size=2,
               train_batch_size=3, steps_used="1:")


@pytest.fixture
def lrm(tmp_path: Path, small_sd: Path) -> LRM:
    """A run that could start: 6 pairs a step in 2 passes."""
    pairs = table(tmp_path / "pairs.parquet", list("abcdef"))
    return LRM(model=str(small_sd), pairs=str(pairs), out=str(tmp_path / "runs" / "out"), batch_size=6,
               accumulate=2)


def rows(lines: list[str]) -> dict[str, list[str]]:
    """The cells of a report by the name in front of them."""
    return {line[:48].strip(): line[48:].split() for line in lines}


def flags(config: LPO | LRM, *keys: str) -> list[str]:
    return [word for key in keys for word in (f"--{key.replace('_', '-')}", str(getattr(config, key)))]


def files(folder: Path) -> set[tuple[Path, int]]:
    return {(path, path.stat().st_mtime_ns) for path in folder.rglob("*")}


# Parameters


def test_parameters_of_a_small_run(lpo: LPO, small_sd: Path) -> None:
    """Against the models as they are loaded, and the LoRA's formula: rank · (inputs + outputs) a layer."""
    shown = rows(dry_run.report(lpo))
    unet, judge = denoisers.load_unet(small_sd), checkpoint.load_lrm(Path(lpo.lrm))
    layers = [m for name, m in unet.named_modules()
              if isinstance(m, nn.Linear) and name.endswith(lpo.targets)]

    def cells(*numbers: int) -> list[str]:
        return [f"{number:,}" for number in numbers]
    assert shown["denoiser"] == cells(0, sum(p.numel() for p in unet.parameters()))
    assert shown["LoRA, rank 4"] == cells(sum(4 * (m.in_features + m.out_features) for m in layers), 0)
    assert (shown["reward model's denoiser (down, mid)"]
            == cells(0, sum(p.numel() for p in judge.unet.parameters())))
    assert (shown["its text encoders, while loading"]
            == cells(0, sum(p.numel() for p in judge.text_encoders.parameters())))
    assert shown["VAE, for pictures"] == cells(0,
                                               sum(p.numel() for p in vaes.load_vae(small_sd).parameters()))


# Operations


def test_operations_of_a_denoiser_are_those_of_torchs_counter(small_sd: Path) -> None:
    unet = denoisers.load_unet(small_sd).to(META)
    given = empty(2, 4, 8, 8), empty(2), empty(2, 16, unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), on_cuda():
        unet(*given)
    with on_cuda():
        assert measure(lambda: unet(*given).sample).flops == counter.get_total_flops() > 1e6


def test_operations_of_a_run(lpo: LPO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling: T policy and T − start · K reward evaluations of two passes a prompt; training:
    one of each a pair."""
    costs: list = []
    real = meta.measure
    monkeypatch.setattr(meta, "measure", lambda step: costs.append(real(step)) or costs[-1])
    shown = rows(dry_run.report(lpo))
    assert shown["policy, sampling (null and text pass)"] == ["8", "16"]
    assert shown["reward model (2 per candidate)"] == ["18", "36"]
    assert shown["reference, training (2 per pair)"] == ["6", "12"]
    judge = meta.scorer(lpo)
    text, _ = meta.encoded(judge.family, list(judge.text_encoders), 6)
    with on_cuda():
        alone = real(lambda: judge.score(empty(6, 4, 8, 8), empty(6, dtype=torch.int64), text))
    _, _, sampling, drawing, *_ = costs
    # what is left of a step is the reward model: 2 prompts, 3 candidates
    assert sampling.flops - drawing.flops == alone.flops


# Memory


def test_weights_and_texts_by_formula(lpo: LPO, small_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict = {}
    monkeypatch.setattr(dry_run, "memory_table",
                        lambda always, *rest: found.update(always=always, rest=rest) or [])
    dry_run.report(replace(lpo, ema_decay=0.9))
    unet = denoisers.load_unet(small_sd)
    count, width = sum(p.numel() for p in unet.parameters()), unet.config.cross_attention_dim
    lora = sum(4 * (m.in_features + m.out_features) for n, m in unet.named_modules()
               if isinstance(m, nn.Linear) and n.endswith(lpo.targets))
    always, (_, gradients, phases, states) = found["always"], found["rest"]
    assert always["denoiser, fp16"] == 2 * count + 4 * lora
    assert always["text features of 2 prompts"] == 2 * 2 * (2 * 16 * width + 4 * width)
    judge = checkpoint.load_lrm(Path(lpo.lrm))
    heads = sum(p.numel() for p in judge.parameters()) - sum(
        p.numel() for m in (judge.unet, judge.text_encoders) for p in m.parameters())
    assert always["reward model, fp16"] == 2 * sum(p.numel() for p in judge.unet.parameters()) + 4 * heads
    assert always["optimizer state (adamw)"] == states["adamw"] == 8 * lora
    assert gradients == always["average of the weights"] == 4 * lora
    assert all(phases[name] >= sum(always.values()) for name in phases if name != "loading")
    graph = "sampling, kept by its CUDA graph (--compile)"
    whole, before = always[graph], phases["training, 3 pairs"]
    dry_run.report(replace(lpo, ema_decay=0.9, compile="none"))
    assert whole == before - found["rest"][2]["training, 3 pairs"] > 0 and not found["always"][graph]
    dry_run.report(replace(lpo, full=True, mixed_precision="no"))
    always, (_, gradients, _, _) = found["always"], found["rest"]
    assert always["denoiser, fp32"] == always["reference, fp32"] == gradients == 4 * count


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_activations_are_those_of_a_real_pass(lpo: LPO, checkpointing: str) -> None:
    """What a forward pass of the tiny policy saves on the CPU, storages counted once and parameters not, and
    what meta keeps; checkpointing keeps less, and its peak is above what it keeps."""
    config = replace(lpo, mixed_precision="no", checkpointing=checkpointing)
    actor, _ = policies.load(config, ["a", "b"], torch.device("cpu"))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 501])
    own, saved = {p.untyped_storage().data_ptr() for p in actor.unet.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = actor.predict(x, t, torch.tensor([0, 1])).square().mean()
    real = sum(size for key, size in saved.items() if key not in own)

    encoders = [families.without_weights(kind, Path(lpo.model) / name) for name, kind in families.SD.encoders]
    ghost = meta.policy(config, "no", meta.encoded(families.SD, encoders, 2)[0])
    index = empty(2, dtype=torch.int64)
    with on_cuda():
        cost = training_pass(lambda: ghost.predict(empty(2, 4, 8, 8), index, index).square().mean(),
                             loras.trainable(ghost.unet))
    assert out.requires_grad and cost.kept == pytest.approx(real, rel=0.08)
    assert cost.peak > cost.kept
    if checkpointing == "full":
        with on_cuda():
            whole = training_pass(lambda: meta.policy(replace(config, checkpointing="none"), "no", ghost.text)
                                  .predict(empty(2, 4, 8, 8), index, index).square().mean(),
                                  loras.trainable(ghost.unet))
        assert cost.kept < 0.6 * whole.kept and cost.peak < whole.peak and cost.flops > whole.flops


# The command


def test_other_settings_and_sdxl(lpo: LPO, lrm: LRM, small_sdxl: Path) -> None:
    xl = replace(lpo, model=str(small_sdxl), lrm=str(small_sdxl.parent / "lrm"))
    for settings in (replace(xl, checkpointing="full", validation_prompts=("a",)),
                     replace(lpo, full=True, fused_norms=True, accumulate=2, train_cfg=False, pictures=0),
                     replace(lrm, loss_type="both", freeze_text_encoder=True, guidance_scale=(1.0,)),
                     replace(lrm, model=str(small_sdxl), fused_norms=True, multi_scale_cfg=True,
                             resolution=32)):
        lines = dry_run.report(settings)
        assert (any("not yet checked on a GPU" in line for line in lines)
                and all(len(line) < 110 for line in lines))


def test_the_same_on_a_machine_with_a_gpu(lpo: LPO, monkeypatch: pytest.MonkeyPatch) -> None:
    """There devices.autocast stands for CUDA, and nothing is put on it."""
    lpo = replace(lpo, checkpointing="full", pictures=0)
    here = dry_run.report(lpo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    assert devices.device().type == "cuda" and dry_run.report(lpo) == here


def test_the_command_prints_and_writes_nothing(lpo: LPO, lrm: LRM, tmp_path: Path, small_sd: Path, capsys,
                                               copied) -> None:
    """No weights are read either: the files are emptied."""
    bare = copied(small_sd)
    for file in bare.glob("*/*.safetensors"):
        file.write_bytes(b"")
    before = files(tmp_path)
    for stage, settings, keys in (("lpo", lpo, ("lrm", "prompts", "out")),
                                  ("lrm", lrm, ("pairs", "out", "batch_size"))):
        assert train.main([stage, "--model", str(bare), *flags(settings, *keys), "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"dry run: {stage.upper()}, sd, 16×16 pixels, networks in")
        assert "peak (" in printed and "report:" not in printed
    assert files(tmp_path) == before and not (tmp_path / "runs").exists()


def test_official_launch_lines(lpo: LPO, lrm: LRM, tmp_path: Path, capsys,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    here = TESTS / "official"
    monkeypatch.chdir(here)
    assert train.main(["--config", "configs/sd15.py",
                       f"--config.pretrained.model={lpo.model}", f"--config.logdir={tmp_path}",
                       f"--config.preference_model_func_cfg.ft_model_path={lpo.lrm}",
                       "--config.use_wandb=False", f"--config.dataset_cfg.meta_json_path={lpo.prompts}",
                       "--dry-run"]) == 0
    assert "dry run: LPO, sd, 16×16" in capsys.readouterr().out
    (tmp_path / "table.csv").write_text("")
    argv = ["--config-path", str(here), "--config-name", "step_sd15", f"dataset.dataset_name={lrm.pairs}",
            "dataset.keep_only_with_pesudo_preference=False",
            f"model.pretrained_model_name_or_path={lrm.model}", "model.clip_ckpt_path=''",
            f"output_dir={tmp_path / 'runs'}", "accelerator.log_with=null"]
    assert train.parse([*argv, "--dry-run"]) == replace(official_lrm.parse(argv), dry_run=True)
    assert train.parse(argv).dry_run is False
    capsys.readouterr()
    assert train.main([*argv, "--dry-run"]) == 0
    assert "dry run: LRM, sd, 16×16" in capsys.readouterr().out and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change, flag", [({"prompts": "nowhere.json"}, "--prompts"),
                                          ({"targets": ("nothing",)}, "--targets"),
                                          ({"model": "nowhere"}, "--model"), ({"lrm": "nowhere"}, "--lrm"),
                                          ({"num_candidates": 1}, "--num-candidates")])
def test_bad_input_is_refused_as_in_a_run(lpo: LPO, change: dict, flag: str, tmp_path: Path) -> None:
    problems = []
    for start in (dry_run.report, train_lpo.train):
        with pytest.raises(InputError) as caught:
            start(replace(lpo, **change))
        problems.append(str(caught.value))
    assert problems[0] == problems[1] and caught.value.key == flag and not (tmp_path / "runs").exists()


def test_resuming_takes_no_notice(lpo: LPO) -> None:
    """Neither of the setting, nor of a run that was started before there was one."""
    out = Path(lpo.out)
    out.mkdir(parents=True)
    (out / states.STATE).touch()
    for known in (asdict(lpo), {key: value for key, value in asdict(lpo).items() if key != "dry_run"}):
        (out / "config.json").write_text(json.dumps(known))
        assert runs.lpo(replace(lpo, resume=True, dry_run=True))[0] == ["a red circle", "two"]


def test_bad_pairs_are_refused(lrm: LRM, tmp_path: Path, capsys) -> None:
    argv = ["lrm", *flags(lrm, "model", "out", "pairs"), "--columns.caption", "text", "--dry-run"]
    assert train.main(argv) == 2 and "text" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_sharded_weights(lpo: LPO, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list = []
    monkeypatch.setattr(dry_run, "memory_table", lambda always, *rest: found.append((always, rest)) or [])
    whole = replace(lpo, full=True, mixed_precision="bf16", compile="none", ema_decay=0.9)
    for settings, world in ((whole, 4), (replace(whole, shard=True), 4)):
        monkeypatch.setattr(dry_run, "processes", lambda world=world: world)
        dry_run.report(settings)
    (before, (_, gradients, *_)), (after, (_, quarter, *_)) = found
    assert quarter == gradients // 4
    for name in ("denoiser, fp32", "reference, fp32", "optimizer state (adamw)", "average of the weights"):
        assert after[name] == before[name] // 4
    assert after["reward model, bf16"] == before["reward model, bf16"]


def test_memory_falls_with_more_passes_and_processes(lrm: LRM, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list = []
    monkeypatch.setattr(dry_run, "memory_table", lambda always, kept, *rest: found.append(kept) or [])
    for accumulate, world in ((1, 1), (2, 1), (1, 3)):
        monkeypatch.setattr(dry_run, "processes", lambda world=world: world)
        dry_run.report(replace(lrm, accumulate=accumulate))
    assert found[0] > 1.5 * found[1] and found[1] > found[2]
