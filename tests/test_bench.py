"""The benchmarks' command, its tables, and what is read out of compiled kernels; no times are asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench import bench_kernels, bench_lrm
from bench.support import measure
from bench.support.measure import markdown, table
from lpo_fast.verify.operators import OPERATORS, Operator, error

ROOT = Path(__file__).parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=clean, capture_output=True, text=True)


def test_every_operator_has_a_benchmark_and_the_same_small_size() -> None:
    benchmarks = {name.removeprefix("test_") for name in vars(bench_kernels) if name.startswith("test_")}
    assert set(OPERATORS) == {path.stem for path in (ROOT / "kernels").glob("*.py")} == benchmarks
    for operator in OPERATORS.values():
        assert {"sd15", "sd21", "sdxl"} <= set(operator.sizes) and operator.small
        for size in operator.small.values():
            torch.manual_seed(0)
            arguments = operator.inputs(torch.device("cpu"), **size)
            for backward in (False, True) if operator.differentiable else (False,):
                call, = operator.calls(operator.kernel, [arguments], backward)
                truth = operator.truth(arguments, backward)
                error(operator.name, call(), truth)
                assert all(x.any() for x in tree_leaves(truth)), f"{operator.name}: a result is all 0"


def test_the_command_writes_results_row_by_row_and_keeps_others(tmp_path: Path) -> None:
    command = ("-m", "pytest", "bench/bench_kernels.py::test_pair_select", "--benchmark-only",
               "-p", "no:cacheprovider", "--results", str(tmp_path))
    first = python(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    assert ("| pair_select | small" in first.stdout
            and {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"})
    path, = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())
    if torch.cuda.is_available():
        return
    assert [(row["size"], row["pass"], row["how"]) for row in rows] == [
        ("small", "forward", "eager"), ("small", "forward", "compiled")]
    assert all(min(row["bytes"], row["wall_us"], row["share"]) > 0 and row["torch"] == torch.__version__
               for row in rows)
    path.write_text(json.dumps([rows[0] | {"op": "another"}, rows[0] | {"wall_us": -1}]))
    assert python(*command, "-k", "eager").returncode == 0
    after = json.loads(path.read_text())
    assert [row["op"] for row in after] == ["another", "pair_select"] and after[1]["wall_us"] > 0
    assert "| another" in path.with_suffix(".md").read_text()


class Once:
    """In pytest-benchmark's place: a round."""

    @staticmethod
    def pedantic(call, setup, rounds: int, iterations: int) -> None:
        setup()
        call()


def test_rows_of_lrm_training(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the compiler's, in miniature; in fp32 every row's first loss is the same."""
    chosen = bench_lrm.ROWS[0], bench_lrm.OURS, bench_lrm.CACHED
    monkeypatch.setitem(bench_lrm.SETTINGS, bench_lrm.CACHED, ({"compile": "none"}, False))
    bench = bench_lrm.Bench(tiny_sd, "tiny", 2)
    for row in chosen:
        rows = bench_lrm.measure(bench, row, Once, tmp_path / "cache", tmp_path / "results")
    stated, ours, cached = rows
    assert tuple(row["row"] for row in rows) == chosen
    for row in rows:
        assert abs(row["loss_difference"]) < (0.1 if torch.cuda.is_available() else 1e-5)
        assert row["factor"] > 0 and min(row["ms"].values()) > 0
    assert (cached["needed_tflop"] < ours["needed_tflop"] == ours["tflop"] == stated["needed_tflop"]
            < stated["tflop"])
    folder, = (tmp_path / "results").iterdir()
    assert {path.name for path in folder.iterdir()} == {f"lrm-tiny.{kind}" for kind in ("json", "md", "png")}


def test_pytest_alone_collects_no_benchmark() -> None:
    collected = python("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider").stdout
    assert "tests/test_bench.py" in collected and "bench/bench_" not in collected
    collected = python("-m", "pytest", "bench/", "--benchmark-only", "--collect-only", "-q",
                       "-p", "no:cacheprovider").stdout
    assert "bench/bench_kernels.py" in collected and "tests/" not in collected


def row(how: str, wall: float, **others) -> dict:
    return {"op": "op", "size": "big", "pass": "forward", "how": how, "wall_us": wall, "GB/s": 100.0,
            "share": 0.25, **others}


def test_table() -> None:
    rows = [row("eager", 50.0, gpu_us=40.0, launches=7),
            row("kernel", 20.0, gpu_us=10.0, launches=1, **{"GB/s": 2345.67}),
            row("compiled", 25.0, gpu_us=15.0, launches=3), row("eager", 8.0) | {"op": "another"},
            row("compiled", 1.0) | {"op": "not timed", "wall_us": 1} | {"pass": "backward"}]
    del rows[-1]["wall_us"]
    header, _, another, big = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table(rows).splitlines())
    assert dict(zip(header, big, strict=True)) == {
        "op": "op", "size": "big", "pass": "forward", "eager µs": "40.0 (50.0)", "compiled µs": "15.0 (25.0)",
        "kernel µs": "10.0 (20.0)", "× eager": "4.00", "× compiled": "1.50", "GB/s": "2345.7",
        "of copy": "25%", "launches": "7/3/1"}
    assert another == ["another", "big", "forward", "(8.0)", "-", "-", "-", "-", "100.0", "25%", "-/-/-"]
    assert table([]).count("\n") == 2
    header, _, big = ([cell.strip() for cell in line.strip("|").split("|")] for line in table(
        [row("eager", 8.0), row("compiled", 4.0)]).splitlines())
    # without a GPU nothing of kernels
    assert dict(zip(header, big, strict=True)) == {
        "op": "op", "size": "big", "pass": "forward", "eager µs": "(8.0)", "compiled µs": "(4.0)",
        "× eager": "2.00", "GB/s": "100.0", "of copy": "25%"}


def test_markdown_is_aligned() -> None:
    assert markdown(("a", "long"), [(1, "x"), ("wide", 2.5)]) == (
        "| a    | long |\n|------|------|\n| 1    | x    |\n| wide | 2.5  |\n")


def test_only_right_results_are_timed() -> None:
    operator = Operator(kernel=lambda x: 1.01 * x, reference=lambda x: x, sizes={"small": {}},
                        small={"small": {}}, inputs=lambda device: (torch.linspace(-1, 1, 9, device=device),),
                        moved=lambda arguments, backward: 72)
    with pytest.raises(AssertionError, match="<lambda> kernel forward, result 0: error of 0.0"):
        measure.run(operator, "small", "kernel", False, benchmark=None, copy_rate=1.0)


AOT = r"""
from bench.tools import aot
import torch
sass = '''
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/              @!P0 LDG.E.LTC128B.64.CONSTANT R4, [R2.64] ;
        /*0070*/                   LDG.E R4, desc[UR4][R2.64+0x128] ;
        /*0080*/                   LDG.E.U16.STRONG.GPU R4, [R2.64] ;
        /*0090*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64] ;
        /*00a0*/                   LDGDEPBAR ;
        /*00b0*/              @P1  STG.E.U8 desc[UR4][R2.64], R4 ;
        /*00c0*/                   LDS.128 R4, [R2] ;
        /*00d0*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;
'''
assert aot.accesses(sass, "(?:LDG|LDGSTS)") == {32: 1, 16: 2, 8: 1, 4: 1, 2: 1}
assert list(aot.accesses(sass, "STG").items()) == [(1, 1)] and aot.accesses("", "STG") == {}
# warps, registers and shared memory of a program → warps on a multiprocessor, by NVIDIA's occupancy rules
for arch, warps, registers, shared, expected in [
    (80, 4, 32, 0, 64), (90, 8, 64, 0, 32), (90, 4, 255, 0, 8), (90, 16, 108, 8192, 16), (86, 4, 32, 0, 48),
    (80, 4, 32, 100 * 1024, 4), (100, 1, 32, 0, 32), (90, 4, 40, 0, 48), (90, 16, 255, 0, 0),
]:
    assert aot.resident(arch, warps, registers, shared) == expected, (arch, warps, registers, shared)
with aot.Unfilled():
    for x in (torch.randint(9, (2, 3)), torch.randint(1, 9, (2, 3)), torch.randint(1, 9, size=(2, 3)),
              torch.randint(low=1, high=9, size=(2, 3), generator=torch.Generator()), torch.rand(2, 3).long(),
              torch.randn((2, 3), dtype=torch.float16).long()):
        assert x.shape == (2, 3) and x.dtype == torch.int64 and not x.any()
    assert torch.rand(2, *(3,), dtype=torch.float16).dtype == torch.float16 and torch.randn(()).shape == ()
"""


def test_what_is_read_out_of_compiled_kernels() -> None:
    result = python("-c", AOT)
    assert result.returncode == 0, result.stderr


def test_ahead_of_time_compilation_of_one_operator(tmp_path: Path) -> None:
    page = tmp_path / "new" / "aot.md"
    result = python("bench/tools/aot.py", "pair_select", "--arch", "90", "--out", str(page))
    assert result.returncode == 0, result.stdout + result.stderr
    assert page.read_text() == result.stdout and "launches compiled, 0 with problems" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("| pair_select")]
    assert lines and all(" ok " in line and "_kernel" in line for line in lines)
    unknown = python("bench/tools/aot.py", "pair_select", "pair_selected")
    assert unknown.returncode == 2 and "no such operator: pair_selected; there are " in unknown.stderr


BAD = """
from bench.tools import aot
import torch
from lpo_fast.system.launch import jit, launch, tl
from lpo_fast.verify.operators import Operator

@jit
def _kernel(x_ptr, out_ptr, n, SIZE: tl.constexpr, BROKEN: tl.constexpr):
    at = tl.arange(0, SIZE) * n
    row, total = tl.load(x_ptr + at), tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(n):
        total = total * tl.load(x_ptr + i) + row[None, :]
    if BROKEN:
        total += undefined
    tl.store(out_ptr + at, tl.sum(total, 0))

def kernel(x, size, broken=False):
    launch(_kernel, (3,), x, x, 5, SIZE=size, BROKEN=broken, warps=1)

operator = Operator(kernel=kernel, reference=None, small={}, moved=None,
                    sizes={"spills": {"size": 128}, "large": {"size": 64}, "narrow": {"size": 32},
                           "broken": {"size": 32, "broken": True}},
                    inputs=lambda device, **size: (torch.randn(999), *size.values()))
text, status = aot.report(aot.examine_all(operator, size, [80]) for size in operator.sizes)
print(text)
raise SystemExit(status)
"""


def test_bad_kernels_are_found(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)  # a file, since Triton reads a kernel's source
    result = python("-c", "import runpy, sys; runpy.run_path(sys.argv[1])", str(tmp_path / "bad.py"))
    assert result.returncode == 1 and "4 launches compiled, 4 with problems" in result.stdout, result.stderr
    verdicts = {cells[2].strip(): cells[-2].strip() for cells in (
        line.split("|") for line in result.stdout.splitlines() if line.startswith("| kernel"))}
    fits = verdicts.pop("large")
    assert verdicts == {"spills": "spills", "narrow": "NARROW", "broken": "does not compile"}
    assert fits.startswith("only ") and fits.endswith(" warps fit")
    assert "undefined is not defined" in result.stderr
