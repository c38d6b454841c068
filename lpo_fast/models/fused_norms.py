"""Replace a denoiser's GroupNorms with fused ones, which also apply the time embedding's bias and SiLU
(group_norm_silu).

The classes of modules are changed in place. Parameters, their names and the file format stay the same, so
LoRA, checkpoints and copies work as before.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from lpo_fast.kernels.group_norm_silu import group_norm_silu


def _fused(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, shift, silu)


class FusedNorm(nn.GroupNorm):
    """GroupNorm without SiLU, as before a transformer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x, [B, C, H, W]."""
        return _fused(self, x, silu=False)


class FusedNormSiLU(nn.GroupNorm):
    """GroupNorm followed by SiLU, as before the last convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Return SiLU of the normalized x, [B, C, H, W]."""
        return _fused(self, x)


class FusedResnetBlock(ResnetBlock2D):
    """A ResNet block with fused norms: x + conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + proj(SiLU(temb)))))."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *_, **__) -> Tensor:
        """Return the block's output [B, C', H, W]. input_tensor: [B, C, H, W]; temb: [B, E] or None."""
        h = self.conv1(_fused(self.norm1, input_tensor))
        h = _fused(self.norm2, h, None if temb is None else self.time_emb_proj(self.nonlinearity(temb)))
        h = self.conv2(self.dropout(h))
        x = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (x + h) / self.output_scale_factor


class FusedTransformer(Transformer2DModel):
    """A transformer that turns tokens back into a channels-last map without a copy."""

    def _get_output_for_continuous_inputs(self, hidden_states: Tensor, residual: Tensor, batch_size: int,
                                          height: int, width: int, inner_dim: int) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        h = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (h if self.use_linear_projection else self.proj_out(h)) + residual


def _can_fuse(block: ResnetBlock2D) -> bool:
    """Return whether ``FusedResnetBlock`` computes this block; other variants are left unchanged."""
    return (block.time_embedding_norm == "default" and block.upsample is None and block.downsample is None
            and isinstance(block.nonlinearity, nn.SiLU)
            and not block.skip_time_act and block.time_emb_proj is not None
            and all(type(norm) is nn.GroupNorm and norm.affine for norm in (block.norm1, block.norm2)))


def fuse_norms(unet: UNet2DConditionModel) -> int:
    """Make ``unet`` channels-last and fuse its GroupNorms, in place; return the number of fused norms."""
    unet.to(memory_format=torch.channels_last)
    fused = 0
    for module in unet.modules():
        if type(module) is ResnetBlock2D and _can_fuse(module):
            module.__class__ = FusedResnetBlock
            fused += 2
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            module.__class__ = FusedTransformer
            module.norm.__class__ = FusedNorm
            fused += 1
    if type(unet.conv_norm_out) is nn.GroupNorm and isinstance(unet.conv_act, nn.SiLU):
        unet.conv_norm_out.__class__ = FusedNormSiLU
        unet.conv_act = nn.Identity()
        fused += 1
    return fused
