"""Damaged states: each flipped bit is found, the state before takes over,
and a directory is replaced or removed whole."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from lpo_fast.errors import InputError
from lpo_fast.run import states
from lpo_fast.system import checksums, writing
from tests.helpers.damage import hurt
from tests.helpers.models import parts
from tests.tools.kill import names


def test_every_flipped_bit_of_a_state_is_found(tmp_path: Path) -> None:
    """Also where neither torch nor a zip file's own checksums see it."""
    file, missed = tmp_path / "state.pt", 0
    states.save_state(file, {"step": 3}, parts(rank=3))
    whole = file.read_bytes()
    assert states.intact_state(file) == file
    assert (tmp_path / "state.sha256").read_text() == hashlib.sha256(whole).hexdigest() + "\n"
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        missed += not checksums.damage(file)
        with pytest.raises(InputError, match="state.pt"):
            states.intact_state(file)
    assert 0 < missed < len(whole) / 6  # by what is checked where there is no list of sums
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert checksums.damage(file), size


def test_states_and_their_list_are_never_apart(tmp_path: Path, monkeypatch) -> None:
    """Killed between any two renames, a state is there that the list knows, at most one save behind."""
    file, real = tmp_path / "state.pt", os.replace
    for survives in range(4):
        for step in (1, 2):
            states.save_state(file, {"step": step}, parts())
        done = []

        def killed(a: Path, b: Path, survives: int = survives, done: list = done) -> None:
            if len(done) == survives:
                raise KeyboardInterrupt
            done.append(real(a, b))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr(writing, "_remove", lambda path: None)  # a killed process does not clean up
            if survives < 3:  # the list, the state before, the state
                with pytest.raises(KeyboardInterrupt):
                    states.save_state(file, {"step": 3}, parts())
            else:
                states.save_state(file, {"step": 3}, parts())
        writing.sweep(tmp_path)
        assert states.load_state(file, parts())["step"] == 2 + (survives == 3)
        assert names(tmp_path) <= {"state.pt", "state.before.pt", "state.sha256"}


def test_saves_that_fail_again_and_again_leave_a_state(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses each new state once the list has its sum."""
    file, real = tmp_path / "state.pt", os.replace
    for step in (1, 2):
        states.save_state(file, {"step": step}, parts())

    def refused(a: Path, b: Path) -> None:
        if Path(b) == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        for step in range(3, 13):
            with pytest.raises(InputError, match="earlier files are intact"):
                states.save_state(file, {"step": step}, parts())
            writing.sweep(tmp_path)
    assert states.load_state(file, parts()) == {"step": 2}


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, harm: str, capsys) -> None:
    file = tmp_path / "state.pt"
    for step in (1, 2):
        states.save_state(file, {"step": step}, parts())
    broken = hurt(file, harm)
    assert states.load_state(file, parts()) == {"step": 1}
    said = capsys.readouterr().out
    assert ((f"warning: {file}: state.pt" in said and "continues from the state before it" in said)
            or harm == "gone")
    states.save_state(file, {"step": 3}, parts())  # the damaged one is not kept as the one before
    assert (torch.load(tmp_path / "state.before.pt", weights_only=True)["at"] == {"step": 1}
            and checksums.damage(file) == "")
    hurt(file, "cut"), hurt(tmp_path / "state.before.pt", "flipped")
    with pytest.raises(InputError, match="state.pt cannot be read safely .*; state.before.pt .*; "
                       "start a new run") as caught:
        states.load_state(file, parts())
    assert caught.value.key == "--out" and broken is None


def test_a_directory_is_removed_whole(tmp_path: Path, monkeypatch) -> None:
    """Killed on the way, its name is gone first."""
    (folder := tmp_path / "checkpoint_0").mkdir()
    (folder / "unet_lora.pt").write_text("weights")

    def killed(_) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(writing.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        writing.discard(folder)
    assert not folder.exists()
    monkeypatch.undo()
    writing.sweep(tmp_path)
    assert not list(tmp_path.iterdir())
