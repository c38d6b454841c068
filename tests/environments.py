"""python tests/environments.py [VARIANT …]: the wheel away from the repository, with and without its optional parts.

Variants without a package run in this interpreter on links to everything installed but that package. ``triton==3.6.0`` and
``kernels`` (Hugging Face's) are installed into a folder of their own first; python3.12 gets an environment of its own.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITHOUT = ("xformers", "bitsandbytes", "triton")
INSTALLED = ("triton==3.6.0", "kernels")
SHORT = ("whole", *(f"without {name}" for name in WITHOUT))
ALL = (*SHORT, *(f"with {name}" for name in INSTALLED), "python3.12")
# One prompt batch of LPO on the packaged pipeline with a reward model that has learned nothing.
RUN = """
import torch
from dataclasses import replace
from pathlib import Path
from lpo_fast import backbone, checkpoint, config, train_lpo
from lpo_fast.shapes import PIPELINE
lrm = checkpoint.new_lrm(PIPELINE, generator=torch.Generator().manual_seed(0))
checkpoint.save_lrm(lrm, backbone.load_tokenizers(PIPELINE, lrm.family), Path("lrm"))
Path("prompts.txt").write_text("a red circle on a blue background\\n")
train_lpo.train(replace(config.shapes().lpo, model=str(PIPELINE), lrm="lrm", prompts="prompts.txt", out="run", pictures=0,
                        batch_size=1, num_steps=2, threshold_min=0.0, threshold_max=0.001))
print("lpo_fast from", Path(backbone.__file__).parent)
"""


def wheel(folder: Path) -> Path:
    """Built from a copy of the repository, unpacked into a folder; no package index is asked."""
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True)
    made, = folder.glob("lpo_fast-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-compile", "-t", str(folder / "wheel"), str(made)], check=True)
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


def check(variant: str, folder: Path, package: Path) -> list[str]:
    """What is wrong in a variant; folder: an empty one to work in."""
    python, paths, without = [sys.executable, "-S"], [package], ""
    if variant == "python3.12":
        venv = folder / "venv"
        subprocess.run([variant, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "-q", "-c", str(ROOT / "constraints.txt"), "--no-compile",
                        str(next(package.parent.glob("*.whl")))], check=True)
        python = [str(venv / "bin" / "python")]
    else:
        kind, _, name = variant.partition(" ")
        if kind == "with":
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "extra"), name],
                           check=True)
            paths.append(folder / "extra")
        without = name if kind == "without" else ""
        paths.append(links(folder / "links", without))
    cwd, problems = folder / "work", []
    cwd.mkdir()
    done = run(python, paths, cwd, "-c", RUN)
    if done.returncode or f"lpo_fast from {package}" not in done.stdout:
        problems.append(f"a run fails: {(done.stdout + done.stderr)[-1500:]}")
    asked = {"xformers": ["--attention", "xformers"], "bitsandbytes": ["--optimizer", "adamw8bit"]}.get(without)
    if asked:
        told = run(python, paths, cwd, "-m", "lpo_fast.train", "lpo", "--model", "m", "--lrm", "l", "--prompts", "p", *asked)
        line = told.stderr.strip().splitlines()[-1:]
        if told.returncode != 2 or not line or "is not installed" not in line[0] or "Traceback" in told.stderr:
            problems.append(f"{' '.join(asked)} says {told.stderr[-500:]!r}")
    looked = run(python, paths, cwd, "-m", "lpo_fast.doctor")
    if looked.returncode or "Traceback" in looked.stderr:
        problems.append(f"doctor fails: {(looked.stdout + looked.stderr)[-1500:]}")
    return problems


def main() -> int:
    """Every variant; the exit code counts those that fail. One that cannot be made here is said and left out."""
    bad = 0
    with tempfile.TemporaryDirectory() as made:
        package = wheel(Path(made))
        for variant in sys.argv[1:] or ALL:
            if variant == "python3.12" and not shutil.which(variant):
                print(f"{variant}: not on this machine, left out", flush=True)
                continue
            folder = Path(tempfile.mkdtemp(dir=made))
            try:
                problems = check(variant, folder, package)
            except subprocess.CalledProcessError as error:
                print(f"{variant}: cannot be installed here, left out ({error})", flush=True)
                continue
            print(f"{variant}: {'; '.join(problems) or 'ok'}", flush=True)
            bad += bool(problems)
    return bad


if __name__ == "__main__":
    sys.exit(main())
