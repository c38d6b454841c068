"""What a dry run counts on the meta device: parameters, operations and memory,
by hand and against real passes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bench.support.random_models import UNETS
from lpo_fast.models import families
from lpo_fast.preflight.meta import META, Tally, empty, measure, on_cuda, training_pass
from lpo_fast.run import optimization
from lpo_fast.system import devices


@pytest.mark.parametrize("name, count", [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_parameters_of_published_denoisers(name: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(UNETS[name] | {"_class_name": "UNet2DConditionModel"}))
    unet = families.without_weights(UNet2DConditionModel, tmp_path)
    assert sum(p.numel() for p in unet.parameters()) == count
    assert all(p.device == META for p in unet.parameters())


def test_operations_by_hand() -> None:
    """A convolution takes 2·Cout·Cin·k²·H·W a picture, a linear layer 2·in·out a row;
    their backward passes twice that."""
    conv, linear = nn.Conv2d(3, 8, 3, padding=1, device=META), nn.Linear(8, 5, device=META)

    def step() -> Tensor:
        return linear(conv(empty(2, 3, 16, 16)).mean((2, 3))).sum()
    forward = 2 * 2 * 8 * 3 * 9 * 16 * 16 + 2 * 2 * 8 * 5
    assert measure(step).flops == forward
    # the input of the convolution has no gradient: one of its two backward convolutions is not computed
    cost = training_pass(step, [*conv.parameters(), *linear.parameters()])
    assert cost.flops == forward + 2 * 2 * 8 * 3 * 9 * 16 * 16 + 2 * (2 * 2 * 8 * 5)


@pytest.mark.parametrize("name", optimization.OPTIMIZERS)
def test_optimizer_states(name: str) -> None:
    """Against the tensors of a real optimizer after a step."""
    parameters = [nn.Parameter(torch.randn(shape))
                  for shape in ((64, 80), (4095,), (8, 4, 3, 3), (128, 64, 3, 3), (7,))]
    optimizer = optimization.optimizer(name, parameters, lr=1e-3, weight_decay=0.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = sum(x.numel() * x.element_size() for state in optimizer.state.values() for key, x in state.items()
               if isinstance(x, Tensor) and key not in ("step", "qmap1", "qmap2", "RMS"))
    assert optimization.optimizer_state(name, parameters) == real


def test_the_tally_against_the_allocator() -> None:
    """Bytes that live on the CPU, by torch's profiler, in a forward and backward pass of plain layers."""
    layers = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(),
                           nn.Linear(512, 256))
    x = torch.randn(1000, 256)
    with torch.profiler.profile(profile_memory=True,
                                activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layers(x).sum().backward()
    live, peak = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    ghost = layers.to(META)
    for parameter in ghost.parameters():
        parameter.grad = None
    cost = training_pass(lambda: ghost(empty(1000, 256)).sum(), list(ghost.parameters()))
    assert cost.peak == pytest.approx(peak + x.nbytes, rel=0.1)  # the input is made inside


def test_the_second_pass_finds_gradients() -> None:
    layer = nn.Linear(1000, 1000, bias=False, device=META)

    def step() -> Tensor:
        return layer(empty(1, 1000)).sum()
    first = training_pass(step, list(layer.parameters()))
    layer.weight.grad = None
    second = training_pass(step, list(layer.parameters()), accumulate=2)
    assert 4e6 < first.peak < 4.1e6 and 8e6 < second.peak < 8.2e6 and second.flops == first.flops


def test_the_tally_lets_go() -> None:
    with Tally() as tally:
        a = torch.empty(100, device=META)
        b = a.view(10, 10)[2:]
        assert tally.live == 400
        del a
        assert tally.live == 400  # a view holds it
        del b
        assert tally.live == 0 and tally.peak == 400


def test_precisions_as_under_autocast_on_cuda() -> None:
    """PyTorch's lists: convolutions, linear layers and attention in half precision,
    norms and softmax in fp32."""
    x, w = empty(2, 8, 4, 4), empty(8, 8, 1, 1)
    with on_cuda(), devices.autocast("bf16"):
        h = F.conv2d(x, w)
        assert h.dtype == F.linear(empty(2, 8), empty(3, 8)).dtype == torch.bfloat16
        assert (F.group_norm(h, 2).dtype == F.layer_norm(h, (4,)).dtype == F.softmax(h, 1).dtype
                == torch.float32)
        assert F.silu(h).dtype == torch.bfloat16 and F.silu(x).dtype == torch.float32
        q = empty(2, 3, 16, 8)
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        with devices.autocast("no"):
            assert F.conv2d(x, w).dtype == torch.float32
    with on_cuda():
        assert F.conv2d(x, w).dtype == torch.float32


def test_attention_keeps_no_matrix() -> None:
    q = empty(1, 2, 4096, 8).requires_grad_()
    with on_cuda():
        cost = training_pass(lambda: F.scaled_dot_product_attention(q, q, q).sum(), [q])
    # 2 products forward, 5 backward
    assert cost.kept < 2 * 4096 * 4 * 16 and cost.flops == 7 * 2 * 2 * 4096 * 4096 * 8
