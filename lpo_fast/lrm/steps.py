"""Take LRM optimizer steps: from pairs of pictures to updated weights and metrics."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lpo_fast.config import LRM, Noising
from lpo_fast.data.latent_cache import Cache
from lpo_fast.lrm import checkpoint, encoding
from lpo_fast.lrm.encoding import Encoder
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.method import loss, noise
from lpo_fast.models import fused_norms, locate
from lpo_fast.run import optimization, states
from lpo_fast.run.optimization import OptimizerStep
from lpo_fast.system import devices, distributed

STEP = ("loss", "accuracy", "grad_norm", "logit_scale")


def parts(batch: dict, size: int) -> list[dict]:
    """Split a step's batch into parts of at most ``size`` pairs."""
    paired = {"labels", "mean", "std"}  # [2, B, …]; the others [B, …]
    return [{key: value[:, i:i + size] if key in paired else value[i:i + size]
             for key, value in batch.items()}
            for i in range(0, len(batch["rows"]), size)]


def encoded(encoder: Encoder, batch: dict, step: int, config: Noising, cache: Cache | None = None) -> dict:
    """Return a batch (``dataset.collate``) on the device, with its pictures replaced by their posterior.

    mean, std: fp32 [2, B, C, h, w], see ``Encoder.posterior``. corrupt remains on the host.
    """
    rows = batch["rows"].to(encoder.device, non_blocking=True)
    mean, std = encoder.posterior(
        batch, cache, encoding.flips(config, step, rows) if config.hflip else None, encoder.train_encode)
    return {key: value.to(encoder.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items() if key in ("captions", "labels", "counts", "compare")} | {
        "rows": rows, "mean": mean, "std": std, "corrupt": batch["corrupt"]}


def train_step(lrm: LatentRewardModel, encoder: Encoder, batch: dict, step: int, update: OptimizerStep,
               config: LRM, cache: Cache | None = None) -> Tensor:
    """Take one optimizer step of all processes together; return its metrics, fp32 [len(STEP)] on the device.

    batch: this process's pairs (``dataset.collate``). Pairs that cannot be decoded are evaluated, so that
    shapes never change, but do not count in the loss. A single process reads nothing back from the device. A
    step whose gradient is not finite changes nothing (run/optimization.py).
    """
    batch = encoded(encoder, batch, step, config, cache)
    good = (~batch["corrupt"]).to(encoder.device, non_blocking=True)
    weight, count = distributed.all_sum(torch.stack([(good / batch["counts"]).sum(), good.sum()]))

    def gradients(size: int) -> Tensor:
        made = []
        for part in parts(batch, size):
            value, number_correct = pair_loss(lrm, encoder, part, step, config, weight)
            update.scaler.scale(value).backward()
            made.append(torch.stack([value.detach(), number_correct]))
        return torch.stack(made).sum(0)
    (value, number_correct), norm = update(gradients)
    with torch.no_grad():
        return torch.stack([value, number_correct / count.clamp(min=1), norm, lrm.logit_scale.exp()])


def pair_loss(lrm: LatentRewardModel, encoder: Encoder, batch: dict, step: int, config: LRM,
              weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return one part's share of a step's loss, and its number of correct pairs.

    batch: one of ``parts``. weight: Σ_j 1/n_j over all pairs j of the step, where n_j is the pair's count;
    the part's share is its own sum divided by this. Every process computes the loss of all processes' pairs,
    and the gradient with respect to its own.
    """
    rows = batch["rows"]
    t, labels = encoding.timesteps(config, step, rows, batch["compare"], batch["labels"])
    x = encoder.latents(batch["mean"], batch["std"], rows, step, t)
    with devices.autocast(encoder.precision):
        unit = encoder.train_features(lrm, *encoder.ids(batch["captions"]), x, t)
    # Found on the host, so that it does not wait for the device.
    good = (~batch["corrupt"]).nonzero()[:, 0].to(encoder.device, non_blocking=True)
    text, image_0, image_1, label_0, label_1, counts, t = distributed.gather(
        *(feature[good] for feature in unit), *labels[:, good], batch["counts"][good], t[:, good].T)
    scale = lrm.logit_scale.exp()  # its gradient is the same in every process and must count once
    share = ((1 / counts).sum() / weight).nan_to_num()
    value = share * loss.preference(
        text, image_0, image_1, scale if distributed.rank() == 0 else scale.detach(), label_0, label_1,
        counts, t, loss_type=config.loss_type, batch_coeff=config.batch_coeff,
        aux_loss_coeff=config.aux_loss_coeff)
    margin = ((image_0 - image_1) * text).sum(-1).detach()
    return value, correct(margin, torch.stack([label_0, label_1])).sum()


def correct(margin: Tensor, labels: Tensor) -> Tensor:
    """Return [B]: 1 if the preferred picture scores higher, ½ for a tie of scores or labels, else 0.

    margin: S_0 − S_1 [B]. labels: [2, B].
    """
    return 0.5 + 0.5 * margin.sign() * (labels[0] - labels[1]).sign()


def steps_per_epoch(config: LRM, pairs: int) -> int:
    """Return the optimizer steps per epoch: full batches only; the epoch does not use the remaining pairs."""
    return pairs // (own_size(config, pairs) * distributed.world_size())


def own_size(config: LRM, pairs: int) -> int:
    """Return the pairs per optimizer step of each process. pairs: the number of training pairs."""
    return min(config.batch_size, pairs) // distributed.world_size()


def batches(config: LRM, pairs: int, step: int) -> Iterator[list[int]]:
    """Yield this process's pair numbers of every batch, starting at optimizer step ``step``.

    Each epoch has a new order, a function of the seed and the epoch.
    """
    own = own_size(config, pairs)
    world = distributed.world_size()
    epoch = steps_per_epoch(config, pairs)
    for k in range(step, config.max_steps):
        if k % epoch == 0 or k == step:
            order = noise.permutation(config.seed, k // epoch, 0, pairs)
        first = (k % epoch * world + distributed.rank()) * own
        yield order[first:first + own].tolist()


class Learner:
    """Train an LRM, with its optimizer, gradient scaler, and learning-rate schedule."""

    def __init__(self, lrm: LatentRewardModel, encoder: Encoder, config: LRM, pairs: int,
                 cache: Cache | None = None):
        """Make the optimizer of the trainable parameters.

        pairs: the number of training pairs. cache: of their latents.
        """
        self.lrm, self.encoder, self.config, self.cache = lrm, encoder, config, cache
        world = distributed.world_size()
        self.weights = states.Trained(lrm)
        self.own = own_size(config, pairs)  # pairs per step of this process
        self.size = self.own * world  # pairs per step of all processes
        self.epoch = steps_per_epoch(config, pairs)
        self.optimizer = optimization.optimizer(config.optimizer, lrm.parameters(), lr=config.learning_rate,
                                                weight_decay=config.weight_decay)
        factor = optimization.learning_rate(config.warmup, config.warmup_steps, config.max_steps)
        self.decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        # A smaller forward pass would change in-batch negatives, and all ranks would have to halve together.
        self.update = OptimizerStep(self.optimizer, optimization.scaler(encoder.device, encoder.precision),
                                    config.max_grad_norm, -(-self.own // config.accumulate),
                                    "use a larger --accumulate",
                                    halves=config.loss_type == "pair" and world == 1)

    def parts(self) -> dict[str, Any]:
        """Return the parts that a state saves; the scaler is None except in fp16, since its scale is 1."""
        scaler = self.update.scaler if self.encoder.precision == "fp16" else None
        return {"weights": self.weights, "optimizer": self.optimizer, "decay": self.decay, "scaler": scaler}

    @property
    def rate(self) -> float:
        """Return the learning rate of the next step."""
        return float(self.decay.get_last_lr()[0])

    def step(self, batch: dict, step: int) -> Tensor:
        """Take optimizer step number ``step``; return its metrics, fp32 [len(STEP)] on the device."""
        metrics = train_step(self.lrm, self.encoder, batch, step, self.update, self.config, self.cache)
        self.decay.step()
        return metrics

    def inputs(self, rows: Tensor) -> dict[str, Any]:
        """Return what ``replay`` needs to repeat the step on these rows; all ranks must call this."""
        rows = distributed.gather(rows.to(self.encoder.device))[0].cpu()
        return {"config": asdict(self.config), "rows": rows, "weights": self.weights.state_dict(),
                "size": self.update.pairs}


def load_reward(config: LRM, device: torch.device, weights: bool = True) -> LatentRewardModel:
    """Create the LRM to be trained, in train mode; weights=False leaves its networks on the meta device.

    Raises InputError if files are missing or do not fit.
    """
    lrm = checkpoint.new_lrm(
        locate.model(config), weights=weights, clip=locate.clip(config),
        generator=torch.Generator().manual_seed(config.seed), resolution=config.resolution,
        multi_scale=config.multi_scale, multi_scale_cfg=config.multi_scale_cfg,
        guidance_scale=config.guidance_scale)
    lrm.logit_scale.data.fill_(config.logit_scale)
    lrm.to(device).train()
    lrm.text_encoders.requires_grad_(not config.freeze_text_encoder)
    devices.layout(lrm.unet)
    if config.fused_norms:
        fused_norms.fuse_norms(lrm.unet)
    return lrm


def load(config: LRM, device: torch.device) -> tuple[LatentRewardModel, Encoder]:
    """Create the LRM to be trained, and the encoder of its inputs.

    Raises InputError if files are missing or do not fit.
    """
    lrm = load_reward(config, device)
    precision = devices.precision(config.mixed_precision, "bf16")
    encoder = Encoder(locate.model(config), lrm, config.seed, precision, locate.vae(config),
                      config.noise_offset, config.compile)
    return lrm, encoder
