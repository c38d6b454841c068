"""Run SD1.5 and SDXL at their real sizes, with random weights, through the real code.

    python bench/tools/real_size.py [STAGE …] --work DIR

    sd15-model, sdxl-model      make the pipeline's directory from the published configs,
                                with fp16 weight files
    sd15-lrm                    make a new LRM, saved as by LRM training
    sdxl-lrm                    make an LRM as by the official code with frozen text encoders,
                                with a linked denoiser
    sd15-score, sdxl-score      score one latent, as LPO does
    sd15-predict, sdxl-predict  evaluate the policy once, with guidance, as sampling does
    sd15-step, sdxl-step        run the command `lpo`: one prompt, one denoising step, two candidates, a LoRA
                                step on their pair; SDXL with activation checkpointing

Each stage runs in its own process, so that peak memory is per stage. The directories take 2 + 4 GB and 7 GB
and remain until --clean. The table that is printed (and written, with --out) has all stages run with that
--work.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.support import random_models

REPO = Path(__file__).resolve().parents[2]
PROMPT = "a photo of a red circle on a blue background"
STAGES = [f"{family}-{what}" for family in ("sd15", "sdxl")
          for what in ("model", "lrm", "score", "predict", "step")]
DEVICE = torch.device("cpu")


def settings(work: Path, family: str, precision: str):
    """Return LPO's settings."""
    from dataclasses import replace

    from lpo_fast import config
    recipe = config.sdxl() if family == "sdxl" else config.sd15()
    return replace(recipe.lpo, model=str(work / family), lrm=str(work / f"lrm_{family}"),
                   mixed_precision=precision)


def lrm(work: Path, family: str, _: str) -> dict[str, float]:
    """Make and save a new LRM; SDXL's is a link and new heads. Return the seconds."""
    from lpo_fast.lrm import checkpoint
    from lpo_fast.models import texts
    folder = work / f"lrm_{family}"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    if family == "sdxl":
        random_models.make_lrm(work / family, folder)
        return {"save": time.perf_counter() - start}
    model = checkpoint.new_lrm(work / family, generator=torch.Generator().manual_seed(0))
    loaded = time.perf_counter()
    checkpoint.save_lrm(model, texts.load_tokenizers(work / family, model.family), folder)
    return {"load": loaded - start, "save": time.perf_counter() - loaded}


def latent(family: str) -> torch.Tensor:
    """Return one noisy latent [1, 4, size, size]."""
    size = random_models.UNETS[family]["sample_size"]
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def score(work: Path, family: str, precision: str) -> dict[str, float]:
    """Measure one score S(x, t, prompt)."""
    from lpo_fast.lpo import judging
    start = time.perf_counter()
    scorer = judging.load_score(settings(work, family, precision), [PROMPT], DEVICE)
    return ({"load": time.perf_counter() - start}
            | timed(lambda: scorer(latent(family), torch.tensor([501]), torch.tensor([0]))))


@torch.no_grad()
def predict(work: Path, family: str, precision: str) -> dict[str, float]:
    """Measure the policy's null and text evaluations."""
    from lpo_fast.lpo import policies
    start = time.perf_counter()
    model, _ = policies.load(settings(work, family, precision), [PROMPT], DEVICE)
    loaded = time.perf_counter() - start
    return ({"load": loaded}
            | timed(lambda: model.predict(latent(family), torch.tensor([501]), torch.tensor([0]))))


def timed(call: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Return the seconds of a process's first call. Raises SystemExit if its result is not finite."""
    start = time.perf_counter()
    out = call()
    seconds = time.perf_counter() - start
    if not out.isfinite().all():
        raise SystemExit("not finite")
    return {"seconds": seconds, "largest result": out.float().abs().max().item()}


def step(work: Path, family: str, precision: str) -> dict[str, float]:
    """Run the command `lpo`; return its timings and metrics."""
    from lpo_fast import train
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    (work / "prompts.txt").write_text(PROMPT + "\n")
    start = time.perf_counter()
    code = train.main([
        "lpo", "--model", str(work / family), "--lrm", str(work / f"lrm_{family}"), "--prompts",
        str(work / "prompts.txt"), "--out", str(out), "--mixed-precision", precision, "--batch-size", "1",
        "--num-steps", "2", "--steps-used", "0:1", "--num-candidates", "2", "--threshold-min", "0",
        "--threshold-max", "0", "--train-batch-size", "1", "--epochs", "1", "--pictures", "0",
        *(["--checkpointing", "full"] if family == "sdxl" else [])])
    seconds = json.loads((out / "timings.jsonl").read_text().splitlines()[0])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (trained,) = (row for row in rows if row["kind"] == "train")
    if code or trained["train_ratio_win"] != 1.0 or not trained["grad_norm"] > 0:
        raise SystemExit(f"exit code {code}, {trained}")
    return {"load and save": time.perf_counter() - start - seconds["seconds"],
            "sampling": seconds["sampling"], "training step": seconds["seconds"] - seconds["sampling"],
            "loss": trained["train_loss"], "grad norm": trained["grad_norm"]}


def one(stage: str, work: Path, precision: str) -> None:
    """Run a stage in this process; print its row as JSON."""
    family, _, what = stage.partition("-")
    if what == "model":
        start = time.perf_counter()
        random_models.make(family, work / family)
        values = {"seconds": time.perf_counter() - start}
    else:
        values = {"lrm": lrm, "score": score, "predict": predict, "step": step}[what](work, family, precision)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("ROW " + json.dumps({"stage": stage, "peak": peak, "load": os.getloadavg()[0],
                               "threads": torch.get_num_threads(), "values": values}), flush=True)


def page(rows: list[dict], argv: list[str], precision: str) -> str:
    """Return the Markdown page."""
    git = ["git", "-C", str(REPO), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "?")
    packages = ("torch", "diffusers", "transformers", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    head = ["# Real sizes on a CPU, random weights", "",
            f"`python bench/tools/real_size.py {' '.join(argv)}`, commit {commit}.",
            f"{cpu}, {os.cpu_count()} cores; {versions}; networks in {precision}.", "",
            "Peak: resident memory of the stage's process. Load: the machine's load average when the stage "
            "ended; load above the thread count is other work, so these times are upper bounds. The gradient "
            "norm only shows that it is finite: with random weights, gradients grow from block to block.", ""]
    table = ["| stage | peak GiB | threads | load | seconds and results |", "|---|---|---|---|---|"]
    table += [f"| {row['stage']} | {row['peak']:.1f} | {row['threads']} | {row['load']:.1f} | "
              + ", ".join(f"{key} {value:.4g}" for key, value in row["values"].items()) + " |"
              for row in rows]
    return "\n".join(head + table) + "\n"


def main() -> int:
    """Run all stages, or (with --one) a single stage in this process; return the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], default=[], help="default: all, in order")
    parser.add_argument("--work", type=Path, required=True, help="directory of the models")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), default="bf16", help="of the networks")
    parser.add_argument("--out", type=Path, help="file of the table")
    parser.add_argument("--clean", action="store_true", help="remove --work at the end")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*args.stages, args.work, args.precision)
        return 0
    rows, argv, failed = {}, sys.argv[1:], 0
    args.work.mkdir(parents=True, exist_ok=True)
    known = args.work / "rows.json"
    if known.is_file():
        rows = json.loads(known.read_text())
    for stage in args.stages or STAGES:
        command = [sys.executable, __file__, stage, "--one", "--work", str(args.work),
                   "--precision", args.precision]
        done = subprocess.run(command, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if not found:
            print(f"{stage} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}",
                  file=sys.stderr)
            failed += 1
            continue
        rows[stage] = json.loads(found[0].removeprefix("ROW "))
        print(rows[stage], flush=True)
        known.write_text(json.dumps(rows))
    text = page([rows[stage] for stage in STAGES if stage in rows], argv, args.precision)
    if args.out:
        args.out.write_text(text)
    if args.clean:
        shutil.rmtree(args.work)
    print(text)
    return failed


if __name__ == "__main__":
    sys.exit(main())
