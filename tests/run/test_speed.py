"""Optimizers, warm-ups, attention and recomputation: each against an independent statement of what it does.
"""

import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import attention, denoisers, texts
from lpo_fast.run import optimization

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8}


def stepped(name: str, start: torch.Tensor, grads: list[torch.Tensor], **adam) -> torch.Tensor:
    """The parameter after a step with each gradient."""
    p = nn.Parameter(start.clone())
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = optimization.optimizer(name, [p, frozen], **SETTINGS, **adam)
    assert [q for group in optimizer.param_groups for q in group["params"]] == [p]
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


@pytest.fixture
def problem() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(64, 128, generator=generator),
            [torch.randn(64, 128, generator=generator) for _ in range(3)])


def adamw(start: torch.Tensor, grads: list[torch.Tensor], betas: tuple[float, float],
          eps: float) -> torch.Tensor:
    """AdamW's formula (Loshchilov & Hutter), float64."""
    p, m, v = start.double(), 0, 0
    for k, g in enumerate(grads, 1):
        p = p * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"])
        m, v = betas[0] * m + (1 - betas[0]) * g.double(), betas[1] * v + (1 - betas[1]) * g.double() ** 2
        p = p - SETTINGS["lr"] * (m / (1 - betas[0] ** k)) / ((v / (1 - betas[1] ** k)).sqrt() + eps)
    return p


@pytest.mark.parametrize("name, tolerance", [("adamw", 1e-6), ("adamw8bit", 2e-3), ("paged_adamw8bit", 2e-3)])
def test_adamw(problem, name: str, tolerance: float) -> None:
    """Moves by lr a step; 8 bits round the moments."""
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    error = (stepped(name, *problem, **ADAM) - adamw(*problem, **ADAM)).abs()
    assert error.mean() < tolerance and (stepped(name, *problem, **ADAM) - problem[0]).abs().mean() > 5e-3


def test_the_8_bit_optimizers_hold_8_bits(problem) -> None:
    pytest.importorskip("bitsandbytes")
    for name in ("adamw8bit", "paged_adamw8bit"):
        p = nn.Parameter(problem[0].clone())
        optimizer = optimization.optimizer(name, [p], **SETTINGS)
        p.grad = problem[1][0]
        optimizer.step()
        assert (optimizer.state[p]["state1"].dtype == torch.uint8
                and optimizer.is_paged == name.startswith("paged"))


def test_adafactor(problem) -> None:
    """Shazeer & Stern: factored second moment, update clipped to RMS 1, the given rate,
    no momentum, decoupled decay."""
    start, grads = problem
    p, rows, columns = start.double(), 0, 0
    for k, g in enumerate(grads, 1):
        beta = 1 - k ** -0.8
        square = g.double() ** 2 + 1e-30
        rows, columns = (beta * rows + (1 - beta) * square.mean(1),
                         beta * columns + (1 - beta) * square.mean(0))
        update = g.double() / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        p = p - SETTINGS["lr"] * SETTINGS["weight_decay"] * p - SETTINGS["lr"] * update
    assert torch.allclose(stepped("adafactor", start, grads).double(), p, atol=1e-6)
    assert torch.equal(stepped("adafactor", start, grads, **ADAM), stepped("adafactor", start, grads))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    for name in ("adamw8bit", "paged_adamw8bit"):
        with pytest.raises(InputError, match="bitsandbytes is not installed") as caught:
            optimization.optimizer(name, [nn.Parameter(torch.zeros(1))], **SETTINGS)
        assert caught.value.key == "--optimizer" and "pip install bitsandbytes" in caught.value.remedy
    optimization.check_optimizer("adamw")


@pytest.mark.parametrize("warmup", ["log", "linear"])
def test_warm_up_and_decay(warmup: str) -> None:
    """DeepSpeed's logarithmic warm-up lr·ln(k+1)/ln(steps) or a linear one; then linearly to 0 at max_steps.
    """
    factor = optimization.learning_rate(warmup, 500, 4000)
    for k in (0, 1, 10, 250, 499):
        expected = math.log(k + 1) / math.log(500) if warmup == "log" else (k + 1) / 500
        assert factor(k) == pytest.approx(expected, abs=1e-6)
    assert factor(499) == pytest.approx(1.0)
    for k in (500, 1000, 2250, 3999, 4000, 5000):
        assert factor(k) == pytest.approx(max(4000 - k, 0) / 3500)
    assert optimization.learning_rate(warmup, 0, 10)(0) == 1.0
    assert optimization.learning_rate("log", 1, 10)(0) == 0.0  # ln 1


def test_up_blocks_are_never_in_the_optimizer(tiny_sd: Path, tiny_lrm: Path) -> None:
    names = set(UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").state_dict())
    for lrm in (checkpoint.new_lrm(tiny_sd, generator=torch.Generator()), checkpoint.load_lrm(tiny_lrm)):
        lrm.requires_grad_(True)
        optimizer = optimization.optimizer("adamw", lrm.parameters(), **SETTINGS)
        known = {p: name for name, p in lrm.named_parameters()}
        inside = {known[p] for group in optimizer.param_groups for p in group["params"]}
        denoiser = {name.removeprefix("unet.") for name in inside if name.startswith("unet.")}
        assert denoiser == {n for n in names
                            if n.startswith(("conv_in.", "time_embedding.", "down_blocks.", "mid_block."))}
        assert {n.partition(".")[0] for n in names - denoiser} == {"up_blocks", "conv_norm_out", "conv_out"}


def test_attention(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = denoisers.load_unet(tiny_sd).eval()
    x = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 16)
    unet.set_default_attn_processor()
    plain = unet(*x).sample
    attention.attention(unet, "sdpa")
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert torch.allclose(unet(*x).sample, plain, atol=1e-5)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="needs a CUDA GPU") as caught:
            attention.attention(unet, "xformers")
        assert caught.value.key == "--attention" and "sdpa" in caught.value.remedy
    monkeypatch.setattr(attention, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="is not installed"):
        attention.check_attention("xformers")
    attention.check_attention("sdpa")


def test_an_xformers_built_for_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Tensor) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n"
                                  "more")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))  # there is no such device
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = broken
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    with pytest.raises(InputError, match=r"does not run here \(No operator found .* inputs:\)"):
        attention.check_attention("xformers")
    ops.memory_efficient_attention = lambda *_: None
    attention.check_attention("xformers")


class Operations(TorchDispatchMode):
    """How often each is carried out."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reward", [False, True])
def test_checkpointing_recomputes_and_keeps_gradients(tiny_sd: Path, tiny_lrm: Path, reward: bool) -> None:
    """In eval mode too; the policy's whole denoiser and the reward model's half.
    "selective" carries out what is dear once."""
    grads, counts = [], []
    for how in ("none", "selective", "full"):
        lrm: LatentRewardModel | None = checkpoint.load_lrm(tiny_lrm) if reward else None
        unet = (lrm.unet if reward else denoisers.load_unet(tiny_sd)).eval().requires_grad_(True)
        attention.attention(unet, "sdpa")
        attention.checkpointing(unet, how)
        generator = torch.Generator().manual_seed(2)
        x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)
        with Operations() as operations:
            if reward:
                text = texts.Text(context, torch.randn(2, 16, generator=generator))
                stages, mid = denoisers.down_mid(unet, x, torch.tensor([5, 500]), text, None)
                loss = sum(s.square().mean() for s in [*stages, mid])
            else:
                loss = unet(x, torch.tensor([5, 500]), context).sample.square().mean()
            loss.backward()
        grads.append([p.grad for p in unet.parameters() if p.grad is not None])
        counts.append(operations.count)
    none, selective, full = counts
    for name in ("convolution", "_scaled_dot_product_flash_attention_for_cpu"):
        assert 0 < none[name] == selective[name] < full[name], name
    for name in ("native_group_norm", "addmm"):
        assert 0 < none[name] < selective[name], name
    assert all(torch.allclose(a, b, atol=1e-6) for other in grads[1:]
               for a, b in zip(grads[0], other, strict=True))
