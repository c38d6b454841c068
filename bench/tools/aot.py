"""Compile every kernel ahead of time, as production launches it, and check the result; no GPU needed.

    python bench/tools/aot.py [op …] [--arch 80 90 100] [--out FILE]

Each operator runs once, forward and backward, on CPU tensors of production's shapes within
``launch.recording()``; each distinct launch is specialized as Triton's own launcher would, compiled and
disassembled. The exit status is 1 if a launch does not compile, spills or uses local memory, if fewer than
MIN_WARPS warps fit on a multiprocessor, or if it has no 16-byte access to global memory (``Operator.narrow``
gives the reason where none is possible).
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before kernels are defined
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.support.measure import markdown
from lpo_fast.system.launch import Launch, recording
from lpo_fast.verify.operators import OPERATORS, Operator

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# With 64 bytes in flight per thread, 32 KB per multiprocessor: hides the latency of an H100's memory.
MIN_WARPS = 16
# Of a multiprocessor, by compute capability: warps, blocks, KB of shared memory (CUDA C++ Programming Guide,
# "Compute Capabilities"). All have 65,536 registers.
LIMITS = {80: (64, 32, 164), 86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228),
          120: (48, 24, 100)}


class Row(NamedTuple):
    """Hold the result of one launch on one architecture. local: bytes of stack and local memory.

    load, store: accesses to global memory among the instructions, "number×bytes", the widest first.
    """

    op: str
    sizes: str
    kernel: str
    arch: int
    programs: str
    warps: int
    registers: int = 0
    shared: int = 0
    spills: int = 0
    local: int = 0
    load: str = "-"
    store: str = "-"
    resident: int = 0
    verdict: str = ""


class Unfilled(TorchFunctionMode):
    """Fill random tensors with zeros instead: nothing reads them, and zeros take no memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.randn, torch.rand, torch.randint):
            kwargs = {k: v for k, v in (kwargs or {}).items() if k not in ("generator", "low", "high")}
            kwargs.setdefault(
                "size", next((a for a in reversed(args) if isinstance(a, (tuple, list, torch.Size))), args))
            if function is torch.randint:
                kwargs.setdefault("dtype", torch.int64)
            return torch.zeros(**kwargs)
        return function(*args, **(kwargs or {}))


def recorded(operator: Operator, size: dict) -> list[Launch]:
    """Return the launches of a forward pass, and of a forward and a backward pass."""
    with Unfilled(), recording() as launches:
        inputs = [operator.inputs(torch.device("cpu"), **size)]
        for backward in (False, True) if operator.differentiable else (False,):
            for call in operator.calls(operator.kernel, inputs, backward):
                call()
    return launches


def source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict]:
    """Return the source and options that Triton's launcher would compile for a launch.

    They depend on dtypes, 16-byte alignment, and integers that are 1 or multiples of 16.
    """
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, num_warps=launch.warps, **launch.constants)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def tool(name: str, cubin: bytes, *options: str) -> str:
    """Return the output of one of Triton's tools for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True,
                              check=True).stdout


def accesses(sass: str, instruction: str) -> dict[int, int]:
    """Return the number of ``instruction`` in ``sass`` by bytes of global memory per thread, widest first."""
    modifiers = re.findall(rf"\b{instruction}\b((?:\.\w+)*)", sass)
    bits = [re.search(r"\.[US]?(8|16|64|128|256)(?!\w)", m) for m in modifiers]
    return dict(sorted(Counter(int(b[1]) // 8 if b else 4 for b in bits).items(), reverse=True))


def resident(arch: int, warps: int, registers: int, shared: int) -> int:
    """Return the number of warps that fit on a multiprocessor at once."""
    most, blocks, memory = LIMITS[arch]
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps  # a quarter per scheduler
    by_memory = memory * 1024 // (-(-shared // 128) * 128 + 1024)  # 1 KB is reserved
    return warps * min(most // warps, blocks, by_registers, by_memory)


def examine(op: str, size: str, launch: Launch, what: ASTSource, options: dict, target: GPUTarget,
            narrow: str) -> Row:
    """Compile one launch; return its row."""
    arch = target.arch
    row = Row(op, size, launch.kernel.__name__, arch, "×".join(map(str, launch.grid)), launch.warps)
    try:
        compiled = triton.compile(what, target=target, options=options)
    except Exception as error:  # the compiler and its assembler raise many kinds
        print(f"{op} {size} {row.kernel} sm_{arch}: {error}", file=sys.stderr)
        return row._replace(verdict="does not compile")
    cubin, shared = compiled.asm["cubin"], compiled.metadata.shared
    usage = {k: int(v)
             for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", cubin, "-res-usage"))}
    sass = tool("nvdisasm", cubin, "-c")
    spills, local = len(re.findall(r"\b(?:STL|LDL)\b", sass)), usage["STACK"] + usage["LOCAL"]
    load, store = accesses(sass, "(?:LDG|LDGSTS)"), accesses(sass, "STG")
    fits = resident(arch, launch.warps, usage["REG"], shared)
    verdict = ("spills" if spills or local else f"only {fits} warps fit" if fits < MIN_WARPS else
               (f"narrow: {narrow}" if narrow else "NARROW") if max([*load, *store], default=0) < 16 else
               "ok")
    load, store = (" ".join(f"{n}×{width}" for width, n in found.items()) or "-" for found in (load, store))
    return row._replace(registers=usage["REG"], shared=shared, spills=spills, local=local, load=load,
                        store=store, resident=fits, verdict=verdict)


def examine_all(operator: Operator, size: str, archs: Iterable[int]) -> dict[tuple[str, int], Row]:
    """Compile every distinct launch of one operator at one size for every architecture; return the rows."""
    found = {}
    for launch in recorded(operator, (operator.sizes | operator.variants)[size]):
        for arch in archs:
            target = GPUTarget("cuda", arch, 32)
            what, options = source(launch, target)
            # a forward pass launches the same with a graph and without
            if (identity := (what.hash(), arch)) not in found:
                narrow = operator.narrow.get(launch.kernel.__name__, "")
                found[identity] = examine(operator.name, size, launch, what, options, target, narrow)
    if not found:
        raise RuntimeError(f"{operator.name} launches nothing at size {size}")
    return found


def examine_by_name(op: str, size: str, archs: Iterable[int]) -> dict[tuple[str, int], Row]:
    """Call ``examine_all`` in another process, to which operators cannot be sent."""
    return examine_all(OPERATORS[op], size, archs)


def report(found: Iterable[dict[tuple[str, int], Row]]) -> tuple[str, int]:
    """Return the table of ``examine_all``'s rows, with equal launches merged, and the exit status."""
    rows: dict[tuple, Row] = {}
    for launches in found:
        for identity, row in launches.items():
            sizes = " ".join(filter(None, (rows[identity].sizes if identity in rows else "", row.sizes)))
            rows[identity] = row._replace(sizes=sizes)
    ordered = sorted(rows.values(), key=lambda row: (row.op, row.kernel, row.sizes, row.arch))
    bad = [row for row in ordered if row.verdict != "ok" and not row.verdict.startswith("narrow: ")]
    text = (f"Compiled ahead of time by Triton {triton.__version__}, python bench/tools/aot.py. load, store: "
            "instructions × bytes per thread; local: bytes; resident: warps per multiprocessor.\n\n"
            f"{markdown(Row._fields, ordered)}\n{len(ordered)} launches compiled, {len(bad)} "
            "with problems.\n")
    return text, 1 if bad or not ordered else 0


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"{', '.join(OPERATORS)}; all by default")
    parser.add_argument("--arch", nargs="+", type=int, choices=LIMITS, default=[80, 90, 100])
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    # choices would refuse an empty list
    if unknown := ", ".join(op for op in options.ops if op not in OPERATORS):
        parser.error(f"no such operator: {unknown}; there are {', '.join(OPERATORS)}")
    tasks = [(op, size, [arch]) for op in options.ops or OPERATORS
             for size in OPERATORS[op].sizes | OPERATORS[op].variants for arch in options.arch]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        text, status = report(pool.map(examine_by_name, *zip(*tasks, strict=True)))
    print(text, end="")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
