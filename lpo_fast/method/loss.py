"""Define the two training objectives in plain PyTorch.

Faster implementations are tested against these definitions.

``step_dpo`` is the step-level DPO loss of LPO (arXiv 2502.01051, eq. 11), ``preference`` the reward model's
loss (eq. 6).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpo_fast.method import schedule
from lpo_fast.method.schedule import SIGMA, Schedule

HALF_LOG_2PI = 0.9189385175704956  # in fp32, as in the official code; a constant of every log density
# the official names first
METRICS = ("train_loss", "train_ratio_win", "train_ratio_lose", "train_win_prob_policy", "train_win_prob_ref",
           "train_lose_prob_policy", "train_lose_prob_ref", "implicit_acc", "train_margin")


def guide(null: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
    """Return null + scale·(text − null): classifier-free guidance.

    >>> guide(torch.tensor([1.0]), torch.tensor([2.0]), 5.0)
    tensor([6.])
    """
    return null + scale * (text - null)


def log_density(sched: Schedule, x_p: Tensor, mean: Tensor, t: Tensor) -> Tensor:
    """Return log p(x_p | x_t) of the sampler's Gaussian, averaged over C, H, W: [B].

    x_p, mean: [B, C, H, W]; t: int64 [B].
    """
    sigma = sched.table[t, SIGMA]
    square_error = (x_p - mean).square().flatten(1).mean(1)
    return -square_error / (2 * sigma**2) - sigma.log() - HALF_LOG_2PI


class StepDPO(NamedTuple):
    """Hold the loss and the metrics of N pairs.

    loss: []. The other fields have no gradient. totals: [9], Σ_i weight_i · metric_i for METRICS, where
    *_prob_* are densities and the margin is r_w − r_l. The rest: [N], one value per pair; ratios are clamped,
    log densities are means over C, H, W.
    """

    loss: Tensor
    pair_loss: Tensor
    ratio_win: Tensor
    ratio_lose: Tensor
    win_policy: Tensor
    win_ref: Tensor
    lose_policy: Tensor
    lose_ref: Tensor
    totals: Tensor


def step_dpo(sched: Schedule, x_t: Tensor, winner: Tensor, loser: Tensor, t: Tensor,
             policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], *, guidance: float, beta: float,
             eps: float, weight: Tensor) -> StepDPO:
    """Return the step-level DPO loss and metrics of N pairs.

    Both members of a pair share x_t, t and the prompt.

        Δ = log p_policy(x_p|x_t) − log p_ref(x_p|x_t),   r = clamp(exp Δ, 1 − eps, 1 + eps)
        loss = Σ_i weight_i · −log sigmoid(beta (log r_w − log r_l))

    x_t, winner, loser: [N, C, H, W]; t: int64 [N]; policy, reference: (null, text) network outputs [N, C, H,
    W]; weight: [N], 0 for padding, summing to 1 over an optimizer step. Computed in the dtype of x_t (fp32 in
    training).
    """
    dtype = x_t.dtype
    mean_policy = schedule.mean(sched, x_t, guide(policy[0].to(dtype), policy[1].to(dtype), guidance), t)
    mean_ref = schedule.mean(sched, x_t, guide(reference[0].to(dtype), reference[1].to(dtype), guidance), t)
    sigma = sched.table[t, SIGMA]

    def log_ratio(x_p: Tensor) -> Tensor:
        # (x − mean_ref)² − (x − mean_policy)², factored: else Δ is a small difference of two large numbers.
        product = (mean_policy - mean_ref) * (2 * x_p - mean_policy - mean_ref)
        return product.flatten(1).mean(1) / (2 * sigma**2)

    low, high = math.log1p(-eps) if eps < 1 else -math.inf, math.log1p(eps)
    log_win, log_lose = (log_ratio(x_p).clamp(low, high) for x_p in (winner, loser))
    pair_loss = -F.logsigmoid(beta * (log_win - log_lose))
    with torch.no_grad():
        win_policy, win_ref, lose_policy, lose_ref = densities = [
            log_density(sched, x_p, mean, t) for x_p in (winner, loser) for mean in (mean_policy, mean_ref)]
        win, lose = log_win.exp(), log_lose.exp()
        metrics = [pair_loss, win, lose, *(d.exp() for d in densities), (win > lose).to(dtype), win - lose]
        totals = (weight * torch.stack(metrics)).sum(1)
    return StepDPO((weight * pair_loss).sum(), pair_loss.detach(), win, lose, win_policy, win_ref,
                   lose_policy, lose_ref, totals)


def preference(text: Tensor, image_0: Tensor, image_1: Tensor, logit_scale: Tensor, label_0: Tensor,
               label_1: Tensor, num_examples: Tensor, timesteps: Tensor, *, loss_type: str = "pair",
               batch_coeff: float = 1.0, aux_loss_coeff: float = 1.0) -> Tensor:
    """Return the reward model's loss over B pairs, [].

        pair_i = −(y0 log P0 + y1 log P1) + [y0 = y1]·log ½,  P = softmax(S_0, S_1)
        loss = Σ_i w_i a_i loss_i,  w_i ∝ 1/num_examples_i,
        a_i = aux_loss_coeff where the two timesteps differ, else 1

    text, image_0, image_1: [B, P] of unit length; logit_scale: [], the scale itself (not its logarithm).
    label_0, label_1: [B], each pair 1/0, 0/1 or ½/½. num_examples: [B], the number of pairs of the prompt.
    timesteps: [B, 2]. loss_type: "pair"; "batch", the mean of the image and the text cross-entropies over the
    batch; or "both", pair + batch_coeff·batch.
    """
    images = torch.cat([image_0, image_1])
    logits = logit_scale * text @ images.T  # [B, 2B]
    size = len(text)
    diagonal = torch.arange(size, device=text.device)
    tie = torch.where(label_0 == label_1, math.log(0.5), 0.0).to(logits.dtype)  # an ideal tie costs 0

    def cross_entropy(logits: Tensor, first: Tensor, second: Tensor) -> Tensor:
        losses = -logits.log_softmax(-1)
        return label_0 * losses[diagonal, first] + label_1 * losses[diagonal, second]

    loss = torch.zeros_like(tie)
    if loss_type in ("pair", "both"):
        scores = torch.stack([logits[diagonal, diagonal], logits[diagonal, diagonal + size]], -1)
        loss = loss + cross_entropy(scores, torch.zeros_like(diagonal), torch.ones_like(diagonal)) + tie
    if loss_type in ("batch", "both"):
        text_loss = cross_entropy(logits, diagonal, diagonal + size) + tie
        image_0_loss, image_1_loss = -logits.T.log_softmax(-1).view(2, size, size).diagonal(dim1=1, dim2=2)
        image_loss = label_0 * image_0_loss + label_1 * image_1_loss
        loss = loss + (image_loss + text_loss) / 2 * (batch_coeff if loss_type == "both" else 1.0)
    weight = 1 / num_examples  # integers divide in fp32, as in the official code
    auxiliary = torch.where(timesteps[:, 0] != timesteps[:, 1], aux_loss_coeff, 1.0)
    return (loss * (weight / weight.sum()) * auxiliary).sum()
