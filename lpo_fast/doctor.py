"""python -m lpo_fast.doctor [--golden DIR]: what this machine can do, and whether this code computes the method.

Prints versions, devices, attention and 8-bit support; with --golden it checks every file of a directory of golden vectors
(see golden.py) and exits with 1 if any check fails.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers.utils import is_xformers_available

from lpo_fast import golden, runs, speed
from lpo_fast.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lpo_fast.doctor",
                                     description="Say what this machine can do, and whether this code computes the method.")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="directory of golden vectors to check against")
    arguments = parser.parse_args(argv)
    if arguments.golden and not (arguments.golden / "configs.json").is_file():
        print(f"error: --golden {arguments.golden}: holds no golden vectors (configs.json is missing); name their directory",
              file=sys.stderr)
        return 2
    here = runs.environment()
    for key in ("python", *runs.PACKAGES, "commit"):
        print(f"{key:>13}  {here[key] or 'not installed'}")
    print(f"{'device':>13}  {here['gpu'] or 'CPU only'} ({here['cores']} cores)")
    for line in attention(), eight_bit():
        print(line)
    if arguments.golden is None:
        return 0
    return 1 if golden.check(arguments.golden) else 0


def attention() -> str:
    """Which attention runs here."""
    works = torch.cuda.is_available() and is_xformers_available()
    return f"{'attention':>13}  SDPA" + (", xformers" if works else "; xformers needs CUDA")


def eight_bit() -> str:
    """Whether a step of 8-bit AdamW runs here."""
    parameter = torch.nn.Parameter(torch.zeros(8192, device=speed.device()))
    parameter.grad = torch.ones_like(parameter)
    try:
        speed.optimizer("adamw8bit", [parameter], lr=1e-3).step()
        state = "works"
    except (InputError, RuntimeError, OSError) as problem:
        state = f"does not run ({problem})"
    return f"{'8-bit AdamW':>13}  {state}"


if __name__ == "__main__":
    sys.exit(main())
