"""Run the kernels' checks that need no GPU with another version of Triton, and record the results.

    python bench/tools/gates.py --triton 3.6.0 [--path DIR] [--out DIR]

Runs the tests of kernels/ under Triton's interpreter, and bench/tools/aot.py, with that Triton first on
PYTHONPATH: from DIR, from a temporary folder into which pip installs it, or the installed one if it has that
version. Writes gates-triton-<version>.md and aot-triton-<version>.md into --out (default: bench/results). The
exit status is 1 if a check fails.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.support.measure import HERE, markdown

ROOT = HERE.parent
VERSIONS = """
import json, numpy, triton
from bench.support import measure
print(json.dumps(measure.environment() | {"numpy": numpy.__version__}))
"""


def folder(version: str, stack: ExitStack) -> str:
    """Install that Triton into a temporary folder and return it; "" if it is the installed version."""
    if importlib.metadata.version("triton") == version:
        return ""
    path = stack.enter_context(tempfile.TemporaryDirectory())
    packages = [f"triton=={version}"]
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        packages.append("numpy==2.3.5")  # its interpreter's loops fail with numpy 2.4
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", path,
                    *packages], check=True)
    return path


def gate(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a command and show its output; return its exit status and last line."""
    closing = ""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                          text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            closing = line.strip(" =\n") or closing
    return process.returncode, closing


def main() -> int:
    """Run the checks and write the record; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", required=True, metavar="VERSION")
    parser.add_argument("--path", help="a folder with that Triton, and a numpy that its interpreter supports")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    out, names = options.out.resolve(), sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    with ExitStack() as stack:
        path = options.path and str(Path(options.path).resolve()) or folder(options.triton, stack)
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        search = os.pathsep.join(filter(None, (path, str(ROOT), clean.get("PYTHONPATH"))))
        environment = {**clean, "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""}
        found = json.loads(subprocess.check_output([sys.executable, "-c", VERSIONS], cwd=ROOT,
                                                   env=environment, text=True))
        if found["triton"] != options.triton:
            parser.error(f"--triton {options.triton}: found {found['triton']}")
        table = out / f"aot-triton-{options.triton}.md"
        rows, failed = [], 0
        for shown, command in (
            ("python -m pytest " + " ".join(tests := ["tests/system/test_launch.py",
                                                      *(f"tests/kernels/test_{name}.py" for name in names)]),
             ["-m", "pytest", "--disable-warnings", "-p", "no:cacheprovider", *tests]),
            (f"python bench/tools/aot.py --out {table.name}", ["bench/tools/aot.py", "--out", str(table)]),
        ):
            status, closing = gate(command, environment)
            rows.append((f"`{shown}`", status, closing))
            failed |= status
    out.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{key} {found[key]}"
                         for key in ("triton", "numpy", "torch", "python", "commit", "date"))
    (out / f"gates-triton-{options.triton}.md").write_text(
        f"# Gates without a GPU, Triton {options.triton}\n\n`python bench/tools/gates.py --triton "
        f"{options.triton}`: {versions}.\n\n" + markdown(("command", "exit status", "closing line"), rows),
        encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
