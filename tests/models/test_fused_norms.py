"""A denoiser with fused norms equals the one without, in outputs, gradients, weights and files."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lpo_fast.models import fused_norms, loras
from lpo_fast.system import launch
from tests.helpers.models import DEVICE, two_stages

FAMILIES = {"sd15": two_stages("unet_sd15"), "sdxl": two_stages("unet_sdxl"),
            "sd21": two_stages("unet_sd15", use_linear_projection=True, attention_head_dim=[1, 2])}


def denoiser(config: dict) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).to(DEVICE).eval()


def inputs(unet: UNet2DConditionModel) -> tuple[Tensor, Tensor, Tensor, dict | None]:
    """A sample, timesteps, context and added conditions."""
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, unet.config.cross_attention_dim)
    added = None
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, pooled).to(DEVICE),
                 "time_ids": torch.ones(2, 6, device=DEVICE)}
    return x.to(DEVICE), torch.tensor([1, 951], device=DEVICE), context.to(DEVICE), added


def output(unet: nn.Module, x: Tensor, t: Tensor, context: Tensor, added: dict | None) -> Tensor:
    return unet(x, t, context, added_cond_kwargs=added, return_dict=False)[0]


def norms(unet: nn.Module) -> int:
    return sum(isinstance(module, nn.GroupNorm) for module in unet.modules())


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_outputs_and_gradients(config: dict, kernels) -> None:
    plain, fused = denoiser(config), denoiser(config)
    assert fused_norms.fuse_norms(fused) == norms(plain) > 10
    assert fused_norms.fuse_norms(fused) == 0  # nothing is fused twice
    arguments = inputs(plain)
    expected, got = output(plain, *arguments), output(fused, *arguments)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    expected, got = (torch.autograd.grad(y, list(unet.parameters()), grad)
                     for y, unet in ((expected, plain), (got, fused)))
    for (name, _), a, b in zip(plain.named_parameters(), expected, got, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6, name


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_every_norm_is_a_kernel_and_no_map_is_copied_for_it(config: dict) -> None:
    class Norms(TorchDispatchMode):
        native = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.native += "group_norm" in str(function) and function.namespace == "aten"
            return function(*args, **(kwargs or {}))

    unet = denoiser(config)
    count = fused_norms.fuse_norms(unet)
    with torch.no_grad(), launch.recording() as launches, Norms() as seen:
        output(unet, *inputs(unet))
    assert len(launches) == 2 * count and seen.native == 0


def test_what_is_no_plain_block_stays(kernels) -> None:
    unet = denoiser(FAMILIES["sd15"] | {"resnet_time_scale_shift": "scale_shift"})
    arguments, before = inputs(unet), norms(unet)
    expected = output(unet, *arguments)
    resnets = sum(type(module).__name__ == "ResnetBlock2D" for module in unet.modules())
    assert fused_norms.fuse_norms(unet) == before - 2 * resnets
    assert torch.allclose(output(unet, *arguments), expected, rtol=1e-4, atol=1e-5)


def test_weights_copies_files_and_adapters(tmp_path, kernels) -> None:
    plain, fused = denoiser(FAMILIES["sd15"]), denoiser(FAMILIES["sd15"])
    fused_norms.fuse_norms(fused)
    assert list(plain.state_dict()) == list(fused.state_dict())
    arguments = inputs(plain)
    expected = output(fused, *arguments)
    assert torch.equal(output(copy.deepcopy(fused), *arguments), expected)
    fused.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).to(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))
    loras.add_lora(fused, 2, 2, ("to_q", "to_out.0"), 0)
    for parameter in loras.trainable(fused):
        nn.init.ones_(parameter)
    assert not torch.allclose(output(fused, *arguments), expected, rtol=1e-2)
    with loras.adapters_off(loras.adapters(fused)):
        assert torch.equal(output(fused, *arguments), expected)


def test_one_graph(kernels) -> None:
    torch._dynamo.reset()
    unet = denoiser(FAMILIES["sd15"])
    fused_norms.fuse_norms(unet)
    arguments = inputs(unet)
    compiled = torch.compile(unet, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.allclose(output(compiled, *arguments), output(unet, *arguments), rtol=1e-5, atol=1e-6)
