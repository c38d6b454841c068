"""Full and read-only disks, damaged states and checkpoints, two runs in one directory:
told in a line, and nothing is lost."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lpo_fast import config, train, train_lpo, train_lrm
from lpo_fast.errors import InputError
from lpo_fast.lpo import checkpoints
from lpo_fast.lpo import steps as lpo_steps
from lpo_fast.lrm import steps as lrm_steps
from lpo_fast.models import loras
from lpo_fast.run import directory
from lpo_fast.shapes import world
from lpo_fast.system import checksums, writing
from tests.helpers.damage import hurt
from tests.helpers.pairs import plain, table
from tests.tools.kill import names, start


@pytest.fixture
def settings(tmp_path: Path, tiny_sd: Path, tiny_lrm: Path) -> config.LPO:
    """Two epochs of two prompt batches, a state every two optimizer steps."""
    (tmp_path / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:4]))
    return replace(config.shapes().lpo, model=str(tiny_sd), lrm=str(tiny_lrm),
                   prompts=str(tmp_path / "prompts.json"), out=str(tmp_path / "run"), batch_size=2,
                   num_steps=3, train_batch_size=2, threshold_min=0.0, threshold_max=0.001, pictures=0,
                   max_batches=0, epochs=2, save_steps=2, mixed_precision="no")


def argv(settings: config.LPO) -> list[str]:
    """The command line of the settings above."""
    keys = ("model", "lrm", "prompts", "out", "batch_size", "num_steps", "train_batch_size", "threshold_min",
            "threshold_max", "pictures", "max_batches", "epochs", "save_steps", "mixed_precision", "rank",
            "learning_rate")
    return ["lpo",
            *(text for key in keys for text in (f"--{key.replace('_', '-')}", str(getattr(settings, key))))]


def same(run: Path, whole: Path) -> None:
    """Two runs ended with the same metrics and weights."""
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    a, b = (loras.read_lora(folder) for folder in (run, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


# Full and read-only disks


@pytest.mark.parametrize("what", ["state", "checkpoint", "weights", "metrics"])
def test_a_full_disk(settings, what, tmp_path, monkeypatch, capsys) -> None:
    """One line with path, reason and remedy, exit code 2;
    earlier files are intact, and the run goes on from it."""
    arguments, out = argv(settings), tmp_path / "run"
    whole = train_lpo.train(replace(train.parse(arguments), out=str(tmp_path / "whole")))
    real, calls, before = torch.save, [], {}

    def full(value: object, file) -> None:
        """Half of it is written."""
        kind = ("state" if "at" in value else "weights" if any("lora_A" in str(key) for key in value) else
                "optimizer")
        calls.append(kind)
        if {"state": calls.count("state") == 3, "checkpoint": kind == "optimizer"}.get(what):
            before.update({path.name: path.read_bytes() for path in out.glob("*.pt")})
            file.write(b"PK" * 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(value, file)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        if what == "weights":
            def refused(*_, **__) -> None:
                raise writing.SafetensorError("Error while serializing: I/O error: No space left on device "
                                              "(os error 28)")
            patch.setattr(loras.StableDiffusionPipeline, "save_lora_weights", refused)
        if what == "metrics":
            out.mkdir()
            (out / "metrics.jsonl").symlink_to("/dev/full")  # which refuses every byte
            (out / "config.json").write_text("{}")
        assert train.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    name = {"state": "state.pt", "checkpoint": "checkpoint_0", "weights": "pytorch_lora_weights.safetensors",
            "metrics": "metrics.jsonl"}[what]
    assert error.startswith(f"error: {out / name}: cannot be written (") and "o space left on device" in error
    assert "free some space" in error and "--resume" in error
    assert all((out / name).read_bytes() == data for name, data in before.items())
    assert len(before) == {"state": 2, "checkpoint": 2}.get(what, 0)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    if what == "metrics":
        (out / "metrics.jsonl").unlink()
    assert train.main([*arguments, "--resume"]) == 0
    same(out, whole)


LIMITED = """
import resource, sys, torch
from lpo_fast.run import states
from lpo_fast.lpo import steps as lpo_steps
from lpo_fast.lrm import steps as lrm_steps
from lpo_fast import train
save, count = states.save_state, []
def third_is_too_much(*arguments):
    count.append(1)
    if len(count) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    save(*arguments)
states.save_state = third_is_too_much
sys.exit(train.main(sys.argv[1:]))
"""


def test_the_kernel_refuses(settings, tmp_path) -> None:
    """Not Python: a limit on the size of files is met in the middle of a state."""
    (tmp_path / "limited.py").write_text(LIMITED)
    process = start(*argv(settings), log=tmp_path / "limited", entry=(str(tmp_path / "limited.py"),))
    process.join(120)
    error = (tmp_path / "limited.err").read_text()
    assert process.exitcode == 2 and "Traceback" not in error, error
    assert (f"error: {tmp_path / 'run' / 'state.pt'}: cannot be written (File too large); free some space"
            in error)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["at"]["step"] == 4
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


UNPRIVILEGED = """
import ctypes, sys
from lpo_fast.lpo import steps as lpo_steps
from lpo_fast.lrm import steps as lrm_steps
from lpo_fast import train
ctypes.CDLL(None).capset(ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)),
                         ctypes.byref((ctypes.c_uint32 * 6)()))
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_run_directory(settings, tmp_path, resume) -> None:
    """Also for a superuser, whose privilege to write anywhere is given up here."""
    (tmp_path / "unprivileged.py").write_text(UNPRIVILEGED)
    out = Path(settings.out)
    if resume:
        train_lpo.train(replace(settings, max_batches=1))
    out.mkdir(exist_ok=True)
    out.chmod(0o555)
    before = names(out)
    process = start(*argv(settings), *["--resume"] * resume, log=tmp_path / "x",
                    entry=(str(tmp_path / "unprivileged.py"),))
    process.join(120)
    out.chmod(0o755)
    error = (tmp_path / "x.err").read_text()
    assert process.exitcode == 2 and error.endswith(f"error: --out {out}: cannot be written; choose a "
                                                    "directory where you may write\n")
    assert names(out) == before


@pytest.mark.parametrize("stage", ["lpo", "lrm"])
@pytest.mark.parametrize("limit", [0, 2])
def test_room_is_checked_before_the_first_step(settings, stage, limit, tiny_sd, tmp_path,
                                               monkeypatch) -> None:
    """The estimate is an upper bound of what a run takes at most at a time, and not far above it."""
    if stage == "lpo":
        run, module = train_lpo.train, lpo_steps
        settings = replace(settings, full=True, keep_checkpoints=limit, epochs=3, max_batches=0)
    else:
        pairs = str(table(tmp_path / "p.parquet", list("abcd"),
                          jpg_0=[plain((40 * i, 9, 9)) for i in range(4)]))
        settings = config.LRM(model=str(tiny_sd), pairs=pairs, validation_pairs=pairs, out=settings.out,
                              batch_size=4, max_steps=6, warmup_steps=0, validate_steps=2, save_steps=1,
                              num_workers=0, keep_checkpoints=limit, save_only_if_best=False)
        run, module = train_lrm.train, lrm_steps
    wanted, taken, replace_ = [], [], os.replace

    def measured(a: Path, b: Path) -> None:
        taken.append(sum(path.stat().st_size for path in Path(settings.out).rglob("*") if path.is_file()))
        replace_(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "require_disk_space", lambda folder, size, remedy: wanted.append(size))
        patch.setattr(os, "replace", measured)
        run(settings)
    assert max(taken) * 0.9 < wanted[0] < max(taken) * 1.6, (max(taken), wanted)
    monkeypatch.setattr(writing.shutil, "disk_usage",
                        lambda _: os.statvfs_result([0] * 10) and type("", (), {"free": 2**20}))
    monkeypatch.setattr(module, "train_step", None)
    with pytest.raises(InputError, match="has 0.00 GiB free, and the run will write up to") as caught:
        run(replace(settings, out=str(tmp_path / "other")))
    assert (caught.value.key == "--out" and "free disk space" in caught.value.remedy
            and not (tmp_path / "other").exists())


# Damage


def test_a_run_goes_on_from_the_state_before(settings, tmp_path) -> None:
    """And ends with the same metrics and weights."""
    whole = train_lpo.train(replace(settings, out=str(tmp_path / "whole")))
    train_lpo.train(replace(settings, max_batches=3))
    hurt(tmp_path / "run" / "state.pt", "flipped")
    same(train_lpo.train(replace(settings, resume=True)), whole)


def test_checksums_of_a_checkpoint(settings, tmp_path) -> None:
    """Against hashlib's own of the bytes on the disk; a change,
    a loss or a damaged list of any file is found."""
    out = train_lpo.train(replace(settings, full=True))
    folder = out / "checkpoint_1"
    recorded = json.loads((folder / checksums.SUMS).read_text())
    assert (recorded.keys() == names(folder) - {checksums.SUMS}
            >= {"unet/config.json", checkpoints.OPTIMIZER, checkpoints.STEP})
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value
               for name, value in recorded.items())
    for name in (*recorded, checksums.SUMS):
        data = (folder / name).read_bytes()
        for broken in (data[:-1], b"\0" + data[1:]):
            (folder / name).write_bytes(broken)
            if name != checksums.SUMS or broken[0] == 0:
                assert checksums.damage(folder), name
        (folder / name).unlink()
        assert name == checksums.SUMS or checksums.damage(folder) == f"{name} is missing"
        (folder / name).write_bytes(data)
    assert checksums.damage(folder) == ""


@pytest.mark.parametrize("full, official", [(False, False), (True, False), (False, True), (True, True)])
def test_resuming_from_an_older_checkpoint(settings, full, official, tmp_path, capsys) -> None:
    """Official ones have no sums: they are checked as far as they can be."""
    settings = replace(settings, full=full, epochs=3)
    runs_ = train_lpo.train(replace(settings, epochs=2))
    for folder in checkpoints.checkpoints(runs_) if official else ():
        (folder / checksums.SUMS).unlink()
    (weights,) = (runs_ / "checkpoint_1").rglob("*.safetensors" if full else loras.LORA_OFFICIAL)
    hurt(weights, "cut" if full and official else "flipped")
    assert checkpoints.find_checkpoint(runs_, full).name == "checkpoint_0"
    expected = train_lpo.train(replace(settings, resume_from=str(runs_ / "checkpoint_0"),
                                       out=str(tmp_path / "a")))
    capsys.readouterr()
    found = train_lpo.train(replace(settings, resume_from=str(runs_), out=str(tmp_path / "b")))
    assert (f"warning: {runs_ / 'checkpoint_1'} is damaged "
            f"({weights.relative_to(runs_ / 'checkpoint_1').parts[0]}" in (capsys.readouterr().out)
            or official)
    assert (found / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    for named in (runs_ / "checkpoint_1", runs_):
        if named == runs_:
            hurt(runs_ / "checkpoint_0" / checkpoints.OPTIMIZER, "cut")
        with pytest.raises(InputError, match="has no intact checkpoint .checkpoint_1: ") as caught:
            train_lpo.train(replace(settings, resume_from=str(named), out=str(tmp_path / "c")))
        assert caught.value.key == "--resume-from" and not (tmp_path / "c").exists()


def test_a_checkpoint_is_read_once_before_it_is_loaded(settings, monkeypatch, tmp_path) -> None:
    """Also a damaged one that it is taken in place of, and in the run's own directory:
    they may have many gigabytes."""
    whole, read, real = train_lpo.train(replace(settings, epochs=3)), [], checksums.sha256
    monkeypatch.setattr(checksums, "sha256", lambda file: read.append(file) or real(file))
    train_lpo.train(replace(settings, epochs=4, resume_from=str(whole)))
    hurt(whole / "checkpoint_3" / loras.LORA_OFFICIAL, "flipped")
    train_lpo.train(replace(settings, epochs=4, resume_from=str(whole), out=str(tmp_path / "on")))
    counts = Counter(file.parent.name for file in read if file.name == loras.LORA_OFFICIAL)
    assert (counts["checkpoint_3"], counts["checkpoint_2"]) == (1, 2)  # once a run


# One run a directory


OWNER = """
import os, sys, time
from pathlib import Path
from lpo_fast.run import directory
with directory.lock(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data loader's worker, which outlives a killed run by seconds
        time.sleep(30)
        os._exit(0)
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused(settings, tmp_path, capsys) -> None:
    """It names the first; when that is killed, the directory is free at once, though a worker still lives."""
    (tmp_path / "owner.py").write_text(OWNER)
    owner = start(settings.out, log=tmp_path / "owner", entry=(str(tmp_path / "owner.py"),))
    out, log = Path(settings.out), tmp_path / "owner.out"
    try:
        while owner.is_alive() and not (log.is_file() and "claimed" in log.read_text()):
            time.sleep(0.01)
        assert train.main(argv(settings)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: --out {out}: is in use by process {owner.pid} on {platform.node()}; "
                                "wait")
        assert names(out) == {directory.LOCK}
        (out / "checkpoint_0").mkdir()  # whatever the other one has written by now
        assert train.main(argv(settings)) == 2 and "is in use by process" in capsys.readouterr().err
        (out / "checkpoint_0").rmdir()
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.join()
    assert train.main(argv(settings)) == 0 and directory.LOCK not in names(out)


def test_a_disk_without_locks(settings, monkeypatch, capsys) -> None:
    def none(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "lockf", none)
    with directory.lock(Path(settings.out)):
        error = capsys.readouterr().err
    assert (error == f"warning: {settings.out} cannot be locked (No locks available): do not start another "
            "run there\n")
    assert not Path(settings.out).exists()  # it was made for the block, and is empty


def test_what_a_killed_run_left_is_removed(settings) -> None:
    """Also a directory that it was about to replace comes back; other hidden files stay."""
    out = Path(settings.out)
    train_lpo.train(replace(settings, max_batches=2))
    whole = names(out)
    (out / ".state.pt.new").write_text("half")
    for name in (".checkpoint_7.new", ".checkpoint_3.gone"):
        (out / name).mkdir()
        (out / name / "half").write_text("half")
    os.replace(out / "checkpoint_0", out / ".checkpoint_0.old")
    (out / ".mine").write_text("kept")
    with directory.lock(out):
        assert names(out) == whole | {".mine", directory.LOCK}
    assert names(out) == whole | {".mine"}


def test_a_half_written_row_is_dropped(settings, tmp_path) -> None:
    """The disk was full in the middle of it."""
    train_lpo.train(replace(settings, max_batches=2))
    rows = (tmp_path / "run" / "timings.jsonl").read_bytes()
    (tmp_path / "run" / "timings.jsonl").write_bytes(rows + b'{"global_step": 4, "samp')
    run = train_lpo.train(replace(settings, resume=True))
    again = (run / "timings.jsonl").read_bytes()
    assert again.startswith(rows) and all(map(json.loads, again.splitlines())) and len(again) > len(rows)
