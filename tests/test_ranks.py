"""Two and three processes (gloo) do what one does: the same pairs, and the same weights from equal global batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import ROOT, environment, free_port, processes
from safetensors.torch import load_file

from lpo_fast.shapes import world

STEPS = """
import sys, torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from lpo_fast import checkpoint, ranks, schedule, train_lpo
from lpo_fast.backbone import Text
from lpo_fast.config import LPO
from lpo_fast.policy import Policy, trainable
from lpo_fast.sample import Pairs
model, out = sys.argv[1:]
ranks.state()
torch.manual_seed(0)
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
checkpoint.add_lora(unet, 2, 2, ("to_q", "to_out.0"), 0)
unet.double()
null = Text(torch.randn(1, 16, 16).double(), torch.zeros(1, 1))
text = Text(torch.randn(5, 16, 16).double(), torch.zeros(5, 1), null)
sched = schedule.ddim(torch.linspace(0.999, 0.01, 1000).double(), torch.arange(951, 0, -50), 20)
config = LPO(train_batch_size=6 // ranks.count(), beta=5.0, guidance_scale=2.0)
optimizer = torch.optim.SGD(trainable(unet), lr=10.0)
for step in range(5):
    n = 6 if step < 4 else 4  # the last one is smaller, in no process alike
    x = torch.randn(3, n, 4, 8, 8).double()
    pairs = Pairs(*x, torch.arange(1, 1 + 50 * n, 50), torch.arange(n) % 5, torch.ones(n, dtype=torch.bool))
    row = train_lpo.train_step(Policy(unet, text, None, full=False), sched, pairs, optimizer,
                               torch.amp.GradScaler("cpu", enabled=False), config)
print(f"rank {ranks.state().process_index}", row, flush=True)
ranks.wait()
if ranks.main():
    torch.save((checkpoint.Trained(unet).state_dict(), row), out)
"""


def launched(count: int, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a module or a script in ``count`` processes of torch.distributed.run."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", f"--master_port={free_port()}"]
    return subprocess.run([sys.executable, *launcher, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=timeout)


@pytest.fixture(scope="module")
def alone(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """The script, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "steps.py").write_text(STEPS)
    done = processes(1, str(folder / "steps.py"), str(tiny_sd), str(folder / "1.pt"), folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, *torch.load(folder / "1.pt")


@pytest.mark.parametrize("count", [2, 3])
def test_equal_global_batches_give_equal_weights(count: int, alone: tuple, tiny_sd: Path) -> None:
    """Five SGD steps in float64."""
    folder, weights, row = alone
    done = processes(count, str(folder / "steps.py"), str(tiny_sd), str(folder / f"{count}.pt"), folder=folder)
    assert done.returncode == 0, done.stderr
    other, other_row = torch.load(folder / f"{count}.pt")
    moved = sum(tensor.abs().sum() for name, tensor in weights.items() if "lora_B" in name)
    assert moved > 1e-4
    for name, tensor in weights.items():
        assert (tensor - other[name]).abs().max() < 1e-9, name
    assert other_row == pytest.approx(row, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_pairs_at_rate_0(count: int, tiny_sd: Path, tiny_lrm: Path, tmp_path: Path) -> None:
    """7 prompts in batches that leave a process without one; every rank prints, writes and counts once."""
    (tmp_path / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:7]))

    def run(n: int, batch: int) -> tuple[list[dict], list[dict]]:
        out = tmp_path / f"run{n}"
        done = processes(n, "-m", "lpo_fast.train", "lpo", "--model", str(tiny_sd), "--lrm", str(tiny_lrm), "--prompts",
                         str(tmp_path / "prompts.json"), "--out", str(out), "--batch-size", str(batch), "--num-steps", "3",
                         "--pictures", "0", "--threshold-min", "0", "--threshold-max", "0.001", "--epochs", "1",
                         "--learning-rate", "0", "--train-batch-size", str(batch), "--validation-prompts", "a red circle",
                         folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("parameters train") == 1 and done.stdout.count("weights: ") == 1
        assert (out / "pictures" / "validation_0.png").is_file() and load_file(out / "pytorch_lora_weights.safetensors")
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
    done = launched(2, "-m", "lpo_fast.train", "lpo", "--model", str(tiny_sd), "--lrm", "nowhere", "--out", str(tmp_path))
    assert done.returncode != 0 and "--lrm nowhere: no such directory" in done.stderr


FAILS = """
import sys
from lpo_fast import ranks, train, train_lpo
step, count = train_lpo.train_step, []
def breaks(*arguments):
    count.append(1)
    if len(count) == 2 and ranks.state().process_index == 1:
        raise RuntimeError("this rank is broken")
    return step(*arguments)
train_lpo.train_step = breaks
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_broken_process_ends_the_run(tiny_sd: Path, tiny_lrm: Path, tmp_path: Path) -> None:
    """Within 60 s, and the error is told."""
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:4]))
    done = launched(2, str(tmp_path / "fails.py"), "lpo", "--model", str(tiny_sd), "--lrm", str(tiny_lrm), "--prompts",
                    str(tmp_path / "prompts.json"), "--out", str(tmp_path / "run"), "--batch-size", "2", "--num-steps", "3",
                    "--pictures", "0", "--threshold-min", "0", "--threshold-max", "0.001", "--train-batch-size", "2",
                    "--epochs", "2", timeout=60)
    assert done.returncode != 0 and done.stderr.count("RuntimeError: this rank is broken") == 1
    assert done.stderr.count("error: rank 0: another process has failed") == 1
    assert done.stderr.count("Traceback") == 2  # its own, and the launcher's
