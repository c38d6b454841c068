"""Load and run denoisers (U-Nets): with text and size conditions, in full or only the down and mid blocks.

SD1.5 and SD2.1 share a family (one CLIP text encoder, "" as the null text); SDXL has two encoders, pooled
text and time ids, and zeros as the policy's null text. The family is read from the denoiser's config, never
set by the user.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from lpo_fast.errors import InputError
from lpo_fast.models import families, vaes
from lpo_fast.models.texts import Text


def time_ids(height: int, width: int) -> Tensor:
    """Return SDXL's size conditions [1, 6]: original size, crop corner, target size, in pixels."""
    return torch.tensor([[height, width, 0, 0, height, width]])


def added_conditions(text: Text, sizes: Tensor | None) -> dict[str, Tensor] | None:
    """Return the denoiser's added_cond_kwargs, or None for families without size conditions."""
    return None if sizes is None else {"text_embeds": text.pooled, "time_ids": sizes.expand(len(text), -1)}


def predict(unet: nn.Module, x_t: Tensor, t: Tensor, text: Text, sizes: Tensor | None = None) -> Tensor:
    """Return the network outputs [2B, C, H, W], null branch first, for latents x_t [B, C, H, W] at timesteps
    t [B].
    """
    both = text.guided()
    return unet(torch.cat([x_t, x_t]), torch.cat([t, t]), both.context, return_dict=False,
                added_cond_kwargs=added_conditions(both, sizes))[0]


def down_mid(unet: nn.Module, x: Tensor, t: Tensor, text: Text,
             sizes: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Run only the down and mid blocks.

    Returns each down block's last map before its down-sampler, and the mid map. x: [B, C, H, W]; t: int64
    [B]; sizes: [1, 6] or None.
    """
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    added = unet.get_aug_embed(emb=emb, encoder_hidden_states=text.context,
                               added_cond_kwargs=added_conditions(text, sizes))
    emb = emb if added is None else emb + added
    h, stages = unet.conv_in(x), []
    for block in unet.down_blocks:
        cross = ({"encoder_hidden_states": text.context} if getattr(block, "has_cross_attention", False) else
                 {})
        h, residuals = block(hidden_states=h, temb=emb, **cross)
        stages.append(residuals[len(block.resnets) - 1])
    return stages, unet.mid_block(h, emb, encoder_hidden_states=text.context)


def empty_down_mid(folder: Path) -> UNet2DConditionModel:
    """Return a denoiser without its up blocks, on the meta device."""
    unet = families.without_weights(UNet2DConditionModel, folder)
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, None
    return unet


def load_down_mid(folder: Path, state: dict[str, Tensor] | None = None,
                  weights: bool = True) -> UNet2DConditionModel:
    """Load a denoiser in fp32 without its up blocks, whose weights are never read from disk.

    state: weights that take precedence over those in ``folder``. weights: False leaves it on the meta device.
    Raises InputError if weights are missing.
    """
    unet = empty_down_mid(folder)
    unet.register_to_config(_name_or_path=str(folder.absolute()))  # for ``up_blocks``
    if not weights:
        return unet
    wanted = set(unet.state_dict())
    found = {name: tensor for name, tensor in (state or {}).items() if name in wanted}
    for file in families.weight_files(folder):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()
                      if name in wanted - found.keys()}
    if missing := wanted - found.keys():
        raise InputError(str(folder), f"lacks {len(missing)} weights, the first {min(missing)!r}",
                         "name a complete diffusers U-Net")
    unet.load_state_dict(found, assign=True)
    return unet.float()


def up_blocks(unet: nn.Module) -> dict[str, Tensor]:
    """Load the weights that ``load_down_mid`` left on disk, in fp32, so that the complete denoiser can be
    written.

    Empty if the files no longer exist.
    """
    kept, rest = set(unet.state_dict()), {}
    for file in families.weight_files(Path(unet.config._name_or_path)):
        with safe_open(file, "pt") as tensors:
            rest |= {name: tensors.get_tensor(name).float() for name in tensors.keys() if name not in kept}
    return rest


def load_unet(path: Path, dtype: torch.dtype = torch.float32, weights: bool = True) -> UNet2DConditionModel:
    """Load the denoiser below ``path``; without weights on the meta device."""
    folder = path / "unet"
    if not weights:
        return families.without_weights(UNet2DConditionModel, folder).to(dtype)
    return UNet2DConditionModel.from_pretrained(folder, variant=families.variant(folder), torch_dtype=dtype,
                                                use_safetensors=True)


def size_conditions(base: Path, family: families.Family, unet: nn.Module,
                    resolution: int = 0) -> Tensor | None:
    """Return the time ids [1, 6] for a resolution in pixels (0: the denoiser's own), or None for families
    without them.
    """
    if not family.time_ids:
        return None
    pixels = vaes.pixels(base, unet.config, resolution)
    return time_ids(pixels, pixels)
