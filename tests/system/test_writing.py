"""Make a file or directory once for all processes."""

import shutil
from pathlib import Path

import pytest

from lpo_fast.system import writing


def test_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    target, other = tmp_path / "it.arrow", tmp_path / "it.arrow2.x-1"
    other.write_text("not ours")
    for left in (".it.arrow.node-77.new", "it.arrow.node-78"):
        (tmp_path / left).mkdir()
    with pytest.raises(KeyboardInterrupt), writing.make_once(target) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert {p.name for p in tmp_path.iterdir()} == {other.name, ".it.arrow.lock"}
    with writing.make_once(target) as aside:
        aside.write_text("whole")
    with writing.make_once(target) as aside:
        assert aside is None and target.read_text() == "whole"
    monkeypatch.setattr(writing.fcntl, "flock",
                        lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with writing.make_once(tmp_path / "folder") as aside:  # another process is faster
        aside.mkdir()
        shutil.copytree(tmp_path, tmp_path / "folder",
                        ignore=lambda *_: [p.name for p in tmp_path.iterdir() if p != target])
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["it.arrow"]
    assert {p.name for p in tmp_path.iterdir()} == {other.name, ".it.arrow.lock", "it.arrow", "folder",
                                                    ".folder.lock"}
