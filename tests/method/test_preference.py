"""The reward model's loss against a loop over pairs, and its gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpo_fast.method import loss

LABELS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (0.5, 0.5)]


COUNTS = [1, 4, 2, 7, 3]


TIMES = [(1, 1), (51, 1), (951, 951), (401, 451), (1, 51)]


def features(requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(5)
    drawn = [F.normalize(torch.randn(5, 6, dtype=torch.float64), dim=-1) for _ in range(3)]
    return [f.requires_grad_(requires_grad) for f in drawn]


def cross_entropy(logits: list[float], i: int) -> float:
    return math.log(sum(math.exp(value) for value in logits)) - logits[i]


def slow_preference(text, image_0, image_1, scale: float, kind: str, batch_coeff: float, aux: float) -> float:
    """The loss pair by pair, on Python floats."""
    text, images = text.tolist(), [*image_0.tolist(), *image_1.tolist()]
    size = len(text)
    s = [[scale * sum(a * b for a, b in zip(words, image, strict=True)) for image in images]
         for words in text]
    total = 0.0
    for i, (y0, y1) in enumerate(LABELS):
        tie = math.log(0.5) if y0 == y1 else 0.0
        both = [s[i][i], s[i][size + i]]
        pair = y0 * cross_entropy(both, 0) + y1 * cross_entropy(both, 1) + tie
        by_text = y0 * cross_entropy(s[i], i) + y1 * cross_entropy(s[i], size + i) + tie
        by_image = (y0 * cross_entropy([row[i] for row in s], i)
                    + y1 * cross_entropy([row[size + i] for row in s], i))
        batch = (by_image + by_text) / 2
        value = {"pair": pair, "batch": batch, "both": pair + batch_coeff * batch}[kind]
        weight = (1 / COUNTS[i]) / sum(1 / n for n in COUNTS)
        total += weight * value * (aux if TIMES[i][0] != TIMES[i][1] else 1.0)
    return total


def fast_preference(text, image_0, image_1, scale: Tensor, kind: str, batch_coeff: float,
                    aux: float) -> Tensor:
    labels = torch.tensor(LABELS, dtype=torch.float64)
    return loss.preference(text, image_0, image_1, scale, labels[:, 0], labels[:, 1],
                           torch.tensor(COUNTS, dtype=torch.float64), torch.tensor(TIMES), loss_type=kind,
                           batch_coeff=batch_coeff, aux_loss_coeff=aux)


@pytest.mark.parametrize("kind", ["pair", "batch", "both"])
@pytest.mark.parametrize("aux", [1.0, 0.25])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_preference_equals_the_slow_statement(kind: str, aux: float, scale: float) -> None:
    inputs = features()
    got = fast_preference(*inputs, torch.tensor(scale, dtype=torch.float64), kind, 0.3, aux)
    expected = slow_preference(*inputs, scale, kind, 0.3, aux)
    # log ½ is rounded to fp32, as in the official code
    assert got.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("kind", ["pair", "batch", "both"])
def test_preference_gradcheck(kind: str) -> None:
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *args: fast_preference(*args, kind, 0.5, 0.25), (*features(requires_grad=True), scale))


def test_integer_counts_and_single_precision() -> None:
    inputs = [f.float() for f in features()]
    labels = torch.tensor(LABELS)
    got = loss.preference(*inputs, torch.tensor(5.0), labels[:, 0], labels[:, 1], torch.tensor(COUNTS),
                          torch.tensor(TIMES))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(slow_preference(*features(), 5.0, "pair", 1.0, 1.0), rel=1e-5)


def test_an_ideal_tie_costs_nothing() -> None:
    text, image, _ = features()
    half = torch.full((5,), 0.5, dtype=torch.float64)
    same = torch.ones(5, 2)
    value = loss.preference(text, image, image, torch.tensor(14.3), half, half, torch.ones(5), same)
    assert value.item() == pytest.approx(0, abs=1e-7)
    sure = loss.preference(text, text, -text, torch.tensor(1e4), torch.ones(5), torch.zeros(5), torch.ones(5),
                           same)
    assert sure.item() == 0
    wrong = loss.preference(text, -text, text, torch.tensor(1e4), torch.ones(5), torch.zeros(5),
                            torch.ones(5), same)
    assert wrong.item() == pytest.approx(2e4)
