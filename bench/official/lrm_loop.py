"""LRM training as the official code computes it: our own statement of a step, evaluation by evaluation,
for SD1.5 and SDXL.

The baseline of bench_lrm.py. What it keeps of the official program, and lpo_fast does not do:

- the text encoders run, with gradient, on the captions *and as many copies of ""*, of which one would do;
- the VAE encodes both pictures of every pair again in each step, all in one batch;
- the denoiser's up blocks are held and, although they never run, have master weights, gradients (of 0)
  and AdamW's moments;
- weights are bf16 on CUDA, the VAE's too, beside fp32 masters in one flat tensor, and gradients are bf16
  (DeepSpeed, ZeRO-2); forward passes are under autocast all the same, and features, logits and the scale are
  bf16 when the loss is computed;
- scores are the diagonals of a product of all texts with all pictures;
- everything is eager, attention is torch's, nothing is channels-last,
  and the host reads the loss before the backward pass.

It is one process, where ZeRO-2 has nothing to divide: over P processes each holds a P-th of masters and
moments, and updates that. So AdamW is torch's fused one, which is faster and smaller than the official step.
Settings are those of the official recipes: pair loss, several scales with the mid feature alone guided, text
encoders that train, no comparison over timesteps. What a network is (its blocks, its text conditioning) comes
from lpo_fast; formulas, order and precision are stated here.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from lpo_fast.config import LRM
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import denoisers, locate, texts, vaes
from lpo_fast.models.texts import Text
from lpo_fast.system import devices


class Official:
    """The models of an LRM run, and a step with them. lrm: with its whole denoiser.
    null_ids: of "", [1, L] an encoder."""

    def __init__(self, config: LRM, lrm: LatentRewardModel, vae: AutoencoderKL, scheduler: DDPMScheduler,
                 null_ids: list[Tensor]):
        self.config, self.lrm, self.vae, self.scheduler, self.null_ids = config, lrm, vae, scheduler, null_ids
        self.device, self.precision = (lrm.logit_scale.device,
                                       devices.precision(config.mixed_precision, "bf16"))
        nn.Module.to(vae, devices.DTYPES[self.precision])
        # The scale last, so that all weights are aligned.
        self.parameters = [p for p in lrm.parameters() if p is not lrm.logit_scale] + [lrm.logit_scale]
        self.weights = torch.cat([p.data.flatten()
                                  for p in self.parameters]).to(devices.DTYPES[self.precision])
        for parameter, weight in zip(self.parameters, self.split(self.weights), strict=True):
            parameter.data = weight
        self.master = self.weights.float().clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.master], lr=config.learning_rate,
                                           weight_decay=config.weight_decay, fused=self.device.type == "cuda")

    def split(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of a flat tensor."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def latents(self, pixels: Tensor, z: Tensor | None = None) -> Tensor:
        """Samples of the VAE's posterior, [2B, C, h, w], of pixels [2, B, 3, H, W].
        z: [2B, C, h, w], drawn if not given."""
        with torch.no_grad(), devices.autocast(self.precision):
            posterior = self.vae.encode(pixels.to(self.device).flatten(0, 1)).latent_dist
            x = posterior.sample() if z is None else posterior.mean + posterior.std * z
            return x * self.vae.config.scaling_factor

    def features(self, ids: list[Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Text features [B, P] and picture features [2B, P] of captions' ids [B, L] and
        noisy latents at t [2B]."""
        lrm, n = self.lrm, len(ids[0])
        both = [torch.cat([i, null.repeat(n, 1)]) for i, null in zip(ids, self.null_ids, strict=True)]
        text = texts.encode(lrm.family, list(lrm.text_encoders), both)
        four = Text(*(torch.cat([part for part in field.chunk(2) for _ in (0, 1)])
                      for field in (text.context, text.pooled)))
        down, mid = denoisers.down_mid(lrm.unet, torch.cat([x, x]), torch.cat([t, t]), four, lrm.sizes)
        text_mid, null_mid = mid.mean((2, 3)).chunk(2)
        mid = null_mid + self.config.guidance_scale[0] * (text_mid - null_mid)
        v = lrm.visual_projection(torch.cat([*(stage.mean((2, 3)).chunk(2)[0] for stage in down), mid], -1))
        return text.pooled[:n] if lrm.text_projection is None else lrm.text_projection(text.pooled[:n]), v

    def loss(self, ids: list[Tensor], x: Tensor, t: Tensor, labels: Tensor, counts: Tensor,
             noise: Tensor | None = None) -> Tensor:
        """The pair loss of latents x [2B, C, h, w].
        t, labels: [2, B]; counts: [B]; noise: as x, drawn if not given."""
        with devices.autocast(self.precision):
            x_t = self.scheduler.add_noise(x, torch.randn_like(x) if noise is None else noise, t.flatten())
            text, v = self.features(ids, x_t, t.flatten())
        v, text = v / v.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        logits = self.lrm.logit_scale.exp() * text @ v.T  # [B, 2B]
        scores = torch.stack([half.diagonal() for half in logits.chunk(2, -1)], -1)
        loss = sum(label * F.cross_entropy(scores, torch.full_like(counts, side), reduction="none")
                   for side, label in enumerate(labels))
        loss = loss + (labels[0] == labels[1]).float() * torch.log(torch.tensor(0.5, device=self.device))
        weight = 1 / counts
        return (loss * (weight / weight.sum())).sum()

    @torch.no_grad()
    def update(self) -> None:
        """Clip the gradients, step the masters, copy them into the weights."""
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                              for p in self.parameters]).float()
        self.master.grad = gradient.div_(((gradient.norm() + 1e-6) / self.config.max_grad_norm).clamp(min=1))
        self.optimizer.step()
        self.weights.copy_(self.master)
        for parameter in (self.master, *self.parameters):
            parameter.grad = None

    def train_step(self, ids: list[Tensor], x: Tensor, t: Tensor, labels: Tensor, counts: Tensor,
                   noise: Tensor | None = None) -> float:
        """One optimizer step; its loss."""
        loss = self.loss(ids, x, t, labels, counts, noise)
        value = loss.item()
        loss.backward()
        self.update()
        return value


def load(config: LRM, device: torch.device) -> Official:
    """The official run of our settings, from the same weights as ours."""
    model = locate.model(config)
    lrm = checkpoint.new_lrm(model, clip=locate.clip(config),
                             generator=torch.Generator().manual_seed(config.seed),
                             resolution=config.resolution, guidance_scale=config.guidance_scale)
    lrm.logit_scale.data.fill_(config.logit_scale)
    lrm.unet = denoisers.load_unet(model)
    null_ids = [i.to(device) for i in texts.tokenize(texts.load_tokenizers(model, lrm.family), [""])]
    return Official(config, lrm.to(device).train(), vaes.load_vae(locate.vae(config)).to(device),
                    DDPMScheduler.from_pretrained(model, subfolder="scheduler"), null_ids)
