"""The operators as data: inputs, bytes, the comparison with float64, and the doctor that reports it."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import Unsupported
from triton.runtime.errors import OutOfResources

from lpo_fast import doctor
from lpo_fast.kernels.ddim_candidates import ddim_candidates
from lpo_fast.kernels.pair_loss import pair_loss
from lpo_fast.verify.operators import OPERATORS, Operator, error
from tests.helpers.models import DEVICE

CUDA = torch.cuda.is_available()


def lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.split()[:1] and line.split()[0] in OPERATORS]


def test_doctor_runs_every_kernel(kernels, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main([]) == 0
    found = lines(capsys.readouterr().out)
    assert {line.split()[0] for line in found} == set(OPERATORS)
    assert all("error" in line and ("GB/s" in line) == CUDA for line in found)
    assert sum("backward" in line for line in found) < sum("forward" in line for line in found) + 1


def test_doctor_says_which_kernel_is_wrong(kernels, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture) -> None:
    good, steps = OPERATORS["pair_select"], OPERATORS["ddim_candidates"]

    def wrong(*arguments):
        right = good.kernel(*arguments)
        return right._replace(winner=right.loser)

    def broken(*arguments):
        raise OutOfResources(300, 228, "shared memory")
    monkeypatch.setitem(OPERATORS, "pair_select", replace(good, kernel=wrong))
    monkeypatch.setitem(OPERATORS, "ddim_candidates", replace(steps, kernel=broken))
    assert doctor.main([]) == 1
    failed = [line.partition("FAILED: ")[2] for line in capsys.readouterr().out.splitlines()
              if "FAILED" in line]
    assert len(failed) == sum(len(good.sizes if CUDA else good.small)
                              for good in (OPERATORS["pair_select"], steps))
    assert {line.partition(":")[0] for line in failed} == {"wrong, result 4", "out of resource"}


@pytest.mark.skipif(CUDA, reason="a GPU runs the kernels")
def test_doctor_without_a_gpu(capsys: pytest.CaptureFixture) -> None:
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert "need CUDA" in output and not lines(output)


@pytest.mark.parametrize("name", OPERATORS)
def test_bytes_are_those_of_distinct_tensors(name: str) -> None:
    """At least the results, at most all arguments, all results and, on the way back,
    the gradients of the forward results."""
    operator = OPERATORS[name]
    for size in operator.small.values():
        arguments = operator.inputs(DEVICE, **size)
        came = 0
        for backward in (False, True) if operator.differentiable else (False,):
            call, = operator.calls(operator.reference, [arguments], backward)
            results = [x for x in torch.utils._pytree.tree_leaves(call()) if x.numel() > 100]
            given = [x for x in torch.utils._pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
            written = sum(x.nbytes for x in results)
            assert (written <= operator.moved(arguments, backward)
                    <= written + sum(x.nbytes for x in given) + came)
            came = written


def test_error() -> None:
    truth = (torch.tensor([3.0, 4.0]).double(), torch.tensor([1, 2]))
    assert error("x", (torch.tensor([3.0, 4.0]), torch.tensor([1, 2])), truth) == 0
    assert (error("x", (torch.tensor([3.001, 4.0]), torch.tensor([1, 2])), truth)
            == pytest.approx(2e-4, rel=1e-3))
    for got, message in [
        ((torch.tensor([3.1, 4.0]), torch.tensor([1, 2])), "x, result 0: error of 0.1, but the result is 5"),
        ((torch.tensor([torch.nan, 4.0]), torch.tensor([1, 2])), "x, result 0: error of nan"),
        ((torch.tensor([3.0, 4.0]), torch.tensor([1, 3])), "x, result 1: 1 of 2 differ"),
        ((torch.tensor([3.0]), torch.tensor([1, 2])), r"x, result 0: \(1,\), expected \(2,\)"),
        ((torch.tensor([3.0, 4.0]),), "x: 1 results, expected 2"),
    ]:
        with pytest.raises(AssertionError, match=message):
            error("x", got, truth)


def test_name_behind_wrappers() -> None:
    assert all(name == operator.name and isinstance(operator, Operator)
               for name, operator in OPERATORS.items())


@pytest.mark.parametrize("name", ["ddim_candidates", "pair_loss"])
def test_compiled_code_takes_other_guidance(kernels, name: str) -> None:
    """As one graph, also where torch.compile makes the number a symbol after its second value."""
    torch._dynamo.reset()
    operator = OPERATORS[name]
    arguments = operator.inputs(DEVICE, **operator.small["small"])
    if name == "pair_loss":
        def call(guidance: float) -> torch.Tensor:
            return pair_loss(*arguments, guidance=guidance, beta=500.0, eps=0.1).loss
    else:
        def call(guidance: float) -> torch.Tensor:
            return ddim_candidates(*arguments[:4], guidance=guidance, noise=arguments[4], candidates=2)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for guidance in (5.0, 7.5, 2.0):
        assert torch.equal(compiled(guidance), call(guidance))
    for function, errors in ((call, ValueError), (compiled, Unsupported)):
        for bad in (float("nan"), float("inf")):
            with pytest.raises(errors, match=f"guidance is {bad}, expected a finite number"):
                function(bad)
