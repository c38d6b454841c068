"""Two and three processes (gloo) do what one does: the same pairs,
and the same weights from equal global batches."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lpo_fast.config import LRM
from lpo_fast.errors import InputError
from lpo_fast.preflight import runs
from lpo_fast.shapes import world
from tests.helpers.pairs import plain, table
from tests.helpers.processes import ROOT, environment, free_port, processes
from tests.helpers.programs import STEPS

LRM_STEPS = """
import sys, torch
from pathlib import Path
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm import encoding
from lpo_fast.lrm import reward as lrm_reward
from lpo_fast.lrm import steps
from lpo_fast.system import distributed
from lpo_fast.config import LRM
from lpo_fast.run.optimization import OptimizerStep
# in float64
lrm_reward.normalized = lambda projection, x: torch.nn.functional.normalize(projection(x), dim=-1, eps=0)
model, out = sys.argv[1:]
distributed.state()
lrm = checkpoint.new_lrm(Path(model), generator=torch.Generator().manual_seed(0),
                         multi_scale=True).double().train()
lrm.requires_grad_(True)
encoder = encoding.Encoder(Path(model), lrm, 0, "no")
encoder.posterior = lambda batch, *_: (batch["pixels"][:, :, [0, 1, 2, 0]],
                                       torch.full((2, len(batch["rows"]), 1, 1, 1), 0.1).double())
config = LRM(loss_type="both", batch_coeff=0.5, compare_between_timestep=True, aux_loss_coeff=0.5)
update = OptimizerStep(torch.optim.SGD(lrm.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False),
                       config.max_grad_norm, 6 // distributed.world_size(), "")
own, first = 6 // distributed.world_size(), 6 // distributed.world_size() * distributed.rank()
for step in range(5):
    generator = torch.Generator().manual_seed(step)
    labels = torch.rand(6, generator=generator).gt(0.4).double()
    labels = torch.stack([labels, 1 - labels])
    labels[:, 2] = 0.5
    batch = {"rows": torch.arange(6), "captions": list("abcdef"), "counts": torch.tensor([1, 3, 2, 2, 1, 5]),
             "pixels": torch.randn(2, 6, 3, 8, 8, generator=generator).double(), "labels": labels,
             "compare": torch.arange(6) == 1,
             "corrupt": torch.tensor([step > 2, False, False, False, step > 2, step > 2])}
    at = {key: 1 if key in ("pixels", "labels") else 0 for key in batch}
    part = {key: value[first:first + own] if at[key] == 0 else value[:, first:first + own]
            for key, value in batch.items()}
    row = steps.train_step(lrm, encoder, part, step, update, config)
row = dict(zip(steps.STEP, row.tolist(), strict=True))
distributed.barrier()
if distributed.is_main():
    torch.save((lrm.state_dict(), row), out)
"""


def launched(count: int, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a module or a script in ``count`` processes of torch.distributed.run."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", f"--master_port={free_port()}"]
    return subprocess.run([sys.executable, *launcher, *arguments], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module", params=["lpo", "lrm"])
def alone(request: pytest.FixtureRequest, tiny_sd: Path,
          tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """The script, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "steps.py").write_text({"lpo": STEPS, "lrm": LRM_STEPS}[request.param])
    done = processes(1, str(folder / "steps.py"), str(tiny_sd), str(folder / "1.pt"), folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, *torch.load(folder / "1.pt")


@pytest.mark.parametrize("count", [2, 3])
def test_equal_global_batches_give_equal_weights(count: int, alone: tuple, tiny_sd: Path) -> None:
    """Five SGD steps in float64; the LRM's last two leave a process without a pair that counts."""
    folder, weights, row = alone
    done = processes(count, str(folder / "steps.py"), str(tiny_sd), str(folder / f"{count}.pt"),
                     folder=folder)
    assert done.returncode == 0, done.stderr
    other, other_row = torch.load(folder / f"{count}.pt")
    assert row["grad_norm"] > 1e-4
    for name, tensor in weights.items():
        assert (tensor - other[name]).abs().max() < 1e-9, name
    assert other_row == pytest.approx(row, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_pairs_at_rate_0(count: int, tiny_sd: Path, tiny_lrm: Path, tmp_path: Path) -> None:
    """7 prompts in batches that leave a process without one; every rank prints, writes and counts once."""
    (tmp_path / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:7]))

    def run(n: int, batch: int) -> tuple[list[dict], list[dict]]:
        out = tmp_path / f"run{n}"
        done = processes(n, "-m", "lpo_fast.train", "lpo", "--model", str(tiny_sd), "--lrm", str(tiny_lrm),
                         "--prompts", str(tmp_path / "prompts.json"), "--out", str(out), "--batch-size",
                         str(batch), "--num-steps", "3", "--pictures", "0", "--threshold-min", "0",
                         "--threshold-max", "0.001", "--epochs", "1", "--learning-rate", "0",
                         "--train-batch-size", str(batch), "--validation-prompts", "a red circle",
                         folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("trainable parameters") == 1 and done.stdout.count("weights: ") == 1
        assert ((out / "pictures" / "validation_0.png").is_file()
                and load_file(out / "pytorch_lora_weights.safetensors"))
        rows = list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
        return ([row for row in rows if row["kind"] == kind] for kind in ("batch", "train"))

    batches, steps = run(1, 6)
    others, other_steps = run(count, 6 // count)
    assert len(batches) == len(others) == 2 and len(steps) == len(other_steps)
    for a, b in zip(batches, others, strict=True):
        assert all(a.pop(key) == b.pop(key) for key in ("kind", "timesteps", "valid_by_timestep"))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for a, b in zip(steps, other_steps, strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_bad_input_ends_all(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    done = launched(2, "-m", "lpo_fast.train", "lpo", "--model", str(tiny_sd), "--lrm", "nowhere",
                    "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run"))
    assert done.returncode != 0 and "--lrm nowhere: no such directory" in done.stderr


FAILS = """
import os, signal, sys, time
from lpo_fast.lpo import steps
from lpo_fast.system import distributed
from lpo_fast import train
step, count, how, which, at = steps.train_step, [], sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def breaks(*arguments):
    count.append(1)
    if len(count) == at and distributed.state().process_index == which:
        print("failed at", time.time(), file=sys.stderr, flush=True)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this rank is broken")
    return step(*arguments)
steps.train_step = breaks
sys.exit(train.main(sys.argv[4:]))
"""


def pair_of_ranks(tiny_sd: Path, tiny_lrm: Path, folder: Path) -> list[str]:
    """The command line of a run of two processes, two epochs of a batch each."""
    (folder / "fails.py").write_text(FAILS)
    (folder / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:4]))
    return ["lpo", "--model", str(tiny_sd), "--lrm", str(tiny_lrm), "--prompts", str(folder / "prompts.json"),
            "--batch-size", "2", "--num-steps", "3", "--pictures", "0", "--threshold-min", "0",
            "--threshold-max", "0.001", "--train-batch-size", "2", "--epochs", "2", "--out",
            str(folder / "run")]


def test_a_broken_process_ends_the_run(tiny_sd: Path, tiny_lrm: Path, tmp_path: Path) -> None:
    """Within 60 s, and the error is told."""
    arguments = pair_of_ranks(tiny_sd, tiny_lrm, tmp_path)
    done = launched(2, str(tmp_path / "fails.py"), "broken", "1", "2", *arguments)
    assert time.time() - float(re.search(r"failed at (\S+)", done.stderr)[1]) < 60
    assert done.returncode != 0 and done.stderr.count("RuntimeError: this rank is broken") == 1
    assert done.stderr.count("error: rank 0: another rank has failed (see its error) or was killed") == 1
    assert done.stderr.count("Traceback") == 2  # its own, and the launcher's


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_run(which: int, tiny_sd: Path, tiny_lrm: Path, tmp_path: Path) -> None:
    """Within 60 s, the other one says so, and the run goes on to the end of one that nobody killed."""
    arguments = [*pair_of_ranks(tiny_sd, tiny_lrm, tmp_path), "--save-steps", "1"]
    done = launched(2, str(tmp_path / "fails.py"), "killed", str(which), "3", *arguments)
    assert time.time() - float(re.search(r"failed at (\S+)", done.stderr)[1]) < 60
    assert (done.returncode != 0
            and done.stderr.count(f"error: rank {1 - which}: another rank has failed") == 1)
    assert "SIGKILL" in done.stderr or "-9" in done.stderr  # the launcher says which
    assert done.stderr.count("Traceback") == 1  # the launcher's
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["at"]["step"] == 2
    whole = tmp_path / "whole"
    for resumed in ([*arguments, "--resume"], [*arguments[:-4], *arguments[-2:], "--out", str(whole)]):
        done = processes(2, "-m", "lpo_fast.train", *resumed, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    a, b = (load_file(run / "pytorch_lora_weights.safetensors") for run in (tmp_path / "run", whole))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("count", [2, 3])
def test_the_reward_model_in_several_processes(count: int, tiny_sd: Path, tmp_path: Path) -> None:
    """The same steps and validations as one process; a broken picture is counted once; one process writes."""
    colours = [plain((40 * i, 255 - 40 * i, 90)) for i in range(7)]
    pairs = table(tmp_path / "p.parquet", list("abcabcd"), jpg_0=[*colours[:3], b"", *colours[4:]],
                  jpg_1=colours[::-1])

    def run(n: int) -> list[dict]:
        out = tmp_path / f"run{n}"
        done = processes(n, "-m", "lpo_fast.train", "lrm", "--model", str(tiny_sd), "--pairs", str(pairs),
                         "--validation-pairs", str(pairs), "--out", str(out), "--batch-size", "6",
                         "--max-steps", "2", "--validate-steps", "1", "--num-workers", "0",
                         "--learning-rate", "1e-4", "--warmup-steps", "0", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("trainable parameters") == 1
        assert done.stdout.count("latent reward model: ") == 1
        assert (out / "checkpoint-final" / "state_dict.pt").is_file() and (out / "report.html").is_file()
        return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))

    alone, together = run(1), run(count)
    assert [row["kind"] for row in alone] == [row["kind"] for row in together]
    # training's, then validation's too
    assert [row["corrupt"] for row in together if row["kind"] == "train"] == [1, 1 + 1]
    for a, b in zip(alone, together, strict=True):
        assert (a.pop("kind") == b.pop("kind")
                and a.pop("accuracy_by_timestep", 0) == b.pop("accuracy_by_timestep", 0))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_more_processes_than_pairs(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LRM(model=str(tiny_sd), pairs=str(table(tmp_path / "p.parquet", ["a", "b"])),
                   out=str(tmp_path / "run"))
    runs.lrm(settings)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="processes, but there are 2 pairs"):
        runs.lrm(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    runs.lrm(settings)
    with pytest.raises(InputError, match="5: pairs cannot be divided evenly among 2 processes and 1 micro"):
        runs.lrm(replace(settings, batch_size=5))


def test_a_port_in_use(tiny_sd: Path, tmp_path: Path) -> None:
    """And a launcher that asks for DeepSpeed, which is not needed."""
    pairs = table(tmp_path / "p.parquet", ["a", "b"])
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "ACCELERATE_USE_DEEPSPEED": "true"}
        done = subprocess.run([sys.executable, "-m", "lpo_fast.train", "lrm", "--model",
                               str(tiny_sd), "--pairs", str(pairs), "--out", str(tmp_path / "run")],
                              env=os.environ | one, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 2
            and f"error: MASTER_PORT 127.0.0.1:{port}: the ranks cannot connect there" in done.stderr)
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_parameters_that_no_loss_reaches(tiny_sdxl: Path, tmp_path: Path) -> None:
    """SDXL's first encoder gives its last hidden state but one: weight decay leaves its last layer alone in
    any number of processes."""
    pairs, name = table(tmp_path / "p.parquet", list("abcd")), "text_model.encoder.layers.1.mlp.fc1.weight"
    last = []
    for count in (1, 2):
        out = tmp_path / f"run{count}"
        done = processes(count, "-m", "lpo_fast.train", "lrm", "--model", str(tiny_sdxl), "--pairs",
                         str(pairs), "--out", str(out), "--batch-size", "4", "--max-steps", "2",
                         "--warmup-steps", "0", "--learning-rate", "1e-2", "--weight-decay", "0.5",
                         "--num-workers", "0", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        last.append(load_file(out / "checkpoint-final" / "text_encoder" / "model.safetensors")[name])
    assert torch.equal(*last)


STOPS = """
import os, signal, sys, time
from lpo_fast.lrm import steps
from lpo_fast.run import states
from lpo_fast import train
rank, step, save = os.environ["RANK"], steps.train_step, states.save_state
def slow(*arguments):
    time.sleep(3)
    save(*arguments)
    print("state at", time.time(), flush=True)
def stops(*arguments):
    if rank == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
states.save_state, steps.train_step = slow, stops
try:
    train.main(sys.argv[1:])
except SystemExit as end:
    print("end", end.code, "at", time.time(), flush=True)
"""


def test_no_process_leaves_before_the_state_is_written(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text(STOPS)
    done = processes(2, str(tmp_path / "stops.py"), "lrm", "--model", str(tiny_sd), "--pairs",
                     str(table(tmp_path / "p.parquet", list("abcd"))), "--out", str(tmp_path / "run"),
                     "--batch-size", "4", "--max-steps", "9", "--warmup-steps", "0", "--num-workers", "0",
                     folder=tmp_path)
    ends = [float(at) for at in re.findall(r"end 143 at (\S+)", done.stdout)]
    assert len(ends) == 2 and min(ends) >= float(re.search(r"state at (\S+)", done.stdout)[1])


NOTES = """
import json, sys
from lpo_fast.lpo import batches
from lpo_fast.system import distributed
from lpo_fast import train
file, sample_pairs = sys.argv.pop(1), batches.sample_pairs
def notes(*arguments, **named):
    if distributed.is_main():
        with open(file, "a") as out:
            out.write(json.dumps(arguments[5].tolist()) + "\\\\n")
    return sample_pairs(*arguments, **named)
batches.sample_pairs = notes
sys.exit(train.main(sys.argv[1:]))
"""


def test_another_number_of_processes_goes_on_with_the_next_prompts(
        tiny_sd: Path, tiny_lrm: Path, tmp_path: Path) -> None:
    """One process samples 3 × 2 of 11 prompts, two go on with 4 and 1, then the next epoch with 4, 4 and 3.
    """
    (tmp_path / "notes.py").write_text(NOTES.replace("\\\\", "\\"))
    (tmp_path / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:11]))
    arguments = [str(tmp_path / "notes.py"), str(tmp_path / "notes"), "lpo", "--model", str(tiny_sd), "--lrm",
                 str(tiny_lrm), "--prompts", str(tmp_path / "prompts.json"), "--out", str(tmp_path / "run"),
                 "--batch-size", "2", "--num-steps", "2", "--pictures", "0", "--threshold-min", "0",
                 "--threshold-max", "0.001", "--epochs", "2"]
    for count, more in ((1, ["--max-batches", "3"]), (2, ["--resume"])):
        done = processes(count, *arguments, *more, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "| 3 of 8 batches done |" in done.stdout
    sampled = list(map(json.loads, (tmp_path / "notes").read_text().splitlines()))
    assert [len(part) for part in sampled] == [2, 2, 2, 4, 1, 4, 4, 3]
    for epoch in (sampled[:5], sampled[5:]):
        assert sorted(sum(epoch, [])) == list(range(11))
