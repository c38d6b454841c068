"""Report what this machine supports, and check that this code computes the method.

Run as python -m lpo_fast.doctor [--golden DIR]. Prints versions, devices, attention and 8-bit support. On a
GPU it runs every kernel against its reference at training sizes, and prints error and rate. With --golden it
checks every file of a directory of golden vectors (see verify/golden.py). Exits with code 1 if any check
fails.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers.utils import is_xformers_available

from lpo_fast.errors import InputError
from lpo_fast.run import environment, optimization
from lpo_fast.system import devices, launch
from lpo_fast.system.launch import triton
from lpo_fast.verify import golden
from lpo_fast.verify.operators import OPERATORS, Operator, error


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lpo_fast.doctor", description="Report what this machine "
                                     "supports, and check that this code computes the method.")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="directory of golden vectors to check")
    arguments = parser.parse_args(argv)
    if arguments.golden and not (arguments.golden / "configs.json").is_file():
        print(f"error: --golden {arguments.golden}: holds no golden vectors (configs.json is missing); name "
              "their directory", file=sys.stderr)
        return 2
    here = environment.environment()
    for key in ("python", *environment.PACKAGES, "commit"):
        print(f"{key:>13}  {here[key] or 'not installed'}")
    print(f"{'device':>13}  {here['gpu'] or 'CPU only'} ({here['cores']} cores)")
    for line in attention(), eight_bit():
        print(line)
    failures = kernels()
    if arguments.golden is not None:
        failures += golden.check(arguments.golden)
    return 1 if failures else 0


def attention() -> str:
    """Return a line with the attention implementations that run here."""
    works = torch.cuda.is_available() and is_xformers_available()
    return f"{'attention':>13}  SDPA" + (", xformers" if works else "; xformers needs CUDA")


def eight_bit() -> str:
    """Return a line stating whether 8-bit AdamW runs here; it runs one step."""
    parameter = torch.nn.Parameter(torch.zeros(8192, device=devices.device()))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimization.optimizer("adamw8bit", [parameter], lr=1e-3, weight_decay=0.0).step()
        state = "works"
    except (InputError, RuntimeError, OSError) as problem:
        state = f"does not run ({problem})"
    return f"{'8-bit AdamW':>13}  {state}"


def kernels() -> int:
    """Run every kernel, print a line for each pass (error, time, rate), and return the number of failures.

    Under Triton's interpreter sizes are small, and times are not measured.
    """
    cuda = torch.cuda.is_available()
    if not cuda and not launch.INTERPRETED:
        print(f"{'kernels':>13}  need CUDA; the references run here "
              "(TRITON_INTERPRET=1 interprets them, for tests)")
        return 0
    failures, copy = 0, copy_rate() if cuda else None
    print(f"{'kernels':>13}  compared with their references in float64"
          + (f"; copying runs at {copy:.0f} GB/s" if cuda else ""))
    for operator in OPERATORS.values():
        for size, settings in (operator.sizes if cuda else operator.small).items():
            for backward in (False, True) if operator.differentiable else (False,):
                try:
                    report = kernel(operator, settings, backward, copy)
                except torch.OutOfMemoryError:
                    report = "does not fit into this GPU's memory"
                except Exception as problem:  # wrong results, or errors of Triton or CUDA
                    failures, report = (failures + 1,
                                        f"FAILED: {(str(problem) or repr(problem)).splitlines()[0]}")
                print(f"{operator.name:>16}  {size:<10}  {'backward' if backward else 'forward':<8}  "
                      f"{report}", flush=True)
    return failures


def kernel(operator: Operator, settings: dict, backward: bool, copy: float | None) -> str:
    """Return a line with the error of one pass, and its median time and rate.

    copy: the rate of copying in GB/s; None: times are not measured. Raises AssertionError if the result is
    wrong, RuntimeError if the kernel does not run.
    """
    torch.manual_seed(0)
    arguments = operator.inputs(devices.device(), **settings)
    call, = operator.calls(operator.kernel, [arguments], backward)
    report = f"error {error(operator.name, call(), operator.truth(arguments, backward)):.1e}"
    if copy is not None:
        milliseconds = triton.testing.do_bench(call, return_mode="median")
        rate = operator.moved(arguments, backward) / milliseconds / 1e6
        report += f"  {milliseconds * 1e3:7.1f} µs  {rate:5.0f} GB/s  {rate / copy:4.0%} of copying"
    return report


def copy_rate() -> float:
    """Return the rate of a copy within the GPU: GB read and written per second."""
    source = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return (2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
            / 1e6)


if __name__ == "__main__":
    sys.exit(main())
