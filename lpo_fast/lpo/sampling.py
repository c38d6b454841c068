"""Sample pairs: draw K candidates at every denoising step, and pair the best with the worst.

The trajectory continues from a uniformly random candidate (arXiv 2502.01051, section 3.3). Shapes are static
and nothing is read back to the host inside a trajectory: every step makes B pairs, and a mask marks the valid
ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lpo_fast.kernels.ddim_candidates import ddim_candidates
from lpo_fast.kernels.pair_select import pair_select
from lpo_fast.method import noise
from lpo_fast.method.noise import Counter
from lpo_fast.method.schedule import Schedule

# (x_t [B, C, H, W], t [B], prompts [B]) → [2B, C, H, W], null branch first
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
# (x [N, C, H, W], t [N], prompts [N]) → scores [N]
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


class LatentPairs(NamedTuple):
    """Hold N pairs: latents x_t, winner, loser, fp32 [N, C, H, W]; t, prompt: int64 [N]; valid: bool [N]."""

    x_t: Tensor
    winner: Tensor
    loser: Tensor
    t: Tensor
    prompt: Tensor
    valid: Tensor

    def take(self, index: Tensor | slice) -> "LatentPairs":
        """Return some of the pairs: index holds their numbers (int64 or a slice) or a mask (bool [N])."""
        return LatentPairs(*(field[index] for field in self))

    @property
    def number(self) -> int:
        """Return N; len(pairs) is the number of fields."""
        return len(self.t)

    def cut(self, size: int) -> tuple["LatentPairs", "LatentPairs"]:
        """Return the first ``size`` pairs, and the rest."""
        return self.take(slice(size)), self.take(slice(size, None))


@dataclass(frozen=True)
class CounterNoise:
    """Draw a trajectory's noise from counters (method/noise.py). prompts: int64 [B]. shape: (C, H, W)."""

    seed: int
    epoch: int
    prompts: Tensor
    shape: tuple[int, int, int]

    def initial(self) -> Tensor:
        """Return the initial noise x_T, fp32 [B, C, H, W]."""
        return noise.normal(self.seed, self.epoch, self.prompts, noise.INITIAL, 1, self.shape)[0]

    def steps(self, count: int) -> Iterator[tuple[Counter, Counter]]:
        """Yield, for each denoising step, the counters of the candidates' noise and of the choice among them.

        Both are the same counter.
        """
        device = self.prompts.device
        run = torch.tensor([self.seed, self.epoch], device=device)
        for step in torch.arange(count, device=device):
            counter = Counter(run, step, self.prompts)
            yield counter, counter


def choose(predict: Predict, score: Score, sched: Schedule, gap: Tensor, x: Tensor, t: Tensor,
           prompts: Tensor, z: Tensor | Counter, choice: Tensor | Counter, guidance: float,
           k: int) -> tuple[Tensor, ...]:
    """Take one denoising step from x [B, C, H, W]; return (winner, loser, valid, scores, next x).

    winner, loser, next x: [B, C, H, W]. valid: bool [B]. scores: fp32 [K, B], of the candidates. t, prompts:
    int64 [B]. gap: fp32 [N], smallest score gap of a valid pair by timestep. z, choice: noise and choices, or
    their counters. guidance: scale. k: number of candidates. This is a pure function without host reads,
    which ``compilation.compiled`` can compile.
    """
    x_p = ddim_candidates(sched, x, predict(x, t, prompts), t, guidance=guidance, noise=z, candidates=k)
    scores = score(x_p.flatten(0, 1), t.repeat(k), prompts.repeat(k)).view(k, -1)
    pair = pair_select(scores, x_p, gap, t, choice)
    return pair.winner, pair.loser, pair.valid, scores, pair.next


@torch.no_grad()
def trajectory(predict: Predict, score: Score, sched: Schedule, gap: Tensor, draw: CounterNoise,
               prompts: Tensor, *, guidance: float, num_candidates: int,
               window: tuple[int, int] | None = None,
               step: Callable[..., tuple[Tensor, ...]] = choose) -> tuple[LatentPairs, Tensor]:
    """Denoise B prompts, with one pair per step and prompt; return the pairs and the scores [steps, K, B].

    The steps · B pairs are ordered by step. prompts: int64 [B]. gap: fp32 [N], smallest score gap of a valid
    pair by timestep (``select.gaps``). window: (first, end) of the steps that make pairs (default: all).
    Before first, one unscored candidate is drawn per step; the trajectory stops at end. All candidates are
    scored at the current step's t. step: ``choose``, or its compiled form.
    """
    x = draw.initial()
    steps, all_scores = [], []
    start, stop = window or (0, len(sched.timesteps))
    for number, (z, choice) in enumerate(draw.steps(stop)):
        t = sched.timesteps[number].repeat(len(prompts))
        if number < start:
            outputs = predict(x, t, prompts)
            x = ddim_candidates(sched, x, outputs, t, guidance=guidance, noise=z, candidates=1)[0]
            continue
        winner, loser, valid, scores, following = step(predict, score, sched, gap, x, t, prompts, z, choice,
                                                       guidance, num_candidates)
        steps.append(LatentPairs(x, winner, loser, t, prompts, valid))
        all_scores.append(scores)
        x = following
    return LatentPairs(*(torch.cat(field) for field in zip(*steps, strict=True))), torch.stack(all_scores)


@torch.no_grad()
def generate(predict: Predict, sched: Schedule, draw: CounterNoise, prompts: Tensor, *,
             guidance: float) -> Tensor:
    """Denoise B prompts completely, without candidates; return latents x_0, fp32 [B, C, H, W].

    prompts: int64 [B]. guidance: scale.
    """
    x = draw.initial()
    for timestep, (z, _) in zip(sched.timesteps, draw.steps(len(sched.timesteps)), strict=True):
        t = timestep.expand(len(prompts))
        x = ddim_candidates(sched, x, predict(x, t, prompts), t, guidance=guidance, noise=z, candidates=1)[0]
    return x
