"""python tests/tools/endurance.py [--steps 5000] [--out FILE.md] [STAGE …]:
long runs take no more memory at their end.

Both stages' real commands on the embedded world, a process each, in tiny batches, with all that a long run
does now and then: states, checkpoints, validations, pictures, worker processes. Every EVERY steps the process
writes down what the kernel says of it. Flat is a stage whose resident memory, its own and its children's,
grows over the last 80 % of the steps by less than LIMIT of what it is there (the slope of a line through the
samples, times their steps), and whose open files, threads and children are as many in the last sample as in
the first of these.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.tools import kill

EVERY = 50
LIMIT = 0.01
FLAGS = {
    "lpo": ["--epochs", "1000000", "--train-batch-size", "1", "--save-steps", "50", "--save-epochs", "4",
            "--validate-epochs", "8", "--validation-prompts", "a red circle", "--ema-decay", "0.99"],
    "lrm": ["--validate-steps", "100", "--save-steps", "50", "--num-workers", "1"]}


class Sample(NamedTuple):
    """What a process holds after an optimizer step: memory in KiB, its children's, and counts of its own."""

    step: int
    memory: int
    children_memory: int
    files: int
    threads: int
    children: int


def resident(process: str | int) -> int:
    """KiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def sample(step: int) -> Sample:
    """Of this process."""
    children = [child for task in Path("/proc/self/task").iterdir()
                for child in (task / "children").read_text().split()]
    return Sample(step, resident("self"), sum(map(resident, children)), len(os.listdir("/proc/self/fd")),
                  len(os.listdir("/proc/self/task")), len(children))


def child(file: str, steps: str, every: str, arguments: list[str]) -> None:
    """Of the watched process: the command, which is asked to stop after so many steps,
    and a row in a file every few."""
    from lpo_fast import train
    from lpo_fast.lpo import steps as lpo_steps
    from lpo_fast.lrm import steps as lrm_steps

    def watched(function):
        count = 0

        def watch(*given, **named):
            nonlocal count
            result = function(*given, **named)
            count += 1
            if count % int(every) == 0:
                with open(file, "a") as rows:
                    rows.write(f"{json.dumps(sample(count))}\n")
            if count == int(steps):
                os.kill(os.getpid(), signal.SIGTERM)
            return result
        return watch

    # what workers are by default, but not below a fork server
    multiprocessing.set_start_method("fork", force=True)
    for steps_of in (lpo_steps, lrm_steps):
        steps_of.train_step = watched(steps_of.train_step)
    sys.exit(train.main(arguments))


def watch(stage: str, folder: Path, model: Path, steps: int, every: int = EVERY) -> list[Sample]:
    """A run of a stage in a folder."""
    arguments = [*kill.command(stage, folder, model), *FLAGS[stage], "--out", str(folder / "run")]
    if stage == "lrm":
        arguments += ["--max-steps", str(steps)]
    process = kill.start(str(folder / "samples"), str(steps), str(every), *arguments, log=folder / "run",
                         entry=(__file__, "--child"))
    process.join()
    assert process.exitcode in (0, 128 + signal.SIGTERM), (folder / "run.err").read_text()
    return [Sample(*json.loads(line)) for line in (folder / "samples").read_text().splitlines()]


class Found(NamedTuple):
    """Of the last 80 % of a run: KiB of memory in the middle, slope in 1,000 steps, growth,
    and what is not flat."""

    memory: float
    slope: float
    growth: float
    wrong: list[str]


def judge(samples: list[Sample], key: str = "memory") -> Found:
    """key: whose memory."""
    kept = samples[len(samples) // 5:]
    x, y = (np.array([getattr(row, name) for row in kept], float) for name in ("step", key))
    slope, memory = np.polyfit(x, y, 1)[0], float(np.median(y))
    growth = slope * (x[-1] - x[0])
    wrong = [f"{key} grows"] if growth > LIMIT * memory else []
    wrong += [f"{name} {before} → {after}" for name, before, after
              in zip(Sample._fields[3:], kept[0][3:], kept[-1][3:], strict=True) if before != after]
    return Found(memory, 1000 * slope, growth, wrong)


def main() -> int:
    """The long form; 1 if a stage is not flat."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: lpo lrm")
    options = parser.parse_args()
    from lpo_fast.run import environment
    from lpo_fast.shapes import PIPELINE
    rows, series, bad, commit = [], [], False, environment.commit()
    for stage in options.stages or FLAGS:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            samples = watch(stage, Path(folder), PIPELINE, options.steps)
        about = (f"{samples[-1].step:,} | {time.monotonic() - begin:.0f} s | "
                 f"{' / '.join(map(str, samples[-1][3:]))}")
        for name, key in ((stage, "memory"), (f"{stage}'s children", "children_memory")):
            found = judge(samples, key)
            if found.memory:
                bad |= bool(found.wrong)
                rows.append(f"| {name} | {about} | {found.memory / 1024:.1f} MiB | {found.slope:+.0f} "
                            f"KiB | {found.growth:+.0f} KiB, {found.growth / found.memory:+.2%} | "
                            f"{'; '.join(found.wrong) or 'flat'} |")
                shown = (f"{getattr(samples[round(i)], key) / 1024:.1f}"
                         for i in np.linspace(0, len(samples) - 1, 11))
                series.append(f"| {name} | {' | '.join(shown)} |")
                print(rows[-1], flush=True)
    text = "\n".join([
        "# Memory of long runs", "",
        f"`{' '.join(['python tests/tools/endurance.py --steps', str(options.steps), *options.stages])}`, "
        f"commit {commit}, {time.strftime('%Y-%m-%d')}, on {os.cpu_count()} {platform.machine()} cores that "
        "other work shared.", ", ".join(f"{name} {version(name)}" for name in (
            "torch", "diffusers", "transformers", "peft", "accelerate")) + ".", "", f"Samples every {EVERY} "
        f"optimizer steps; the last 80 % of them are judged, and {LIMIT:.0%} of growth is allowed. Every "
        "50 steps a state is saved; LPO writes a checkpoint every 4 epochs and draws a validation grid every "
        "8; LRM training validates every 100 steps and reads its pictures in worker processes.", "",
        "| run | steps | time | files / threads / children | resident | in 1,000 steps | growth | |",
        "|---|---|---|---|---|---|---|---|", *rows, "",
        "MiB in samples at equal distances, from the first to the last:", "", f"| run |{' |' * 11}",
        f"|---|{'---|' * 11}", *series, ""])
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return int(bad)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], sys.argv[5:])
    else:
        sys.exit(main())
