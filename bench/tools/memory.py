"""Compare the memory that --dry-run estimates with measured peaks, for the settings in docs/memory.md.

    python bench/tools/memory.py [SETTING …] [--out FILE.md]

Each setting is a run of one prompt batch, or of two LRM steps, on random weights of the real architecture, in
its own process; the peak is that of torch's allocator. The ratio should be within 25 % of 1. Without a GPU,
only a small model's dry run is reported. Models are kept in $BENCH_WORK.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.support import random_models
from bench.support.measure import markdown, stamp
from lpo_fast.shapes import evaluate, world

CUDA = torch.cuda.is_available()
LPO = ["--max-batches", "1", "--pictures", "0", "--threshold-min", "0", "--threshold-max", "0.001"]
# The table in docs/memory.md: stage, model, GB of the GPU, flags.
SETTINGS = {
    "sd15": ("lpo", "sd15", 8, [*LPO, "--batch-size", "2", "--train-batch-size", "2", "--accumulate", "5",
                                "--checkpointing", "selective"]),
    "sdxl": ("lpo", "sdxl", 24, [*LPO, "--batch-size", "2", "--train-batch-size", "2", "--accumulate", "2",
                                 "--checkpointing", "selective"]),
    "lrm-xl": ("lrm", "sdxl", 48, ["--accumulate", "32", "--optimizer", "adamw8bit", "--max-steps", "2",
                                   "--warmup-steps", "0"]),
} if CUDA else {"small": ("lpo", "small", 8, [*LPO, "--batch-size", "1", "--train-batch-size", "2"])}
CHILD = """
import sys, torch
from lpo_fast import train
code = train.main(sys.argv[1:])
print("PEAK", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
sys.exit(code)
"""


def run(*arguments: str) -> list[str]:
    """Run the command in its own process; return its output lines. Its errors are shown."""
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}")
    return done.stdout.splitlines()


def row(name: str, work: Path, scratch: Path) -> list[object]:
    """Return the table row of a setting: estimate and measurement in GiB."""
    stage, family, gigabytes, flags = SETTINGS[name]
    model, lrm = work / family, work / f"lrm_{family}"
    if not model.exists():
        random_models.make(family, model)
    given = ["--model", str(model), "--out", str(scratch / name), *flags]
    if stage == "lpo":
        if not lrm.exists():
            random_models.make_lrm(model, lrm)
        (scratch / "prompts.txt").write_text("\n".join(world.captions(held_out=False)) + "\n")
        given += ["--lrm", str(lrm), "--prompts", str(scratch / "prompts.txt")]
    else:
        evaluate.write_pairs(scratch / "pairs.parquet", 64, 0, held_out=False)
        given += ["--pairs", str(scratch / "pairs.parquet")]
    phases = [line.split()[-1].replace(",", "") for line in run(stage, *given, "--dry-run")
              if line.startswith("most while")]
    estimate = max(map(float, phases))
    if not CUDA:
        return [name, gigabytes, f"{estimate:.2f}", "no GPU", ""]
    peak = int(run(stage, *given)[-1].removeprefix("PEAK ")) / 2**30
    return [name, gigabytes, f"{estimate:.2f}", f"{peak:.2f}", f"{estimate / peak:.2f}"]


def main() -> None:
    """Measure all settings; print and write the table after each row."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", choices=[[], *SETTINGS], default=[], help="default: all")
    parser.add_argument("--out", type=Path, help="file of the table")
    args, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(os.environ.get("BENCH_WORK", scratch))
        for name in args.settings or SETTINGS:
            rows.append(row(name, work, Path(scratch)))
            table = markdown(["setting", "GB of the GPU", "GiB by --dry-run", "GiB measured", "ratio"], rows)
            print(table, flush=True)
            if args.out:
                args.out.write_text(f"# Peak memory\n\n`python bench/tools/memory.py`; {stamp()}.\n\n{table}",
                                    encoding="utf-8")


if __name__ == "__main__":
    main()
