"""The golden vectors of the official code: every check passes, none runs empty,
and a wrong number is noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpo_fast import doctor
from lpo_fast.errors import InputError
from lpo_fast.verify import golden as verify_golden
from lpo_fast.verify import recordings, vectors
from lpo_fast.verify.vectors import Golden
from tests.helpers.models import GOLDEN
from tests.tools import golden_inputs

# How many lines the checks of these files print. From the settings that the files hold, counted by hand.
LINES = {
    "lrm_sd15_weights.safetensors lrm_sd15_io.safetensors": 5,  # (multi_scale, multi_scale_cfg, guidance)
    "lrm_sdxl_weights.safetensors lrm_sdxl_io.safetensors": 1,
    "lrm_loss.safetensors": 6,  # 3 loss types × 2 coefficients
    "pseudo_preference.csv pseudo_preference_kept.json": 3,  # strategies
    "pair_selection.safetensors": 12,  # K = 2, 4, 8 × 4 shapes
    "ddim.safetensors": 6,  # 3 prediction types × 2 etas
    "pairwise_loss.safetensors": 2,  # prediction types
    "lpo_sd15_weights.safetensors lpo_sd15_io.safetensors lrm_sd15_weights.safetensors "
    "lpo_sd15_checkpoint/unet_lora.pt": 11,  # scores, choices, pairs; null text, schedule; 2 clip widths × 3
    "lpo_sdxl_weights.safetensors lpo_sdxl_io.safetensors lrm_sdxl_weights.safetensors": 7,  # no null text
    "lpo_sd15_weights.safetensors lpo_sd15_checkpoint/unet_lora.pt pytorch_lora_weights.safetensors": 3,
}
# How far the official float32 gradients are from float64, as noted beside the recording.
OFFICIAL = {"sd15 LoRA step, clip0.1, float32: 256 gradients": 1.0e-4,
            "sd15 LoRA step, noclip, float32: 256 gradients": 2.5e-5,
            "sdxl LoRA step, clip0.1, float32: 272 gradients": 9.5e-5}
RUNS = {family: next(files for files in LINES if f"lpo_{family}_io" in files).split()
        for family in ("sd15", "sdxl")}
PRESENT = [files for files in verify_golden.CHECKS if all((GOLDEN / file).is_file() for file in files)]


def test_no_check_is_left_out() -> None:
    assert {" ".join(files) for files in PRESENT} == set(LINES)


@pytest.mark.parametrize("files", PRESENT, ids=lambda files: files[0].partition(".")[0])
def test_golden(golden: Golden, files: tuple[str, ...]) -> None:
    lines = list(verify_golden.CHECKS[files](golden))
    assert len({what for what, _, _ in lines}) == len(lines) == LINES[" ".join(files)]
    failed = [(what, apart) for what, apart, tolerance in lines if not apart <= tolerance]
    assert not failed
    for what, _, tolerance in lines:
        if what in OFFICIAL:
            assert tolerance == pytest.approx(2 * OFFICIAL[what], rel=0.02)
        else:
            assert tolerance <= (1e-9 if what.endswith("float64") else 1e-4)


def subset(folder: Path, *names: str) -> Path:
    """A directory of golden vectors with some of the files alone."""
    for name in ("configs.json", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(GOLDEN / name, folder / name)
    return folder


def add(file: Path, name: str, index: int, change: float) -> None:
    """Change one number of a safetensors file."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[name].view(-1)[index] += change
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("file, name, index, change", [
    ("lrm_loss", "pair/aux0.25/loss", 0, 1e-6),
    ("lrm_loss", "both/aux1.0/grad_image_1", 3, 1e-6),
    ("pair_selection", "K4/sigma/indices", 5, 1),
    ("pairwise_loss", "epsilon/eps0.1/grad_cond", 7, 1e-3),
    ("ddim", "v_prediction/eta0.5/candidates", 11, 1e-6),
])
def test_one_wrong_number_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture, file: str, name: str,
                                     index: int, change: float) -> None:
    root = subset(tmp_path / "g", f"{file}.safetensors")
    add(root / f"{file}.safetensors", name, index, change)
    assert verify_golden.check(root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAIL")][0].count(name.rpartition("/")[0]) == 1
    assert lines[-1].endswith("1 failed")


def test_one_wrong_score_of_a_model_is_noticed(tmp_path: Path) -> None:
    root = subset(tmp_path / "g", "lrm_sdxl_weights.safetensors", "lrm_sdxl_io.safetensors")
    add(root / "lrm_sdxl_io.safetensors", "score/ms1_mscfg0_gs7.5", 1, 1e-2)
    assert verify_golden.check(root) == 1


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("family", RUNS)
def test_another_chosen_candidate_is_noticed(tmp_path: Path, family: str, step: int) -> None:
    """The recorded scores follow from the recorded candidates and no others (the last has no successor)."""
    root = subset(tmp_path / "g", *RUNS[family])
    chosen = load_file(root / f"lpo_{family}_io.safetensors")["chosen_candidate"]
    assert len(chosen) == 6
    index = step * chosen.shape[1] + 1
    add(root / f"lpo_{family}_io.safetensors", "chosen_candidate", index, -1 if chosen.view(-1)[index] else 1)
    what, apart, tolerance = next(recordings.recorded_run(Golden(root, tmp_path), family))
    assert what == f"{family} sampling run, scores" and tolerance == 1e-4 and apart > 1e-3


def test_one_wrong_number_of_a_float64_step_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = subset(tmp_path / "g", *RUNS["sd15"])
    file = root / "lpo_sd15_io.safetensors"
    name, gradient = next((n, t) for n, t in load_file(file).items() if n.startswith("train64/noclip/grad/"))
    add(file, name, 0, 2e-9 * gradient.abs().max().item())
    assert verify_golden.check(root) == 1
    failed, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL"))
    assert failed == "FAIL  sd15 LoRA step, noclip, float64: 2.0e-09 (tolerance 1e-09)"


def test_a_recording_without_its_float64_step_is_noticed(tmp_path: Path) -> None:
    root = subset(tmp_path / "g", *RUNS["sdxl"])
    file = root / "lpo_sdxl_io.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    kept = {name: t for name, t in load_file(file).items() if not name.startswith("train64/grad/")}
    save_file(kept, file, metadata)
    assert verify_golden.check(root) == 3


def test_a_slightly_wrong_step_is_noticed_in_float64(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor that float32 hides: beta is off by one part in 10⁷."""
    evaluate = recordings.evaluate
    monkeypatch.setattr(recordings, "evaluate",
                        lambda *args, beta, **settings: evaluate(*args, beta=beta * (1 + 1e-7), **settings))
    lines = recordings.recorded_run(golden, "sdxl")
    failed = [what for what, apart, tolerance in lines if not apart <= tolerance]
    assert failed == ["sdxl LoRA step, clip0.1, float64"]


def test_recovered_coefficients_are_float32_roundings_of_the_official_formulas(golden: Golden) -> None:
    """Each square root is at most one unit in the last place off the correctly rounded one."""
    sched = recordings.recorded_schedule(golden, golden.metadata("lpo_sd15_io"))
    recorded = load_file(vectors.RECORDED)
    assert sorted(recorded["timesteps"].tolist()) == [801, 851, 901, 951]
    for t, row in zip(recorded["timesteps"].tolist(), recorded["coefficients"], strict=True):
        assert any(torch.equal(row, candidate) for candidate in golden_inputs.roundings(sched, t, 20))


def test_one_wrong_row_of_the_filter_is_noticed(tmp_path: Path) -> None:
    root = subset(tmp_path / "g", "pseudo_preference.csv", "pseudo_preference_kept.json")
    kept = json.loads((root / "pseudo_preference_kept.json").read_text())
    kept["2"] = kept["2"][1:]
    (root / "pseudo_preference_kept.json").write_text(json.dumps(kept))
    assert verify_golden.check(root) == 1


def test_unknown_and_absent_files_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = subset(tmp_path / "g", "pseudo_preference.csv", "pseudo_preference_kept.json")
    assert verify_golden.check(root) == 0
    assert "absent  ddim.safetensors" in capsys.readouterr().out
    (root / "extra.safetensors").write_bytes(b"")
    assert verify_golden.check(root) == 1
    assert "FAIL  extra.safetensors: no check knows this file" in capsys.readouterr().out


def test_no_golden_vectors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="configs.json is missing"):
        verify_golden.check(tmp_path)


def test_error_is_infinite_for_what_cannot_be_compared() -> None:
    one = torch.ones(2)
    assert (vectors.error(one, torch.ones(3)) == vectors.error(one * torch.nan, one)
            == float("inf"))
    assert vectors.error(one, torch.zeros(2)) == float("inf")
    assert vectors.error(torch.zeros(2), torch.zeros(2)) == 0
    assert vectors.error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25
    assert vectors.mismatches(one, torch.ones(3)) == float("inf")


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("python", "torch", "diffusers", "peft", "device", "attention",
                                          "8-bit AdamW"))
    root = subset(tmp_path / "g", "pseudo_preference.csv", "pseudo_preference_kept.json")
    assert doctor.main(["--golden", str(root)]) == 0
    (root / "extra").write_bytes(b"")
    assert doctor.main(["--golden", str(root)]) == 1
    assert doctor.main(["--golden", str(tmp_path / "nowhere")]) == 2
    assert "configs.json is missing" in capsys.readouterr().err


def test_doctor_says_what_does_not_run(monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture) -> None:
    def refuse(*_, **__):
        raise InputError("adamw8bit", "bitsandbytes is not installed", "pip install bitsandbytes")
    monkeypatch.setattr(doctor.optimization, "optimizer", refuse)
    assert doctor.main([]) == 0
    assert "8-bit AdamW  does not run" in capsys.readouterr().out
