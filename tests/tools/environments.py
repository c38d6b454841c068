"""python tests/tools/environments.py [--out FILE.md] [VARIANT …]:
the wheel away from the repository, with and without extras.

Variants without a package run in this interpreter on links to everything installed but that package.
``triton==3.6.0`` and ``kernels`` (Hugging Face's) are installed into a folder of their own first; python3.12
gets an environment of its own.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = ("xformers", "bitsandbytes", "triton")
INSTALLED = ("triton==3.6.0", "kernels")
SHORT = ("whole", *(f"without {name}" for name in WITHOUT))
ALL = (*SHORT, *(f"with {name}" for name in INSTALLED), "python3.12")
NAMES = ("python", "torch", "triton", "xformers", "bitsandbytes", "kernels")
# One prompt batch of LPO on the packaged pipeline with a reward model that has learned nothing.
RUN = """
import torch
from dataclasses import replace
from pathlib import Path
from lpo_fast import config
from lpo_fast.lrm import checkpoint
from lpo_fast.models import denoisers
from lpo_fast.models import texts
from lpo_fast import train_lpo
from lpo_fast.shapes import PIPELINE
lrm = checkpoint.new_lrm(PIPELINE, generator=torch.Generator().manual_seed(0))
checkpoint.save_lrm(lrm, texts.load_tokenizers(PIPELINE, lrm.family), Path("lrm"))
Path("prompts.txt").write_text("a red circle on a blue background\\n")
train_lpo.train(replace(config.shapes().lpo, model=str(PIPELINE), lrm="lrm", prompts="prompts.txt", out="run",
                        pictures=0, batch_size=1, num_steps=2, threshold_min=0.0, threshold_max=0.001))
print("lpo_fast from", Path(denoisers.__file__).parent)
"""
# What a variant runs on: what is imported, not what is listed.
VERSIONS = """
import importlib, json, platform, sys
from importlib.metadata import version
found = {"python": platform.python_version()}
for name in sys.argv[2:]:
    try:
        module = importlib.import_module(name)
        found[name] = getattr(module, "__version__", "") or version(name)
    except ModuleNotFoundError:
        found[name] = "none"
print(json.dumps(found))
"""


class Checked(NamedTuple):
    """A variant: what it ran on, by name, and what is wrong."""

    versions: dict[str, str]
    problems: list[str]


def wheel(folder: Path) -> Path:
    """Built from a copy of the repository, unpacked into a folder; no package index is asked."""
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True,
                    ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)],
                   check=True)
    made, = folder.glob("lpo_fast-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-compile", "-t", str(folder / "wheel"),
                    str(made)], check=True)
    return folder / "wheel"


def links(folder: Path, without: str = "") -> Path:
    """Links to all that is installed here, but for one package and this repository's own."""
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        name = path.name.lower()
        if not name.startswith(("lpo_fast", "__editable__")) and not (without and name.startswith(without)):
            (folder / path.name).symlink_to(path)
    return folder


def run(python: list[str], paths: list[Path], cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A command away from the repository."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_", "PYTEST"))}
    env = clean | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*python, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def check(variant: str, folder: Path, package: Path) -> Checked:
    """folder: an empty one to work in. Raises CalledProcessError if the variant cannot be made here."""
    python, paths = [sys.executable, "-S"], [package]
    kind, _, name = variant.partition(" ")
    if variant.startswith("python"):
        venv = folder / "venv"
        subprocess.run([variant, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "-q", "-c", str(ROOT / "constraints.txt"),
                        "--no-compile", str(next(package.parent.glob("*.whl")))], check=True)
        python = [str(venv / "bin" / "python")]
    else:
        if kind == "with":
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                            str(folder / "extra"), name], check=True)
            paths.append(folder / "extra")
        paths.append(links(folder / "links", name if kind == "without" else ""))
    cwd, problems = folder / "work", []
    cwd.mkdir()
    seen = run(python, paths, cwd, "-c", VERSIONS, *NAMES)
    versions = json.loads(seen.stdout.splitlines()[-1])
    name, _, wanted = name.partition("==")
    if name and (versions[name] == "none") != (kind == "without") or wanted not in ("", versions.get(name)):
        problems.append(f"is not what it is called: {versions}")
    done = run(python, paths, cwd, "-c", RUN)
    if done.returncode or f"lpo_fast from {package}" not in done.stdout:
        problems.append(f"a run fails: {(done.stdout + done.stderr)[-1500:]}")
    asked = {"xformers": ["--attention", "xformers"], "bitsandbytes": ["--optimizer", "adamw8bit"]}.get(name)
    if asked and kind == "without":
        told = run(python, paths, cwd, "-m", "lpo_fast.train", "lpo", "--model", "m", "--lrm", "l",
                   "--prompts", "p", *asked)
        line = told.stderr.strip().splitlines()[-1:]
        if (told.returncode != 2 or not line or "is not installed" not in line[0]
                or "Traceback" in told.stderr):
            problems.append(f"{' '.join(asked)} says {told.stderr[-500:]!r}")
    looked = run(python, paths, cwd, "-m", "lpo_fast.doctor")
    if looked.returncode or "Traceback" in looked.stderr:
        problems.append(f"doctor fails: {(looked.stdout + looked.stderr)[-1500:]}")
    return Checked(versions, problems)


def main() -> int:
    """Every variant; the exit code counts those that fail. One that cannot be made here is said and left out.
    """
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"default: {', '.join(ALL)}")
    options, bad, rows = parser.parse_args(), 0, []
    from lpo_fast.run import environment
    commit = environment.commit()
    with tempfile.TemporaryDirectory() as made:
        package = wheel(Path(made))
        for variant in options.variants or ALL:
            begin, versions, folder = time.monotonic(), {}, Path(tempfile.mkdtemp(dir=made))
            if variant.startswith("python") and not shutil.which(variant):
                result = "not on this machine, left out"
            else:
                try:
                    versions, problems = check(variant, folder, package)
                    result = "; ".join(problems) or "ok"
                    bad += bool(problems)
                except subprocess.CalledProcessError as error:
                    result = f"cannot be installed here, left out ({error})"
            shutil.rmtree(folder)
            print(f"{variant}: {result}", flush=True)
            seconds = f"{time.monotonic() - begin:.0f} s"
            rows.append(
                f"| {' | '.join([variant, *(versions.get(name, '') for name in NAMES), seconds, result])} |")
    text = "\n".join([
        "# The wheel in other environments", "",
        f"`{shlex.join(['python', 'tests/tools/environments.py', *options.variants])}`, commit {commit}, "
        f"{time.strftime('%Y-%m-%d')}, on {os.cpu_count()} {platform.machine()} cores that "
        "other work shared.", "", "The wheel is built, unpacked away from the repository, trains a prompt "
        "batch of LPO on the packaged pipeline, and `python -m lpo_fast.doctor` runs; without xformers and "
        "bitsandbytes the options that want them are refused in a sentence.", "",
        f"| variant | {' | '.join(NAMES)} | time | result |", f"|{'---|' * (len(NAMES) + 3)}", *rows, ""])
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return bad


if __name__ == "__main__":
    sys.exit(main())
