"""python tests/tools/kill.py [--kills 50] [--ranks 1] [--seed 0] [--out FILE.md]:
killed training runs end as if nothing happened.

A real run of the command (the embedded world's pipeline, always with --resume, as a restart script has it)
gets SIGKILL again and again: at a random moment, or as soon as a certain unfinished file is there. Each life
after the first goes on from what the one before left. Writes are slowed down, in halves, so that many kills
fall into them. After every kill a state can be read and no more than --save-steps steps are lost; the end is
that of a run that nobody killed, bit for bit. With --ranks 2, or more, a life is so many processes of
torch.distributed.run, of which a random one is killed: the others must end, and say why. The results are
added to FILE.md.
"""

import argparse
import io
import json
import multiprocessing.forkserver
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.processes import CONTEXT, environment, free_port, rank

SAVE_STEPS = 2
TARGETS = (".state.pt", ".checkpoint", ".config.json", ".pytorch_lora", ".exp", "")  # what a kill waits for
FLAGS = {
    "lpo": ["--batch-size", "2", "--num-steps", "4", "--train-batch-size", "2", "--threshold-min", "0",
            "--threshold-max", "0.001", "--epochs", "2", "--pictures", "1", "--keep-checkpoints", "2",
            "--mixed-precision", "no"],
    "lrm": ["--batch-size", "4", "--max-steps", "12", "--validate-steps", "3", "--keep-checkpoints", "2",
            "--warmup-steps", "0", "--learning-rate", "1e-3", "--num-workers", "0",
            "--mixed-precision", "no"]}


def child(steps: str, arguments: list[str]) -> None:
    """Of the killed process: the command, on a slow disk,
    with a byte in the file ``steps`` for every optimizer step."""
    from lpo_fast import train
    from lpo_fast.lpo import steps as lpo_steps
    from lpo_fast.lrm import steps as lrm_steps

    def slow(function, seconds: float):
        def slowly(*given, **named):
            time.sleep(seconds)
            return function(*given, **named)
        return slowly

    def counted(function):
        def count(*given, **named):
            result = function(*given, **named)
            if os.environ.get("RANK", "0") == "0":
                with open(steps, "ab") as file:
                    file.write(b".")
            return result
        return count

    save = torch.save

    def in_halves(value: object, file: io.BufferedWriter) -> None:
        save(value, whole := io.BytesIO())
        data = whole.getvalue()
        file.write(data[:len(data) // 2])
        file.flush()
        time.sleep(0.05)
        file.write(data[len(data) // 2:])

    torch.save, os.fsync, os.replace = in_halves, slow(os.fsync, 0.01), slow(os.replace, 0.01)
    for steps_of in (lpo_steps, lrm_steps):
        steps_of.train_step = counted(steps_of.train_step)
    sys.exit(train.main(arguments))


def start(*arguments: str, log: Path, entry: tuple[str, ...] = (),
          variables: dict[str, str] | None = None) -> BaseProcess:
    """A process that runs a script, or a module behind -m,
    with its output and its errors added to ``log``.out and .err."""
    with mock.patch.dict(os.environ, environment(), clear=True):
        CONTEXT.set_forkserver_preload(["lpo_fast.train_lpo"])
        multiprocessing.forkserver.ensure_running()
    streams = f"{log}.out", f"{log}.err"
    process = CONTEXT.Process(target=rank, args=(variables or {}, streams, [*entry, *arguments]))
    process.start()
    return process


class Trial:
    """A stage's run in a folder: once undisturbed, then killed."""

    def __init__(self, stage: str, folder: Path, arguments: list[str]):
        self.stage, self.folder, self.left, self.lost = stage, folder, Counter(), []
        self.arguments = [*arguments, "--save-steps", str(SAVE_STEPS), "--resume"]
        begin = time.monotonic()
        self.whole = self.life("whole")
        self.whole.join()
        self.seconds = time.monotonic() - begin
        assert self.whole.exitcode == 0, (folder / "whole.err").read_text()

    def life(self, name: str) -> BaseProcess:
        """Start the run, or go on with it."""
        return start(str(self.folder / f"{name}.steps"), *self.arguments, "--out", str(self.folder / name),
                     log=self.folder / name, entry=(*self.launcher(), __file__, "--child"))

    def launcher(self) -> list[str]:
        """What starts the processes of a life."""
        return []

    def kill(self, process: BaseProcess) -> None:
        """End a life."""
        process.kill()
        process.join()

    def killed(self, process: BaseProcess, said: str) -> bool:
        """Whether a life ended as ``kill`` ends it; said: its errors."""
        return process.exitcode == -signal.SIGKILL

    def run(self, name: str, plan: list[float | str]) -> int:
        """A run, killed as planned, and its end; how many kills there were,
        which are fewer if it ended before one.

        plan: of each life, the share of the undisturbed run's time after which it ends, or the beginning of
        the name of an unfinished file that ends it.
        """
        out, steps, done, heard = self.folder / name, self.folder / f"{name}.steps", 0, 0
        while True:
            steps.unlink(missing_ok=True)
            first, process = stands(out), self.life(name)
            end = plan[done] if done < len(plan) else float("inf")
            if isinstance(end, str):
                while process.is_alive() and not left(out, end):
                    time.sleep(0.001)
                time.sleep(random.uniform(0, 0.06))
                self.kill(process)
            elif end < 1:
                process.join(end * self.seconds)
                self.kill(process)
            process.join()
            if process.exitcode == 0:
                break
            said = steps.with_suffix(".err").read_text()
            assert self.killed(process, said[heard:]), said[heard:]
            heard = len(said)
            done += 1
            self.left.update(left(out) or ["nothing"])
            now, made = stands(out), len(steps.read_bytes()) if steps.is_file() else 0
            assert 0 <= first + made - now <= SAVE_STEPS, (first, made, now)
            self.lost.append(first + made - now)
        self.check(out)
        return done

    def check(self, out: Path) -> None:
        """The same files with the same contents as the undisturbed run's;
        what the machine and the clock say is left out."""
        other = self.folder / "whole"
        assert names(out) == names(other), names(out) ^ names(other)
        for name in names(out):
            if name.endswith((".safetensors", ".bin", ".png")) or name in ("metrics.jsonl", "checksums.json"):
                assert (out / name).read_bytes() == (other / name).read_bytes(), name
            # of a run killed after its last step, it is the last one
            elif name.endswith(".pt") and name != "state.before.pt":
                a, b = (torch.load(folder / name, weights_only=True) for folder in (out, other))
                assert equal(a, b), name


class Ranks(Trial):
    """The same of several processes, of which one is killed."""

    def __init__(self, stage: str, folder: Path, arguments: list[str], count: int):
        self.count, self.ends, self.told = count, [], 0
        super().__init__(stage, folder, arguments)

    def launcher(self) -> list[str]:
        return ["-m", "torch.distributed.run", f"--nproc_per_node={self.count}",
                f"--master_port={free_port()}"]

    def kill(self, process: BaseProcess) -> None:
        """Kill a random rank; all must have ended within 60 s."""
        while process.is_alive() and len(ranks := children(process.pid)) < self.count:
            time.sleep(0.01)
        if not process.is_alive():
            return
        begin = time.monotonic()
        os.kill(random.choice(ranks), signal.SIGKILL)
        process.join(60)
        self.ends.append(time.monotonic() - begin)
        assert not process.is_alive() and not any(Path(f"/proc/{rank}").exists() for rank in ranks)

    def killed(self, process: BaseProcess, said: str) -> bool:
        """The launcher names the signal; a rank that was waiting for the killed one says so,
        and none has another error."""
        self.told += "another rank has failed (see its error) or was killed" in said
        return process.exitcode == 1 and "SIGKILL" in said and said.count("Traceback") == 1


def children(process: int) -> list[int]:
    """Processes that a process has started and that have not ended."""
    found = [int(child) for task in Path(f"/proc/{process}/task").glob("*/children")
             for child in task.read_text().split()]
    return [child for child in found if "--child" in Path(f"/proc/{child}/cmdline").read_text()]


def equal(a: object, b: object) -> bool:
    """Bit for bit, with all that is in it."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def names(out: Path) -> set[str]:
    """All files of a run directory."""
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def left(out: Path, target: str = "") -> list[str]:
    """What is being written, replaced or removed in a run directory."""
    kinds = (".new", ".old", ".gone")
    return sorted(name for name in (os.listdir(out) if out.is_dir() else ()) if name.startswith(target or ".")
                  and name.endswith(kinds))


def stands(out: Path) -> int:
    """The step that a run will go on from. Every checkpoint must be readable, and a state if there is one."""
    for file in (*out.glob("checkpoint*/*.pt"), *out.glob("checkpoint*/*.bin")):
        torch.load(file, weights_only=True)
    for file in out.glob("checkpoint*/*.json"):
        json.loads(file.read_text())
    for name in ("state.pt", "state.before.pt"):
        if (out / name).is_file():
            return torch.load(out / name, weights_only=True)["at"]["step"]
    return 0


def command(stage: str, folder: Path, model: Path) -> list[str]:
    """A stage's command line on a model, with an untrained LRM and the embedded world's prompts or
    pairs, made in a folder."""
    from lpo_fast.lrm import checkpoint
    from lpo_fast.models import texts
    from lpo_fast.shapes import evaluate, world
    if stage == "lpo":
        lrm = checkpoint.new_lrm(model, generator=torch.Generator().manual_seed(1))
        checkpoint.save_lrm(lrm, texts.load_tokenizers(model, lrm.family), folder / "lrm")
        (folder / "prompts.json").write_text(json.dumps(world.captions(held_out=False)[:6]))
        data = ["--lrm", str(folder / "lrm"), "--prompts", str(folder / "prompts.json")]
    else:
        evaluate.write_pairs(folder / "pairs.parquet", 12, 0, held_out=False)
        data = ["--pairs", str(folder / "pairs.parquet"), "--validation-pairs", str(folder / "pairs.parquet")]
    return [stage, "--model", str(model), *data, *FLAGS[stage]]


def trials(folder: Path, model: Path, stages: tuple[str, ...] = ("lpo", "lrm"),
           ranks: int = 1) -> list[Trial]:
    """Both stages, each in a folder of its own."""
    made = []
    for stage in stages:
        (at := folder / stage).mkdir()
        arguments = command(stage, at, model)
        made.append(Trial(stage, at, arguments) if ranks == 1 else Ranks(stage, at, arguments, ranks))
    return made


def main() -> None:
    """The long form. The seed decides what is planned; what a kill hits is chance."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from lpo_fast.run import environment as place
    from lpo_fast.shapes import evaluate
    begin, chance, folder, commit = (time.monotonic(), random.Random(options.seed), Path(tempfile.mkdtemp()),
                                     place.commit())
    both = trials(folder, evaluate.PIPELINE, ranks=options.ranks)
    print("undisturbed:", *(f"{trial.stage} {trial.seconds:.1f} s" for trial in both), flush=True)
    lines, total = [], 0
    for trial, kills in zip(both, (options.kills - options.kills // 2, options.kills // 2), strict=True):
        done, count = 0, 0
        while done < kills:
            plan = [chance.random() if chance.random() < 0.4 else chance.choice(TARGETS)
                    for _ in range(chance.randint(3, 12))]
            done += trial.run(f"run{count}", plan[:kills - done])
            count += 1
            print(f"{trial.stage}: {done} kills, {count} runs, {time.monotonic() - begin:.0f} s", flush=True)
        found = ", ".join(f"`{name}` {times}" for name, times in trial.left.most_common())
        lost = f"{max(trial.lost)} of {SAVE_STEPS}"
        lines.append(f"| {trial.stage} | {done} | {count} | {trial.seconds:.1f} s | {lost} | {found} |")
        total += done
    shutil.rmtree(folder)
    title, what, more = "# Killed training runs", "SIGKILL", []
    if options.ranks > 1:
        ends, told = sorted(sum((trial.ends for trial in both), [])), sum(trial.told for trial in both)
        title, what = f"## One of {options.ranks} processes killed", "SIGKILL to one process"
        more = [f"The others had ended after {ends[len(ends) // 2]:.1f} s (median), {ends[-1]:.1f} s at "
                f"most. The launcher named the signal every time; {told} times another process said that one "
                "had failed: else it was not in the loop.", ""]
    asked = f"--kills {options.kills} --ranks {options.ranks} --seed {options.seed}"
    text = "\n".join([
        title, "", f"`python tests/tools/kill.py {asked}`, commit {commit}, {time.strftime('%Y-%m-%d')}, "
        f"{time.monotonic() - begin:.0f} s on {os.cpu_count()} {platform.machine()} cores.",
        ", ".join(f"{name} {version(name)}"
                  for name in ("torch", "diffusers", "transformers", "peft", "accelerate")) + ".", "",
        f"{total} times {what}, at random moments and during writes. After each, all checkpoints and the "
        "state could be read. Every run ended with the files of one that nobody killed and no others: "
        "metrics, weights, checkpoints, states and pictures equal bit for bit.", "", *more,
        "| stage | kills | runs | undisturbed | most steps lost, of --save-steps | unfinished files at the "
        "moment of death |", "|---|---|---|---|---|---|", *lines, ""])
    print(text)
    if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(f"\n{text}" if file.tell() else text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
