"""Take LPO optimizer steps: from pairs to updated weights and metrics."""

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
    """Return the loss and metrics of N pairs, from one evaluation each of the policy and the reference.

    Both members of a pair share x_t, and so these evaluations. weight: fp32 [N], the pairs' weights in the
    loss (``loss.step_dpo``). guidance: scale. beta: β of the loss. eps: clip width of the ratios.
    """
    at = pairs.x_t, pairs.t, pairs.prompt
    return pair_loss(sched, pairs.x_t, pairs.winner, pairs.loser, pairs.t, policy.train(*at),
                     policy.reference(*at), weight, guidance=guidance, beta=beta, eps=eps)


def padded(pairs: LatentPairs, size: int) -> LatentPairs:
    """Pad to ``size`` pairs, so that shapes never change: repeat the first pair, marked as not valid."""
    index = torch.arange(size, device=pairs.t.device)
    real = index < len(pairs.t)
    return pairs.take(torch.where(real, index, 0))._replace(valid=real)


def micro_batches(pairs: LatentPairs, size: int) -> Iterator[LatentPairs]:
    """Yield this process's part of an optimizer step's pairs, ``size`` at a time.

    Every process yields the same number of times.
    """
    rank, world, total = distributed.rank(), distributed.world_size(), len(pairs.t)
    for first in range(0, -(-total // world), size):
        part = pairs.take(slice(rank + first * world, rank + (first + size) * world, world))
        yield padded(part, size) if len(part.t) else padded(pairs, size)._replace(valid=torch.zeros_like(
            pairs.valid[:1]).expand(size))


def train_step(policy: Policy, sched: Schedule, pairs: LatentPairs, update: OptimizerStep,
               config: PairLoss) -> Tensor:
    """Take one optimizer step; return its metrics, fp32 [len(STEP)] on the device.

    pairs: of all processes, up to train_batch_size · accumulate per process. A step whose gradient is not
    finite changes nothing (run/optimization.py).
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
    """Train a policy, with its optimizer, gradient scaler, and weight average."""

    def __init__(self, policy: Policy, sched: Schedule, texts: list[str], config: LPO, device: torch.device):
        """Make the optimizer of the policy's trainable weights. texts: all prompts, by number."""
        self.policy, self.sched, self.texts, self.config = policy, sched, texts, config
        self.weights = states.Trained(policy.unet)
        self.ema = None
        self.optimizer = optimization.optimizer(
            config.optimizer, policy.unet.parameters(), lr=config.learning_rate,
            weight_decay=config.weight_decay, betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon)
        scaler = optimization.scaler(device, policy.precision)
        self.update = OptimizerStep(
            self.optimizer, torch.amp.GradScaler(enabled=False) if config.shard else scaler,
            config.max_grad_norm, config.train_batch_size,
            "use --checkpointing, or a smaller --train-batch-size with a larger --accumulate",
            halves=not config.shard)
        # Pairs per optimizer step, of all processes.
        self.size = config.train_batch_size * config.accumulate * distributed.world_size()

    def average(self) -> None:
        """Start the weight average, if --ema-decay asks for one, from the current weights."""
        if self.config.ema_decay:
            self.ema = EMAModel(trainable(self.policy.unet), decay=self.config.ema_decay)

    def to(self, device: torch.device) -> None:
        """Move the weight average, which is on the CPU after a state was loaded, to a device."""
        if self.ema:
            self.ema.to(device)

    def parts(self) -> dict[str, Any]:
        """Return the parts that a state saves; the scaler is None except in fp16, since its scale is 1."""
        scaler = self.update.scaler if self.policy.precision == "fp16" else None
        return {"weights": self.weights, "optimizer": self.optimizer, "ema": self.ema, "scaler": scaler}

    @property
    def rate(self) -> float:
        """Return the learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, fed: LatentPairs) -> Tensor:
        """Take one optimizer step; return its metrics, fp32 [len(STEP)] on the device.

        A skipped step does not change the weight average.
        """
        metrics = train_step(self.policy, self.sched, fed, self.update, self.config)
        if self.ema and metrics[-1].isfinite():
            self.ema.step(trainable(self.policy.unet))
        return metrics

    def inputs(self, fed: LatentPairs) -> dict[str, Any]:
        """Return what ``replay`` needs to repeat the step on these pairs."""
        numbers = fed.prompt.unique().cpu()
        return {"config": asdict(self.config), "prompts": [self.texts[n] for n in numbers],
                "numbers": numbers, "size": self.update.pairs, "pairs": [x.cpu() for x in fed],
                "weights": self.weights.state_dict()}

    def finish(self) -> None:
        """Replace the weights by their average, if there is one."""
        if self.ema:
            self.ema.copy_to(trainable(self.policy.unet))
            console.say(f"exporting the average of the weights (--ema-decay {self.config.ema_decay:g})")


def work(policy: Policy, score: Score, sched: Schedule, shape: tuple[int, int, int],
         config: PairLoss) -> dict[str, int]:
    """Return the FLOPs of sampling one prompt ("prompts") and of training on one pair ("pairs").

    shape: (C, H, W) of the latents.
    """
    x = torch.zeros(1, *shape, device=sched.table.device)
    t = sched.timesteps[:1]
    pair = LatentPairs(x, x, x, t, t * 0, t > 0)
    k = config.num_candidates
    first, last = config.window
    with accounting.countable(policy.unet), policy.plain():
        step = accounting.operations(lambda: policy.predict(x, t, t * 0))
        judged = accounting.operations(lambda: score(x, t, t * 0))
        trained = accounting.operations(lambda: evaluate(
            policy, sched, pair, torch.ones(1, device=x.device), beta=config.beta, eps=config.clip_eps,
            guidance=config.train_guidance).loss, trainable(policy.unet))
    return {"prompts": last * step + (last - first) * k * judged, "pairs": trained}
