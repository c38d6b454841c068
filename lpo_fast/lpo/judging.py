"""Load the LRM that judges a run's candidates, as a function of latents, timesteps, and prompt numbers."""

import json

import torch
from torch import Tensor, nn

from lpo_fast.config import LPO
from lpo_fast.lpo import policies
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import attention, fused_norms, locate, texts, vaes
from lpo_fast.models.texts import Text, TextWindow
from lpo_fast.system import devices


def load_reward(config: LPO, device: torch.device, weights: bool = True) -> LatentRewardModel:
    """Load the LRM that scores a run's candidates; weights=False leaves its networks on the meta device.

    Raises InputError if its weights are missing or do not fit.
    """
    path, base, model = locate.lrm(config), locate.base(config), locate.model(config)
    size = vaes.pixels(model, json.loads((model / "unet" / "config.json").read_text()), config.resolution)
    settings = {"guidance_scale": config.lrm_guidance or None, "multi_scale_cfg": config.lrm_multi_scale_cfg}
    given = {name: value for name, value in settings.items() if value is not None}
    lrm = checkpoint.load_lrm(path, base, resolution=size,  # of the latents to score, not of its training
                              weights=weights, **given).to(device)
    devices.layout(lrm.unet)
    if config.fused_norms:
        fused_norms.fuse_norms(lrm.unet)
    attention.attention(lrm.unet, config.attention)
    return lrm


def load_score(config: LPO, prompts: list[str], device: torch.device) -> "Judge":
    """Load the LRM as a function of latents, timesteps, and prompt numbers; encode all its texts once."""
    lrm = load_reward(config, device)
    tokenizers = texts.load_tokenizers(locate.tokenizer(config), lrm.family)
    precision = devices.precision(config.mixed_precision, "fp16")
    text = policies.encoded(config, lrm.family, tokenizers, list(lrm.text_encoders), prompts, False,
                            precision)
    lrm.text_encoders = nn.ModuleList()  # no longer needed
    if precision != "no":
        lrm.unet.to(devices.DTYPES[precision])
    return Judge(lrm, text, precision)


class Judge:
    """Score latents with a reward model: a ``Score`` of latents, timesteps and prompt numbers."""

    def __init__(self, lrm: LatentRewardModel, text: Text | TextWindow, precision: str):
        self.lrm, self.text, self.precision, self.prefetch = lrm, text, precision, text.prefetch

    def __call__(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """Return scores [N] of latents x [N, C, H, W] at timesteps t [N] for prompt numbers [N]."""
        with devices.autocast(self.precision):
            return self.lrm.score(x, t, self.text[prompts])
