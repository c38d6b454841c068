"""GroupNorm with shift and SiLU against the definition in float64, on the GPU or under Triton's interpreter.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import Unsupported

from lpo_fast.kernels import group_norm_silu as module
from lpo_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from lpo_fast.system import launch
from tests.helpers.models import DEVICE
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(12, 7, 33, 4), (33, 1, 7, 11), (7, 33, 1, 1), (33, 7, 7, 33), (64, 9, 5, 32)]  # C, H, W, groups


def inputs(shape: tuple[int, int, int, int], batch: int = 2, dtype: torch.dtype = torch.float32,
           shifted: bool = True, scale: float = 1.0, seed: int = 0,
           eps: float = 1e-5) -> tuple[Tensor, int, Tensor, Tensor, float, Tensor | None]:
    """x channels-last around a mean that is not 0, groups, weight, bias, eps, shift."""
    c, h, w, groups = shape
    random = torch.Generator().manual_seed(seed)
    x = (((torch.randn(batch, h, w, c, generator=random) + 0.5) * scale).to(dtype).to(DEVICE)
         .permute(0, 3, 1, 2))
    weight, bias, shift = (torch.randn(*size, generator=random).to(DEVICE)
                           for size in ((c,), (c,), (batch, c)))
    shift = (shift * scale).to(dtype) if shifted else None
    return *(y if y is None or isinstance(y, int | float) else y.requires_grad_()
             for y in (x, groups, weight, bias, eps, shift)),


def run(arguments: tuple, silu: bool, function=group_norm_silu,
        seed: int = 1) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """y, a gradient of it, and the gradients of x, weight, bias and, if there is one, shift."""
    y = function(*arguments, silu)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    leaves = [a for a in arguments if isinstance(a, Tensor)]
    return y, grad, torch.autograd.grad(y, leaves, grad)


def check(arguments: tuple, silu: bool, y: Tensor, dy: Tensor, grads: tuple[Tensor, ...]) -> None:
    """y and all gradients by float64, from the equations;
    *_size is what rounding multiplies by the dtype's epsilon."""
    x, groups, weight, bias, eps, shift = arguments
    b, c, height, width = x.shape
    n, hw = c // groups * height * width, height * width

    def grouped(z: Tensor) -> Tensor:
        """Mean over the group, for every element."""
        return (z.reshape(b, groups, -1).mean(2).repeat_interleave(c // groups, 1)[:, :, None, None]
                .expand(b, c, height, width))

    s = torch.zeros(b, c, dtype=torch.float64, device=x.device) if shift is None else shift.detach().double()
    w, beta = (v.detach().double()[None, :, None, None] for v in (weight, bias))
    x, s, dy = x.detach().double(), s[:, :, None, None], dy.double()
    h = x + s
    mean = grouped(h)
    rstd = (grouped((h - mean).square()) + eps).rsqrt()
    condition = 1 + grouped(h.square()).sqrt() * rstd  # of the variance
    norm = (h - mean) * rstd
    norm_size = (x.abs() + s.abs() + mean.abs() + grouped(h.abs())) * rstd + norm.abs() * condition
    u = norm * w + beta
    u_size = norm_size * w.abs() + beta.abs()
    gate = torch.sigmoid(u) if silu else torch.ones_like(u)
    assert_close("y", y, u * gate, 1.2 * u_size, n)
    du = dy * (gate + u * gate * (1 - gate))
    du_size = dy.abs() * (1 + u_size / 2) if silu else dy.abs()
    sum_1, sum_1_size = du.sum((2, 3), keepdim=True), du_size.sum((2, 3), keepdim=True)
    sum_2 = (du * norm).sum((2, 3), keepdim=True)
    sum_2_size = (du_size * norm.abs() + du.abs() * norm_size).sum((2, 3), keepdim=True)
    mean_1, mean_1_size = grouped(w * du), grouped(w.abs() * sum_1_size.expand_as(x) / hw)
    mean_2, mean_2_size = grouped(w * du * norm), grouped(w.abs() * sum_2_size.expand_as(x) / hw)
    dx = rstd * (w * du - mean_1 - norm * mean_2)
    parts = (w.abs() * du_size, mean_1_size, norm_size * mean_2.abs(), norm.abs() * mean_2_size)
    dx_size = (rstd * sum(parts)
               + condition * rstd * (w.abs() * du.abs() + mean_1.abs() + norm.abs() * mean_2.abs()))
    assert y.is_contiguous(memory_format=torch.channels_last) and grads[0].stride() == y.stride()
    for name, got, exact, size, terms in (
        ("gradient of x", grads[0], dx, dx_size, n),
        ("gradient of weight", grads[1], sum_2.sum((0, 2, 3)), sum_2_size.sum((0, 2, 3)), n + b * hw),
        ("gradient of bias", grads[2], sum_1.sum((0, 2, 3)), sum_1_size.sum((0, 2, 3)), n + b * hw),
        *([("gradient of shift", grads[3], dx.sum((2, 3)), dx_size.sum((2, 3)), n + hw)]
          if len(grads) == 4 else []),
    ):
        assert got.dtype == (arguments[2].dtype if "weight" in name or "bias" in name else y.dtype)
        assert_close(name, got, exact, size, terms)


def checked(arguments: tuple, silu: bool = True, function=group_norm_silu) -> None:
    check(arguments, silu, *run(arguments, silu, function))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(dtype: torch.dtype, shifted: bool, silu: bool) -> None:
    for shape in SHAPES:
        checked(inputs(shape, dtype=dtype, shifted=shifted), silu)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_epsilon(eps: float) -> None:
    """Beside a variance of about 1e-4, so that each of these matters."""
    checked(inputs((12, 7, 5, 4), scale=1e-2, eps=eps))


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of channels, parts of the pixels and blocks of groups, the last of each not full."""
    for name, value in (("TILE", 256), ("CHUNK", 512), ("COMBINED", 64)):
        monkeypatch.setattr(module, name, value)
    arguments = inputs((66, 9, 13, 33), dtype=torch.float16)
    for tile in (256, 128):
        write, reduce = module._blocks(arguments[0], 33, tile)
        assert (66 > write["CB"] and 66 % write["CB"] and 117 % reduce["ROWS"] % reduce["SB"]
                and reduce["SPLITS"] > 2)
        assert reduce["GB"] < 33 and 33 % reduce["GB"] and reduce["ROWS"] > reduce["SB"] and 117 % write["SB"]
    checked(arguments)


def test_production_tiles() -> None:
    """Groups of 10 and 80 channels; more pixels than a program takes at once, and more than it reduces."""
    checked(inputs((320, 16, 40, 32), 1, torch.float16))
    checked(inputs((2560, 2, 3, 32), 1, torch.float16, shifted=False))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3),
       st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.sampled_from([1e-4, 1.0, 1e4]),
       st.integers(0, 99))
def test_any_shape_and_value(groups, width, h, w, batch, dtype, shifted, silu, scale, seed) -> None:
    checked(inputs((groups * width, h, w, groups), batch, dtype, shifted, scale, seed), silu)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_mean_far_from_zero_keeps_the_variance(offset: float) -> None:
    """Deviation 1 about a large mean: a sum of squares in fp32 would lose it."""
    x, groups, weight, bias, eps, _ = inputs((12, 16, 16, 4), shifted=False)
    x = (x.detach() + offset).requires_grad_()
    checked((x, groups, weight, bias, eps, None))


def test_equals_pytorch_in_a_resnet_block() -> None:
    """As diffusers writes it, in float64 and in the kernel's precision."""
    x, groups, weight, bias, eps, shift = inputs((12, 7, 5, 4))
    norm = torch.nn.GroupNorm(groups, 12, eps).double().to(DEVICE)
    norm.weight.data, norm.bias.data = weight.detach().double(), bias.detach().double()
    exact = torch.nn.functional.silu(norm(x.double() + shift.double()[:, :, None, None])).detach()
    assert_close("y", group_norm_silu(x, groups, weight, bias, eps, shift).detach(), exact, 20.0, 105)


def test_weights_of_another_dtype_and_without_gradient() -> None:
    x, groups, weight, bias, eps, shift = inputs((12, 7, 5, 4), dtype=torch.float16)
    half = weight.detach().half().requires_grad_(), bias.detach().half().requires_grad_()
    checked((x, groups, *half, eps, shift))
    frozen = x, groups, weight.detach(), bias.detach(), eps, shift
    y = group_norm_silu(*frozen)
    got = torch.autograd.grad(y, (x, shift), torch.ones_like(y))
    y = group_norm_silu(x, groups, weight, bias, eps, shift)
    for one, other in zip(got, torch.autograd.grad(y, (x, shift), torch.ones_like(y)), strict=True):
        assert torch.equal(one, other)


def test_samples_and_groups_do_not_depend_on_each_other() -> None:
    x, groups, weight, bias, eps, shift = inputs((12, 7, 5, 4), 3, torch.float16)
    whole = group_norm_silu(x, groups, weight, bias, eps, shift)
    assert torch.equal(whole, group_norm_silu(x, groups, weight, bias, eps, shift))
    for i in range(3):
        # aligned as x is
        alone, own = x[i : i + 1].clone(memory_format=torch.preserve_format), shift[i : i + 1].clone()
        assert torch.equal(group_norm_silu(alone, groups, weight, bias, eps, own), whole[i : i + 1])
    for bad in (math.nan, math.inf):
        broken = x.detach().clone(memory_format=torch.preserve_format)
        broken[1, 4, 3, 2] = bad  # group 1 of sample 1
        y = group_norm_silu(broken, groups, weight, bias, eps, shift)
        assert y[1, 3:6].isnan().all()
        y[1, 3:6] = whole[1, 3:6]
        assert torch.equal(y, whole)


def test_two_launches_each_way_and_no_copies() -> None:
    arguments = inputs((12, 7, 5, 4))
    with launch.recording() as launches:
        y = group_norm_silu(*arguments)
        torch.autograd.grad(y, arguments[0], torch.ones_like(y))
    assert [record.kernel for record in launches] == [
        module._moments_kernel, module._apply_kernel, module._sums_kernel, module._backward_kernel]
    assert launches[0].arguments[0].data_ptr() == arguments[0].data_ptr()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_nchw_and_float64_take_the_reference(memory: torch.memory_format) -> None:
    arguments = inputs((12, 7, 5, 4))
    exact = [a.detach().double().contiguous(memory_format=memory) if isinstance(a, Tensor) and a.ndim == 4
             else a.detach().double() if isinstance(a, Tensor) else a for a in arguments]
    nchw = arguments[0].detach().contiguous()
    with launch.recording() as launches:
        assert torch.allclose(group_norm_silu(*exact), group_norm_silu_reference(*exact), rtol=1e-14,
                              atol=1e-14)
        y = group_norm_silu(nchw, *arguments[1:])
    assert not launches and y.is_contiguous()
    assert_close("y", y.detach(), group_norm_silu_reference(*exact), 20.0, 105)


def test_strides() -> None:
    x, groups, weight, bias, eps, shift = inputs((12, 7, 5, 4), dtype=torch.float16)
    y, grad, grads = run((x, groups, weight, bias, eps, shift), True)
    spaced = [torch.stack([v, v + 1], -1).detach()[..., 0].requires_grad_() for v in (weight, bias, shift)]
    assert not any(v.is_contiguous() for v in spaced)
    out = group_norm_silu(x, groups, *spaced[:2], eps, spaced[2])
    assert torch.equal(out, y)
    for got, exact in zip(torch.autograd.grad(out, [x, *spaced], grad.contiguous()), grads, strict=True):
        assert torch.equal(got, exact)
    one = torch.ones((), dtype=y.dtype, device=DEVICE).expand_as(y)
    out, other = group_norm_silu(x, groups, weight, bias, eps, shift), torch.ones_like(y)
    assert torch.equal(torch.autograd.grad(out, x, one, retain_graph=True)[0],
                       torch.autograd.grad(out, x, other)[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(group_norm_silu, fullgraph=True, dynamic=False, backend=backend)
    checked(inputs((12, 7, 5, 4), dtype=torch.float16), True, compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        checked(inputs((12, 7, 5, 4), dtype=torch.float16, seed=3), True, compiled)


@pytest.mark.parametrize("last", [False, True])
def test_compiled_code_takes_other_epsilons_and_groups(last: bool) -> None:
    """As one graph, also where torch.compile makes the numbers symbols after their second values;
    NCHW is the reference."""
    torch._dynamo.reset()
    x, _, *rest, _, shift = inputs((12, 3, 5, 4))
    x = x if last else x.detach().contiguous()
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    for groups, eps in ((4, 1e-5), (4, 0.5), (4, 0), (3, 2.0), (6, 0.1)):
        exact = group_norm_silu_reference(x.double(), groups, *(w.double() for w in rest), eps,
                                          shift.double())
        assert_close("y", compiled(x, groups, *rest, eps, shift), exact, 20.0, 105)
    for bad in (-1e-5, math.inf):
        with pytest.raises(Unsupported, match=f"eps is {bad}, expected a finite number of at least 0"):
            compiled(x, 4, *rest, bad, shift)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("batch", [0, 2])
def test_is_a_torch_op(batch: int, shifted: bool) -> None:
    torch.library.opcheck(module._op, (*inputs((12, 3, 5, 4), batch, torch.float16, shifted), True))


def test_an_empty_batch() -> None:
    y, _, grads = run(inputs((12, 3, 5, 4), 0), True)
    assert y.shape == (0, 12, 3, 5) and grads[0].shape == y.shape and grads[3].shape == (0, 12)
    assert not grads[1].any() and not grads[2].any() and grads[1].shape == (12,)


def test_gradcheck_of_the_reference() -> None:
    for shifted in (False, True):
        exact = [a.detach().double().requires_grad_() if isinstance(a, Tensor) else a
                 for a in inputs((6, 2, 3, 3), shifted=shifted)]
        for silu in (False, True):
            assert torch.autograd.gradcheck(lambda *a, flag=silu: group_norm_silu_reference(*a, flag), exact)


HERE = str(DEVICE)


def on(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("change, message", [
    ({"x": on(HERE, 2, 6, 5)}, "x has shape (2, 6, 5), expected (B, C, H, W)"),
    ({"x": on(HERE, 2, 6, 0, 5)}, "x has shape (2, 6, 0, 5): no elements"),
    ({"x": on(HERE, 2, 6, 5, 5, dtype=torch.int64)}, "x is torch.int64, expected torch.float32"),
    ({"groups": 4}, "groups is 4, expected a divisor of 6 channels"),
    ({"groups": 0}, "groups is 0, expected a divisor of 6 channels"),
    ({"groups": -3}, "groups is -3, expected a divisor of 6 channels"),
    ({"groups": 3.0}, "groups is of type float, expected int"),
    ({"groups": True}, "groups is of type bool, expected int"),
    ({"silu": 1}, "silu is of type int, expected bool"),
    ({"silu": None}, "silu is of type NoneType, expected bool"),
    ({"eps": torch.tensor(1e-5)}, "eps is of type Tensor, expected int or float"),
    ({"x": None}, "x is of type NoneType, expected Tensor"),
    ({"weight": 1.0}, "weight is of type float, expected Tensor"),
    ({"weight": on(HERE, 5)}, "weight has shape (5,), expected (6,)"),
    ({"weight": on("meta", 6)}, "weight is on meta, expected"),
    ({"bias": on(HERE, 6, dtype=torch.int64)}, "bias is torch.int64, expected torch.float32"),
    ({"bias": on(HERE, 6, 1)}, "bias has shape (6, 1), expected (6,)"),
    ({"shift": on(HERE, 1, 6)}, "shift has shape (1, 6), expected (2, 6)"),
    ({"shift": on("meta", 2, 6)}, "shift is on meta, expected"),
    ({"eps": math.nan}, "eps is nan, expected a finite number of at least 0"),
    ({"eps": math.inf}, "eps is inf, expected"), ({"eps": -1e-5}, "eps is -1e-05, expected"),
])
def test_rejects(change: dict, message: str) -> None:
    arguments = {"x": on(HERE, 2, 6, 5, 5), "groups": 3, "weight": on(HERE, 6), "bias": on(HERE, 6),
                 "eps": 1e-5, "shift": on(HERE, 2, 6)}
    group_norm_silu(**arguments)
    with pytest.raises(ValueError) as error:
        group_norm_silu(**arguments | change)
    assert message in str(error.value)
