"""Score noisy latents with a diffusion model: the latent reward model, LRM (arXiv 2502.01051, section 3.2).

    S(x, t, prompt) = exp(logit_scale) · < V/|V| , T/|T| >

V projects the average-pooled maps of the denoiser's down and mid blocks; the mid feature is guided (visual
feature enhancement): V_mid = null + g·(text − null). T projects the prompt's pooled embedding. Up blocks are
neither used nor loaded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpo_fast.kernels.reward_pool import reward_pool
from lpo_fast.models import denoisers, texts
from lpo_fast.models.families import Family
from lpo_fast.models.texts import Text
from lpo_fast.system import devices

TIMESTEPS = 1000  # of the diffusion model's training


def guidance_table(scale: Sequence[float]) -> Tensor:
    """Return the guidance scale g of every training timestep, fp32 [1000].

    The numbers of ``scale`` are spread evenly from t = 0 to 999 and interpolated linearly. Values below 1
    become 1, which means no guidance.
    """
    at = np.linspace(0, TIMESTEPS - 1, len(scale))
    return torch.from_numpy(np.interp(np.arange(TIMESTEPS), at, scale)).float().clamp(min=1)


class LatentRewardModel(nn.Module):
    """Score noisy latents.

    Parameters: the denoiser's down and mid blocks, the text encoders, the projections, and logit_scale.

    visual_projection: [P, sum of pooled channels]. text_projection: [P, E]; None: the pooled text is already
    projected. guidance_scale: g of the mid feature, one number or several over the timesteps
    (``guidance_table``); if none is above 1, the null branch is not evaluated. multi_scale: pool every down
    block too. multi_scale_cfg: guide the down features as well (except SDXL's first stage, for equality with
    the official code). sizes: SDXL's time ids [1, 6]. base, resolution: the origin of the model and the side
    of the pictures that it scores, in pixels, which lrm.json records.
    """

    unet: Any

    def __init__(self, family: Family, unet: Any, text_encoders: Sequence[nn.Module],
                 visual_projection: Tensor, text_projection: Tensor | None, logit_scale: Tensor, *,
                 multi_scale: bool = True, multi_scale_cfg: bool = False,
                 guidance_scale: float | Sequence[float] = 7.5, sizes: Tensor | None = None, base: str = "",
                 resolution: int = 0):
        super().__init__()
        self.base, self.resolution = base, resolution
        self.family, self.unet = family, unet
        self.text_encoders = nn.ModuleList(text_encoders)
        self.visual_projection = linear(visual_projection)
        self.text_projection = None if text_projection is None else linear(text_projection)
        self.logit_scale = nn.Parameter(torch.as_tensor(logit_scale, dtype=torch.float32))
        self.multi_scale, self.multi_scale_cfg = multi_scale, multi_scale_cfg
        scales = guidance_scale if isinstance(guidance_scale, Sequence) else (guidance_scale,)
        self.guidance_scale = tuple(scales)
        self.guidance: Tensor
        self.sizes: Tensor | None
        self.register_buffer("guidance", guidance_table(self.guidance_scale), persistent=False)
        self.register_buffer("sizes", sizes, persistent=False)

    def encode(self, ids: list[Tensor], null_ids: list[Tensor]) -> Text:
        """Return text features, with gradient, of ids int64 [B, L] and of the null prompt's ids [1, L].

        Each list holds one tensor per text encoder.
        """
        both = [torch.cat([i, n]) for i, n in zip(ids, null_ids, strict=True)]
        text = texts.encode(self.family, list(self.text_encoders), both)
        return Text(text.context[:-1], text.pooled[:-1], text[-1:])

    def image_features(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """Return V/|V|, fp32 [B, P], of latents x [B, C, H, W] at timesteps t int64 [B].

        text: features of B prompts, one per latent.
        """
        guided = max(self.guidance_scale) > 1
        inputs = (torch.cat([x, x]), torch.cat([t, t]), text.guided()) if guided else (x, t, text)
        stages, mid = denoisers.down_mid(self.unet, *inputs, self.sizes)
        down = stages if self.multi_scale else []
        first_guided = 1 if self.family.time_ids else 0
        flags = [guided and self.multi_scale_cfg and i >= first_guided for i in range(len(down))]
        v = reward_pool([*down, mid], [*flags, guided], t, self.guidance)
        return normalized(self.visual_projection, v)

    def text_features(self, text: Text) -> Tensor:
        """Return T/|T|, fp32 [B, P], of the features of B prompts."""
        return normalized(self.text_projection, text.pooled)

    def score(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """Return S(x, t, prompt), fp32 [B]. x: [B, C, H, W]. t: int64 [B]. text: features of B prompts."""
        return self.logit_scale.exp() * (self.image_features(x, t, text) * self.text_features(text)).sum(-1)


def normalized(projection: nn.Linear | None, features: Tensor) -> Tensor:
    """Project features (if there is a projection) and scale them to unit length, in fp32.

    Half precision would not resolve the small differences of scores.
    """
    with devices.autocast("no"):
        features = features.float()
        return F.normalize(features if projection is None else projection(features), dim=-1, eps=0)


def linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer without bias, with a copy of ``weight`` [out, in] in fp32."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.float().clone())
    return layer


def encode_features(lrm: LatentRewardModel, ids: list[Tensor], null_ids: list[Tensor], x: Tensor,
                    t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``features`` of token ids: the part of a training step's forward pass that has gradient.

    ids, null_ids: see ``LatentRewardModel.encode``. x, t: see ``features``.
    """
    return features(lrm, lrm.encode(ids, null_ids), x, t)


def features(lrm: LatentRewardModel, text: Text, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit features (text, image_0, image_1), fp32 [B, P] each, of noisy pairs x [2, B, C, h, w].

    text: features of B prompts. t: int64 [B] or [2, B].
    """
    both = texts.concatenate([text, text])
    image_0, image_1 = lrm.image_features(x.flatten(0, 1), t.expand(2, -1).flatten(), both).chunk(2)
    return lrm.text_features(text), image_0, image_1
