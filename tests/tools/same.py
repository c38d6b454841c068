"""python tests/tools/same.py BASE: does this tree train to the same bytes as commit BASE?

A worktree of BASE in a temporary directory and this tree run both stages on this machine, each with one
thread, through the public command line alone: the embedded world at two seeds, and SD1.5 and SDXL in
miniature. Models, pairs and prompts are made once, and each tree trains the LRM that its own LPO takes. One
LPO and one LRM run of the miniatures get SIGTERM between two optimizer steps of a prompt batch, and are
resumed. metrics.jsonl and all weights must agree byte for byte, between the trees and between the whole and
the resumed run. Prints a table; exits with 1 at a difference.
"""

import argparse
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Case(NamedTuple):
    """A run: its name, which is its run directory, its arguments,
    and the optimizer step it is stopped after, 0: none."""

    name: str
    arguments: list[str]
    stop: int = 0


def flags(**values: object) -> list[str]:
    """Options of the command line."""
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def cases(pipeline: Path, inputs: Path) -> list[Case]:
    """All runs of a tree, in their order; paths of LRMs are relative to the folder that they all lie in."""
    lrm = dict(num_workers=0, warmup="linear", learning_rate=1e-3, weight_decay=0.01, mixed_precision="no",
               validation_pairs=inputs / "held_out.parquet", pairs=inputs / "pairs.parquet")
    lpo = dict(prompts=inputs / "prompts.json", guidance_scale=2.25, threshold_min=0, mixed_precision="no")
    made = []
    for seed in (0, 1):
        made += [
            Case(f"shapes_lrm_{seed}",
                 ["lrm", *flags(model=pipeline, **lrm, seed=seed, batch_size=32, max_steps=20, warmup_steps=3,
                                validate_steps=10, save_steps=10)]),
            Case(f"shapes_lpo_{seed}", ["lpo", *flags(
                model=pipeline, lrm=f"shapes_lrm_{seed}/checkpoint-final",
                **lpo, seed=seed, batch_size=8, max_batches=2, epochs=1,
                learning_rate=7e-4, rank=16, train_batch_size=16, threshold_max=0.05, pictures=2)])]
    for model in ("sd", "sdxl"):
        stage1 = ["lrm", *flags(model=inputs / model, **lrm, batch_size=8, max_steps=6, warmup_steps=1,
                                validate_steps=3, save_steps=2)]
        stage2 = ["lpo", *flags(model=inputs / model, lrm=f"{model}_lrm/checkpoint-final",
                                **lpo, batch_size=2, num_steps=5, train_batch_size=3,
                                threshold_max=0.001, max_batches=3, epochs=1, learning_rate=1e-3,
                                ema_decay=0.9, save_steps=3, pictures=1)]
        made += [Case(f"{model}_lrm", stage1), Case(f"{model}_lrm_resumed", stage1, stop=3),
                 Case(f"{model}_lpo", stage2), Case(f"{model}_lpo_resumed", stage2, stop=5)]
    return made


def make_inputs(folder: Path) -> None:
    """Make the models, the pairs and the prompts that both trees train on."""
    sys.path.insert(0, str(ROOT))
    from lpo_fast.shapes import evaluate, world
    from tests.helpers import models
    models.make_sd(folder / "sd")
    models.make_sdxl(folder / "sdxl", folder / "sd")
    evaluate.write_pairs(folder / "pairs.parquet", 400, 0, held_out=False)
    evaluate.write_pairs(folder / "held_out.parquet", 24, 1, held_out=True)
    (folder / "prompts.json").write_text(json.dumps(world.captions(held_out=False)), encoding="utf-8")


def command(arguments: list[str], stop: int = 0) -> int:
    """Run the command in this process; its exit code. stop: SIGTERM comes after so many optimizer steps."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    steps = []

    def count(*_: object) -> None:
        steps.append(1)
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
    hook = register_optimizer_step_post_hook(count)
    sys.argv = ["train", *arguments]
    try:
        runpy.run_module("lpo_fast.train", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        hook.remove()
    return 0


def runs(root: Path, inputs: Path) -> int:
    """Run all cases in the working directory with the package of the tree ``root``,
    which this process belongs to."""
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, str(root))
    import lpo_fast
    pipeline = Path(lpo_fast.__file__).parent / "shapes" / "pipeline"
    assert pipeline.is_relative_to(root), f"{pipeline} is not below {root}"
    for case in cases(pipeline, inputs):
        begin, arguments = time.monotonic(), [*case.arguments, "--out", case.name]
        if case.stop and (code := command(arguments, case.stop)) != 128 + signal.SIGTERM:
            print(f"{case.name}: exit code {code} instead of {128 + signal.SIGTERM}")
            return 1
        if code := command([*arguments, *(["--resume"] if case.stop else [])]):
            print(f"{case.name}: exit code {code}")
            return 1
        print(f"{case.name}: {time.monotonic() - begin:.1f} s", flush=True)
    return 0


def files(run: Path) -> dict[str, str]:
    """Digests of a run's metrics and weights by their path within it."""
    chosen = [run / "metrics.jsonl", *run.rglob("*.safetensors"), *run.rglob("unet_lora.pt")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(chosen) if "profile" not in file.parts}


def row(title: str, one: Path, other: Path) -> tuple[str, bool]:
    """A line of the table: which files of two runs differ."""
    a, b = files(one), files(other)
    different = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    steps = sum(1 for line in (one / "metrics.jsonl").read_text().splitlines() if '"train"' in line)
    said = "equal" if not different else "DIFFERENT: " + ", ".join(different)
    return f"| {title} | {steps} | {len(a)} | {said} |", not different


def main() -> int:
    """Run both trees and compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--keep", type=Path, help="keep inputs and runs in this new directory")
    parser.add_argument("--inside", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return runs(*options.inside)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="same_"))
    inputs, tree = folder / "inputs", folder / "base"
    inputs.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                                "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                                "HF_DATASETS_CACHE": str(folder / "arrow"), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", tree, options.base], check=True)
    try:
        make_inputs(inputs)
        for name, root in (("base", tree), ("here", ROOT)):
            begin, place = time.monotonic(), folder / f"runs_{name}"
            place.mkdir()
            shutil.rmtree(folder / "arrow", ignore_errors=True)
            with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
                code = subprocess.run([sys.executable, "-P", __file__, options.base, "--inside", root,
                                       inputs], cwd=place, env=environment, stdout=log,
                                      stderr=subprocess.STDOUT).returncode
            print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
            if code:
                print("\n".join((folder / f"{name}.log").read_text().splitlines()[-20:]), f"exit code {code}",
                      sep="\n")
                return 1
        there, here = folder / "runs_base", folder / "runs_here"
        made = [row(case.name, there / case.name, here / case.name) for case in cases(Path(), inputs)]
        made += [row(f"{case.name} and the whole run", here / case.name, here
                     / case.name.removesuffix("_resumed")) for case in cases(Path(), inputs) if case.stop]
        print("| run | optimizer steps | files | here and there |", "|---|---|---|---|",
              *(line for line, _ in made), sep="\n")
        return 0 if all(equal for _, equal in made) else 1
    finally:
        subprocess.run([*git, "remove", "--force", tree], check=True)
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
