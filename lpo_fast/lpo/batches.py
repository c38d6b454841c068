"""Choose the prompt batches of a run, and sample the valid pairs of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpo_fast import cli
from lpo_fast.config import LPO, Prompts, Sampling, Seed
from lpo_fast.errors import InputError
from lpo_fast.lpo import policies, sampling
from lpo_fast.lpo.judging import Judge
from lpo_fast.lpo.policies import Policy
from lpo_fast.lpo.sampling import CounterNoise, LatentPairs, Score
from lpo_fast.method import noise, select
from lpo_fast.method.schedule import Schedule
from lpo_fast.models.texts import TextWindow
from lpo_fast.run import session
from lpo_fast.system import compilation, devices, distributed


@dataclass
class Progress(session.Progress):
    """Hold the progress of an LPO run.

    step: optimizer steps taken. epoch: the current epoch, from 0. batch, prompts: batches done and prompts
    sampled in this epoch. done: batches done in all. start: those done before --resume-from. pairs: pairs of
    the current batch not yet trained on; None between batches. index: int64 [B], the batch's prompt numbers.
    texts: digest of the prompts.
    """

    epoch: int = 0
    batch: int = 0
    prompts: int = 0
    done: int = 0  # type: ignore[assignment]
    start: int = 0
    pairs: LatentPairs | None = None
    index: Tensor | None = None
    texts: str = ""

    def state(self) -> dict[str, Any]:
        """Return the fields as plain values and CPU tensors; index is None unless pairs remain."""
        pairs = None if self.pairs is None else [x.cpu() for x in self.pairs]
        index = None if self.index is None or pairs is None else self.index.cpu()
        return super().state() | {"pairs": pairs, "index": index}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the fields from what ``state`` returned, with the pairs on the run's device."""
        super().load(saved)
        self.start = saved.get("start", self.done)
        if self.pairs is not None:
            self.pairs = LatentPairs(*(x.to(devices.device()) for x in self.pairs))

    def next_batch(self, config: Prompts, prompts: int) -> None:
        """Advance to the next prompt batch, or to the next epoch if this was the epoch's last batch.

        prompts: the number of training prompts.
        """
        self.pairs, self.index = None, None
        self.batch += 1
        self.done += 1
        smallest = config.batch_size * distributed.world_size() if config.drop_last else 1
        if prompts - self.prompts < smallest:
            self.epoch, self.batch, self.prompts = self.epoch + 1, 0, 0


class Sampler:
    """Sample pairs from prompts, with the constants on the device and the denoising step compiled."""

    def __init__(self, policy: Policy, judge: Judge, score: Score, sched: Schedule, config: LPO,
                 prompts: int):
        """Compile the denoising step, depending on --compile.

        score: the judge's score, possibly wrapped. prompts: the number of training prompts.
        """
        self.policy, self.judge, self.score, self.sched, self.config = policy, judge, score, sched, config
        self.gap = select.gaps(sched, config.threshold_shape, config.threshold_min, config.threshold_max)
        self.shape = policies.latent_shape(config, policy.unet)
        self.count = prompts
        self.slots = min(config.batch_size, -(-prompts // distributed.world_size()))
        self.step = compilation.compiled(sampling.choose, config.compiled, graphs=True)
        compilation.mark_static(*policy.text.tensors, *judge.text.tensors, sched.timesteps, sched.table,
                                sched.alphas_cumprod, self.gap)

    def fetch(self, at: Progress) -> int:
        """Choose the prompts of the next batch, prefetch their text features, and return their number.

        The current batch is kept while pairs of it remain. Raises InputError if the text windows of this many
        processes cannot hold the text of the current batch.
        """
        size = self.config.batch_size * distributed.world_size()
        if at.pairs is None or at.index is None:
            at.index = order(self.config, at.epoch, self.count, at.prompts)[0]
            at.prompts += len(at.index)
        elif isinstance(self.policy.text, TextWindow) and len(at.index) > size:
            raise InputError(str(distributed.world_size()),
                             f"these processes hold the text of {size} prompts, and the unfinished batch has "
                             f"{len(at.index)}", "resume with at least as many processes as before",
                             "WORLD_SIZE")
        self.policy.prefetch(at.index.cpu())
        self.judge.prefetch(at.index.cpu())
        return len(at.index)

    def pairs(self, at: Progress) -> tuple[LatentPairs, dict[str, object]]:
        """Return the batch's valid pairs in random order, and its metrics.

        Raises InputError if the GPU has too little memory.
        """
        assert at.index is not None, "fetch comes first"
        config, index = self.config, at.index.to(devices.device())
        try:
            pairs, metrics = sample_pairs(self.policy, self.score, self.sched, self.gap, self.shape, index,
                                          config, at.epoch, slots=self.slots, step=self.step)
        except torch.OutOfMemoryError as error:
            raise InputError(str(self.slots), "this number of prompts does not fit into the GPU's memory "
                             f"({str(error).splitlines()[0]})", "use a smaller --batch-size",
                             "--batch-size") from error
        return shuffled(pairs, config, at.epoch, at.batch), metrics


def sample_pairs(policy: Policy, score: Score, sched: Schedule, gap: Tensor, shape: tuple[int, int, int],
                 index: Tensor, config: Sampling, epoch: int, *, slots: int = 0,
                 step: Callable = sampling.choose) -> tuple[LatentPairs, dict[str, object]]:
    """Return the valid pairs of all processes for prompt numbers ``index``, and the metrics of the batch.

    gap: fp32 [N], smallest score gap of a valid pair by timestep. shape: (C, H, W) of the latents. index:
    int64 [B], of all processes. slots: prompts that each process samples. A process with fewer repeats the
    batch's first prompt and drops the pairs of the repeats, so that shapes never change and every process
    takes part. step: see ``sampling.trajectory``. The pairs are ordered by denoising step, then by prompt.
    """
    own = index[distributed.rank()::distributed.world_size()]
    filled = torch.cat([own, index[:1].expand(max(slots - len(own), len(own) == 0))])
    pairs, scores = sampling.trajectory(
        policy.predict, score, sched, gap, CounterNoise(config.seed, epoch, filled, shape), filled, step=step,
        guidance=config.guidance_scale, num_candidates=config.num_candidates, window=config.window)
    steps = len(scores)
    real = torch.arange(len(filled), device=filled.device) < len(own)
    times, valid, scores = distributed.gather(*(x.movedim(-1, 0)[:len(own)].contiguous() for x in (
        pairs.t.view(steps, -1), pairs.valid.view(steps, -1).int(), scores)))  # [B, steps], [B, steps, K]
    gathered = pairs._replace(t=times.T.flatten(), valid=valid.T.flatten().bool())
    metrics = batch_metrics(gathered, scores.movedim(0, -1))
    kept = pairs.take(pairs.valid & real.repeat(steps))
    kept = LatentPairs(*distributed.gather(*kept[:-1], kept.valid.int()))
    number, place = ((values[:, None] == known).int().argmax(1)
                     for values, known in ((kept.t, sched.timesteps), (kept.prompt, index)))
    return kept.take((number * len(index) + place).argsort())._replace(valid=kept.valid.bool()), metrics


def batch_metrics(pairs: LatentPairs, scores: Tensor) -> dict[str, object]:
    """Return the metrics of one prompt batch, under the official names.

    pairs: all pairs, valid or not, ordered by denoising step. scores: [steps, K, B].
    """
    t, valid = pairs.t, pairs.valid
    bands = {"even_large": t > 751, "large": (t > 501) & (t <= 751), "mid": (t >= 251) & (t <= 501),
             "small": (t > 1) & (t < 251)}
    steps, _, size = scores.shape
    counts = {f"{name}_noise_samples_num": int((valid & band).sum()) for name, band in bands.items()}
    return {"preference_scores_mean": scores.mean().item(), "preference_scores_std": scores.std().item(),
            "total_valid_samples_num": int(valid.sum()), **counts,
            "timesteps": t.view(steps, size)[:, 0].tolist(),
            "valid_by_timestep": valid.view(steps, size).sum(1).tolist(), "pairs_possible": len(t)}


def order(config: Prompts, epoch: int, prompts: int, done: int = 0) -> list[Tensor]:
    """Return the prompt batches of an epoch that remain after ``done`` prompts.

    Each holds the int64 numbers of the prompts of all processes. prompts: the number of training prompts.
    Their order is a function of the seed and the epoch; only the division into batches depends on the world
    size.
    """
    size = config.batch_size * distributed.world_size()
    numbers = noise.permutation(config.seed, epoch, 0, prompts) if config.shuffle else torch.arange(prompts)
    left = prompts - done
    used = left // size * size or left if config.drop_last else left
    return list(numbers[done:][:used].split(size))


def per_epoch(config: Prompts, prompts: int) -> int:
    """Return how many prompt batches an epoch has, the length of ``order``."""
    size = config.batch_size * distributed.world_size()
    return max(prompts // size, 1) if config.drop_last else -(-prompts // size)


def batches_left(config: Prompts, prompts: int, at: Progress) -> int:
    """Return the number of prompt batches that remain, also if the epoch began with another world size.

    A batch with pairs not yet trained on counts, although ``at.prompts`` includes its prompts.
    """
    if at.epoch >= config.epochs:
        return 0
    size = config.batch_size * distributed.world_size()
    here = (prompts - at.prompts + (0 if config.drop_last else size - 1)) // size + (at.pairs is not None)
    return max(here, 1) + (config.epochs - at.epoch - 1) * per_epoch(config, prompts)


def total(config: LPO, prompts: int, at: Progress) -> int:
    """Return the number of prompt batches of the complete run. Raises InputError if more are done."""
    last = at.start + config.max_batches if config.max_batches else math.inf
    count = min(at.done + batches_left(config, prompts, at), last)
    if at.epoch > config.epochs or at.done > count:
        key = "epochs" if at.epoch > config.epochs else "max_batches"
        raise InputError(str(getattr(config, key)), f"is less than the run in {config.out} has done, "
                         f"{at.epoch} epochs and {at.done} batches",
                         "use more, or start from a checkpoint_{epoch}", cli.flag(key))
    return int(count)


def shuffled(pairs: LatentPairs, config: Seed, epoch: int, batch: int) -> LatentPairs:
    """Return the valid pairs in random order, a function of the seed, the epoch and the batch."""
    index = pairs.valid.nonzero()[:, 0]
    return pairs.take(index[noise.permutation(config.seed, epoch, batch + 1, len(index)).to(index.device)])
