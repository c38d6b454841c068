"""How kernels are launched: when they run, what is recorded, what is refused, and that nothing needs Triton.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported

import lpo_fast
from lpo_fast.system import launch
from lpo_fast.system.launch import (
    channels_last,
    dense,
    expect,
    expect_number,
    expect_table,
    expect_tensor,
    expect_type,
    fused,
    jit,
    power_of_2,
    tl,
)
from tests.helpers.models import DEVICE

KERNELS = sorted(path.stem for path in (Path(lpo_fast.__file__).parent / "kernels").glob("*.py")
                 if path.stem != "__init__")


@jit
def _double(x_ptr, more, out_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) + tl.load(more[0] + at, mask=at < n), mask=at < n)


def test_runs_where_it_is_asked_to(kernels: None) -> None:
    x, out = torch.arange(7.0, device=DEVICE), torch.zeros(7, device=DEVICE)
    launch.launch(_double, (1,), x, (x,), out, 6, SIZE=8, warps=1)
    assert out.tolist() == [0, 2, 4, 6, 8, 10, 0]


def test_an_empty_grid_launches_nothing() -> None:
    launch.launch(None, (0, 5), torch.zeros(0))  # None cannot run


def test_recording_in_place_of_running() -> None:
    x = torch.zeros(3)
    with launch.recording() as launches:
        launch.launch(_double, (2, 3), (x, x), x, 5, 0.5, warps=8, SIZE=16)
        launch.launch(_double, (0,), x)
        assert fused(x) and fused(x.half()) and not fused(x.double())
    assert launches[0].kernel is _double and launches[0].grid == (2, 3)
    assert launches[0].arguments == ((x, x), x, 5, 0.5) and launches[0].constants == {"SIZE": 16}
    assert (launches[0].warps, launches[1].warps, len(launches)) == (8, 4, 2)
    assert fused(x) is launch.INTERPRETED is False  # tests run references unless they ask for kernels

    with pytest.raises(KeyError), launch.recording():
        raise KeyError
    assert not fused(x)


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("installed", [False, True])
def test_kernels_run_on_cuda_or_interpreted(interpreted: bool, installed: bool,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    monkeypatch.setattr(launch, "triton", launch.triton if installed else None)

    class OnCuda:
        is_cuda, dtype = True, torch.bfloat16

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert fused(torch.zeros(1, dtype=dtype)) is (interpreted and installed)
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
        assert not fused(torch.zeros(1, dtype=dtype))
    assert fused(OnCuda()) is installed
    OnCuda.dtype = torch.float64
    assert not fused(OnCuda())


def test_layouts() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert channels_last(last) and not channels_last(x)
    assert dense(x) is x and dense(last) is last
    for holes in (x[..., ::2], last[:, :2], last[..., ::2], x.transpose(2, 3),
                  x.expand(2, 2, 3, 4, 5)[0].flip(0)[:, 1:]):
        assert not channels_last(holes) and torch.equal(dense(holes), holes) and dense(holes).is_contiguous()
    assert channels_last(last[1:]) and dense(last[1:]).data_ptr() == last[1:].data_ptr()
    for shape in ((2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (1, 1, 1, 1)):  # the same either way: NCHW
        both = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
        assert not channels_last(both) and dense(both) is both
    strange = torch.zeros(2, 1, 4, 5).as_strided((2, 1, 4, 5), (20, 1, 5, 1))
    assert not channels_last(strange) and dense(strange).data_ptr() == strange.data_ptr()


def test_power_of_2() -> None:
    for n in range(1, 70):
        p = power_of_2(n)
        assert p >= n > p // 2 and p & (p - 1) == 0
    assert power_of_2(2**31 + 1) == 2**32


def test_refusals_name_what_is_wrong() -> None:
    x = torch.zeros(2, 3)
    expect(True, "never")
    expect_tensor("x", x, (2, 3), x)
    expect_tensor("x", x, x.shape, x, (torch.int64, torch.float32))
    expect_tensor("x", x.double(), [2, 3], x)
    expect_tensor("x", x, ("B", 3), x)
    wanting = x.clone().requires_grad_()
    expect_tensor("x", wanting, (2, "C"), x)
    with torch.no_grad():
        expect_tensor("x", wanting, (2, "C"), x, gradient=False)
    for arguments, message in (
        ((x, (3, 2), x), "x has shape (2, 3), expected (3, 2)"),
        ((x, (2, 3, 1), x), "x has shape (2, 3), expected (2, 3, 1)"),
        ((x, (2, 3), x, (torch.int64,)), "x is torch.float32, expected torch.int64"),
        ((x.long(), (2, 3), x),
         "x is torch.int64, expected torch.float32 or torch.float16 or torch.bfloat16 or torch.float64"),
        ((x, ("B", 4), x), "x has shape (2, 3), expected (B, 4)"),
        ((x, ("N",), x), "x has shape (2, 3), expected (N,)"),
        ((x, (2, 3), x, (torch.int64, torch.bool, torch.int64)),
         "x is torch.float32, expected torch.int64 or torch.bool"),
        ((7.5, (2, 3), x), "x is of type float, expected Tensor"),
        (((x, x), (2, 3), x), "x is of type tuple, expected Tensor"),
        ((wanting, (2, 3), x, (torch.float32,), False),
         "x requires a gradient, but the operator has none: detach it, or call under torch.no_grad()"),
        ((x.to("meta"), (2, 3), x), "x is on meta, expected cpu"),
        ((x, (2, 3), x.to("meta")), "x is on cpu, expected meta"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            expect_tensor("x", *arguments)
    with pytest.raises(ValueError, match="^why$"):
        expect(False, "why")
    expect_table("g", x, (3,), x, (torch.float32,))
    for table, message in ((x[0], "g has shape (3,), expected (N, 3)"),
                           (x[:0], "g has shape (0, 3): no timesteps"),
                           (wanting, "g requires a gradient, but the operator has none"),
                           (3, "g is of type int, expected Tensor")):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            expect_table("g", table, (3,), x, (torch.float32,))
    for value, kind in ((3, int), (True, bool), (2, (int, float)), (2.5, (int, float)), (x, Tensor)):
        expect_type("n", value, kind)
    for value, kind, message in ((True, int, "bool, expected int"),
                                 (False, (int, float), "bool, expected int or float"),
                                 (2.0, int, "float, expected int"), (1, bool, "int, expected bool"),
                                 (None, float, "NoneType, expected float")):
        with pytest.raises(ValueError, match=f"^n is of type {message}$"):
            expect_type("n", value, kind)


NUMBERS = [(5.0, ""), (7.5, ""), (3, ""), (0, ""), (sys.float_info.max, ""),
           (-1.5, "is -1.5, expected a finite number of at"), (math.nan, "is nan, expected a finite number"),
           (math.inf, "is inf, expected"), (-math.inf, "is -inf, expected"),
           (True, "is of type bool, expected int or float"), ("5", "is of type str, expected int or float")]


@pytest.mark.parametrize("dynamic", [None, False, True, "eager"])
def test_numbers(dynamic: bool | str | None) -> None:
    """Compiled as one graph the same values pass and are refused, constants or (from the second on) symbols.
    """
    def scaled(x: Tensor, number: float) -> Tensor:
        expect_number("g", number, least=0)
        return x * number
    call, errors, one = scaled, ValueError, torch.ones(2, dtype=torch.float64)
    if dynamic != "eager":
        torch.compiler.reset()
        call, errors = (torch.compile(scaled, fullgraph=True, backend="aot_eager", dynamic=dynamic),
                        Unsupported)
    for value, message in NUMBERS:
        if message:
            with pytest.raises(errors, match=f"g {message}"):
                call(one, value)
        else:
            assert torch.equal(call(one, value), one * value)
    expect_number("g", -1.5)


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env={**clean, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import importlib
import torch
from lpo_fast.system import launch
assert launch.triton is None and not launch.INTERPRETED
with launch.recording():
    assert not launch.fused(torch.zeros(1))
for name in NAMES:
    module = importlib.import_module(f"lpo_fast.kernels.{name}")
    public, reference = getattr(module, name), getattr(module, f"{name}_reference")
from lpo_fast.method import schedule
from lpo_fast.kernels.ddim_candidates import ddim_candidates
from lpo_fast.kernels.pair_loss import pair_loss
from lpo_fast.kernels.pair_select import pair_select
from lpo_fast.kernels.reward_pool import reward_pool
torch.manual_seed(0)
x, t, z = torch.randn(2, 4, 3, 3), torch.tensor([1, 951]), torch.randn(3, 2, 4, 3, 3)
maps = [torch.randn(4, 4, 3, 3, requires_grad=True)]
reward_pool(maps, [True], t, torch.ones(1000)).sum().backward()
sched = schedule.ddim(torch.linspace(0.999, 0.01, 1000), torch.arange(951, 0, -50), 20)
x_p = ddim_candidates(sched, x, torch.cat([x, x]), t, guidance=1.0, noise=z, candidates=3)
pair = pair_select(torch.randn(3, 2), x_p, torch.zeros(1000), t, t % 3)
policy = torch.randn(4, 4, 3, 3, requires_grad=True)
pair_loss(sched, x, pair.winner, pair.loser, t, policy, torch.randn(4, 4, 3, 3), torch.ones(2), guidance=5.0,
          beta=1.0, eps=0.1).loss.backward()
print(maps[0].grad.sum().item(), policy.grad.isfinite().all().item(), *NAMES)
"""


def test_without_triton_the_references_run() -> None:
    printed = python(f"NAMES = {KERNELS}" + WITHOUT_TRITON, TRITON_INTERPRET="1").split()
    # Σ of a mean's gradients: one a feature
    assert float(printed[0]) == pytest.approx(8) and printed[1:] == ["True", *KERNELS]


@pytest.mark.parametrize("value, expected", [("1", "True"), ("0", "False"), (None, "False")])
def test_the_interpreter_is_an_environment_variable(value: str | None, expected: str) -> None:
    environment = {} if value is None else {"TRITON_INTERPRET": value}
    assert python("from lpo_fast.system import launch; print(launch.INTERPRETED)", **environment) == expected
