"""Channels-last GroupNorm fused with its neighbors in a ResNet block: the time embedding's bias before it,
SiLU after it.

    h = x + shift[b, c],   u = (h − mean_g)·rstd_g·weight[c] + bias[c],   y = u·sigmoid(u)   (or y = u)

``fused_norms`` puts the operator into a denoiser. PyTorch's own GroupNorm copies a channels-last map to NCHW
and back, and adds the shift and applies SiLU in separate kernels. Here the forward pass has two launches: one
reads x for the moments, one reads it again and writes y. The backward pass also has two: one reads x and the
gradient for the sums over a group, one reads them again and writes the gradient of x. Two small kernels run
as well: a fill of 4 bytes per sample, and the sum of the weights' gradients over the batch. The order of
every reduction is fixed, so all runs with equally aligned tensors give the same bits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lpo_fast.system.launch import (
    expect,
    expect_number,
    expect_tensor,
    expect_type,
    fused,
    jit,
    launch,
    power_of_2,
    tl,
)

# None of these sizes has been tuned on a GPU yet.
WARPS = 8  # per program
TILE = 4096  # elements loaded at once: 2 loads of 16 bytes per thread in fp16
CHUNK = 32768  # elements that one program reduces, at most
COMBINED = 4096  # partial results that the last program combines at a time


def group_norm_silu_reference(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float,
                              shift: Tensor | None = None, silu: bool = True) -> Tensor:
    """Compute ``group_norm_silu`` in plain PyTorch, in fp32 or the dtype of x if that is more precise,
    rounded once.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = x.to(dtype) if shift is None else x.to(dtype) + shift.to(dtype)[:, :, None, None]
    u = F.group_norm(h, groups, weight.to(dtype), bias.to(dtype), eps)
    return (F.silu(u) if silu else u).to(x.dtype)


@jit
def _tile(block, row, C: tl.constexpr, HW: tl.constexpr, CB: tl.constexpr, SB: tl.constexpr):
    """Return channels c [CB] of channel block ``block``, and the offsets and mask [SB, CB] of pixels row …
    row + SB − 1.
    """
    c = block * CB + tl.arange(0, CB)
    s = row + tl.arange(0, SB)
    return c, s[:, None] * C + c[None, :], (s < HW)[:, None] & (c < C)[None, :]


@jit
def _vector(ptr, c, C: tl.constexpr, fill):
    """Load entries c of a vector [C] in fp32, as a row [1, CB]."""
    return tl.load(ptr + c, mask=c < C, other=fill).to(tl.float32)[None, :]


@jit
def _normalized(x, stats_ptr, shift_ptr, b, c, C: tl.constexpr, G: tl.constexpr, SHIFTED: tl.constexpr):
    """Return (h − mean)·rstd of a tile x [SB, CB], and rstd [1, CB]. stats: [B, 2, G]."""
    group = tl.minimum(c // (C // G), G - 1)
    rstd = tl.load(stats_ptr + (2 * b + 1) * G + group)[None, :]
    x -= tl.load(stats_ptr + 2 * b * G + group)[None, :]
    if SHIFTED:
        x += _vector(shift_ptr + b * C, c, C, 0.0)
    return x * rstd, rstd


@jit
def _arrived(count_ptr, programs):
    """Return whether this program is the last of its sample to write its partial results."""
    tl.debug_barrier()  # all threads have stored their results before the program is counted
    return tl.atomic_add(count_ptr, 1, sem="acq_rel") == programs - 1


@jit
def _partial(partial_ptr, WHICH: tl.constexpr, PARTS: tl.constexpr, split, c, mask, C: tl.constexpr):
    """Load one kind of partial result of a sample, for splits [S, 1, 1] and channels [1, G, J].

    partial: [B, SPLITS, PARTS, C].
    """
    return tl.load(partial_ptr + (split * PARTS + WHICH) * C + c, mask=mask, other=0.0, cache_modifier=".cg")


@jit
def _grouped(first, C: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr, S2: tl.constexpr,
             GB: tl.constexpr, J2: tl.constexpr):
    """Return groups g [GB] starting at ``first``, the splits [S2, 1, 1] and channels [1, GB, J2] of their
    partial results, and the mask.
    """
    g, j, split = first + tl.arange(0, GB), tl.arange(0, J2), tl.arange(0, S2)
    mask = (split < SPLITS)[:, None, None] & ((g < G)[:, None] & (j < C // G)[None, :])[None, :, :]
    return g, split[:, None, None], (g[:, None] * (C // G) + j[None, :])[None, :, :], mask


@jit
def _statistics(shift_ptr, partial_ptr, stats_ptr, b, eps, first, C: tl.constexpr, HW: tl.constexpr,
                G: tl.constexpr, SHIFTED: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
                S2: tl.constexpr, GB: tl.constexpr, J2: tl.constexpr):
    """Store mean and 1/deviation of GB groups of a sample, from the moments of the parts (Chan et al., 1979).
    """
    g, split, c, real = _grouped(first, C, G, SPLITS, S2, GB, J2)
    rows = tl.where(real, tl.minimum(ROWS, HW - split * ROWS).to(tl.float32), 0.0)
    mean = _partial(partial_ptr, 0, 2, split, c, real, C)
    if SHIFTED:
        mean += tl.load(shift_ptr + b * C + c, mask=real, other=0.0).to(tl.float32)
    center = tl.sum(tl.sum(rows * mean, 2), 0) / (C // G * HW)
    mean -= center[None, :, None]
    square = _partial(partial_ptr, 1, 2, split, c, real, C) + rows * mean * mean
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(square, 2), 0) / (C // G * HW) + eps)
    tl.store(stats_ptr + 2 * b * G + g, center, mask=g < G)
    tl.store(stats_ptr + (2 * b + 1) * G + g, rstd, mask=g < G)


@jit
def _moments_kernel(x_ptr, shift_ptr, partial_ptr, count_ptr, stats_ptr, eps, C: tl.constexpr,
                    HW: tl.constexpr, G: tl.constexpr, SHIFTED: tl.constexpr, ROWS: tl.constexpr,
                    SPLITS: tl.constexpr, CB: tl.constexpr, SB: tl.constexpr, S2: tl.constexpr,
                    GB: tl.constexpr, J2: tl.constexpr):
    # One program: mean and sum of squared deviations of ROWS pixels of a block of channels of one sample.
    b, split, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    partial_ptr += b * (SPLITS * 2 * C)
    mean, square, n = (tl.zeros([SB, CB], tl.float32), tl.zeros([SB, CB], tl.float32),
                       tl.zeros([SB, 1], tl.float32))
    for row in range(split * ROWS, min(split * ROWS + ROWS, HW), SB):  # Welford, per tile element
        c, at, mask = _tile(block, row, C, HW, CB, SB)
        x = tl.load(x_ptr + b * (C * HW) + at, mask=mask, other=0.0).to(tl.float32)
        n += (row + tl.arange(0, SB) < HW).to(tl.float32)[:, None]
        deviation = tl.where(mask, x - mean, 0.0)
        mean += deviation / tl.maximum(n, 1.0)
        square += tl.where(mask, deviation * (x - mean), 0.0)
    c = block * CB + tl.arange(0, CB)
    total = tl.sum(mean * n, 0) / tl.sum(tl.sum(n, 1), 0)  # mean over all tile rows
    square += n * (mean - total[None, :]) * (mean - total[None, :])
    tl.store(partial_ptr + split * 2 * C + c, total, mask=c < C)
    tl.store(partial_ptr + (split * 2 + 1) * C + c, tl.sum(square, 0), mask=c < C)
    if _arrived(count_ptr + b, SPLITS * tl.num_programs(2)):
        for first in range(0, G, GB):
            _statistics(shift_ptr, partial_ptr, stats_ptr, b, eps, first, C, HW, G, SHIFTED, ROWS, SPLITS, S2,
                        GB, J2)


@jit
def _apply_kernel(x_ptr, shift_ptr, weight_ptr, bias_ptr, stats_ptr, out_ptr, C: tl.constexpr,
                  HW: tl.constexpr, G: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
                  CB: tl.constexpr, SB: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    c, at, mask = _tile(tl.program_id(2), tl.program_id(1) * SB, C, HW, CB, SB)
    x = tl.load(x_ptr + b * (C * HW) + at, mask=mask, other=0.0).to(tl.float32)
    y, _ = _normalized(x, stats_ptr, shift_ptr, b, c, C, G, SHIFTED)
    y = y * _vector(weight_ptr, c, C, 0.0) + _vector(bias_ptr, c, C, 0.0)
    if SILU:
        y = y / (1 + tl.exp(-y))
    tl.store(out_ptr + b * (C * HW) + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _gradient_in(grad_ptr, x_ptr, stats_ptr, shift_ptr, weight_ptr, bias_ptr, b, c, at, mask, C: tl.constexpr,
                 G: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr):
    """Return ∂/∂u, the normalized h, and rstd of a tile."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    normalized, rstd = _normalized(x, stats_ptr, shift_ptr, b, c, C, G, SHIFTED)
    if SILU:
        u = normalized * _vector(weight_ptr, c, C, 0.0) + _vector(bias_ptr, c, C, 0.0)
        gate = 1 / (1 + tl.exp(-u))
        grad *= gate * (1 + u * (1 - gate))
    return grad, tl.where(mask, normalized, 0.0), rstd


@jit
def _combined(weight_ptr, stats_ptr, partial_ptr, means_ptr, sums_ptr, grad_shift_ptr, b, first,
              C: tl.constexpr, HW: tl.constexpr, G: tl.constexpr, SHIFTED: tl.constexpr, SPLITS: tl.constexpr,
              S2: tl.constexpr, GB: tl.constexpr, J2: tl.constexpr):
    """Store the sums over the pixels of GB groups of a sample, their means over each group, and the gradient
    of shift.
    """
    g, split, c, real = _grouped(first, C, G, SPLITS, S2, GB, J2)
    sum_1 = tl.sum(_partial(partial_ptr, 0, 3, split, c, real, C), 0)
    sum_2 = tl.sum(_partial(partial_ptr, 1, 3, split, c, real, C), 0)
    j = tl.arange(0, J2)[None, :]
    column = g[:, None] * (C // G) + j
    mask = (j < C // G) & (g < G)[:, None]
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + 2 * b * C + column, sum_1, mask=mask)
    tl.store(sums_ptr + (2 * b + 1) * C + column, sum_2, mask=mask)
    mean_1 = tl.sum(weight * sum_1, 1) / (C // G * HW)
    mean_2 = tl.sum(weight * sum_2, 1) / (C // G * HW)
    tl.store(means_ptr + 2 * b * G + g, mean_1, mask=g < G)
    tl.store(means_ptr + (2 * b + 1) * G + g, mean_2, mask=g < G)
    if SHIFTED:  # Σ over the pixels of ∂/∂x
        rstd = tl.load(stats_ptr + (2 * b + 1) * G + g, mask=g < G, other=0.0)
        sum_3 = tl.sum(_partial(partial_ptr, 2, 3, split, c, real, C), 0)
        grad = rstd[:, None] * (weight * sum_1 - HW * mean_1[:, None] - mean_2[:, None] * sum_3)
        tl.store(grad_shift_ptr + b * C + column, grad.to(grad_shift_ptr.dtype.element_ty), mask=mask)


@jit
def _sums_kernel(grad_ptr, x_ptr, shift_ptr, weight_ptr, bias_ptr, stats_ptr, partial_ptr, count_ptr,
                 means_ptr, sums_ptr, grad_shift_ptr, C: tl.constexpr, HW: tl.constexpr, G: tl.constexpr,
                 SHIFTED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
                 CB: tl.constexpr, SB: tl.constexpr, S2: tl.constexpr, GB: tl.constexpr, J2: tl.constexpr):
    # One program sums ∂/∂u, ∂/∂u·normalized and normalized over ROWS pixels of a sample's block of channels.
    b, split, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    partial_ptr += b * (SPLITS * 3 * C)
    sum_1, sum_2, sum_3 = (tl.zeros([SB, CB], tl.float32), tl.zeros([SB, CB], tl.float32),
                           tl.zeros([SB, CB], tl.float32))
    for row in range(split * ROWS, min(split * ROWS + ROWS, HW), SB):
        c, at, mask = _tile(block, row, C, HW, CB, SB)
        grad, normalized, _ = _gradient_in(grad_ptr, x_ptr, stats_ptr, shift_ptr, weight_ptr, bias_ptr, b, c,
                                           b * (C * HW) + at, mask, C, G, SHIFTED, SILU)
        sum_1 += grad
        sum_2 += grad * normalized
        if SHIFTED:
            sum_3 += normalized
    c = block * CB + tl.arange(0, CB)
    tl.store(partial_ptr + split * 3 * C + c, tl.sum(sum_1, 0), mask=c < C)
    tl.store(partial_ptr + (split * 3 + 1) * C + c, tl.sum(sum_2, 0), mask=c < C)
    if SHIFTED:
        tl.store(partial_ptr + (split * 3 + 2) * C + c, tl.sum(sum_3, 0), mask=c < C)
    if _arrived(count_ptr + b, SPLITS * tl.num_programs(2)):
        for first in range(0, G, GB):
            _combined(weight_ptr, stats_ptr, partial_ptr, means_ptr, sums_ptr, grad_shift_ptr, b, first, C,
                      HW, G, SHIFTED, SPLITS, S2, GB, J2)


@jit
def _backward_kernel(grad_ptr, x_ptr, shift_ptr, weight_ptr, bias_ptr, stats_ptr, means_ptr, out_ptr,
                     C: tl.constexpr, HW: tl.constexpr, G: tl.constexpr, SHIFTED: tl.constexpr,
                     SILU: tl.constexpr, CB: tl.constexpr, SB: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    c, at, mask = _tile(tl.program_id(2), tl.program_id(1) * SB, C, HW, CB, SB)
    at += b * (C * HW)
    grad, normalized, rstd = _gradient_in(grad_ptr, x_ptr, stats_ptr, shift_ptr, weight_ptr, bias_ptr, b, c,
                                          at, mask, C, G, SHIFTED, SILU)
    group = tl.minimum(c // (C // G), G - 1)
    mean_1 = tl.load(means_ptr + 2 * b * G + group)[None, :]
    mean_2 = tl.load(means_ptr + (2 * b + 1) * G + group)[None, :]
    grad = rstd * (grad * _vector(weight_ptr, c, C, 0.0) - mean_1 - normalized * mean_2)
    tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=mask)


def _blocks(x: Tensor, groups: int, tile: int) -> tuple[dict, dict]:
    """Return the compile-time constants of the kernel that writes a map, and of the kernel that reduces it.

    tile: elements that the reducing kernel loads at once.
    """
    c, hw = x.shape[1], x.shape[2] * x.shape[3]
    cb = min(power_of_2(c), max(math.gcd(c, 256), 32))
    sb = min(power_of_2(hw), tile // cb)
    rows = min(-(-hw // sb), max(CHUNK // (sb * cb), 1)) * sb
    splits, j2 = -(-hw // rows), power_of_2(c // groups)
    s2 = power_of_2(splits)
    common = {"C": c, "HW": hw, "G": groups, "CB": cb}
    write = common | {"SB": min(power_of_2(hw), TILE // cb)}
    reduce = common | {"SB": sb, "ROWS": rows, "SPLITS": splits, "S2": s2, "J2": j2,
                       "GB": min(power_of_2(groups), max(COMBINED // (s2 * j2), 1))}
    return write, reduce


def _to_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("lpo_fast::group_norm_silu", mutates_args=())
def _op(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None,
        silu: bool) -> tuple[Tensor, Tensor]:
    batch = len(x)
    x = _to_channels_last(x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    stats = torch.empty(batch, 2, groups, device=x.device)
    if batch:
        write, reduce = _blocks(x, groups, TILE)
        flags = {"SHIFTED": shift is not None}
        shift = x if shift is None else shift.contiguous()  # x is a placeholder that is never read
        weight, bias = weight.contiguous(), bias.contiguous()
        channel_blocks = -(-write["C"] // write["CB"])
        partial = torch.empty(batch, reduce["SPLITS"], 2, write["C"], device=x.device)
        count = torch.zeros(batch, dtype=torch.int32, device=x.device)
        launch(_moments_kernel, (batch, reduce["SPLITS"], channel_blocks), x, shift, partial, count, stats,
               eps, warps=WARPS, **reduce, **flags)
        launch(_apply_kernel, (batch, -(-write["HW"] // write["SB"]), channel_blocks), x, shift, weight, bias,
               stats, out, warps=WARPS, SILU=silu, **write, **flags)
    return out, stats


@_op.register_fake
def _(x, groups, weight, bias, eps, shift, silu):
    return (torch.empty_like(x, memory_format=torch.channels_last),
            x.new_empty((x.shape[0], 2, groups), dtype=torch.float32))


@torch.library.custom_op("lpo_fast::group_norm_silu_backward", mutates_args=())
def _op_backward(grad: Tensor, x: Tensor, stats: Tensor, groups: int, weight: Tensor, bias: Tensor,
                 shift: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(x)
    x = _to_channels_last(x)
    grad = _to_channels_last(grad)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    sums = torch.empty(batch, 2, x.shape[1], device=x.device)
    grad_shift = (x.new_empty(0) if shift is None else
                  torch.empty_like(shift, memory_format=torch.contiguous_format))
    if batch:
        write, reduce = _blocks(x, groups, TILE // 2)  # three sums per element, of two maps
        flags = {"SHIFTED": shift is not None, "SILU": silu}
        shift = x if shift is None else shift.contiguous()  # x is a placeholder that is never read
        weight, bias = weight.contiguous(), bias.contiguous()
        channel_blocks = -(-write["C"] // write["CB"])
        partial = torch.empty(batch, reduce["SPLITS"], 3, write["C"], device=x.device)
        means = torch.empty_like(stats)
        count = torch.zeros(batch, dtype=torch.int32, device=x.device)
        launch(_sums_kernel, (batch, reduce["SPLITS"], channel_blocks), grad, x, shift, weight, bias, stats,
               partial, count, means, sums, grad_shift, warps=WARPS, **reduce, **flags)
        launch(_backward_kernel, (batch, -(-write["HW"] // write["SB"]), channel_blocks), grad, x, shift,
               weight, bias, stats, means, out, warps=WARPS, **write, **flags)
    return out, sums, grad_shift


@_op_backward.register_fake
def _(grad, x, stats, groups, weight, bias, shift, silu):
    return (
        torch.empty_like(x, memory_format=torch.channels_last), stats.new_empty((x.shape[0], 2, x.shape[1])),
        x.new_empty(0) if shift is None else torch.empty_like(shift, memory_format=torch.contiguous_format))


def _setup(ctx, inputs, output) -> None:
    x, ctx.groups, weight, bias, _, shift, ctx.silu = inputs
    ctx.save_for_backward(x, output[1], weight, bias, shift)
    ctx.set_materialize_grads(False)  # the statistics have no gradient: do not materialize zeros


def _backward(ctx, grad: Tensor, _):  # the second output, the statistics, has no gradient
    x, stats, weight, bias, shift = ctx.saved_tensors
    grad_x, sums, grad_shift = _op_backward(grad, x, stats, ctx.groups, weight, bias, shift, ctx.silu)
    grad_bias, grad_weight = sums.sum(0).unbind() if any(ctx.needs_input_grad[2:4]) else (None, None)
    return (grad_x, None, None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype), None,
            None if shift is None else grad_shift, None)


_op.register_autograd(_backward, setup_context=_setup)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float,
                    shift: Tensor | None = None, silu: bool = True) -> Tensor:
    """Return SiLU(GroupNorm(x + shift)), or GroupNorm(x + shift) if ``silu`` is False; [B, C, H, W] in the
    dtype of x.

    x: [B, C, H, W], fp32, fp16 or bf16, channels-last (NCHW and float64 take the reference). B may be 0.
    groups: a divisor of C. weight, bias: [C]. shift: [B, C], the projected time embedding, or None. Each may
    have any of these dtypes, whatever that of x. eps: added to the variance; under torch.compile the kernel
    compiles once per value.

    All tensors have gradients. Statistics are computed in fp32 (Welford). Raises ValueError for invalid
    arguments, and for an eps that is negative or not finite.
    """
    expect_tensor("x", x, ("B", "C", "H", "W"), x)
    expect(0 < math.prod(x.shape[1:]) < 2**31,
           f"x has shape {tuple(x.shape)}: no elements, or 2³¹ or more per sample")
    c = x.shape[1]
    expect_type("groups", groups, int)
    if groups <= 0 or c % groups:  # not expect(): torch.compile cannot format a symbolic number
        raise ValueError(f"groups is {int(groups)}, expected a divisor of {c} channels")
    expect_tensor("weight", weight, (c,), x)
    expect_tensor("bias", bias, (c,), x)
    if shift is not None:
        expect_tensor("shift", shift, (len(x), c), x)
    expect_number("eps", eps, least=0)
    expect_type("silu", silu, bool)
    if fused(x) and x.is_contiguous(memory_format=torch.channels_last):
        return _op(x, groups, weight, bias, eps, shift, silu)[0]
    return group_norm_silu_reference(x, groups, weight, bias, eps, shift, silu)
