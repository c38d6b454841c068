"""The LRM loop on its training data: timesteps, accumulation, corrupt pairs, checkpoints, exact resumption.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lpo_fast import config, train_lrm
from lpo_fast.config import LRM
from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint, encoding, selection, steps, validation
from lpo_fast.method import noise
from lpo_fast.run import states
from tests.helpers.models import update as update_of
from tests.helpers.pairs import BLUE, RED, plain, table
from tests.helpers.runs import rows


@pytest.fixture
def settings(tmp_path: Path, tiny_sd: Path) -> LRM:
    """An LRM run of three steps of four of six pairs."""
    path = table(tmp_path / "p.parquet", ["a", "b", "a", "a", "c", "d"], jpg_0=[RED, plain((0, 255, 0))] * 3)
    return replace(config.sd15().lrm, model=str(tiny_sd), pairs=str(path), out=str(tmp_path / "run"),
                   batch_size=4, max_steps=3, warmup_steps=1, learning_rate=1e-3, num_workers=0,
                   validate_steps=1, save_steps=1)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_lrm(run / selection.FINAL).state_dict()


def test_timesteps_of_comparisons() -> None:
    """Every first timestep, its neighbour on either side where there are two,
    and the less noisy one preferred."""
    settings = LRM(compare_between_timestep=True, timestep_interval=2, largest_timestep=301)  # 1, 51, … 301
    pairs = torch.arange(4000)
    compare, labels = pairs % 2 == 0, torch.tensor([[0.5], [0.5]]).expand(2, 4000)
    t, made = encoding.timesteps(settings, 3, pairs, compare, labels)
    assert (t[:, ~compare][0] == t[:, ~compare][1]).all() and (made[:, ~compare] == 0.5).all()
    first, second = t[:, compare]
    assert set(t.flatten().tolist()) == set(range(1, 302, 50)) and ((first - second).abs() == 100).all()
    assert (torch.equal(made[0, compare] == 1, first < second)
            and torch.equal(made[1, compare] == 1, first > second))
    steps = {(int(a), int(b)) for a, b in zip(first, second, strict=True)}
    assert steps == {(a, b) for a in range(1, 302, 50) for b in (a - 100, a + 100) if 1 <= b <= 301}
    alone = [encoding.timesteps(settings, 3, pairs[i:i + 1], compare[i:i + 1], labels[:, :1])
             for i in range(20)]
    assert torch.equal(torch.cat([a for a, _ in alone], 1), t[:, :20])  # however pairs are batched


def test_one_timestep() -> None:
    labels = torch.tensor([[1.0], [0.0]])
    settings = LRM(variable_timestep=False, constant_timestep=7)
    t, same = encoding.timesteps(settings, 0, torch.tensor([0]), torch.tensor([False]), labels)
    assert t.tolist() == [[7], [7]] and same is labels


def test_mirrored() -> None:
    def mirrored(rows: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        flips = encoding.flips(LRM(hflip=True), 2, rows)
        return encoding.mirrored(pixels.flatten(0, 1), flips.flatten()).view_as(pixels)
    pixels = torch.randn(2, 400, 3, 4, 4)
    made = mirrored(torch.arange(400), pixels)
    kept, flipped = ((made == other).all(-1).all(-1).all(-1) for other in (pixels, pixels.flip(-1)))
    assert ((kept ^ flipped).all() and 0.4 < flipped[0].float().mean() < 0.6
            and not torch.equal(flipped[0], flipped[1]))
    alone = mirrored(torch.tensor([7]), pixels[:, 7:8])
    assert torch.equal(alone, made[:, 7:8])


def test_noise_offset_is_one_number_a_channel(tiny_sd: Path) -> None:
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(0))
    plain_, offset = (encoding.Encoder(tiny_sd, lrm, 0, "no", noise_offset=amount) for amount in (0.0, 0.5))
    mean, std, t = torch.zeros(2, 3, 4, 8, 8), torch.ones(2, 3, 4, 8, 8), torch.tensor([951, 501, 1])
    rows = torch.tensor([3, 1, 2])
    added = offset.latents(mean, std, rows, 5, t) - plain_.latents(mean, std, rows, 5, t)
    assert (added.std((-1, -2)) < 1e-5).all()
    drawn = noise.normal(0, 5, rows, encoding.OFFSET, 2, (4,))
    sigma = added[..., 0, 0] / (0.5 * drawn)
    # √(1 − a_t), the same for all channels
    assert torch.allclose(sigma, sigma[0, :, :1].expand_as(sigma), rtol=1e-2)


def test_accumulation_leaves_the_step_unchanged(settings: LRM, tmp_path: Path) -> None:
    whole = train_lrm.train(settings)
    for passes in (2, 4):
        parts = train_lrm.train(replace(settings, accumulate=passes, out=str(tmp_path / f"run{passes}")))
        for a, b in zip(rows(whole, "train"), rows(parts, "train"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert (a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
                    and a["accuracy"] == b["accuracy"])


def test_a_corrupt_pair_is_as_if_it_were_not_in_the_batch(settings: LRM, tmp_path: Path,
                                                          tiny_sd: Path) -> None:
    """The step equals one of the other pairs alone, weights included."""
    lrm = checkpoint.new_lrm(tiny_sd, generator=torch.Generator().manual_seed(0))
    encoder = encoding.Encoder(tiny_sd, lrm, 0, "no")
    pixels = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = {"rows": torch.arange(4), "captions": ["a", "b", "a", "c"], "pixels": pixels,
             "labels": torch.tensor([[1.0, 0, 1, 0.5], [0, 1, 0, 0.5]]), "counts": torch.tensor([2, 1, 2, 1]),
             "compare": torch.zeros(4, dtype=torch.bool), "corrupt": torch.tensor([False, True, False, True])}
    good = [0, 2]
    small = {key: value[:, good] if key in ("pixels", "labels") else value[good]
             for key, value in batch.items() if key != "captions"} | {"captions": ["a", "a"]}
    broken = batch | {"pixels": pixels * ~batch["corrupt"][None, :, None, None, None]}
    for loss_type in ("pair", "both"):
        options = replace(settings, loss_type=loss_type)
        start = {name: p.detach().clone() for name, p in lrm.named_parameters()}
        results = []
        for made in (small, broken):
            for name, p in lrm.named_parameters():
                p.data.copy_(start[name])
            optimizer = torch.optim.SGD([p for p in lrm.parameters() if p.requires_grad], lr=0.0)
            update = update_of(optimizer, 4)
            results.append(steps.train_step(lrm, encoder, made, 0, update, options).tolist())
        assert results[0] == pytest.approx(results[1], rel=1e-4)
    every = batch | {"corrupt": torch.ones(4, dtype=torch.bool)}
    assert steps.train_step(lrm, encoder, every, 0, update, settings)[0] == 0


def test_corrupt_pairs_are_counted_and_may_stop_the_run(settings: LRM, tmp_path: Path, capsys) -> None:
    path = table(tmp_path / "q.parquet", list("abcdef"), jpg_0=[RED, b"?", RED, RED, b"", RED])
    held = table(tmp_path / "held.parquet", ["a", "b"], jpg_1=[b"?", BLUE])
    broken = replace(settings, pairs=str(path), validation_pairs=str(held), batch_size=6)
    out = train_lrm.train(broken)
    assert [row["corrupt"] for row in rows(out, "train")] == [3, 3, 3]
    assert {row["n"] for row in rows(out, "validation")} == {1}
    assert "2 train pairs left out because a picture cannot be decoded" in capsys.readouterr().out
    with pytest.raises(InputError, match="pictures of 2 pairs cannot be decoded, the first: rows 1, 4"):
        train_lrm.train(replace(broken, max_corrupt=1, out=str(tmp_path / "strict")))


def test_resume_is_exact_with_every_option(settings: LRM, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "p.parquet", ["a", "b", "a", "a", "c", "d"], jpg_0=[RED, b"?"] * 3)
    whole = replace(settings, compare_between_timestep=True, hflip=True, noise_offset=0.1, accumulate=2,
                    num_workers=1, validation_pairs=settings.pairs, test_pairs=settings.pairs)
    first = train_lrm.train(whole)
    assert len(rows(first, "test")) == 1 and len(rows(first, "validation")) == 5
    step, part = steps.train_step, replace(whole, out=str(tmp_path / "part"))

    def killed(*args):
        if args[3] == 2:
            raise KeyError
        return step(*args)
    monkeypatch.setattr(steps, "train_step", killed)
    with pytest.raises(KeyError):
        train_lrm.train(part)
    monkeypatch.undo()
    second = train_lrm.train(replace(part, resume=True))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert all(torch.equal(a, b)
               for a, b in zip(weights(first).values(), weights(second).values(), strict=True))


@pytest.mark.parametrize("options, kept, final", [
    ({}, [2], 2), ({"save_only_if_best": False}, [2], 2),
    ({"save_only_if_best": False, "keep_best": False}, [2, 3], 2),
    ({"save_only_if_best": False, "keep_checkpoints": 2}, [1, 2], 2), ({"keep_checkpoints": 0}, [1, 2], 2),
    ({"final_checkpoint": "last"}, [2], 3),
    ({"save_only_if_best": False, "keep_best": False, "final_checkpoint": "last"}, [3], 3),
    ({"save_only_if_best": False, "keep_checkpoints": 0}, [1, 2, 3], 2),
])
def test_checkpoints(settings: LRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, options: dict,
                     kept: list, final: int) -> None:
    """Validation accuracies 0.5 before the first step, then 0.6, 0.8, 0.55."""
    found = iter([0.5, 0.6, 0.8, 0.55, 0.9])
    monkeypatch.setattr(validation, "validate",
                        lambda *args: {"accuracy": next(found), "accuracy_by_timestep": {}, "n": 1})
    out = train_lrm.train(replace(settings, validation_pairs=settings.pairs, **options))
    assert sorted(int(p.name.removeprefix("checkpoint-gstep")) for p in out.glob("checkpoint-gstep*")) == kept
    stage = json.loads((out / selection.FINAL / "training_stage.json").read_text())
    assert stage["global_step"] == final == rows(out, "validation")[-1]["checkpoint"]
    assert "learned nothing" not in capsys.readouterr().out
    assert (stage.keys() == {"epoch", "step", "global_step", "step_loss", "lr", "metrics"}
            and np.isfinite(stage["step_loss"]))


@pytest.mark.parametrize("accuracies, useless",
                         [([0.6, 0.4, 0.6, 0.5], True), ([0.6, 0.4, 0.61, 0.5], False)])
def test_a_reward_model_that_learned_nothing(settings: LRM, monkeypatch, capsys, accuracies: list,
                                             useless: bool) -> None:
    """Validation accuracies before the first step, then after each of three."""
    found = iter([*accuracies, 0.9])
    monkeypatch.setattr(validation, "validate",
                        lambda *args: {"accuracy": next(found), "accuracy_by_timestep": {}, "n": 1})
    train_lrm.train(replace(settings, validation_pairs=settings.pairs))
    assert ("(best 0.600) is above the one before the first step (0.600): this reward model has "
            "learned nothing" in capsys.readouterr().out) is useless
def test_checkpoints_go_only_when_no_state_names_them(settings: LRM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the validation of step 2 and before its state: what the state of step 1 names is there."""
    found = iter([0.6, 0.8])
    monkeypatch.setattr(validation, "validate",
                        lambda *args: {"accuracy": next(found), "accuracy_by_timestep": {}, "n": 1})
    save, out = states.save_state, Path(settings.out)

    def killed(file: Path, at: dict, parts: dict) -> None:
        if at["step"] == 2:
            raise KeyError
        save(file, at, parts)
    monkeypatch.setattr(states, "save_state", killed)
    with pytest.raises(KeyError):
        train_lrm.train(replace(settings, validation_pairs=settings.pairs, eval_on_start=False))
    named = torch.load(out / states.STATE)["at"]["checkpoints"]
    assert ([step for step, _ in named] == [1]
            and (out / selection.CHECKPOINT.format(1) / "state_dict.pt").is_file())


def test_no_validation_pair_decodes(settings: LRM, tmp_path: Path) -> None:
    # row 0 is not used
    held = table(tmp_path / "held.parquet", ["a", "b"], jpg_1=[BLUE, b"?"], has_label=[False, True])
    with pytest.raises(InputError,
                       match="--validation-pairs .*held.parquet: has no pair whose pictures can be decoded"):
        train_lrm.train(replace(settings, validation_pairs=str(held)))


def test_the_handed_on_model_is_the_one_that_is_judged(settings: LRM,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one's weights are brought back into memory."""
    found, seen = iter([0.6, 0.8, 0.55, 0.9]), []

    def validate(lrm, *args) -> dict:
        seen.append({name: x.clone() for name, x in lrm.state_dict().items()})
        return {"accuracy": next(found), "accuracy_by_timestep": {}, "n": 1}
    monkeypatch.setattr(validation, "validate", validate)
    final = weights(train_lrm.train(replace(settings, validation_pairs=settings.pairs, eval_on_start=False)))
    assert all(torch.equal(x, seen[1][name]) and torch.equal(x, seen[3][name]) for name, x in final.items())
    assert not torch.equal(seen[2]["visual_projection.weight"], seen[3]["visual_projection.weight"])


def test_other_pairs_are_not_resumed(settings: LRM, tmp_path: Path) -> None:
    train_lrm.train(replace(settings, max_steps=2))
    table(tmp_path / "p.parquet", ["a", "b", "a", "a", "c", "e"], jpg_0=[RED, plain((0, 255, 0))] * 3)
    with pytest.raises(InputError, match="--pairs .*p.parquet: holds other rows than when this run began"):
        train_lrm.train(replace(settings, resume=True, max_steps=2))


def test_deterministic_runs_are_equal_in_every_byte(settings: LRM, tmp_path: Path) -> None:
    runs = [train_lrm.train(replace(settings, out=str(tmp_path / str(i)), deterministic=i < 2))
            for i in range(3)]
    for name in ("metrics.jsonl", f"{selection.FINAL}/state_dict.pt"):
        assert len({(run / name).read_bytes() for run in runs}) == 1, name
