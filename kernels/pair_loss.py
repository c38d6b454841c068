"""Compute the pairwise DPO loss of LPO and its metrics from the networks' outputs, and the gradient of the
policy's outputs.

    m = null + g·(text − null),   mean = sqrt(a_p)·x0(x_t, m) + direction·e(x_t, m)    of policy and reference
    Δ = log p_policy(x_p|x_t) − log p_ref(x_p|x_t),   r = clamp(exp Δ, 1 − eps, 1 + eps)  of winner and loser
    loss = Σ_i weight_i · −log sigmoid(beta (log r_w − log r_l))                    (arXiv 2502.01051, eq. 11)

``lpo.steps`` calls the operator once per forward pass. One launch reads the seven latents once (null and text
output counted as one), and one launch writes the gradient of both guidance branches; plain PyTorch launches
about 60 kernels each way. The difference of the means is computed from the difference of the outputs, so that
the two nearly equal terms are subtracted before anything is rounded.
"""

import math

import torch
from torch import Tensor

from lpo_fast.method import loss
from lpo_fast.method.loss import HALF_LOG_2PI, METRICS, StepDPO
from lpo_fast.method.schedule import Schedule
from lpo_fast.system.launch import (
    DTYPES,
    channels_last,
    dense,
    expect,
    expect_number,
    expect_table,
    expect_tensor,
    fused,
    jit,
    launch,
    power_of_2,
    tl,
)

# BLOCK and SUMMED have not been tuned on a GPU yet.
BLOCK = 1024  # elements per program
SUMMED = 256  # partial sums that the last program adds up at a time
SUMS = 6  # partial sums per program
VALUES = 9  # values per pair: the seven of StepDPO, and both log ratios before the clamp


def pair_loss_reference(sched: Schedule, x_t: Tensor, winner: Tensor, loser: Tensor, t: Tensor,
                        policy: Tensor, reference: Tensor, weight: Tensor, *, guidance: float, beta: float,
                        eps: float) -> StepDPO:
    """Compute the loss in plain PyTorch with ``loss.step_dpo``; arguments and result as in ``pair_loss``."""
    return loss.step_dpo(sched, x_t, winner, loser, t, policy.chunk(2), reference.chunk(2), guidance=guidance,
                         beta=beta, eps=eps, weight=weight)


@jit
def _coefficients(table_ptr, t_ptr, n):
    """Load x0_x, x0_m, e_x, e_m, sqrt_a_p, direction and sigma of pair n."""
    row = table_ptr + tl.load(t_ptr + n) * 7
    return (tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4),
            tl.load(row + 5), tl.load(row + 6))


@jit
def _slope(x0_m, e_m, sqrt_a_p, direction):
    """Return ∂mean/∂m where x0 is not clipped, computed in fp64 because the two terms nearly cancel at small
    timesteps.
    """
    return (sqrt_a_p.to(tl.float64) * x0_m + direction.to(tl.float64) * e_m).to(tl.float32)


@jit
def _outputs(outputs_ptr, n, pairs, element, mask, C: tl.constexpr, HW: tl.constexpr, LAST: tl.constexpr):
    """Load the null and the text output of pair n in fp32; ``element`` counts in NCHW order."""
    position = element % HW * C + element // HW if LAST else element
    null = tl.load(outputs_ptr + n * (C * HW) + position, mask=mask, other=0.0).to(tl.float32)
    text = tl.load(outputs_ptr + (n + pairs) * (C * HW) + position, mask=mask, other=0.0).to(tl.float32)
    return null, text


@jit
def _clipped(x, low, high):
    """Return x clamped to [low, high]; NaN is kept."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@jit
def _forward_kernel(table_ptr, x_ptr, winner_ptr, loser_ptr, t_ptr, policy_ptr, reference_ptr, weight_ptr,
                    partial_ptr, count_ptr, values_ptr, totals_ptr, loss_ptr, pairs, guidance, beta,
                    low, high, clip, HALF_LOG_2PI: tl.constexpr, METRICS: tl.constexpr, C: tl.constexpr,
                    HW: tl.constexpr, LAST: tl.constexpr, CLIP: tl.constexpr, SUMS: tl.constexpr,
                    SPLITS: tl.constexpr, SPLITS_2: tl.constexpr, PAIRS_2: tl.constexpr, BLOCK: tl.constexpr):
    # One program computes the sums of one block of a pair. The last to finish adds them up, in a fixed order.
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = split * BLOCK + tl.arange(0, BLOCK)
    mask = element < C * HW
    x0_x, x0_m, e_x, e_m, sqrt_a_p, direction, _ = _coefficients(table_ptr, t_ptr, n)
    x_t = tl.load(x_ptr + n * (C * HW) + element, mask=mask, other=0.0)
    winner = tl.load(winner_ptr + n * (C * HW) + element, mask=mask, other=0.0)
    loser = tl.load(loser_ptr + n * (C * HW) + element, mask=mask, other=0.0)
    null, text = _outputs(policy_ptr, n, pairs, element, mask, C, HW, LAST)
    null_ref, text_ref = _outputs(reference_ptr, n, pairs, element, mask, C, HW, LAST)
    m, m_ref = null + guidance * (text - null), null_ref + guidance * (text_ref - null_ref)
    difference = (null - null_ref) + guidance * ((text - text_ref) - (null - null_ref))  # m − m_ref
    x0, x0_ref = x0_x * x_t + x0_m * m, x0_x * x_t + x0_m * m_ref
    mean_difference = _slope(x0_m, e_m, sqrt_a_p, direction) * difference
    if CLIP:
        inside = (tl.abs(x0) <= clip) & (tl.abs(x0_ref) <= clip)
        x0, x0_ref = _clipped(x0, -clip, clip), _clipped(x0_ref, -clip, clip)
        mean_difference = tl.where(
            inside, mean_difference, sqrt_a_p * (x0 - x0_ref) + direction * e_m * difference)
    mean = sqrt_a_p * x0 + direction * (e_x * x_t + e_m * m)
    mean_ref = sqrt_a_p * x0_ref + direction * (e_x * x_t + e_m * m_ref)
    w, w_ref, l, l_ref = winner - mean, winner - mean_ref, loser - mean, loser - mean_ref  # noqa: E741
    sums_ptr = partial_ptr + (n * SPLITS + split) * SUMS
    tl.store(sums_ptr, tl.sum(tl.where(mask, mean_difference * (w + w_ref), 0.0), 0))
    tl.store(sums_ptr + 1, tl.sum(tl.where(mask, mean_difference * (l + l_ref), 0.0), 0))
    tl.store(sums_ptr + 2, tl.sum(tl.where(mask, w * w, 0.0), 0))
    tl.store(sums_ptr + 3, tl.sum(tl.where(mask, w_ref * w_ref, 0.0), 0))
    tl.store(sums_ptr + 4, tl.sum(tl.where(mask, l * l, 0.0), 0))
    tl.store(sums_ptr + 5, tl.sum(tl.where(mask, l_ref * l_ref, 0.0), 0))

    tl.debug_barrier()  # all threads have stored their sums before the program is counted
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == pairs * SPLITS - 1:
        lane = tl.arange(0, 16)
        totals = tl.zeros([16], tl.float64)
        for first in range(0, pairs, PAIRS_2):
            i = first + tl.arange(0, PAIRS_2)
            real = i < pairs
            t = tl.load(t_ptr + i, mask=real, other=0)
            sigma = tl.load(table_ptr + t * 7 + 6, mask=real, other=1.0).to(tl.float64)
            weight = tl.load(weight_ptr + i, mask=real, other=0.0).to(tl.float64)
            per = 1 / (2 * sigma * sigma * (C * HW))  # divide once: fp64 division may need a stack
            log_win = _total(partial_ptr, i, real, 0, SUMS, SPLITS, SPLITS_2) * per
            log_lose = _total(partial_ptr, i, real, 1, SUMS, SPLITS, SPLITS_2) * per
            offset = -tl.log(sigma) - HALF_LOG_2PI
            win_policy = offset - _total(partial_ptr, i, real, 2, SUMS, SPLITS, SPLITS_2) * per
            win_ref = offset - _total(partial_ptr, i, real, 3, SUMS, SPLITS, SPLITS_2) * per
            lose_policy = offset - _total(partial_ptr, i, real, 4, SUMS, SPLITS, SPLITS_2) * per
            lose_ref = offset - _total(partial_ptr, i, real, 5, SUMS, SPLITS, SPLITS_2) * per
            tl.store(values_ptr + 7 * pairs + i, log_win.to(tl.float32), mask=real)
            tl.store(values_ptr + 8 * pairs + i, log_lose.to(tl.float32), mask=real)
            log_win, log_lose = _clipped(log_win, low, high), _clipped(log_lose, low, high)
            z = beta * (log_win - log_lose)
            value = tl.where(z < 0, -z, 0.0) + tl.log(1 + tl.exp(-tl.abs(z)))  # −log sigmoid(z)
            win, lose = tl.exp(log_win), tl.exp(log_lose)
            tl.store(values_ptr + i, value.to(tl.float32), mask=real)
            tl.store(values_ptr + pairs + i, win.to(tl.float32), mask=real)
            tl.store(values_ptr + 2 * pairs + i, lose.to(tl.float32), mask=real)
            tl.store(values_ptr + 3 * pairs + i, win_policy.to(tl.float32), mask=real)
            tl.store(values_ptr + 4 * pairs + i, win_ref.to(tl.float32), mask=real)
            tl.store(values_ptr + 5 * pairs + i, lose_policy.to(tl.float32), mask=real)
            tl.store(values_ptr + 6 * pairs + i, lose_ref.to(tl.float32), mask=real)
            metrics = (value, win, lose, tl.exp(win_policy), tl.exp(win_ref), tl.exp(lose_policy),
                       tl.exp(lose_ref), (win > lose).to(tl.float64), win - lose)
            for k in tl.static_range(len(metrics)):
                totals += tl.where(lane == k, tl.sum(tl.where(real, weight * metrics[k], 0.0), 0), 0.0)
        tl.store(totals_ptr + lane, totals.to(tl.float32), mask=lane < METRICS)
        tl.store(loss_ptr + lane, totals.to(tl.float32), mask=lane < 1)


@jit
def _total(partial_ptr, i, real, WHICH: tl.constexpr, SUMS: tl.constexpr, SPLITS: tl.constexpr,
           SPLITS_2: tl.constexpr):
    """Return one of the partial sums of pairs i, added up over all blocks in fp64."""
    split = tl.arange(0, SPLITS_2)
    sums_ptr = partial_ptr + (i.to(tl.int64)[:, None] * SPLITS + split[None, :]) * SUMS + WHICH
    mask = real[:, None] & (split < SPLITS)[None, :]
    return tl.sum(tl.load(sums_ptr, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64), 1)


@jit
def _backward_kernel(grad_ptr, table_ptr, x_ptr, winner_ptr, loser_ptr, t_ptr, policy_ptr, weight_ptr,
                     values_ptr, out_ptr, pairs, guidance, beta, low, high, clip, C: tl.constexpr,
                     HW: tl.constexpr, LAST: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr):
    # ∂Δ/∂mean = (x_p − mean)/(σ²·CHW); the reference drops out.
    # One program computes one block of one pair, for both guidance branches.
    n = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < C * HW
    x0_x, x0_m, e_x, e_m, sqrt_a_p, direction, sigma = _coefficients(table_ptr, t_ptr, n)
    log_win, log_lose = tl.load(values_ptr + 7 * pairs + n), tl.load(values_ptr + 8 * pairs + n)
    win, lose = _clipped(log_win, low, high), _clipped(log_lose, low, high)
    small = tl.exp(-tl.abs(beta * (win - lose)))
    share = tl.where(win > lose, small, 1.0) / (1 + small)  # sigmoid(−beta (log r_w − log r_l))
    slope = -tl.load(grad_ptr) * tl.load(weight_ptr + n) * beta * share / (sigma * sigma * (C * HW))
    slope_win = tl.where((log_win > high) | (log_win < low), 0.0, slope)  # NaN is not clamped away
    slope_lose = tl.where((log_lose > high) | (log_lose < low), 0.0, -slope)

    x_t = tl.load(x_ptr + n * (C * HW) + element, mask=mask, other=0.0)
    winner = tl.load(winner_ptr + n * (C * HW) + element, mask=mask, other=0.0)
    loser = tl.load(loser_ptr + n * (C * HW) + element, mask=mask, other=0.0)
    null, text = _outputs(policy_ptr, n, pairs, element, mask, C, HW, LAST)
    m = null + guidance * (text - null)
    x0 = x0_x * x_t + x0_m * m
    through = _slope(x0_m, e_m, sqrt_a_p, direction)
    if CLIP:
        through = tl.where((x0 > clip) | (x0 < -clip), direction * e_m, through)
        x0 = _clipped(x0, -clip, clip)
    mean = sqrt_a_p * x0 + direction * (e_x * x_t + e_m * m)
    grad = (slope_win * (winner - mean) + slope_lose * (loser - mean)) * through
    position = element % HW * C + element // HW if LAST else element
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + n * (C * HW) + position, ((1 - guidance) * grad).to(dtype), mask=mask)
    tl.store(out_ptr + (n + pairs) * (C * HW) + position, (guidance * grad).to(dtype), mask=mask)


def _bounds(eps: float) -> tuple[float, float]:
    """Return the bounds of log r; the lower one is −inf where 1 − eps is not positive."""
    return math.log1p(-eps) if eps < 1 else -math.inf, math.log1p(eps)


def _settings(outputs: Tensor, clip: float) -> dict:
    """Return the compile-time constants that both kernels share. outputs: [2N, C, H, W]."""
    return {"C": outputs.shape[1], "HW": outputs.shape[2] * outputs.shape[3], "LAST": channels_last(outputs),
            "CLIP": math.isfinite(clip), "BLOCK": BLOCK}


@torch.library.custom_op("lpo_fast::pair_loss", mutates_args=())
def _op(table: Tensor, x_t: Tensor, winner: Tensor, loser: Tensor, t: Tensor, policy: Tensor,
        reference: Tensor, weight: Tensor, guidance: float, beta: float, eps: float,
        clip: float) -> tuple[Tensor, Tensor, Tensor]:
    pairs = len(t)
    size = x_t[0].numel() if pairs else 0
    empty = torch.empty if pairs else torch.zeros
    value = empty((), device=t.device)
    totals = empty(len(METRICS), device=t.device)
    values = torch.empty(VALUES, pairs, device=t.device)
    if not pairs:
        return value, totals, values
    splits = -(-size // BLOCK)
    splits_2 = power_of_2(splits)
    partial = torch.empty(pairs, splits, SUMS, device=t.device)
    count = torch.zeros(1, dtype=torch.int32, device=t.device)
    launch(_forward_kernel, (pairs, splits), table, x_t, winner, loser, t, policy, reference,
           weight, partial, count, values, totals, value, pairs, guidance, beta, *_bounds(eps), clip,
           HALF_LOG_2PI=HALF_LOG_2PI, METRICS=len(METRICS), SUMS=SUMS, SPLITS=splits, SPLITS_2=splits_2,
           PAIRS_2=min(power_of_2(pairs), max(SUMMED // splits_2, 1)), **_settings(policy, clip))
    return value, totals, values


@_op.register_fake
def _(table, x_t, winner, loser, t, policy, reference, weight, guidance, beta, eps, clip):
    return table.new_empty(()), table.new_empty(len(METRICS)), table.new_empty(VALUES, t.shape[0])


@torch.library.custom_op("lpo_fast::pair_loss_backward", mutates_args=())
def _op_backward(grad: Tensor, table: Tensor, x_t: Tensor, winner: Tensor, loser: Tensor, t: Tensor,
                 policy: Tensor, weight: Tensor, values: Tensor, guidance: float, beta: float, eps: float,
                 clip: float) -> Tensor:
    out = torch.empty_like(policy)
    if len(t):
        launch(_backward_kernel, (len(t), -(-x_t[0].numel() // BLOCK)), grad, table, x_t, winner,
               loser, t, policy, weight, values, out, len(t), guidance, beta, *_bounds(eps), clip,
               **_settings(policy, clip))
    return out


@_op_backward.register_fake
def _(grad, table, x_t, winner, loser, t, policy, weight, values, guidance, beta, eps, clip):
    return torch.empty_like(policy)


def _setup(ctx, inputs, output) -> None:
    table, x_t, winner, loser, t, policy, _, weight, *ctx.settings = inputs
    ctx.save_for_backward(table, x_t, winner, loser, t, policy, weight, output[2])
    ctx.set_materialize_grads(False)  # the metrics have no gradient: do not materialize zeros


def _backward(ctx, grad: Tensor, *_):  # the gradient of the loss; the other outputs have none
    return *[None] * 5, _op_backward(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 6


_op.register_autograd(_backward, setup_context=_setup)


def pair_loss(sched: Schedule, x_t: Tensor, winner: Tensor, loser: Tensor, t: Tensor, policy: Tensor,
              reference: Tensor, weight: Tensor, *, guidance: float, beta: float, eps: float) -> StepDPO:
    """Return the loss and the metrics of N pairs, with a gradient to the policy's outputs.

    x_t, winner, loser: fp32 [N, C, H, W]. t: int64 [N], rows of the schedule's table, timesteps with positive
    sigma. policy, reference: network outputs [2N, C, H, W], null branch first; fp32, fp16 or bf16, NCHW or
    channels-last. weight: fp32 [N], 0 for padding. Latents in float64 take the reference; outputs and weight
    may then be float64 too. guidance, beta, eps: Python numbers; under torch.compile the kernel compiles once
    per value. eps: bound of the ratios, at least 0; from 1 on the ratios have no lower bound. Sums are
    computed in fp32, with the same bits in every run.

    Returns a ``loss.StepDPO`` in fp32 (float64 if x_t is): loss [], totals [9], the other seven [N]; zeros or
    empty if N is 0.

    The values of t are not checked, because that would synchronize with the device: outside the table, or
    where sigma is 0, the result is undefined. Raises ValueError for any other invalid argument, and for a
    guidance, beta or eps that is not finite.
    """
    expect_tensor("x_t", x_t, ("N", "C", "H", "W"), x_t, (torch.float32, torch.float64), gradient=False)
    expect(x_t[:1].numel() > 0 or len(x_t) == 0, f"x_t has shape {tuple(x_t.shape)}: no elements")
    dtype, shape = x_t.dtype, (2 * len(x_t), *x_t.shape[1:])
    expect_tensor("winner", winner, x_t.shape, x_t, (dtype,), gradient=False)
    expect_tensor("loser", loser, x_t.shape, x_t, (dtype,), gradient=False)
    expect_tensor("t", t, x_t.shape[:1], x_t, (torch.int64,))
    expect_tensor("policy", policy, shape, x_t, (*DTYPES, dtype))
    expect_tensor("reference", reference, shape, x_t, (*DTYPES, dtype), gradient=False)
    expect_tensor("weight", weight, x_t.shape[:1], x_t, (torch.float32, dtype), gradient=False)
    expect_table("sched.table", sched.table, (7,), x_t, (dtype,))
    expect_number("guidance", guidance)
    expect_number("beta", beta)
    expect_number("eps", eps, least=0)
    if not fused(x_t):
        return pair_loss_reference(sched, x_t, winner, loser, t, policy, reference, weight, guidance=guidance,
                                   beta=beta, eps=eps)
    policy = dense(policy)
    layout = torch.channels_last if channels_last(policy) else torch.contiguous_format
    value, totals, values = _op(
        sched.table.contiguous(), x_t.contiguous(), winner.contiguous(), loser.contiguous(), t.contiguous(),
        policy, reference.contiguous(memory_format=layout), weight.contiguous(), guidance, beta, eps,
        math.inf if sched.clip is None else sched.clip)
    return StepDPO(value, *values[:7].detach(), totals.detach())
