"""python tests/tools/mutate.py [NAME …]: break the method in small ways, one at a time,
and see that a test notices.

Works on a copy of the project in a temporary directory. Prints ``killed`` or ``SURVIVED`` a mutation; exits
with 1 if one survives or no longer applies to the source.
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds; a mutation that hangs is noticed, too
FAILED, HUNG, ANOTHER = 1, -1, -2  # exit codes: pytest's for failed tests, and ours


def preload() -> None:
    """Import once what the tests import, so that the processes below need not; not lpo_fast itself."""
    import torch
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    for name in ("pytest", "hypothesis", "pyarrow.parquet", "peft", "diffusers.training_utils",
                 "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"):
        importlib.import_module(name)


def child(copy: Path, tests: tuple[str, ...], code: Synchronized) -> None:
    """In a process of its own: run the tests on the copy, quietly."""
    import pytest
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True  # a mutation of the same length within the same second would go unseen
    code.value = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)])
    if Path(sys.modules["lpo_fast"].__file__).resolve().parent.parent != copy:
        code.value = ANOTHER


def run(copy: Path, tests: tuple[str, ...]) -> int:
    """pytest's exit code in the copy."""
    context = multiprocessing.get_context("fork")
    code = context.Value("i", HUNG)
    process = context.Process(target=child, args=(copy, tests, code))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
    return code.value


def main(names: list[str]) -> int:
    """Try the mutations, all or those named; the exit code."""
    chosen = [m for m in MUTATIONS if not names or any(name in m.name for name in names)]
    bad = [m.name for m in chosen
           if (ROOT / "lpo_fast" / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    for name in bad:
        print(f"NOT FOUND ONCE  {name}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for part in ("lpo_fast", "kernels", "bench", "tests"):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, symlinks=True,
                                ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "pyproject.toml", copy / "pyproject.toml")
        preload()
        for tests in sorted({m.tests for m in chosen}):
            if code := run(copy, tests):
                print(f"{' '.join(tests)} fails without a mutation: code {code} ({ANOTHER}: another copy "
                      "was imported)")
                return 1
        survived = 0
        for mutation in chosen:
            file = copy / "lpo_fast" / mutation.file
            source = file.read_text(encoding="utf-8")
            if mutation.name in bad:
                continue
            file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
            alive = run(copy, mutation.tests) not in (FAILED, HUNG)
            file.write_text(source, encoding="utf-8")
            survived += alive
            print(f"{'SURVIVED' if alive else 'killed'}  {mutation.file}: {mutation.name}", flush=True)
    print(f"{len(chosen) - survived - len(bad)} killed, {survived} survived, {len(bad)} not found once")
    return 1 if survived or bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
