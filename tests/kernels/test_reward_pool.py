"""The reward pooling kernel against the definition in float64, on the GPU or under Triton's interpreter."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpo_fast.kernels import reward_pool as module
from lpo_fast.kernels.reward_pool import reward_pool, reward_pool_reference
from lpo_fast.system import launch
from tests.helpers.models import DEVICE
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# [C, H, W] of the maps; the last is the mid block's
SHAPES = [(7, 33, 1), (1, 7, 33), (33, 1, 1), (5, 33, 33), (64, 7, 7)]
TABLE = torch.linspace(-1, 7.5, 50)  # below and above 1


def maps_of(shapes: Sequence[tuple[int, int, int]], rows: int, dtype: torch.dtype = torch.float32,
            last: bool = False, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Random maps [rows, C, H, W] around a mean that is not 0."""
    random, memory = (torch.Generator().manual_seed(seed),
                      torch.channels_last if last else torch.contiguous_format)
    drawn = [(torch.randn(rows, *shape, generator=random) + 0.5) * scale for shape in shapes]
    return [x.to(dtype).to(DEVICE).contiguous(memory_format=memory).requires_grad_() for x in drawn]


def times(b: int, seed: int = 0) -> Tensor:
    """Timesteps [b], all different."""
    return ((torch.arange(b) * 17 + 3 + seed) % 50).to(DEVICE)


def check(maps: list[Tensor], guided: Sequence[bool], t: Tensor, table: Tensor, out: Tensor, grad: Tensor,
          grads: Sequence[Tensor | None]) -> None:
    """Features and gradients by float64, a map at a time."""
    b, column, g = len(t), 0, table.double()[t][:, None]
    assert out.dtype == torch.float32 and out.shape == (b, sum(stage.shape[1] for stage in maps))
    for i, (stage, guide_it, got) in enumerate(zip(maps, guided, grads, strict=True)):
        (c, h, w), what = stage.shape[1:], f"map {i} {tuple(stage.shape)} {stage.dtype}"
        x, columns = stage.detach().double(), slice(column, column + c)
        text, null = x[-b:].sum((2, 3)) / (h * w), x[:b].sum((2, 3)) / (h * w)
        size_text, size_null = (rows.abs().mean((2, 3)) for rows in (x[-b:], x[:b]))
        exact = g * text + (1 - g) * null if guide_it else text
        size = size_null + g.abs() * (size_text + size_null) if guide_it else size_text
        assert_close(f"feature of {what}", out[:, columns], exact, size, h * w)
        each, column = grad[:, columns].double() / (h * w), column + c
        rows = [(1 - g) * each, g * each] if guide_it else [0 * each, each] if len(stage) == 2 * b else [each]
        exact = torch.cat(rows)[:, :, None, None].expand_as(stage)
        assert got.dtype == stage.dtype and got.stride() == stage.stride()
        size = torch.cat(rows).abs() + each.abs().repeat(len(rows), 1)  # of g and 1 − g
        assert_close(f"gradient of {what}", got, exact, size[:, :, None, None])


def run(maps: list[Tensor], guided: Sequence[bool], t: Tensor, table: Tensor, function=reward_pool,
        seed: int = 1) -> tuple:
    """Features, a gradient of theirs, and what it becomes of every map."""
    out = function(maps, guided, t, table)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return out, grad, torch.autograd.grad(out, maps, grad)


def checked(maps: list[Tensor], guided: Sequence[bool], t: Tensor, table: Tensor,
            function=reward_pool) -> None:
    check(maps, guided, t, table, *run(maps, guided, t, table, function))


@pytest.mark.parametrize("down", [False, True])  # guided too, as with multi_scale_cfg
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(dtype: torch.dtype, last: bool, down: bool) -> None:
    checked(maps_of(SHAPES, 6, dtype, last), [False, *[down] * 3, True], times(3), TABLE.to(DEVICE))


@pytest.mark.parametrize("last", [False, True])
def test_one_pass(last: bool) -> None:
    checked(maps_of(SHAPES, 3, torch.float16, last), [False] * 5, times(3), TABLE.to(DEVICE))


@pytest.mark.parametrize("last", [False, True])
def test_many_tiles(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of channels and of pixels a map, the last of each not full."""
    monkeypatch.setattr(module, "TILE", 256)
    monkeypatch.setattr(module, "CHUNK", 64)
    maps = maps_of([(70, 9, 5), (33, 7, 7), (96, 5, 13)], 4, torch.float16, last)
    sizes, programs, width = module._sizes(maps, [False, True, True], 2, forward=True)
    assert all(c > cb and hw > sb for c, hw, *_, cb, sb, _, _, _ in sizes) and programs >= 6 and width == 199
    checked(maps, [False, True, True], times(2), TABLE.to(DEVICE))


def test_production_tiles() -> None:
    """A map with more channels than a program of each layout takes, and one with more pixels."""
    for last in (False, True):
        maps = maps_of([(320, 8, 8), (8, 64, 64)], 2, torch.float16, last)
        checked(maps, [True, True], times(1), TABLE.to(DEVICE))


def test_both_layouts_and_many_maps_at_once() -> None:
    shapes = [(1 + 3 * i, 1 + i % 4, 1 + i % 5) for i in range(12)]
    both = maps_of(shapes, 4, torch.bfloat16), maps_of(shapes, 4, torch.bfloat16, last=True)
    maps = [both[i % 2][i] for i in range(12)]
    assert len({launch.channels_last(stage) for stage in maps}) == 2
    checked(maps, [i % 3 == 0 for i in range(12)], times(2), TABLE.to(DEVICE))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.booleans()),
                min_size=1, max_size=4),
       st.integers(1, 4), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([1e-4, 1.0, 1e4]),
       st.sampled_from([-2.0, 0.0, 0.5, 1.0, 7.5, 100.0]), st.integers(0, 99))
def test_any_shape_and_value(stages, b, dtype, last, scale, top, seed) -> None:
    maps = maps_of([stage[:3] for stage in stages], 2 * b, dtype, last, scale, seed)
    checked(maps, [stage[3] for stage in stages], times(b, seed), torch.linspace(-1, top, 50, device=DEVICE))


@pytest.mark.parametrize("last", [False, True])
def test_the_null_pass_of_unguided_maps_is_not_read(last: bool) -> None:
    maps = maps_of(SHAPES, 6, torch.float16, last)
    clean = reward_pool(maps, [False] * 4 + [True], times(3), TABLE.to(DEVICE))
    with torch.no_grad():
        for stage in maps[:4]:
            stage[:3] = math.nan
    out = reward_pool(maps, [False] * 4 + [True], times(3), TABLE.to(DEVICE))
    assert torch.equal(out, clean) and out.isfinite().all()
    grads = torch.autograd.grad(out, maps, torch.full_like(out, math.inf))
    assert not any(stage[:3].any() for stage in grads[:4])  # none, even if the gradient is infinite
    assert all(stage[3:].isinf().all() for stage in grads[:4])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [1, 4])
def test_not_finite_stays_where_it_is(row: int, bad: float) -> None:
    """In the null or the text pass of sample 1, in a guided and an unguided map."""
    maps = maps_of(SHAPES, 6)
    with torch.no_grad():
        maps[1][row, 0, 3, 3] = maps[4][row, 5, 1, 2] = bad
    guided, t, table = [False] * 4 + [True], times(3), TABLE.to(DEVICE)
    assert not table[t[1]] == 1
    out, exact = (f(maps, guided, t, table) for f in (reward_pool, reward_pool_reference))
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
    assert torch.equal(out.sign().nan_to_num(), exact.sign().nan_to_num())
    assert (~exact.isfinite()).sum() == (2 if row == 4 else 1)


def test_guidance_of_the_samples_own_timestep() -> None:
    """g = 0 is the null pass, 1 the text pass, and 2 as far beyond it; nobody else's timestep matters."""
    maps = maps_of([(6, 4, 4)], 6)
    null, text = maps[0].double().mean((2, 3)).chunk(2)
    t, table = torch.tensor([999, 0, 500], device=DEVICE), torch.zeros(1000, device=DEVICE)
    table[500], table[999] = 1, 2
    out = reward_pool(maps, [True], t, table)
    for i, expected in enumerate([2 * text[0] - null[0], null[1], text[2]]):
        assert_close(f"sample {i}", out[i], expected, 4.0, 16)


def test_samples_do_not_depend_on_each_other() -> None:
    maps, guided = maps_of(SHAPES, 6, torch.float16, last=True), [False, True, False, True, True]
    t, table = times(3), TABLE.to(DEVICE)
    whole = reward_pool(maps, guided, t, table)
    assert torch.equal(whole, reward_pool(maps, guided, t, table))
    for i in range(3):
        alone = [stage[i::3].contiguous(memory_format=torch.channels_last) for stage in maps]
        assert torch.equal(reward_pool(alone, guided, t[i : i + 1], table), whole[i : i + 1])


def test_strides() -> None:
    """Maps, timesteps, table and gradient with gaps; one timestep for all; maps that want no gradient."""
    maps, table = maps_of([(3, 5, 4), (7, 3, 3)], 6), TABLE.to(DEVICE)
    t = times(8)[2:3].expand(3)
    expected, grad, grads = run(maps, [False, True], t.contiguous(), table)
    holes = [torch.stack([stage, stage + 1], -1).detach()[..., 0].requires_grad_() for stage in maps]
    gaps = torch.stack([table, table + 1], -1)[:, 0]
    assert not any(x.is_contiguous() for x in (t, *holes, gaps))
    out = reward_pool(holes, [False, True], t, gaps)
    assert torch.equal(out, expected)
    for got, exact in zip(torch.autograd.grad(out, holes, grad.T.contiguous().T), grads, strict=True):
        assert torch.equal(got, exact)
    spaced = torch.stack([times(3), times(3) + 1], 1)[:, 0]
    assert torch.equal(reward_pool(maps, [False, True], spaced, table),
                       reward_pool(maps, [False, True], times(3), table))
    out = reward_pool([maps[0].detach(), maps[1]], [False, True], t, table)
    assert torch.equal(torch.autograd.grad(out, maps[1], grad)[0], grads[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reward_pool, fullgraph=True, dynamic=False, backend=backend)
    for last in (False, True):
        maps = maps_of(SHAPES[:3], 6, torch.float16, last)
        checked(maps, [False, True, True], times(3), TABLE.to(DEVICE), compiled)
        with torch.compiler.set_stance("fail_on_recompile"):
            checked(maps, [False, True, True], times(3, 5), TABLE.to(DEVICE) * 2, compiled)


@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize("last", [False, True])
def test_is_a_torch_op(b: int, last: bool) -> None:
    maps = maps_of([(3, 5, 4), (7, 3, 3)], 2 * b, torch.float16, last)
    torch.library.opcheck(module._op, (maps, [False, True], times(b), TABLE.to(DEVICE)))


@pytest.mark.parametrize("guided", [False, True])
def test_empty_batch(guided: bool) -> None:
    maps = maps_of([(3, 5, 4), (7, 3, 3)], 0)
    out, _, grads = run(maps, [False, guided], times(0), TABLE.to(DEVICE))
    assert out.shape == (0, 10) and [g.shape for g in grads] == [(0, 3, 5, 4), (0, 7, 3, 3)]


def test_one_launch_each_way_and_no_copy() -> None:
    maps = maps_of([(3, 5, 4), (7, 3, 3)], 4, torch.float16, last=True)
    with launch.recording() as launches:
        out = reward_pool(maps, [False, True], times(2), TABLE.to(DEVICE))
        torch.autograd.grad(out, maps, torch.ones_like(out))
    assert [record.kernel for record in launches] == [module._forward_kernel, module._backward_kernel]
    assert [x.data_ptr() for x in launches[0].arguments[0]] == [x.data_ptr() for x in maps]


def test_float64_takes_the_reference() -> None:
    maps = [stage.detach().double() for stage in maps_of(SHAPES, 6)]
    t, table = times(3), TABLE.double().to(DEVICE)
    with launch.recording() as launches:
        out = reward_pool(maps, [False] * 4 + [True], t, table)
    g, (null, text) = table[t][:, None], maps[4].flatten(2).sum(2).div(49).chunk(2)
    down = [stage[3:].flatten(2).sum(2) / stage[0, 0].numel() for stage in maps[:4]]
    assert not launches and out.dtype == torch.float64
    assert torch.allclose(out, torch.cat([*down, (1 - g) * null + g * text], 1), rtol=1e-13, atol=1e-13)


def test_gradcheck_of_the_reference() -> None:
    maps = [stage.detach().double().requires_grad_() for stage in maps_of([(2, 3, 1), (3, 2, 2)], 4)]
    t, table = times(2), TABLE.double().to(DEVICE)
    for guided in ([False, True], [True, True], [False, False]):
        assert torch.autograd.gradcheck(lambda *m, flags=guided: reward_pool_reference(m, flags, t, table),
                                        maps)


def on(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


HERE = str(DEVICE)


@pytest.mark.parametrize("change, message", [
    ({"maps": [], "guided": []}, "no maps"),
    ({"guided": [True]}, "2 maps, but 1 entries of guided"),
    ({"t": on(HERE, 1, 2, dtype=torch.int64)}, "t has shape (1, 2), expected (B,)"),
    ({"t": on(HERE, 2)}, "t is torch.float32, expected torch.int64"),
    ({"t": on(HERE, 2, dtype=torch.int32)}, "t is torch.int32, expected torch.int64"),
    ({"t": on("meta", 2, dtype=torch.int64)}, "t is on meta, expected"),
    ({"t": on(HERE, 3, dtype=torch.int64)}, "maps have 4 rows for 3 timesteps, expected 3 or 6"),
    ({"t": on(HERE, 1, dtype=torch.int64)}, "maps have 4 rows for 1 timesteps, expected 1 or 2"),
    ({"t": on(HERE, 4, dtype=torch.int64)}, "a guided map needs the null branch too: 2B rows"),
    ({"guidance": on(HERE, 5, 1)}, "guidance has shape (5, 1), expected (N,)"),
    ({"guidance": torch.zeros(5, device=HERE, requires_grad=True)},
     "guidance requires a gradient, but the operator has none"),
    ({"guidance": on(HERE, 0)}, "guidance has shape (0,): no timesteps"),
    ({"guidance": 7.5}, "guidance is of type float, expected Tensor"),
    ({"t": 951}, "t is of type int, expected Tensor"),
    ({"maps": [None, on(HERE, 4, 3, 5, 5)]}, "maps[0] is of type NoneType, expected Tensor"),
    ({"maps": [on(HERE, 4, 3, 5, 5), "mid"]}, "maps[1] is of type str, expected Tensor"),
    ({"guidance": on(HERE, 5, dtype=torch.float16)}, "guidance is torch.float16, expected torch.float32"),
    ({"guidance": on("meta", 5)}, "guidance is on meta, expected"),
    ({"maps": [on(HERE, 4, 3, 5), on(HERE, 4, 3, 5, 5)]},
     "maps[0] has shape (4, 3, 5), expected (B, C, H, W)"),
    ({"maps": [on(HERE, 4, 3, 5, 5), on(HERE, 2, 3, 5, 5)]},
     "maps[1] has shape (2, 3, 5, 5), expected (4, C, H, W)"),
    ({"maps": [on(HERE, 4, 3, 5, 5), on(HERE, 4, 3, 5, 5, dtype=torch.float16)]},
     "maps[1] is torch.float16, expected torch.f"),
    ({"maps": [on(HERE, 4, 3, 5, 5), on("meta", 4, 3, 5, 5)]}, "maps[1] is on meta, expected"),
    ({"maps": [on(HERE, 4, 3, 5, 5), on(HERE, 4, 3, 0, 5)]},
     "maps[1] has shape (4, 3, 0, 5): nothing to pool"),
    ({"maps": [on(HERE, 4, 0, 5, 5), on(HERE, 4, 3, 5, 5)]},
     "maps[0] has shape (4, 0, 5, 5): nothing to pool"),
    ({"maps": [on(HERE, 4, 3, 5, 5, dtype=torch.int64)] * 2},
     "maps[0] is torch.int64, expected torch.float32"),
])
def test_rejects(change: dict, message: str) -> None:
    arguments = {"maps": [on(HERE, 4, 3, 5, 5), on(HERE, 4, 2, 1, 7)], "guided": [False, True],
                 "t": on(HERE, 2, dtype=torch.int64), "guidance": on(HERE, 5)}
    reward_pool(**arguments)
    with pytest.raises(ValueError) as error:
        reward_pool(**arguments | change)
    assert message in str(error.value)
