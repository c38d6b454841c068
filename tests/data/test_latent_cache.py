"""The cache of latents: training with it is training without it, whatever happens to it;
where it cannot be it is refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lpo_fast import config, train, train_lrm
from lpo_fast.config import LRM
from lpo_fast.data import dataset, images, latent_cache
from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint, encoding, selection, steps
from lpo_fast.models import vaes
from lpo_fast.preflight import dry_run, runs
from lpo_fast.run import clock
from lpo_fast.system import compilation
from tests.helpers.pairs import BLUE, GREEN, RED, table
from tests.helpers.processes import processes

ENTRY = 2 * 4 * 8 * 8 * 4  # bytes


@pytest.fixture
def settings(tmp_path: Path, tiny_sd: Path) -> LRM:
    """Three epochs of three batches of two of six pairs, one of which does not decode; two held-out pairs."""
    path = table(tmp_path / "p.parquet", ["a", "b", "a", "a", "c", "d"],
                 jpg_0=[RED, GREEN, RED, b"?", GREEN, RED])
    held = table(tmp_path / "held.parquet", ["a", "b"], jpg_0=[GREEN, RED])
    return replace(config.sd15().lrm, model=str(tiny_sd), pairs=str(path), validation_pairs=str(held),
                   batch_size=2, out=str(tmp_path / "run"), max_steps=9, warmup_steps=1, learning_rate=1e-3,
                   num_workers=0, validate_steps=4, save_steps=2)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Counts loaded VAEs, encoded pictures and decoded pictures."""
    counts = SimpleNamespace(vaes=0, encoded=0, decoded=0)
    load, encode, decode = vaes.load_vae, encoding.encode, images.decode

    def loaded(path: Path):
        counts.vaes += 1
        return load(path)

    def counted(vae, pixels: torch.Tensor, precision: str) -> torch.Tensor:
        counts.encoded += len(pixels)
        return encode(vae, pixels, precision)

    def opened(picture: bytes, resolution: int) -> torch.Tensor:
        counts.decoded += resolution != 8  # what preflight tries
        return decode(picture, resolution)
    monkeypatch.setattr(vaes, "load_vae", loaded)
    monkeypatch.setattr(encoding, "encode", counted)
    monkeypatch.setattr(images, "decode", opened)
    return counts


def metrics(run: Path) -> bytes:
    return (run / "metrics.jsonl").read_bytes()


def cached(settings: LRM, tmp_path: Path, name: str = "cached") -> LRM:
    return replace(settings, cache_latents=str(tmp_path / "latents"), out=str(tmp_path / name))


def cache_of(settings: LRM, use: str = "train") -> latent_cache.Cache:
    return latent_cache.of(settings, runs.lrm(replace(settings, out=settings.out + "_never"))[use], "no")


def folder_of(settings: LRM, use: str = "train") -> Path:
    return cache_of(settings, use).folder


@pytest.mark.parametrize("options", [
    {}, {"compare_between_timestep": True, "num_workers": 2},
    {"accumulate": 2, "noise_offset": 0.1, "resolution": 32},
    {"only_on_best": True}, {"mixed_precision": "bf16", "test_pairs": "held"},
])
def test_training_is_the_same(settings: LRM, tmp_path: Path, encoded: SimpleNamespace, options: dict) -> None:
    """While the cache is filled and when it is full, which takes no VAE and decodes nothing that decodes."""
    if "only_on_best" in options:
        table(tmp_path / "p.parquet", list("abcdef"), jpg_0=[RED, GREEN, BLUE] * 2,
              image_0_uid=list("pqrsss"), image_1_uid=list("qrsttt"))
    options |= {"test_pairs": settings.validation_pairs} if "test_pairs" in options else {}
    plain_run = train_lrm.train(replace(settings, **options))
    assert encoded.vaes == 1
    filling, full = (replace(cached(settings, tmp_path, name), **options) for name in ("filling", "full"))
    first = train_lrm.train(filling)
    encoded.vaes = encoded.encoded = encoded.decoded = 0
    second = train_lrm.train(full)
    assert metrics(plain_run) == metrics(first) == metrics(second)
    assert encoded.vaes == encoded.encoded == 0 and (encoded.decoded == 0 or "num_workers" not in options)


def test_each_picture_is_encoded_once(settings: LRM, tmp_path: Path, encoded: SimpleNamespace) -> None:
    """Also where a run was killed in between; pairs that do not decode are tried again, and take no VAE."""
    settings = replace(cached(settings, tmp_path), validation_pairs="")
    train_lrm.train(replace(settings, max_steps=2))
    assert encoded.encoded <= 8
    shutil.rmtree(settings.out)
    encoded.encoded = 0
    train_lrm.train(replace(settings, max_steps=3, save_steps=1))
    cache = cache_of(settings)
    # of the pair that does not decode
    assert cache.missing(np.arange(12)) == 2 and cache.missing(np.array([6, 7])) == 2
    assert encoded.encoded == 4  # the third batch's
    shutil.rmtree(settings.out)
    encoded.encoded = encoded.vaes = 0
    out = train_lrm.train(settings)
    assert encoded.encoded == encoded.vaes == 0
    assert [json.loads(line)["corrupt"] for line in metrics(out).splitlines()].count(1) > 0


def flip(file: Path, place: int) -> None:
    """Another bit."""
    with open(file, "r+b") as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("file, place", [("latents", 4 * ENTRY + 77), ("marks", 4 * 8 + 2)])
def test_damaged_entries_are_made_anew(settings: LRM, tmp_path: Path, encoded: SimpleNamespace, capsys,
                                       file: str, place: int) -> None:
    plain_run = train_lrm.train(settings)
    folder = folder_of(cached(settings, tmp_path))
    train_lrm.train(cached(settings, tmp_path, "first"))
    whole = (folder / "latents").read_bytes()
    assert len(whole) == 12 * ENTRY
    flip(folder / file, place)
    capsys.readouterr()
    encoded.encoded = 0
    again = train_lrm.train(cached(settings, tmp_path, "again"))
    assert f"1 entries of {folder} are damaged and will be rewritten" in capsys.readouterr().err
    assert (metrics(again) == metrics(plain_run) and encoded.encoded == 4
            and (folder / "latents").read_bytes() == whole)
    train_lrm.train(cached(settings, tmp_path, "third"))
    assert "damaged" not in capsys.readouterr().err


def test_files_cut_short(settings: LRM, tmp_path: Path) -> None:
    plain_run = train_lrm.train(settings)
    folder = folder_of(cached(settings, tmp_path))
    train_lrm.train(cached(settings, tmp_path, "first"))
    for name, size in (("latents", 3 * ENTRY + 5), ("marks", 20)):
        os.truncate(folder / name, size)
        assert metrics(train_lrm.train(cached(settings, tmp_path, f"cut_{name}"))) == metrics(plain_run)


def test_a_full_disk_is_no_end(settings: LRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys) -> None:
    plain_run, write, room = train_lrm.train(settings), os.pwrite, [3]

    def until_full(*args) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return write(*args)
    monkeypatch.setattr(os, "pwrite", until_full)
    assert metrics(train_lrm.train(cached(settings, tmp_path))) == metrics(plain_run)
    assert "No space left on device; missing entries are encoded every time" in capsys.readouterr().err


def test_what_a_cache_is_of(settings: LRM, tmp_path: Path, tiny_sd: Path, copied: Callable) -> None:
    """Another folder for another VAE, size, precision, table or column;
    the same for another model with this VAE."""
    settings = cached(settings, tmp_path)
    other = copied(tiny_sd)
    same = folder_of(settings)
    assert (folder_of(replace(settings, model=str(other))) == same
            == folder_of(replace(settings, compare_between_timestep=True)))
    vae = vaes.load_vae(tiny_sd)
    vae.encoder.conv_in.bias.data += 1e-3
    vae.save_pretrained(tmp_path / "vae")
    swapped = config.Columns(jpg_0="jpg_1", jpg_1="jpg_0")
    found = [same, folder_of(replace(settings, vae=str(tmp_path / "vae"))),
             folder_of(replace(settings, resolution=32)),
             folder_of(replace(settings, columns=swapped)), folder_of(settings, "validation"),
             latent_cache.of(settings, runs.lrm(settings)["train"], "bf16").folder]
    table(Path(settings.pairs), ["a", "b", "a", "a", "c", "d"], jpg_0=[GREEN, RED] * 3)
    assert len({*found, folder_of(settings)}) == 7 and not (tmp_path / "latents").exists()


def test_tables_that_datasets_saved(settings: LRM, tmp_path: Path) -> None:
    import datasets
    datasets.Dataset.from_parquet(settings.pairs,
                                  cache_dir=str(tmp_path / "arrow")).save_to_disk(tmp_path / "saved")
    settings = replace(settings, pairs=str(tmp_path / "saved"), validation_pairs="")
    plain_run = train_lrm.train(settings)
    assert metrics(train_lrm.train(cached(settings, tmp_path))) == metrics(plain_run)
    assert folder_of(cached(settings, tmp_path)).is_dir()


def test_two_processes_share_it(settings: LRM, tmp_path: Path) -> None:
    """Three runs of two processes: without a cache, filling it, and with a full one."""
    made = []
    for name in ("alone", "first", "second"):
        cache = [] if name == "alone" else ["--cache-latents", str(tmp_path / "latents")]
        done = processes(2, "-m", "lpo_fast.train", "lrm", "--model", settings.model,
                         "--pairs", settings.pairs, "--validation-pairs", settings.validation_pairs, "--out",
                         str(tmp_path / name), "--batch-size", "2", "--max-steps", "6", "--warmup-steps", "1",
                         "--num-workers", "0", *cache, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        made.append(metrics(tmp_path / name))
    assert made[0] == made[1] == made[2]
    assert cache_of(cached(settings, tmp_path)).missing(np.arange(12)) == 2


def test_refused_before_the_run(settings: LRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = cached(settings, tmp_path)

    def refused(changed: LRM, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            train_lrm.train(changed)
        assert caught.value.key == "--cache-latents" and not Path(changed.out).exists()
        assert not (tmp_path / "latents").exists()
    refused(replace(settings, hflip=True), "cannot be combined with --hflip.*drop one of the two")
    refused(replace(settings, cache_latents=settings.pairs), "cannot be written")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        refused(replace(settings, out=str(tmp_path.parent / "elsewhere" / "run")), "cannot be written")
    used = runs.lrm(settings)
    assert latent_cache.needed(settings, used, "no") == (16, 16 * (ENTRY + 8))
    free = SimpleNamespace(free=16 * (ENTRY + 8) - 1)
    monkeypatch.setattr(latent_cache, "shutil", SimpleNamespace(disk_usage=lambda path: free))
    refused(settings, r"needs 32,896 bytes \(0.0 GiB\) for 16 pictures, and 32,895 are free there")
    free.free += 1
    train_lrm.train(settings)
    free.free = 4 * (ENTRY + 8)  # those of the pair that does not decode are missing for ever
    train_lrm.train(replace(settings, out=str(tmp_path / "again")))


def test_dry_run_counts_it(settings: LRM, tmp_path: Path) -> None:
    lines = dry_run.report(replace(cached(settings, tmp_path), batch_size=4, accumulate=2))
    assert any(line.startswith("--cache-latents: 16 pictures to add, 0.00 GiB") for line in lines)
    assert any(line.startswith("most while encoding, 8 pictures at a time") for line in lines)
    assert not (tmp_path / "latents").exists()


def test_resume_with_and_without(settings: LRM, tmp_path: Path) -> None:
    """A run that goes on may start to use a cache."""
    whole = train_lrm.train(settings)
    part = replace(settings, out=str(tmp_path / "part"))
    step, at = steps.train_step, []

    def killed(*args):
        at.append(args[3])
        if args[3] == 5:
            raise KeyError
        return step(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "train_step", killed)
        with pytest.raises(KeyError):
            train_lrm.train(part)
    resumed = train_lrm.train(replace(part, resume=True, cache_latents=str(tmp_path / "latents")))
    assert metrics(resumed) == metrics(whole)


# Parts


def test_part_size() -> None:
    """Equal parts of at most 2²² pixels, one picture at least."""
    assert encoding.part_size(64, 1024) == 4 and encoding.part_size(256, 512) == 16
    assert encoding.part_size(20, 512) == 10 and encoding.part_size(34, 512) == 12
    assert encoding.part_size(128, 32) == 128 and encoding.part_size(2, 4096) == 1
    for count in range(1, 70):
        size = encoding.part_size(count, 512)
        assert size <= 16 and -(-count // size) == -(-count // 16)


@pytest.mark.parametrize("mirrored", [False, True])
def test_parts_give_what_the_whole_gives(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch,
                                         encoded: SimpleNamespace, mirrored: bool) -> None:
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(0))
    encoder = encoding.Encoder(tiny_sd, lrm, 0, "no")
    pixels = torch.rand(2, 7, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    flips = torch.arange(14).view(2, 7) % 3 == 0 if mirrored else None
    whole = encoder.posterior({"pixels": pixels}, None, flips)
    expected = encoder.vae.encode(torch.where(flips[..., None, None, None], pixels.flip(-1), pixels)
                                  .flatten(0, 1) if mirrored else pixels.flatten(0, 1)).latent_dist
    assert (torch.equal(whole[0].flatten(0, 1), expected.mean)
            and torch.equal(whole[1].flatten(0, 1), expected.std))
    monkeypatch.setattr(encoding, "ENCODED", 4 * 16 * 16)
    shapes, encode = [], encoding.encode
    monkeypatch.setattr(encoding, "encode",
                        lambda vae, x, precision: shapes.append(len(x)) or encode(vae, x, precision))
    for a, b in zip(whole, encoder.posterior({"pixels": pixels}, None, flips), strict=True):
        assert torch.equal(a, b)
    assert shapes == [4, 4, 4, 2]


# Time


def test_metrics_that_are_read_late_are_the_same(settings: LRM, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a step's metrics are read when the next one is queued."""
    at_once = train_lrm.train(settings)
    monkeypatch.setattr(compilation, "metric_lag", lambda: 1)
    late = train_lrm.train(replace(settings, out=str(tmp_path / "late")))
    assert metrics(at_once) == metrics(late)
    assert (at_once / selection.FINAL / "training_stage.json").read_bytes() == (
        late / selection.FINAL / "training_stage.json").read_bytes()


def test_time_spent_waiting_is_said(settings: LRM, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    fetch, step = dataset.PairDataset.__getitem__, steps.train_step

    def slow(self, i: int) -> dict:
        now[0] += 1.5
        return fetch(self, i)

    def slower(*args) -> torch.Tensor:
        now[0] += 9.0
        return step(*args)
    monkeypatch.setattr(dataset.PairDataset, "__getitem__", slow)
    monkeypatch.setattr(steps, "train_step", slower)
    out = train_lrm.train(settings)
    rows = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and all(row["seconds"] == 12 and row["data"] == 0.25 for row in rows)
    said = capsys.readouterr().out
    assert said.count(" | 12000 ms | data 25% | ") == 9
    assert ("waited for pictures 25% of the time: use --cache-latents DIR, or more --num-workers than 0"
            in said)


def test_the_command(settings: LRM, tmp_path: Path) -> None:
    assert train.main(["lrm", "--model", settings.model, "--pairs", settings.pairs, "--out",
                       str(tmp_path / "run"), "--batch-size", "4", "--max-steps", "2", "--warmup-steps", "0",
                       "--num-workers", "0", "--cache-latents", str(tmp_path / "latents")]) == 0
    (folder,) = (tmp_path / "latents").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["contents.json", "latents", "marks"]
    assert json.loads((folder / "contents.json").read_text())["entry"] == [8, 8, 8]
