"""Steps without a finite gradient, memory that does not suffice, and signs of a collapse."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lpo_fast import config, replay, train, train_lpo, train_lrm
from lpo_fast.config import LPO, LRM
from lpo_fast.errors import InputError
from lpo_fast.lpo import batches, steps
from lpo_fast.lpo.sampling import LatentPairs
from lpo_fast.lrm import checkpoint, encoding, selection
from lpo_fast.lrm import steps as lrm_steps
from lpo_fast.models import loras
from lpo_fast.run import monitor, optimization, states
from lpo_fast.shapes import world
from tests.helpers.pairs import RED, plain, table
from tests.helpers.runs import rows

PROMPTS = world.captions(held_out=False)[:4]


@pytest.fixture
def lpo(tiny_sd: Path, tiny_lrm: Path, tmp_path: Path) -> LPO:
    """Two prompt batches of 12 pairs, three optimizer steps each."""
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return LPO(model=str(tiny_sd), lrm=str(tiny_lrm), prompts=str(tmp_path / "prompts.json"),
               out=str(tmp_path / "run"), num_steps=6, num_candidates=2, batch_size=2, train_batch_size=4,
               pictures=0, epochs=1, threshold_shape="none", threshold_min=0.0, beta=50.0)


def injected(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, LatentPairs], LatentPairs]) -> None:
    """change(call, pairs): what the call-th evaluation of a training pass is given instead."""
    evaluate, calls = steps.evaluate, iter(range(10**6))
    monkeypatch.setattr(steps, "evaluate", lambda policy, sched, pairs, *args, **how: evaluate(
        policy, sched, change(next(calls), pairs), *args, **how))


def poisoned(pairs: LatentPairs) -> LatentPairs:
    return pairs._replace(winner=pairs.winner * math.nan)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return loras.read_lora(run)


def test_a_step_without_finite_loss_changes_nothing(lpo: LPO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                    capsys) -> None:
    """The last step is poisoned: the weights are those of a run that ends before it, and its inputs are kept.
    """
    with monkeypatch.context() as patch:
        injected(patch, lambda call, pairs: poisoned(pairs) if call == 5 else pairs)
        run = train_lpo.train(lpo)
    told = capsys.readouterr().out
    assert (told.count("has no finite loss and was skipped") == 1
            and "1 of 6 optimizer steps had no finite" in told)
    assert [row["train_loss"] is None for row in rows(run)] == [False] * 5 + [True]
    assert all(x.isfinite().all() for x in weights(run).values())
    steps = []
    step = torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(1) or (
            step(self, *a, **k) if len(steps) <= 5 else None))
        other = train_lpo.train(replace(lpo, out=str(tmp_path / "five")))
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(run).items())
    assert replay.main([str(run / monitor.SKIPPED)]) == 0
    said = capsys.readouterr().out
    assert ("step 5, 4 pairs at timesteps" in said and "with the weights after 6 steps" in said
            and "all values are finite here" in said)


def test_replay_names_what_is_not_finite(lpo: LPO, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Pairs that are bad themselves: everything that follows from them is named,
    the reference's output is not."""
    monkeypatch.setattr(batches, "shuffled", lambda pairs, *_: poisoned(pairs))
    run = train_lpo.train(replace(lpo, max_batches=1))
    lines = replay.replay(run / monitor.SKIPPED)
    assert lines[0].startswith("step 0, ")  # the first one's
    assert (any(line.startswith("pairs, winner: ") for line in lines)
            and any(line.startswith("loss: 1 of 1") for line in lines))
    assert not any("reference" in line or line.startswith("pairs, loser") for line in lines)
    capsys.readouterr()


@pytest.mark.parametrize("argv", [[], ["nothing.pt"], ["--help"], ["a", "b"]])
def test_replay_of_no_file(argv: list[str], capsys) -> None:
    assert replay.main(argv) == 2 and capsys.readouterr().err.startswith("error: FILE ")


def test_too_many_in_a_row_end_the_run(lpo: LPO, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the state of a run whose weights are those of the start;
    it goes on with --resume when the cause is gone."""
    monkeypatch.setattr(monitor, "IN_A_ROW", 3)
    with monkeypatch.context() as patch:
        injected(patch, lambda call, pairs: poisoned(pairs))
        with pytest.raises(InputError, match="3 optimizer steps in a row had no finite gradient, the last "
                           "of them step 2"):
            train_lpo.train(lpo)
    run = train_lpo.train(replace(lpo, resume=True))
    losses = [row["train_loss"] for row in rows(run)]
    assert losses[:3] == [None] * 3 and all(math.isfinite(loss) for loss in losses[3:]) and len(losses) == 6


def test_skipped_steps_leave_the_scale_as_it_is() -> None:
    """After as many as would have driven a scale that halves to 0."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    update = optimization.OptimizerStep(optimizer, optimization.scaler(torch.device("cpu"), "no"), 1.0, 1, "")

    def gradients(factor: float) -> Callable[[int], torch.Tensor]:
        def run(_: int) -> torch.Tensor:
            loss = (weight * factor * torch.tensor([3.0, 0.0, 4.0])).sum()
            update.scaler.scale(loss).backward()
            return loss.detach()
        return run
    for _ in range(160):
        update(gradients(math.nan))
    assert weight.tolist() == [1.0, 1.0, 1.0]
    _, norm = update(gradients(1.0))
    assert norm.item() == 5.0 and torch.allclose(weight.detach(), torch.tensor([0.4, 1.0, 0.2]))


def test_a_pass_that_fails_leaves_no_gradient() -> None:
    """Of a step of two passes the second does not fit: both are gone through again, by smaller ones."""
    weight, sizes = torch.nn.Parameter(torch.tensor([2.0])), []
    optimizer = torch.optim.SGD([weight], lr=1.0)
    update = optimization.OptimizerStep(optimizer, optimization.scaler(torch.device("cpu"), "no"), 1e9, 4, "")

    def gradients(size: int) -> torch.Tensor:
        for number in range(8 // size):
            if size == 4 and number == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            sizes.append(size)
            update.scaler.scale(weight.sum() * size / 8).backward()
        return weight.detach()
    _, norm = update(gradients)
    assert sizes == [4, 2, 2, 2, 2] and norm.item() == 1.0 and weight.item() == 1.0


def test_the_scaler_of_other_precisions_changes_nothing(lpo: LPO, monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    run = train_lpo.train(lpo)
    monkeypatch.setattr(optimization, "scaler", lambda *_: torch.amp.GradScaler("cpu", enabled=False))
    other = train_lpo.train(replace(lpo, out=str(tmp_path / "other")))
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(run).items())


def test_too_little_memory_halves_the_passes(lpo: LPO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                             capsys) -> None:
    """More than one pair at a time never fit: metrics are those of another run but for rounding,
    and each size is said once."""
    plain = rows(train_lpo.train(lpo))
    capsys.readouterr()

    def small(call: int, pairs: LatentPairs) -> LatentPairs:
        if len(pairs.t) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pairs
    injected(monkeypatch, small)
    halved = rows(train_lpo.train(replace(lpo, out=str(tmp_path / "halved"))))
    told = capsys.readouterr().out
    assert told.count("does not fit into the GPU's memory") == 2
    assert "of 4 pairs does not fit" in told and "from now on its size is 1, " in told
    for a, b in zip(plain, halved, strict=True):
        assert a.pop("kind") == b.pop("kind") and a == pytest.approx(b, rel=1e-3, abs=1e-6)


def test_no_pair_fits(lpo: LPO, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    injected(monkeypatch, never)
    with pytest.raises(InputError, match=r"a training micro-batch of 1 pair: does not fit .*checkpointing"):
        train_lpo.train(lpo)


def test_no_prompt_fits(lpo: LPO, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_, **__) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(batches, "sample_pairs", never)
    with pytest.raises(InputError, match="--batch-size 2: this number of prompts does not fit"):
        train_lpo.train(lpo)


@pytest.fixture
def lrm(tiny_sd: Path, tmp_path: Path) -> LRM:
    """Three steps of four of six pairs."""
    path = table(tmp_path / "p.parquet", list("abaacd"), jpg_0=[RED, plain((0, 255, 0))] * 3)
    return replace(config.sd15().lrm, model=str(tiny_sd), pairs=str(path), out=str(tmp_path / "lrm"),
                   batch_size=4, max_steps=3, warmup_steps=1, learning_rate=1e-3, num_workers=0, save_steps=1)


def passes(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, torch.Tensor], torch.Tensor]) -> list[int]:
    """change(step, x): what a training pass of the LRM is given as noisy latents instead.
    The sizes of all passes."""
    sizes, pair_loss, latents = [], lrm_steps.pair_loss, encoding.Encoder.latents

    def counted(lrm, encoder, batch, step, *rest):
        sizes.append(len(batch["rows"]))
        return pair_loss(lrm, encoder, batch, step, *rest)
    monkeypatch.setattr(lrm_steps, "pair_loss", counted)
    monkeypatch.setattr(encoding.Encoder, "latents", lambda self, mean, std, rows, step, t: change(
        step, latents(self, mean, std, rows, step, t)))
    return sizes


def test_an_lrm_step_without_finite_loss_changes_nothing(lrm: LRM, monkeypatch: pytest.MonkeyPatch,
                                                         tmp_path: Path, capsys) -> None:
    """The last one: the weights are those of the step before. Its inputs are kept, and here they are finite.
    """
    def weights(settings: LRM) -> dict[str, torch.Tensor]:
        return checkpoint.load_lrm(train_lrm.train(settings) / selection.FINAL).state_dict()
    two = weights(replace(lrm, out=str(tmp_path / "two"), max_steps=3))
    state = torch.load(tmp_path / "two" / states.STATE_BEFORE, weights_only=True)["weights"]  # after step 2
    with monkeypatch.context() as patch:
        passes(patch, lambda step, x: x * math.nan if step == 2 else x)
        three = weights(lrm)
    told = capsys.readouterr().out
    assert (told.count("step 2 has no finite loss and was skipped") == 1
            and "1 of 3 optimizer steps had no finite" in told)
    assert all(torch.equal(three[name], x) for name, x in state.items())
    assert any(not torch.equal(three[name], two[name]) for name in state)
    run = Path(lrm.out)
    assert [row["loss"] is None for row in rows(run)] == [False, False, True]
    assert replay.main([str(run / monitor.SKIPPED)]) == 0
    said = capsys.readouterr().out
    assert "step 2, rows [" in said and "all values are finite here" in said


def test_replay_of_an_lrm_step_names_what_is_not_finite(lrm: LRM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that gives NaN."""
    encode = encoding.encode
    monkeypatch.setattr(encoding, "encode", lambda *arguments: encode(*arguments) * math.nan)
    lines = replay.replay(train_lrm.train(replace(lrm, max_steps=1, warmup_steps=0)) / monitor.SKIPPED)
    assert lines[0].startswith("step 0, rows [") and lines[1].startswith("VAE's posterior, mean: ")
    assert any(line.startswith("loss: 1 of 1") for line in lines)
    assert not any(line.startswith("logit_scale") for line in lines)  # the weights are finite


def test_replay_takes_the_weights_that_were_kept(lrm: LRM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        passes(patch, lambda step, x: x * math.nan)
        file = train_lrm.train(replace(lrm, max_steps=1, warmup_steps=0)) / monitor.SKIPPED
    assert replay.replay(file)[1].startswith("all values are finite here")
    kept = torch.load(file, weights_only=True)
    kept["weights"]["visual_projection.weight"][0, 0] = math.inf
    torch.save(kept, file)
    assert any(line.startswith("visual_projection.weight: 1 of ") for line in replay.replay(file))


def test_lrm_steps_that_fail_in_a_row_end_the_run(lrm: LRM, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(monitor, "IN_A_ROW", 2)
    with monkeypatch.context() as patch:
        passes(patch, lambda step, x: x * math.nan)
        with pytest.raises(InputError, match="2 optimizer steps in a row had no finite gradient, the last "
                           "of them step 1"):
            train_lrm.train(lrm)
    losses = [row["loss"] for row in rows(train_lrm.train(replace(lrm, resume=True)))]
    assert losses[:2] == [None] * 2 and math.isfinite(losses[2])
    assert "2 of 3 optimizer steps had no finite gradient and were skipped" in capsys.readouterr().out


def test_lrm_memory_that_does_not_suffice(lrm: LRM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                          capsys) -> None:
    """No more than two pairs fit: the four of a step take two passes, with the same losses."""
    whole = train_lrm.train(lrm)
    capsys.readouterr()

    def small(step: int, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return x
    sizes = passes(monkeypatch, small)
    halved = train_lrm.train(replace(lrm, out=str(tmp_path / "halved")))
    assert sizes == [4, 2, 2, 2, 2, 2, 2]
    assert capsys.readouterr().out.count("from now on its size is 2, with the same loss") == 1
    for a, b in zip(rows(whole), rows(halved), strict=True):
        assert (a["loss"] == pytest.approx(b["loss"], rel=1e-3)
                and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2))
    with pytest.raises(InputError, match="a training micro-batch of 4 pairs: does not fit .* GPU's memory "
                       ".*--accumulate"):
        # their negatives are those of a pass
        train_lrm.train(replace(lrm, out=str(tmp_path / "negatives"), loss_type="both"))


def test_memory_that_does_not_suffice_elsewhere(lrm: LRM, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def never(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    monkeypatch.setattr(lrm_steps, "load", never)
    assert train.main(["lrm", "--model", lrm.model, "--pairs", lrm.pairs, "--out", lrm.out]) == 2
    assert "error: the GPU's memory: is too small (CUDA out of memory" in capsys.readouterr().err


def test_a_poisoned_step_among_others(lpo: LPO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are read at the end of a prompt batch of three steps: what is kept says how many steps the
    weights have seen. With as many validation prompts as prompts, and passes of two pairs."""
    lpo = replace(lpo, train_batch_size=2, accumulate=2, validation_prompts=tuple(PROMPTS),
                  validation_pictures=1, validate_epochs=100)
    injected(monkeypatch, lambda call, pairs: poisoned(pairs) if call == 2 else pairs)
    run = train_lpo.train(lpo)
    assert [row["train_loss"] is None for row in rows(run)] == [False, True, False, False, False, False]
    said = replay.replay(run / monitor.SKIPPED)[0]
    assert torch.load(run / monitor.SKIPPED, weights_only=True)["size"] == 2  # of a pass
    assert said.startswith("step 1, 4 pairs at ") and said.endswith("with the weights after 3 steps")
