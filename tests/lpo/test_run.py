"""LPO runs that are stopped, resumed and kept: inside a prompt batch, by steps, with every optimizer;
and what they draw."""

import itertools
import json
import os
import signal
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lpo_fast import config, report, train_lpo
from lpo_fast.errors import InputError
from lpo_fast.lpo import batches as lpo_batches
from lpo_fast.lpo import checkpoints, steps
from lpo_fast.lpo.batches import Progress
from lpo_fast.lpo.sampling import LatentPairs
from lpo_fast.method import noise
from lpo_fast.models import loras
from lpo_fast.run import states
from lpo_fast.shapes import world
from lpo_fast.system import distributed

NAME = "conv_in.weight"


@pytest.fixture
def settings(tmp_path: Path, tiny_sd: Path, tiny_lrm: Path) -> config.LPO:
    """Three prompt batches of two prompts, some four optimizer steps each."""
    (tmp_path / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:6]))
    return replace(config.shapes().lpo, model=str(tiny_sd), lrm=str(tiny_lrm),
                   prompts=str(tmp_path / "prompts.json"), out=str(tmp_path / "run"), batch_size=2,
                   num_steps=4, train_batch_size=2, threshold_min=0.0, threshold_max=0.001, pictures=0,
                   max_batches=0, save_steps=1000, mixed_precision="no")


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """A signal arrives during an optimizer step."""
    real, count = steps.train_step, []

    def train_step(*arguments):
        count.append(1)
        if len(count) == step:
            os.kill(os.getpid(), number)
        return real(*arguments)
    monkeypatch.setattr(steps, "train_step", train_step)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_inside_a_batch_goes_on_exactly(settings, number, optimizer, monkeypatch,
                                                      tmp_path) -> None:
    settings = replace(settings, optimizer=optimizer, targets=("to_q", "to_k", "to_v", "to_out.0"), rank=16)
    whole = train_lpo.train(replace(settings, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_at(patch, 6, number)
        with pytest.raises(SystemExit) as stopped:
            train_lpo.train(settings)
    assert stopped.value.code == 128 + number
    state = torch.load(tmp_path / "run" / states.STATE, weights_only=True)["at"]
    # in the middle of the second
    assert state["step"] == 6 and state["batch"] == 1 and len(state["pairs"][0]) > 0
    run = train_lpo.train(replace(settings, resume=True))
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    first, second = (loras.read_lora(folder) for folder in (whole, run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_exit_code_after_a_signal_can_be_chosen(settings, monkeypatch) -> None:
    stop_at(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train_lpo.train(replace(settings, preempt_exit_code=85))
    assert stopped.value.code == 85


def test_states_are_saved_by_steps(settings, monkeypatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(states, "save_state", lambda file, at, parts: saved.append(at["step"]))
    train_lpo.train(replace(settings, save_steps=3))
    assert saved[:3] == [3, 6, 9] and saved[-1] >= 9


def test_checkpoints_are_limited(settings) -> None:
    out = train_lpo.train(replace(settings, epochs=3, keep_checkpoints=2, num_steps=2))
    assert [path.name for path in checkpoints.checkpoints(out)] == ["checkpoint_1", "checkpoint_2"]


def test_full_fine_tuning_goes_on_from_a_checkpoint(settings, tmp_path) -> None:
    """With the base's weights as the reference, not the checkpoint's."""
    settings = replace(settings, full=True, num_steps=2, learning_rate=1e-3)
    whole = train_lpo.train(replace(settings, epochs=2, out=str(tmp_path / "whole")))
    second = train_lpo.train(replace(settings, epochs=2, resume_from=str(whole / "checkpoint_0")))
    rows = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, second)]
    assert rows[1] == rows[0][-len(rows[1]):] and 0 < len(rows[1]) < len(rows[0])


def test_max_batches_count_from_the_checkpoint(settings, monkeypatch, tmp_path) -> None:
    """Also where that run was stopped and resumed."""
    first = train_lpo.train(replace(settings, epochs=1, num_steps=2, out=str(tmp_path / "first")))
    settings = replace(settings, epochs=5, num_steps=2, max_batches=2, resume_from=str(first))
    with monkeypatch.context() as patch:
        stop_at(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_lpo.train(settings)
    run = train_lpo.train(replace(settings, resume=True, resume_from=""))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["kind"] == "batch"] == [1, 1]


def test_a_checkpoint_after_the_last_epoch_is_refused(settings, tmp_path) -> None:
    first = train_lpo.train(replace(settings, epochs=2, num_steps=2, out=str(tmp_path / "first")))
    with pytest.raises(InputError, match="checkpoint_1 has finished epoch 1; use --epochs above 2") as caught:
        train_lpo.train(replace(settings, epochs=2, resume_from=str(first)))
    assert caught.value.key == "--resume-from" and not Path(settings.out).exists()


def test_validation_pictures(settings, tmp_path) -> None:
    out = train_lpo.train(replace(settings, epochs=2, num_steps=2,
                                  validation_prompts=("a red circle", "<b>&"), validation_pictures=3,
                                  log_with="tensorboard"))
    for epoch in (0, 1):
        assert Image.open(out / "pictures" / f"validation_{epoch}.png").size == (3 * 16, 2 * 16)
    page = report.write(out).read_text()
    assert "after epoch 1" in page and "&lt;b&gt;&amp;" in page and "<b>&" not in page
    assert any(out.rglob("events.out.tfevents*"))


def test_the_text_pass_alone(settings) -> None:
    """Without guidance in training the first ratio is still 1, and the loss another after the first step."""
    rows = [[json.loads(line) for line in (train_lpo.train(replace(
        settings, train_cfg=cfg, out=f"{settings.out}_{cfg}")) / "metrics.jsonl").read_text().splitlines()]
        for cfg in (True, False)]
    first, second = ([row for row in run if row["kind"] == "train"] for run in rows)
    assert first[0]["train_loss"] == second[0]["train_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert (first[1]["train_loss"] != second[1]["train_loss"]
            and first[0]["grad_norm"] != second[0]["grad_norm"])


def test_order_of_the_prompts() -> None:
    parts = lpo_batches.order(config.LPO(batch_size=4, shuffle=False), 3, 10)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert ([len(part) for part in lpo_batches.order(config.LPO(batch_size=4, drop_last=True), 0, 10)]
            == [4, 4])
    # never none
    assert [len(part) for part in lpo_batches.order(config.LPO(batch_size=40, drop_last=True), 0, 10)] == [10]
    for size, prompts, drop_last in itertools.product((1, 3, 4, 40), (1, 3, 8, 10), (False, True)):
        settings = config.LPO(batch_size=size, drop_last=drop_last)
        assert lpo_batches.per_epoch(settings, prompts) == len(lpo_batches.order(settings, 0, prompts))
    whole = torch.cat(lpo_batches.order(config.LPO(batch_size=4), 1, 10))
    assert torch.equal(whole, noise.permutation(42, 1, 0, 10))


PAIRS = LatentPairs(*torch.zeros(6, 1))  # of a batch that is half done


@pytest.mark.parametrize("drop_last, unfinished", list(product([False, True], repeat=2)))
def test_batches_left(drop_last, unfinished, monkeypatch) -> None:
    """As many as the loop goes through that was stopped in the second of three epochs, in or after a prompt
    batch, and goes on with any number of processes."""
    settings = config.LPO(batch_size=1, drop_last=drop_last, epochs=3)
    for prompts, before, after in product(range(1, 13), range(1, 5), range(1, 5)):
        monkeypatch.setattr(distributed, "world_size", lambda count=before: count)
        for done in accumulate(map(len, lpo_batches.order(settings, 1, prompts))):
            if not unfinished and prompts - done < (before if drop_last else 1):
                continue  # the third epoch has begun
            monkeypatch.setattr(distributed, "world_size", lambda count=after: count)
            at, batches = Progress(epoch=1, prompts=done, pairs=PAIRS if unfinished else None), 0
            left = lpo_batches.batches_left(settings, prompts, at)
            while at.epoch < 3:
                at.prompts += (0 if at.pairs else
                               len(lpo_batches.order(settings, at.epoch, prompts, at.prompts)[0]))
                at.pairs, batches = None, batches + 1
                if prompts - at.prompts < (after if drop_last else 1):
                    at.epoch, at.prompts = at.epoch + 1, 0
            at.pairs = PAIRS if unfinished else None
            assert left == batches and lpo_batches.batches_left(settings, prompts, at) == 0


def test_a_run_from_a_checkpoint_has_settings_of_its_own(settings, tmp_path) -> None:
    """The optimizer's moments come from the checkpoint; rate, weight decay, betas and eps do not."""
    first = train_lpo.train(replace(settings, num_steps=2))
    own = {"learning_rate": 1e-3, "weight_decay": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.9,
           "adam_epsilon": 1e-6}
    second = train_lpo.train(replace(settings, num_steps=2, epochs=2, out=str(tmp_path / "on"),
                                     resume_from=str(first), **own))
    before, after = (torch.load(folder / checkpoints.OPTIMIZER)
                     for folder in (first / "checkpoint_0", second / "checkpoint_1"))
    group = after["param_groups"][0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-3, 0.5, (0.8, 0.9), 1e-6)
    assert after["state"][0]["step"] > before["state"][0]["step"] > 0
    assert ({json.loads(line).get("lr", 1e-3) for line in (second / "metrics.jsonl").read_text().splitlines()}
            == {1e-3})


def test_the_average_that_is_exported(settings, monkeypatch, tmp_path) -> None:
    """w ← d·w + (1 − d)·w_k by hand, with diffusers' warm-up: d is 0 at step k = 0, then min(decay, (1 +
    k)/(10 + k)). Of a run without a step it is what the run started from, be that a checkpoint."""
    real, seen = steps.train_step, []

    def train_step(policy, *rest):
        weights = states.Trained(policy.unet)
        seen[:] = seen or [{name: x.clone() for name, x in weights.state_dict().items()}]
        row = real(policy, *rest)
        seen.append({name: x.clone() for name, x in weights.state_dict().items()})
        return row
    monkeypatch.setattr(steps, "train_step", train_step)
    settings = replace(settings, num_steps=3, learning_rate=1e-3, ema_decay=0.22, full=True)

    def exported(**changes) -> torch.Tensor:
        return load_file(train_lpo.train(replace(settings, **changes)) / "unet"
                         / "diffusion_pytorch_model.safetensors")[NAME]

    ours, average = exported(epochs=1), seen[0][NAME]
    for k, weights in enumerate(seen[1:]):
        d = min(0.22, (1 + k) / (10 + k)) if k else 0.0
        average = d * average + (1 - d) * weights[NAME]
    last = seen[-1][NAME]
    assert len(seen) > 3 and (ours - average).abs().max() < 1e-6 and (ours - last).abs().max() > 1e-5
    on = {"resume_from": settings.out, "threshold_min": 0.998, "threshold_max": 0.999}  # no pair is valid
    assert torch.equal(exported(epochs=2, out=str(tmp_path / "on"), **on), last)


def test_a_directory_with_another_run_s_checkpoints_is_refused(settings) -> None:
    """One that was killed before its first state: --keep-checkpoints would take the new
    run's for the old ones."""
    out = train_lpo.train(replace(settings, num_steps=2, epochs=2))
    (out / states.STATE).unlink()
    with pytest.raises(InputError, match="holds checkpoint_0 of another run"):
        train_lpo.train(replace(settings, num_steps=2, keep_checkpoints=1))
    assert [path.name for path in checkpoints.checkpoints(out)] == ["checkpoint_0", "checkpoint_1"]


@pytest.mark.parametrize("official", [False, True])
def test_a_run_goes_on_in_its_own_directory(settings, official, tmp_path) -> None:
    """From its newest checkpoint, as official launches do:
    what came after it is run again, with the same outcome."""
    settings = replace(settings, num_steps=2)
    whole = train_lpo.train(replace(settings, epochs=3, out=str(tmp_path / "whole")))
    train_lpo.train(replace(settings, epochs=3, max_batches=4))  # killed in the second epoch
    if official:  # writes no files of ours
        for name in ("config.json", "metrics.jsonl", states.STATE):
            (tmp_path / "run" / name).unlink()
    source = tmp_path / "run" if official else tmp_path / "run" / "checkpoint_0"
    out = train_lpo.train(replace(settings, epochs=2, resume_from=str(source)))
    train_lpo.train(replace(settings, epochs=3, resume=True))  # of the run that went on
    lines = [(folder / "metrics.jsonl").read_bytes() for folder in (whole, out)]
    assert lines[0].endswith(lines[1]) if official else lines[0] == lines[1]
    first, second = (loras.read_lora(folder) for folder in (whole, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match="holds later checkpoints than checkpoint_0, up to checkpoint_2"):
        train_lpo.train(replace(settings, epochs=3, resume_from=str(out / "checkpoint_0")))


def test_tf32_can_be_turned_off_everywhere(settings, monkeypatch) -> None:
    backends, seen = (torch.backends.cuda.matmul, torch.backends.cudnn), []
    before = [backend.allow_tf32 for backend in backends]

    def load(*_) -> None:
        seen.append([backend.allow_tf32 for backend in backends])
        raise KeyError
    monkeypatch.setattr(train_lpo.policies, "load", load)
    for on in (True, False, True):
        with pytest.raises(KeyError):
            train_lpo.train(replace(settings, tf32=on))
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value
    assert seen == [[True, True], [False, False], [True, True]]


def test_other_prompts_are_not_resumed(settings: config.LPO, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of prompts depends on how many there are, and what is saved are their numbers."""
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_lpo.train(settings)
    prompts = json.loads(Path(settings.prompts).read_text())
    Path(settings.prompts).write_text(json.dumps(prompts[::-1]))
    with pytest.raises(InputError,
                       match="--prompts .*prompts.json: holds other rows than when this run began"):
        train_lpo.train(replace(settings, resume=True))
    Path(settings.prompts).write_text(json.dumps(prompts, indent=2))
    train_lpo.train(replace(settings, resume=True))


def test_deterministic_runs_are_equal_in_every_byte(settings: config.LPO, tmp_path: Path) -> None:
    """Twice the same, and the same as without: on a CPU nothing changes."""
    runs = [train_lpo.train(replace(settings, out=str(tmp_path / str(i)), deterministic=i < 2,
                                    validation_prompts=("a",))) for i in range(3)]
    assert not torch.are_deterministic_algorithms_enabled()
    for name in ("metrics.jsonl", "checkpoint_0/unet_lora.pt", loras.LORA_DIFFUSERS,
                 "pictures/validation_0.png"):
        assert len({(run / name).read_bytes() for run in runs}) == 1, name


def test_a_resumed_run_is_not_beyond_what_is_asked_for(settings: config.LPO) -> None:
    """Nothing is exported under settings that other weights belong to; what memory and speed want may change.
    """
    train_lpo.train(replace(settings, epochs=2))
    with pytest.raises(InputError,
                       match="--epochs 1: is less than the run in .* has done, 2 epochs and 6 batches"):
        train_lpo.train(replace(settings, epochs=1, resume=True))
    with pytest.raises(InputError,
                       match="--max-batches 4: is less than the run in .* has done, 2 epochs and 6 batches"):
        train_lpo.train(replace(settings, epochs=2, max_batches=4, resume=True))
    train_lpo.train(replace(settings, epochs=2, resume=True, checkpointing="selective"))
