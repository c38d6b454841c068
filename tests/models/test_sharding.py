"""Full fine-tuning cut over processes (FSDP, gloo): the weights, files and resumed runs of one process."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from lpo_fast import config, train_lpo
from lpo_fast.run import states
from lpo_fast.shapes import world
from tests.helpers.models import make_sd, two_stages
from tests.helpers.processes import processes
from tests.helpers.programs import STEPS

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Of all weights; the policy also draws between the steps, as in sampling, and after the last one.
WHOLE_STEPS = STEPS
for old, new in (
    ('loras.add_lora(unet, 2, 2, ("to_q", "to_out.0"), 0)\nunet.double()', "unet.double()"),
    ("config = LPO(",
     'policy = Policy(unet, text, None, full=True, sharded=True)\nconfig = LPO(max_grad_norm=0.01, '),
    ("    row = steps", """    with torch.no_grad():
        policy.predict(pairs.x_t, pairs.t, pairs.prompt)
    row = steps"""),
    ("Policy(unet, text, None, full=False)", "policy"),
    ("    torch.save((states.Trained(unet).state_dict(), row), out)", "    torch.save((state, row), out)"),
    ("distributed.barrier()", """with torch.no_grad():
    outputs = {"policy": policy.predict(pairs.x_t, pairs.t, pairs.prompt),
               "reference": policy.reference(pairs.x_t, pairs.t, pairs.prompt)}
state = sharding.gathered(states.Trained(unet).state_dict()) | outputs
held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for network in (unet, policy.frozen)
           for p in network.parameters())
row["held"] = held / 2 / sum(p.numel() for p in unet.parameters())"""),
    ("models import loras", "models import loras, sharding"),
):
    assert WHOLE_STEPS.count(old) == 1, old
    WHOLE_STEPS = WHOLE_STEPS.replace(old, new)


def test_equal_global_batches_give_equal_weights(tiny_sd: Path, tmp_path: Path) -> None:
    """Five SGD steps in float64, clipped; most tensors have rows that 3 does not divide;
    each process holds its part alone."""
    (tmp_path / "steps.py").write_text(WHOLE_STEPS)
    made = {}
    for count in (1, 3):
        done = processes(count, str(tmp_path / "steps.py"), str(tiny_sd), str(tmp_path / f"{count}.pt"),
                         folder=tmp_path)
        assert done.returncode == 0, done.stderr
        made[count] = torch.load(tmp_path / f"{count}.pt")
    weights, row = made[1]
    before = load_file(tiny_sd / WEIGHTS)
    assert row["grad_norm"] > 0.01 and row.pop("held") == 1
    assert max((weights[name] - before[name]).abs().max() for name in before) > 1e-3
    other, other_row = made[3]
    assert weights.keys() == other.keys() == before.keys() | {"policy", "reference"}
    assert all((weights[name] - other[name]).abs().max() < 1e-9 for name in weights)
    assert other_row.pop("held") == pytest.approx(1 / 3, abs=0.03)
    assert other_row == pytest.approx(row, rel=1e-9)


RUNS = """
import os, signal, sys
from dataclasses import replace
from lpo_fast.lpo import steps
from lpo_fast.system import distributed
from lpo_fast import train_lpo
from tests.models.test_sharding import settings
out = sys.argv[1]
settings = replace(settings(*sys.argv[2:]), shard=True)
train_lpo.train(replace(settings, out=f"{out}/whole"))
step, count = steps.train_step, []
def stops(*arguments):
    count.append(1)
    if len(count) == 2 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
steps.train_step = stops
try:
    train_lpo.train(replace(settings, out=f"{out}/stopped"))
except SystemExit as stopped:
    assert stopped.code == 143
steps.train_step = step
train_lpo.train(replace(settings, out=f"{out}/stopped", resume=True))
train_lpo.train(replace(settings, out=f"{out}/average", ema_decay=0.5, max_batches=1))
train_lpo.train(replace(settings, out=f"{out}/average", ema_decay=0.5, resume=True))
train_lpo.train(replace(settings, out=f"{out}/second", resume_from=f"{out}/whole/checkpoint_0"))
train_lpo.train(replace(settings, out=f"{out}/bf16", max_batches=1, mixed_precision="bf16",
                        checkpointing="full", fused_norms=True))
"""


def settings(model: str, lrm: str, prompts: str) -> config.LPO:
    """Two epochs of two batches for two processes, the last of which leaves one of them without a prompt."""
    return replace(config.shapes().lpo, model=model, lrm=lrm, prompts=prompts, epochs=2, batch_size=2,
                   num_steps=3, train_batch_size=2, threshold_min=0.0, threshold_max=0.001, max_batches=0,
                   learning_rate=1e-3, full=True, pictures=1, validation_prompts=("a red circle",),
                   validation_pictures=1, mixed_precision="no")


@pytest.fixture(scope="module")
def cut(tiny_lrm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, config.LPO]:
    """The runs of two processes, and the settings with which one does the same."""
    folder = tmp_path_factory.mktemp("runs")
    small = make_sd(folder / "sd", **two_stages("unet_sd15"))
    (folder / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:5]))
    (folder / "runs.py").write_text(RUNS)
    models = str(small), str(tiny_lrm), str(folder / "prompts.json")
    done = processes(2, str(folder / "runs.py"), str(folder), *models, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, replace(settings(*models), batch_size=4, train_batch_size=4)


def rows(run: Path, kind: str = "train") -> list[dict]:
    """A run's metrics."""
    made = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "kind"} for row in made
            if row["kind"] == kind]


def equal(first: Path, second: Path, tolerance: float = 0.0) -> bool:
    """Whether the files hold the same weights."""
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


def test_the_run_of_one_process(cut: tuple, tmp_path: Path) -> None:
    """Its steps, pictures and files; the state holds whole tensors."""
    folder, alone = cut
    # cuts nothing
    whole, one = folder / "whole", train_lpo.train(replace(alone, out=str(tmp_path / "one"), shard=True))
    assert len(rows(one)) == len(rows(whole)) > 4
    assert all(a == pytest.approx(b, rel=1e-3, abs=1e-5) for a, b in zip(rows(one), rows(whole), strict=True))
    for file in (WEIGHTS, f"checkpoint_0/{WEIGHTS}", f"checkpoint_1/{WEIGHTS}"):
        assert equal(one / file, whole / file, 1e-4), file
        config_file = (whole / file).parent / "config.json"
        assert config_file.read_bytes() == (one / config_file.relative_to(whole)).read_bytes()
    UNet2DConditionModel.from_pretrained(whole / "unet")
    assert {p.name for p in (one / "pictures").iterdir()} == {p.name for p in (whole / "pictures").iterdir()}
    a, b = (torch.load(run / states.STATE, weights_only=True) for run in (one, whole))
    assert all(torch.allclose(a["weights"][name], b["weights"][name], atol=1e-4) for name in a["weights"])
    moments = [run["optimizer"]["state"][0]["exp_avg"] for run in (a, b)]
    assert moments[0].shape == moments[1].shape == next(iter(a["weights"].values())).shape


def test_resumed_runs_are_exact(cut: tuple) -> None:
    """Stopped inside a batch by a signal to one process;
    started again from a checkpoint, with the same reference."""
    folder, _ = cut
    assert ((folder / "stopped" / "metrics.jsonl").read_bytes()
            == (folder / "whole" / "metrics.jsonl").read_bytes())
    for run in ("stopped", "second"):
        assert equal(folder / run / WEIGHTS, folder / "whole" / WEIGHTS)
    assert 0 < len(rows(folder / "second")) < len(rows(folder / "whole"))
    assert rows(folder / "second") == rows(folder / "whole")[-len(rows(folder / "second")):]


def test_other_numbers_of_processes_go_on(cut: tuple, tmp_path: Path, copied) -> None:
    """One, from the checkpoint and from the state of two."""
    folder, alone = cut
    second = train_lpo.train(replace(alone, out=str(tmp_path / "second"),
                                     resume_from=str(folder / "whole" / "checkpoint_0")))
    assert all(a == pytest.approx(b, rel=1e-3, abs=1e-5)
               for a, b in zip(rows(second), rows(folder / "second"), strict=True))
    ended = copied(folder / "average")
    before = load_file(ended / WEIGHTS)
    train_lpo.train(replace(alone, out=str(ended), ema_decay=0.5, resume=True, batch_size=2,
                            train_batch_size=2))
    after = load_file(ended / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing was left to do
    assert not equal(ended / WEIGHTS, folder / "whole" / WEIGHTS, 1e-5)


def test_the_average_of_a_resumed_run(cut: tuple, tmp_path: Path) -> None:
    folder, alone = cut
    one = train_lpo.train(replace(alone, out=str(tmp_path / "one"), ema_decay=0.5))
    assert equal(one / WEIGHTS, folder / "average" / WEIGHTS, 1e-4)


def test_bf16(cut: tuple, tmp_path: Path) -> None:
    """What is rounded is the weights that come together: those that train stay in fp32.
    With recomputation, fused norms."""
    folder, alone = cut
    one = train_lpo.train(replace(alone, out=str(tmp_path / "one"), max_batches=1, mixed_precision="bf16"))
    first, other = rows(one)[0], rows(folder / "bf16")[0]
    assert other["train_ratio_win"] == other["train_ratio_lose"] == 1
    assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=0.1)
    weights = load_file(folder / "bf16" / WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any((tensor.bfloat16() != tensor).any() for tensor in weights.values())


