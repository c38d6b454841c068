"""What outlives a run or a crash: run states, pickles that are no danger, writes that are whole or not there.
"""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch

from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.models import loras, texts
from lpo_fast.models.families import SD
from lpo_fast.run import states
from lpo_fast.system import reading, writing
from tests.helpers.models import parts

# Run states


@pytest.mark.parametrize("ema", [False, True])
def test_run_state_round_trip(tmp_path: Path, ema: bool) -> None:
    saved, other = parts(ema=ema), parts(ema=ema)
    states.save_state(tmp_path / "state.pt", {"step": 7, "best": 0.5}, saved)
    # what does not train is not saved
    assert not saved["weights"].state_dict().keys() & {"1.weight", "1.bias"}
    for parameter in other["weights"].parameters.values():
        parameter.data.zero_()
    identities = [id(p) for p in other["weights"].parameters.values()]
    assert states.load_state(tmp_path / "state.pt", other) == {"step": 7, "best": 0.5}
    # the optimizer still holds them
    assert identities == [id(p) for p in other["weights"].parameters.values()]
    for name, value in saved["weights"].state_dict().items():
        assert torch.equal(other["weights"].state_dict()[name], value)
    a, b = (p["optimizer"].state_dict()["state"] for p in (saved, other))
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


@pytest.mark.parametrize("other, message", [
    ({"rank": 3}, "other parameters are trained"), ({"bias": False}, "other parameters are trained"),
    ({"ema": True}, "ema was not in use"),
])
def test_run_state_of_another_run(tmp_path: Path, other: dict, message: str) -> None:
    states.save_state(tmp_path / "state.pt", {}, parts())
    with pytest.raises(InputError, match=message) as caught:
        states.load_state(tmp_path / "state.pt", parts(**other))
    assert caught.value.key == "--out"
    states.save_state(tmp_path / "state.pt", {}, parts(ema=True))
    with pytest.raises(InputError, match="ema was in use"):
        states.load_state(tmp_path / "state.pt", parts())


@pytest.mark.parametrize("state", [{}, [], {"at": {}}])
def test_what_is_no_run_state(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(InputError, match="was saved with other settings|it is not a dictionary"):
        states.load_state(tmp_path / "state.pt", parts())


# Pickles


class Attack:
    """Unpickled without care it would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


def test_hostile_pickles_do_not_run(tiny_lrm: Path, copied, tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace", copied(tiny_lrm)
    torch.save({"visual_projection": Attack(trace), "logit_scale": 1.0}, folder / "state_dict.pt")
    torch.save(Attack(trace), tmp_path / "unet_lora.pt")
    torch.save({"text_projection.weight": Attack(trace)}, tmp_path / "pytorch_model.bin")
    lora = tmp_path / "unet_lora.pt"
    for read, what in ((checkpoint.load_lrm, folder), (loras.read_lora, lora), (reading.read_pickle, lora),
                       (checkpoint.read_text_projection, str(tmp_path))):
        with pytest.raises(InputError, match="cannot be read safely"):
            read(what)
    assert not trace.exists()
    torch.load(tmp_path / "unet_lora.pt", weights_only=False)
    assert trace.exists()  # the attack is a real one


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read safely"):
        reading.read_pickle(tmp_path / "x.pt")


# Atomic writes


def test_replacing_a_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with writing.replacing(target) as aside:
            assert aside.parent == target.parent and not aside.exists()
            aside.write_text(text)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text
    with pytest.raises(RuntimeError, match="half way"), writing.replacing(target) as aside:
        aside.write_text("three")
        raise RuntimeError("half way")
    assert target.read_text() == "two" and [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_replacing_a_directory(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("a", "b"):
        with writing.replacing(target) as aside:
            (aside / "sub").mkdir(parents=True)
            (aside / "sub" / name).write_text(name)
        assert [p.name for p in (target / "sub").iterdir()] == [name]
    with pytest.raises(KeyboardInterrupt), writing.replacing(target) as aside:
        aside.mkdir()
        (aside / "c").write_text("c")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["folder"] and (target / "sub" / "b").read_text() == "b"


def test_replacing_what_a_killed_run_left(tmp_path: Path) -> None:
    for _ in range(2):  # the name of the second run's temporary is that of the first's
        with writing.replacing(tmp_path / "file") as aside:
            aside.write_text("whole")
        aside.mkdir()
        (aside / "half").write_text("half")
    with writing.replacing(tmp_path / "file") as again:
        assert not again.exists()
        again.write_text("new")
    assert (tmp_path / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_directory_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two operations of the file system, the old or the new directory can be found again.
    """
    def write(text: str) -> None:
        with writing.replacing(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / "file").write_text(text)
    for survives in range(3):
        write("old")
        calls, real = [], os.replace

        def replace(a: Path, b: Path, survives: int = survives, calls: list = calls, real=real) -> None:
            if len(calls) == survives:
                raise KeyboardInterrupt
            calls.append(b)
            real(a, b)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(writing.os, "replace", replace)
            patch.setattr(writing, "_remove", lambda path: None)  # a killed process does not clean up
            write("new")
        with contextlib.suppress(RuntimeError), writing.replacing(tmp_path / "folder"):
            raise RuntimeError  # the next run recovers, even if it fails
        assert (tmp_path / "folder" / "file").read_text() in ("old", "new")


def test_a_failed_save_leaves_the_lrm_before(tiny_sd: Path, tiny_lrm: Path, copied,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tiny_lrm)
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(8))

    def full_disk(*_) -> None:
        raise OSError("no space left on device")
    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(InputError, match="copy_of_lrm: cannot be written .no space"):
        checkpoint.save_lrm(lrm, texts.load_tokenizers(tiny_sd, SD), folder)
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert json.loads((folder / "lrm.json").read_text())["guidance_scale"] == [7.5]


def test_replacing_keeps_the_old_directory_when_the_new_one_was_never_made(tmp_path: Path) -> None:
    with writing.replacing(tmp_path / "run") as aside:
        aside.mkdir()
        (aside / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), writing.replacing(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "weights").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
