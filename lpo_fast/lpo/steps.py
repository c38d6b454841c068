"""The LPO optimizer step: pairs in, metrics out."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from lpo_fast.config import LPO, PairLoss
from lpo_fast.kernels.pair_loss import pair_loss
from lpo_fast.lpo.policies import Policy
from lpo_fast.lpo.sampling import LatentPairs, Score
from lpo_fast.method.loss import METRICS, StepDPO
from lpo_fast.method.schedule import Schedule
from lpo_fast.models.loras import trainable
from lpo_fast.run import accounting, optimization, states
from lpo_fast.run.optimization import OptimizerStep
from lpo_fast.system import console, distributed

STEP = (*METRICS, "grad_norm")


def evaluate(policy: Policy, sched: Schedule, pairs: LatentPairs, weight: Tensor, *, guidance: float,
             beta: float, eps: float) -> StepDPO:
    """Evaluate policy and reference once for each pair, and return the loss and its metrics.

    One evaluation serves both members of a pair. weight: [N], see ``loss.step_dpo``.
    """
    at = pairs.x_t, pairs.t, pairs.prompt
    return pair_loss(sched, pairs.x_t, pairs.winner, pairs.loser, pairs.t, policy.train(*at),
                     policy.reference(*at), weight, guidance=guidance, beta=beta, eps=eps)


def padded(pairs: LatentPairs, size: int) -> LatentPairs:
    """Return exactly ``size`` pairs; padding repeats the first pair, marked as not valid,
    so shapes never change.
    """
    index = torch.arange(size, device=pairs.t.device)
    real = index < len(pairs.t)
    return pairs.take(torch.where(real, index, 0))._replace(valid=real)


def micro_batches(pairs: LatentPairs, size: int) -> Iterator[LatentPairs]:
    """Yield this rank's share of an optimizer step's pairs, ``size`` at a time, equally often on every rank.
    """
    rank, world, total = distributed.rank(), distributed.world_size(), len(pairs.t)
    for first in range(0, -(-total // world), size):
        part = pairs.take(slice(rank + first * world, rank + (first + size) * world, world))
        yield padded(part, size) if len(part.t) else padded(pairs, size)._replace(valid=torch.zeros_like(
            pairs.valid[:1]).expand(size))


def train_step(policy: Policy, sched: Schedule, pairs: LatentPairs, update: OptimizerStep,
               config: PairLoss) -> Tensor:
    """Take one optimizer step on at most train_batch_size · accumulate pairs per rank.

    Returns its metrics, STEP, on the device. A step without a finite gradient changes nothing
    (see run/optimization.py).
    """
    def gradients(size: int) -> Tensor:
        metrics = torch.zeros(len(METRICS), device=pairs.t.device)
        for micro in micro_batches(pairs, size):
            out = evaluate(policy, sched, micro, micro.valid / len(pairs.t), beta=config.beta,
                           eps=config.clip_eps, guidance=config.train_guidance)
            update.scaler.scale(out.loss).backward()
            metrics = metrics + out.totals
        return metrics
    metrics, norm = update(gradients)
    return torch.cat([distributed.all_sum(metrics), norm[None]])


class Learner:
    """Trains a policy: its optimizer, gradient scaler, and weight average."""

    def __init__(self, policy: Policy, sched: Schedule, texts: list[str], config: LPO, device: torch.device):
        """Make the optimizer over the policy's trained weights. texts: of all prompt numbers."""
        self.policy, self.sched, self.texts, self.config = policy, sched, texts, config
        self.weights, self.ema = states.Trained(policy.unet), None
        self.optimizer = optimization.optimizer(config.optimizer, policy.unet.parameters(),
                                                lr=config.learning_rate, weight_decay=config.weight_decay,
                                                betas=(config.adam_beta1, config.adam_beta2),
                                                eps=config.adam_epsilon)
        scaler = optimization.scaler(device, policy.precision)
        self.update = OptimizerStep(
            self.optimizer, torch.amp.GradScaler(enabled=False) if config.shard else scaler,
            config.max_grad_norm, config.train_batch_size, "use --checkpointing, or a smaller "
            "--train-batch-size with a larger --accumulate", halves=not config.shard)
        # pairs per optimizer step
        self.size = config.train_batch_size * config.accumulate * distributed.world_size()

    def average(self) -> None:
        """Start the weight average, if there is one, from the current weights."""
        if self.config.ema_decay:
            self.ema = EMAModel(trainable(self.policy.unet), decay=self.config.ema_decay)

    def to(self, device: torch.device) -> None:
        """Move the weight average, which a saved state holds on the CPU, to a device."""
        if self.ema:
            self.ema.to(device)

    def parts(self) -> dict[str, Any]:
        """Return what is saved. The scaler is left out unless in fp16: else its scale is always 1."""
        scaler = self.update.scaler if self.policy.precision == "fp16" else None
        return {"weights": self.weights, "optimizer": self.optimizer, "ema": self.ema, "scaler": scaler}

    @property
    def rate(self) -> float:
        """Return the learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, fed: LatentPairs) -> Tensor:
        """Take one optimizer step; return its metrics, STEP, on the device.
        A skipped step leaves the average as it is."""
        metrics = train_step(self.policy, self.sched, fed, self.update, self.config)
        if self.ema and metrics[-1].isfinite():
            self.ema.step(trainable(self.policy.unet))
        return metrics

    def inputs(self, fed: LatentPairs) -> dict[str, Any]:
        """Return what ``replay`` needs to run the step on these pairs again."""
        numbers = fed.prompt.unique().cpu()
        return {"config": asdict(self.config), "prompts": [self.texts[n] for n in numbers],
                "numbers": numbers, "size": self.update.pairs, "pairs": [x.cpu() for x in fed],
                "weights": self.weights.state_dict()}

    def finish(self) -> None:
        """Put the weight average, if there is one, in place of the weights."""
        if self.ema:
            self.ema.copy_to(trainable(self.policy.unet))
            console.say(f"exporting the average of the weights, --ema-decay {self.config.ema_decay:g}")


def work(policy: Policy, score: Score, sched: Schedule, shape: tuple[int, int, int],
         config: PairLoss) -> dict[str, int]:
    """Return the operations needed to sample one prompt and to train on one pair."""
    x, t = torch.zeros(1, *shape, device=sched.table.device), sched.timesteps[:1]
    pair, k, (first, last) = LatentPairs(x, x, x, t, t * 0, t > 0), config.num_candidates, config.window
    with accounting.countable(policy.unet), policy.plain():
        step = accounting.operations(lambda: policy.predict(x, t, t * 0))
        judged = accounting.operations(lambda: score(x, t, t * 0))
        trained = accounting.operations(lambda: evaluate(
            policy, sched, pair, torch.ones(1, device=x.device), beta=config.beta, eps=config.clip_eps,
            guidance=config.train_guidance).loss, trainable(policy.unet))
    return {"prompts": last * step + (last - first) * k * judged, "pairs": trained}
