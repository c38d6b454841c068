"""LPO as the official code computes it: our own statement of it, evaluation by evaluation, for SD1.5,
SD2.1 and SDXL.

The baseline of bench_lpo.py and the yardstick of tests/official/test_lpo_loop.py and tests/run/test_flops.py.
What it keeps of the official program, and lpo_fast does not do:

- the text encoders of the policy run on every prompt batch, those of the LRM on the prompts *and as many
  copies of ""* at every step for every candidate;
- the reference is another denoiser; winner and loser of a pair are evaluated one after the other by policy
  and reference, although both have the same x_t, t and prompt;
- pairs are picked by boolean indexing, so that the host waits for the device;
  text features travel with the pairs;
- networks, latents and the LRM's head are fp16 on CUDA, only the policy under autocast; log sigmoid may
  overflow; gradients are not clipped; metrics are read one by one; the allocator's cache is emptied before
  training.

It is one process, where no pair is dropped and the last training batch may be smaller; over P processes the
official code deals out floor(pairs / P) to each. Thresholds are computed from the schedule, not looked up in
a table of four decimals. What a network is (its blocks, its text conditioning) comes from lpo_fast; formulas,
order and precision are stated here.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from lpo_fast.config import LPO
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.models import attention, denoisers, families, locate, loras
from lpo_fast.models import texts as models_texts
from lpo_fast.models.families import Family
from lpo_fast.models.texts import Text
from lpo_fast.system import devices


class Pairs(NamedTuple):
    """The valid pairs of a prompt batch, step-major. x_t, winner, loser: [N, C, H, W]; t, prompt: int64 [N].
    """

    x_t: Tensor
    winner: Tensor
    loser: Tensor
    t: Tensor
    context: Tensor  # [N, L, D]
    pooled: Tensor  # [N, E]
    prompt: Tensor  # numbers, which nothing but comparisons reads

    def take(self, index: Tensor | slice) -> "Pairs":
        """Some of the pairs."""
        return Pairs(*(field[index] for field in self))


class Random:
    """The randomness of a trajectory, as official draws it: from torch's generator in the order of calls."""

    def __init__(self, shape: tuple[int, ...], candidates: int, device: torch.device, dtype: torch.dtype):
        self.shape, self.candidates, self.how = shape, candidates, {"device": device, "dtype": dtype}

    def initial(self) -> Tensor:
        """x_T, [B, C, H, W]."""
        return torch.randn(self.shape, **self.how)

    def noise(self, step: int) -> Tensor:
        """z of the candidates, [K, B, C, H, W]."""
        return torch.randn(self.candidates, *self.shape, **self.how)

    def choice(self, step: int) -> Tensor:
        """Return the candidate from which each trajectory continues, int64 [B]."""
        return torch.randint(self.candidates, self.shape[:1], device=self.how["device"])


class Official:
    """The models of an LPO run, and what is computed with them. ids: token ids [P, L] of all prompts, one
    tensor an encoder, and of "" [1, L]; for the policy, and with the LRM's own tokenizers for the LRM."""

    def __init__(self, config: LPO, family: Family, unet: nn.Module, encoders: list[nn.Module],
                 judge: LatentRewardModel, scheduler: DDIMScheduler, sizes: Tensor | None,
                 ids: tuple[list[Tensor], list[Tensor]], judge_ids: tuple[list[Tensor], list[Tensor]]):
        self.config, self.family, self.encoders, self.judge, self.sizes = (
            config, family, encoders, judge, sizes)
        self.device = next(unet.parameters()).device
        self.half = self.device.type == "cuda"
        self.dtype = torch.float16 if self.half else torch.float32
        for network in (unet, judge, *encoders):
            network.to(self.dtype).requires_grad_(False)
        self.reference = copy.deepcopy(unet)
        loras.add_lora(unet, config.rank, config.alpha or config.rank, config.targets, config.seed)
        self.unet = unet
        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.ids, self.judge_ids, self.scheduler = ids, judge_ids, scheduler
        self.alphas = scheduler.alphas_cumprod.to(self.device)
        null = models_texts.encode(family, encoders, ids[1])
        zero = torch.zeros_like if family.zero_null else lambda features: features
        self.null = Text(zero(null.context), zero(null.pooled))

    # Networks

    def encode(self, prompts: Tensor) -> Text:
        """The policy's text features of prompt numbers [B]."""
        return models_texts.encode(self.family, self.encoders, [i[prompts] for i in self.ids[0]])

    @torch.no_grad()
    def score(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """S(x, t, prompt), [N], of latents [N, C, H, W]; the text encoders run on 2N sequences."""
        judge, n, null = self.judge, len(x), self.judge_ids[1]
        ids = [torch.cat([i[prompts], empty.repeat(n, 1)])
               for i, empty in zip(self.judge_ids[0], null, strict=True)]
        text = models_texts.encode(judge.family, list(judge.text_encoders), ids)
        down, mid = denoisers.down_mid(judge.unet, torch.cat([x, x]), torch.cat([t, t]), text, judge.sizes)
        text_mid, null_mid = mid.mean((2, 3)).chunk(2)
        scale = judge.guidance_scale[0]
        features = [stage.mean((2, 3))[:n] for stage in down] if judge.multi_scale else []
        v = judge.visual_projection(torch.cat([*features, null_mid + scale * (text_mid - null_mid)], -1))
        pooled = text.pooled[:n] if judge.text_projection is None else judge.text_projection(text.pooled[:n])
        v, pooled = v / v.norm(dim=-1, keepdim=True), pooled / pooled.norm(dim=-1, keepdim=True)
        return judge.logit_scale.exp() * (v * pooled).sum(-1)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """The guided output of one evaluation, null and text pass as one batch."""
        both = Text(torch.cat([self.null.context.repeat(len(x), 1, 1), text.context]),
                    torch.cat([self.null.pooled.repeat(len(x), 1), text.pooled]))
        with torch.autocast(devices.device().type, torch.float16, enabled=self.half and network is self.unet):
            out = network(torch.cat([x, x]), torch.cat([t, t]), both.context,
                          added_cond_kwargs=denoisers.added_conditions(both, self.sizes)).sample
        null, conditional = (out.float() if network is self.unet else out).chunk(2)
        return null + self.config.guidance_scale * (conditional - null)

    # DDIM: p = max(t − 1000 // T, 0), so that the last step has noise too

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and a_p, [B, 1, 1, 1]."""
        p = (t - self.scheduler.config.num_train_timesteps // self.config.num_steps).clamp(min=0)
        return self.alphas[t][:, None, None, None], self.alphas[p][:, None, None, None]

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the step from t [B], [B, 1, 1, 1]."""
        a, a_p = self.alpha(t)
        return self.config.eta * ((1 - a_p) / (1 - a) * (1 - a / a_p)).sqrt()

    def mean(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Mean of x_p given x_t = x, [B, C, H, W]."""
        how, (a, a_p) = self.scheduler.config, self.alpha(t)
        if how.prediction_type == "epsilon":
            x0, e = (x - (1 - a).sqrt() * output) / a.sqrt(), output
        elif how.prediction_type == "v_prediction":
            x0, e = a.sqrt() * x - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * x
        else:
            x0, e = output, (x - a.sqrt() * output) / (1 - a).sqrt()
        if how.clip_sample:
            x0 = x0.clamp(-how.clip_sample_range, how.clip_sample_range)
        return a_p.sqrt() * x0 + (1 - a_p - self.sigma(t) ** 2).sqrt() * e

    def log_density(self, output: Tensor, t: Tensor, x: Tensor, x_p: Tensor) -> Tensor:
        """log p(x_p | x_t), the mean over C, H, W. [B]."""
        sigma = self.sigma(t)
        density = (-(x_p - self.mean(output, t, x)) ** 2 / (2 * sigma**2) - sigma.log()
                   - math.log(math.sqrt(2 * math.pi)))
        return density.mean((1, 2, 3))

    def threshold(self, t: Tensor) -> Tensor:
        """th_t of timesteps [B], from threshold_min at the trajectory's last to threshold_max at its first.
        """
        config = self.config
        if config.threshold_shape == "none":
            return torch.full(t.shape, config.threshold_min, device=self.device)
        curve = {"linear": lambda at: at.float(), "sigma": lambda at: self.sigma(at).flatten(),
                 "variance": lambda at: self.sigma(at).flatten() ** 2}[config.threshold_shape]
        last, first = curve(self.scheduler.timesteps[[-1, 0]].to(self.device))
        return (config.threshold_min
                + (curve(t) - last) / (first - last) * (config.threshold_max - config.threshold_min))

    # The loop

    @torch.no_grad()
    def sample(self, prompts: Tensor, draw: Random, encode: Callable = None,
               score: Callable = None) -> tuple[Pairs, Tensor]:
        """The pairs of prompt numbers [B], and all scores [T, K, B].
        encode and score may stand in for the methods."""
        k, b, text = self.config.num_candidates, len(prompts), (encode or self.encode)(prompts)
        x, found, logged = draw.initial(), [], []
        for step, timestep in enumerate(self.scheduler.timesteps.to(self.device)):
            t = timestep.repeat(b)
            mean = self.mean(self.predict(self.unet, x, t, text), t, x)
            x_p = (mean + self.sigma(t) * draw.noise(step)).to(self.dtype)  # [K, B, C, H, W]
            scores = (score or self.score)(x_p.flatten(0, 1), timestep.repeat(k * b),
                                           prompts.repeat(k)).view(k, b)
            ordered, index = scores.sort(0, descending=True)
            likely = ordered[[0, -1]].softmax(0)
            valid, rows = likely[0] - likely[1] > self.threshold(t), torch.arange(b, device=self.device)
            winner, loser = x_p[index[0], rows], x_p[index[-1], rows]
            fields = Pairs(x, winner, loser, t, text.context, text.pooled, prompts)
            found.append(fields.take(valid))  # the host waits for the number of pairs, once a field
            logged.append(scores)
            x = x_p[draw.choice(step), rows]
        scores = torch.stack(logged)
        scores.mean().item(), scores.std().item()  # for the log
        return Pairs(*(torch.cat(field) for field in zip(*found, strict=True))), scores

    def loss(self, pairs: Pairs) -> tuple[Tensor, list[Tensor]]:
        """Step DPO, and r_w, r_l and the four log densities, each [N]: winner, then loser;
        of each policy, then reference."""
        densities, text, eps = [], Text(pairs.context, pairs.pooled), self.config.clip_eps
        for x_p in (pairs.winner, pairs.loser):
            for network in (self.unet, self.reference):
                with torch.set_grad_enabled(network is self.unet):
                    output = self.predict(network, pairs.x_t, pairs.t, text)
                densities.append(self.log_density(output, pairs.t, pairs.x_t, x_p))
        ratios = [(densities[i] - densities[i + 1]).exp().clamp(1 - eps, 1 + eps) for i in (0, 2)]
        gap = self.config.beta * ratios[0].log() - self.config.beta * ratios[1].log()
        return -gap.sigmoid().log().mean(), ratios + densities

    def train_step(self, pairs: Pairs) -> dict[str, float]:
        """One optimizer step; its metrics, each of which the host waits for."""
        loss, (win, lose, *densities) = self.loss(pairs)
        names = ("train_win_prob_policy", "train_win_prob_ref", "train_lose_prob_policy",
                 "train_lose_prob_ref")
        metrics = {"train_loss": loss.item(), "train_ratio_win": win.mean().item(),
                   "train_ratio_lose": lose.mean().item(), "implicit_acc": (win > lose).float().mean().item(),
                   "train_margin": (win - lose).mean().item(),
                   **{name: d.detach().exp().mean().item() for name, d in zip(names, densities, strict=True)}}
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return metrics

    def train(self, pairs: Pairs) -> list[dict[str, float]]:
        """Optimizer steps on all pairs, shuffled."""
        pairs = pairs.take(torch.randperm(len(pairs.t), device=self.device))
        if self.half:
            torch.cuda.empty_cache()
        size = self.config.train_batch_size
        self.unet.train()
        metrics = [self.train_step(pairs.take(slice(at, at + size))) for at in range(0, len(pairs.t), size)]
        self.unet.eval()
        return metrics


def load(config: LPO, prompts: list[str], device: torch.device) -> Official:
    """The official run of our settings: attention by xformers where it runs (the LRM's by torch),
    no channels-last."""
    model, path, base = locate.model(config), locate.lrm(config), locate.base(config)
    unet = denoisers.load_unet(model).to(device).eval()
    if not attention.xformers_problem():
        attention.attention(unet, "xformers")
    attention.checkpointing(unet, config.checkpointing)
    family, judge = (families.family_of(unet.config),
                     checkpoint.load_lrm(path, base, resolution=config.resolution))
    tokenizers = [models_texts.load_tokenizers(model, family),
                  models_texts.load_tokenizers(path if (Path(path) / "tokenizer").is_dir() else base,
                                               judge.family)]
    ids = [tuple([i.to(device) for i in models_texts.tokenize(own, texts)] for texts in (prompts, [""]))
           for own in tokenizers]
    sizes = denoisers.size_conditions(model, family, unet, config.resolution)
    how = {"clip_sample": False} | json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config(how)
    scheduler.set_timesteps(config.num_steps)
    encoders = [encoder.to(device).eval() for encoder in models_texts.load_text(model, family)]
    return Official(config, family, unet, encoders, judge.to(device).eval(), scheduler,
                    sizes if sizes is None else sizes.to(device), *ids)
