"""Measure the embedded world's result under each speed setting.

    python bench/tools/levers.py [--seeds 0 …] [--pictures 200] [--out FILE]

Trains one LRM per seed, then LPO with the recipe and with one setting changed at a time. Exact settings must
find the same pairs and, except for noise, the same share of correct pictures. The last rows are
approximations, whose effect is measured here.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.support.measure import markdown, stamp
from lpo_fast import train_lpo
from lpo_fast.models import loras
from lpo_fast.shapes import evaluate

LEVERS: dict[str, dict] = {
    "the recipe": {}, "compile default": {"compile": "default"},
    "checkpointing full": {"checkpointing": "full"},
    "checkpointing selective": {"checkpointing": "selective"},
    "passes of 8 pairs, 4 a step": {"train_batch_size": 8, "accumulate": 4},
    "fused norms": {"fused_norms": True}, "8-bit AdamW *": {"optimizer": "adamw8bit"},
    "steps used 0:5 *": {"steps_used": "0:5"}, "steps used 0:10 *": {"steps_used": "0:10"}}

def pairs(run: Path) -> list[dict]:
    """Return the valid pairs per prompt batch; all runs sample the first batch with the base model."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["valid_by_timestep"] for row in rows if row["kind"] == "batch"]


def main() -> None:
    """Run all settings; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pictures", type=int, default=200, help="of held-out captions, per run")
    parser.add_argument("--out", type=Path, help="file of the table")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), help="default: all")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        work = Path(tempfile.mkdtemp())
        base = evaluate.settings(work, evaluate.train_reward(work, seed), seed)
        before = evaluate.judge(*evaluate.draw(None, args.pictures, seed))["right"] / args.pictures
        found = {}
        for number, name in enumerate(args.levers):
            start = time.perf_counter()
            run = train_lpo.train(replace(base, **LEVERS[name], out=str(work / f"lpo_{number}")))
            seconds = time.perf_counter() - start
            shown = evaluate.judge(*evaluate.draw(run / loras.LORA_DIFFUSERS, args.pictures, seed))
            found[name] = pairs(run)
            same = found[name][0] == found[args.levers[0]][0]
            rows.append([seed, name, f"{before:.1%}",
                         f"{shown['right'] / args.pictures:.1%}", f"{shown['diversity']:.1f}",
                         sum(map(sum, found[name])), "yes" if same else "no", f"{seconds:.0f}"])
            table = markdown(["seed", "setting", "correct before", "correct after", "diversity",
                              "pairs of the run", "first batch's pairs equal the recipe's", "s"], rows)
            print(table, flush=True)
            if args.out:
                args.out.write_text(
                    "# The embedded world under each lever\n\n`python bench/tools/levers.py --seeds "
                    f"{' '.join(map(str, args.seeds))} --pictures {args.pictures}`; {stamp()}. Rows with * "
                    f"are approximations. Seconds include compilation.\n\n{table}", encoding="utf-8")


if __name__ == "__main__":
    main()
