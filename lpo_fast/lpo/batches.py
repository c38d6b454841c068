"""Prompt batches of a run, and the valid pairs that one of them gives."""

from collections.abc import Callable

import torch
from torch import Tensor

from lpo_fast.config import Prompts, Sampling, Seed
from lpo_fast.lpo import sampling
from lpo_fast.lpo.policies import Policy
from lpo_fast.lpo.sampling import CounterNoise, LatentPairs, Score
from lpo_fast.method import noise
from lpo_fast.method.schedule import Schedule
from lpo_fast.system import distributed


def sample_pairs(
    policy: Policy,
    score: Score,
    sched: Schedule,
    gap: Tensor,
    shape: tuple[int, int, int],
    index: Tensor,
    config: Sampling,
    epoch: int,
    *,
    slots: int = 0,
    step: Callable = sampling.choose,
) -> tuple[LatentPairs, dict[str, object]]:
    """The valid pairs of all processes for prompt numbers ``index``, step-major, and what they say of the batch.

    slots: prompts that each process samples; where it has fewer, the first one again, whose pairs are dropped: shapes never
    change, and a process without a prompt keeps the others company. step: see ``sampling.trajectory``.
    """
    own = index[distributed.rank()::distributed.world_size()]
    some = torch.cat([own, index[:1].expand(max(slots - len(own), len(own) == 0))])
    pairs, scores = sampling.trajectory(
        policy.predict, score, sched, gap, CounterNoise(config.seed, epoch, some, shape), some, step=step,
        guidance=config.guidance_scale, num_candidates=config.num_candidates, window=config.window)
    steps, real = len(scores), torch.arange(len(some), device=some.device) < len(own)
    times, valid, scores = distributed.gather(*(x.movedim(-1, 0)[:len(own)].contiguous() for x in (
        pairs.t.view(steps, -1), pairs.valid.view(steps, -1).int(), scores)))  # [prompts, steps] or [prompts, steps, K]
    everything = pairs._replace(t=times.T.flatten(), valid=valid.T.flatten().bool())
    metrics = batch_metrics(everything, scores.movedim(0, -1))
    kept = pairs.take(pairs.valid & real.repeat(steps))
    kept = LatentPairs(*distributed.gather(*kept[:-1], kept.valid.int()))
    number, place = ((a[:, None] == b).int().argmax(1) for a, b in ((kept.t, sched.timesteps), (kept.prompt, index)))
    return kept.take((number * len(index) + place).argsort())._replace(valid=kept.valid.bool()), metrics


def batch_metrics(pairs: LatentPairs, scores: Tensor) -> dict[str, object]:
    """What one prompt batch gave. pairs: all of them, step-major; scores: [steps, K, B]."""
    t, valid = pairs.t, pairs.valid
    bands = {"even_large": t > 751, "large": (t > 501) & (t <= 751), "mid": (t >= 251) & (t <= 501),
             "small": (t > 1) & (t < 251)}
    steps, _, size = scores.shape
    counts = {f"{name}_noise_samples_num": int((valid & band).sum()) for name, band in bands.items()}
    return {"preference_scores_mean": scores.mean().item(), "preference_scores_std": scores.std().item(),
            "total_valid_samples_num": int(valid.sum()), **counts, "timesteps": t.view(steps, size)[:, 0].tolist(),
            "valid_by_timestep": valid.view(steps, size).sum(1).tolist(), "pairs_possible": len(t)}


def order(config: Prompts, epoch: int, prompts: int, done: int = 0) -> list[Tensor]:
    """The prompt batches of an epoch, for all processes together, that are left after ``done`` prompts. The order of the
    prompts is a function of the seed and the epoch; only how it is cut into batches depends on the number of processes."""
    size = config.batch_size * distributed.world_size()
    numbers = noise.permutation(config.seed, epoch, 0, prompts) if config.shuffle else torch.arange(prompts)
    left = prompts - done
    return list(numbers[done:][:left // size * size or left if config.drop_last else left].split(size))


def batches_left(config: Prompts, prompts: int, at: dict[str, int], unfinished: bool) -> int:
    """Prompt batches that are left of a run, in whose epoch another number of processes may have begun. unfinished: whether
    the pairs of one more, whose prompts ``at`` counts already, are still to be trained on."""
    if at["epoch"] >= config.epochs:
        return 0
    size = config.batch_size * distributed.world_size()
    here = (prompts - at["prompts"] + (0 if config.drop_last else size - 1)) // size + unfinished
    return max(here, 1) + (config.epochs - at["epoch"] - 1) * len(order(config, 0, prompts))


def shuffled(pairs: LatentPairs, config: Seed, epoch: int, batch: int) -> LatentPairs:
    """The valid pairs in random order: a function of the seed, the epoch and the batch."""
    index = pairs.valid.nonzero()[:, 0]
    return pairs.take(index[noise.permutation(config.seed, epoch, batch + 1, len(index)).to(index.device)])
