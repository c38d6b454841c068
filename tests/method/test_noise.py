"""Counter-based noise: Philox against its published vectors, streams that never meet,
and the right distributions."""

import math

import pytest
import torch
from torch import Tensor

from lpo_fast.method import noise
from lpo_fast.method.noise import box_muller
from lpo_fast.system.launch import jit, launch, tl
from tests.helpers.models import DEVICE
from tests.helpers.philox import ONES, apart, philox_python

# Random123, examples/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
SHAPE = (4, 8, 8)


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_philox_known_answers(counter: tuple, key: tuple, result: tuple) -> None:
    words = noise.philox(key[1] << 32 | key[0], *(torch.tensor([c]) for c in counter))
    assert tuple(word.item() for word in words) == result


@pytest.mark.parametrize("seed, epoch, item, step, candidate", [
    (42, 0, 0, 0, 0), (2**40 + 7, 3, 2**33 + 5, 19, 3), (0, ONES, 4095, noise.INITIAL, 0),
])
def test_normal_is_box_muller_of_the_documented_counter(seed, epoch, item, step, candidate) -> None:
    z = noise.normal(seed, epoch, torch.tensor([item]), step, candidate + 1,
                     (2, 5))[candidate, 0].flatten().tolist()
    expected = []
    for element in range(3):
        words = philox_python(seed, [element, step << 16 | candidate, item & ONES, epoch])
        u = [(word >> 8) / 2**24 for word in words]
        for radius, angle in ((u[0], u[1]), (u[2], u[3])):
            length = math.sqrt(-2 * math.log(radius + 2**-24))
            expected += [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
    assert z == pytest.approx(expected[:10], rel=1e-6, abs=1e-7)


def test_integers_are_the_documented_counter() -> None:
    drawn = noise.integers(9, 2, torch.tensor([3, 70000]), 5, 1000).tolist()
    assert drawn == [philox_python(9, [0, 5 << 16 | 0xFFFF, item, 2])[0] % 1000 for item in (3, 70000)]


def test_independent_of_batches_and_order() -> None:
    items = torch.arange(6)
    whole = noise.normal(1, 2, items, 3, 4, SHAPE)
    halves = torch.cat([noise.normal(1, 2, part, 3, 4, SHAPE) for part in items.split(3)], 1)
    single = torch.cat([noise.normal(1, 2, part, 3, 4, SHAPE) for part in items.flip(0).split(1)], 1).flip(1)
    assert torch.equal(whole, halves) and torch.equal(whole, single)
    # fewer candidates are the first ones
    assert torch.equal(noise.normal(1, 2, items, 3, 2, SHAPE), whole[:2])
    integers = noise.integers(1, 2, items, 3, 7)
    assert torch.equal(integers, torch.cat([noise.integers(1, 2, part, 3, 7) for part in items.split(1)]))


def test_streams_differ_and_do_not_correlate() -> None:
    def draw(seed=0, epoch=0, item=0, step=0, candidates=1) -> torch.Tensor:
        return noise.normal(seed, epoch, torch.tensor([item]), step, candidates, (4, 32, 32))[-1].flatten()
    streams = torch.stack([
        draw(), draw(seed=1), draw(seed=2**32), draw(epoch=1), draw(epoch=2), draw(item=1), draw(item=2),
        draw(step=1), draw(step=2), draw(candidates=2), draw(candidates=3), draw(step=noise.INITIAL),
        draw(seed=1, epoch=1), draw(epoch=1, item=1), draw(item=1, step=1), draw(step=1, candidates=2)])
    correlation = torch.corrcoef(streams.double()) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / math.sqrt(streams.shape[1])


def test_normals_are_standard_normal() -> None:
    z = noise.normal(7, 0, torch.arange(50), 4, 4, (4, 16, 16)).flatten().double()
    n = len(z)  # 204,800; every bound is five standard errors
    assert z.mean().abs() < 5 / math.sqrt(n)
    assert (z.var() - 1).abs() < 5 * math.sqrt(2 / n)
    assert (z**3).mean().abs() < 5 * math.sqrt(15 / n)
    assert ((z**4).mean() - 3).abs() < 5 * math.sqrt(96 / n)
    distribution = torch.special.ndtr(z.sort().values)
    above = (torch.arange(1, n + 1) / n - distribution).abs().max()
    assert above < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at the 0.1 % level
    neighbours = torch.corrcoef(torch.stack([z[:-1], z[1:]]))[0, 1]
    assert neighbours.abs() < 5 / math.sqrt(n) and z.abs().max() < 6 and z.isfinite().all()


def test_box_muller_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (0, ONES):  # a radius of 0 must not become an infinite normal
        words = tuple(torch.full((1, 1, 1), word) for _ in range(4))
        monkeypatch.setattr(noise, "philox", lambda *_, words=words: words)
        assert noise.normal(0, 0, torch.tensor([0]), 0, 1, (4,)).isfinite().all()


@pytest.mark.parametrize("high", [2, 3, 4, 7, 20])
def test_integers_are_uniform(high: int) -> None:
    n = 20000
    drawn = noise.integers(3, 1, torch.arange(n), 11, high)
    assert drawn.dtype == torch.int64 and drawn.min() == 0 and drawn.max() == high - 1
    expected = n / high
    chi_square = ((torch.bincount(drawn, minlength=high) - expected) ** 2 / expected).sum()
    assert chi_square < (high - 1) + 5 * math.sqrt(2 * (high - 1)) + 10
    assert not torch.equal(drawn, noise.integers(3, 1, torch.arange(n), 12, high))


@pytest.mark.parametrize("n", [0, 1, 2, 5, 4000])
def test_permutation(n: int) -> None:
    order = noise.permutation(3, 1, 0, n)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, noise.permutation(3, 1, 0, n))
    if n == 4000:
        others = [noise.permutation(*key, n) for key in ((4, 1, 0), (3, 2, 0), (3, 1, 1))]
        streams = torch.stack([torch.arange(n), order, *others]).double()
        assert (torch.corrcoef(streams) - torch.eye(5)).abs().max() < 5 / math.sqrt(n)


def test_permutations_are_equally_likely() -> None:
    count = 6000
    drawn = [tuple(noise.permutation(0, 0, item, 3).tolist()) for item in range(count)]
    assert len(set(drawn)) == 6
    chi_square = sum((drawn.count(order) - count / 6) ** 2 / (count / 6) for order in set(drawn))
    assert chi_square < 20.5  # 0.1 % level of five degrees of freedom


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 5), (3, 3, 3), (4, 7, 5), (2, 1, 1)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    z = noise.normal(0, 0, torch.tensor([8, 9]), 0, 3, shape)
    assert z.shape == (3, 2, *shape) and z.dtype == torch.float32
    longer = noise.normal(0, 0, torch.tensor([8, 9]), 0, 3, (200,))
    # an element's number does not depend on the size
    assert torch.equal(z.flatten(2), longer[..., :math.prod(shape)])


def test_tensors_give_the_same_numbers() -> None:
    """Seed, epoch and step may be tensors, whose values may change without another compilation."""
    def draw(run: Tensor, step: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return noise.normal(*run, items, step, 3, (2, 3)), noise.integers(*run, items, step, 1000)
    compiled, items = (torch.compile(draw, fullgraph=True, backend="aot_eager", dynamic=False),
                       torch.tensor([3, 2**33]))
    cases = [(42, 1, 5), (2**40 + 7, 2**32 + 3, noise.INITIAL), (2**63 - 1, ONES, 0), (-5, 0, 999)]
    for i, (seed, epoch, step) in enumerate(cases):
        expected = (noise.normal(seed, epoch, items, step, 3, (2, 3)),
                    noise.integers(seed, epoch, items, step, 1000))
        with torch.compiler.set_stance("fail_on_recompile" if i > 0 else "default"):
            got = compiled(torch.tensor([seed, epoch]), torch.tensor(step), items)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        got = draw(torch.tensor([seed, epoch]), torch.tensor([step]), items)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("field, value, message", [
    ("run", torch.zeros(3, dtype=torch.int64), r"noise.run has shape \(3,\), expected \(2,\)"),
    ("run", torch.zeros(2), "noise.run is torch.float32, expected torch.int64"),
    ("items", torch.zeros(4, dtype=torch.int64), r"noise.items has shape \(4,\), expected \(5,\)"),
    ("items", torch.zeros(5, dtype=torch.int32), "noise.items is torch.int32"),
    ("items", torch.zeros(5, dtype=torch.int64, device="meta"), "noise.items is on meta, expected cpu"),
    ("step", torch.zeros(2, dtype=torch.int64), r"noise.step has shape \(2,\), expected \[\] or \[1\]"),
    ("step", torch.zeros(1, 1, dtype=torch.int64), r"noise.step has shape \(1, 1\), expected \[\] or \[1\]"),
    ("step", torch.zeros(1), "noise.step is torch.float32"),
    ("step", 3, "noise.step is of type int, expected Tensor"),
    ("run", (42, 0), "noise.run is of type tuple, expected Tensor"),
    ("items", [0, 1, 2, 3, 4], "noise.items is of type list, expected Tensor"),
])
def test_rejected_counters(field: str, value: Tensor, message: str) -> None:
    good = noise.Counter(*(torch.zeros(size, dtype=torch.int64) for size in ((2,), (), (5,))))
    noise.expect_counter("noise", good, torch.zeros(5, 4, 8, 8))
    noise.expect_counter("noise", good._replace(step=torch.zeros(1, dtype=torch.int64)), torch.zeros(5))
    with pytest.raises(ValueError, match=message):
        noise.expect_counter("noise", good._replace(**{field: value}), torch.zeros(5))


@jit
def _probe(length_ptr, turn_ptr, first_ptr, second_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    length, turn = tl.load(length_ptr + i).to(tl.uint32), tl.load(turn_ptr + i).to(tl.uint32)
    first, second = box_muller(length, turn)
    tl.store(first_ptr + i, first)
    tl.store(second_ptr + i, second)


def test_box_muller_in_a_kernel(kernels) -> None:
    """Quarter and eighth turns and their neighbours, the longest and the shortest radius, and any others."""
    turns = ([(turn + near) % 2**24 << 8 for turn in range(0, 2**24, 2**21) for near in (-1, 0, 1)]
             + [0x1FF, ONES])
    lengths = [0, 255, 256, ONES, ONES - 255, ONES - 256, 2**31]
    random = torch.randint(2**32, (2, 2048), generator=torch.Generator().manual_seed(0))
    pairs = torch.cartesian_prod(torch.tensor(lengths), torch.tensor(turns)).T
    words = torch.cat([pairs, random], 1)[:, :2048].contiguous().to(DEVICE)
    first, second = torch.empty(2, 2048, device=DEVICE)
    launch(_probe, (1,), words[0].contiguous(), words[1].contiguous(), first, second, N=2048)
    u = [[(word >> 8) / 2**24 for word in row] for row in words.tolist()]
    length = [math.sqrt(-2 * math.log(x + 2**-24)) for x in u[0]]
    for got, wave in ((first, math.cos), (second, math.sin)):
        expected = [r * wave(2 * math.pi * x) for r, x in zip(length, u[1], strict=True)]
        assert apart(got, torch.tensor(expected, dtype=torch.float64).float()) <= 1
