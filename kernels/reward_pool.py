"""Pool the denoiser's maps, conditioned on the timestep, into the visual feature of the latent reward model.

    feature_i[b] = mean_hw(text_i[b])                                           for the map of a down block
    feature_i[b] = null + g(t_b)·(text − null),  null, text = mean_hw of each branch  for the mid block's map

(arXiv 2502.01051, section 3.2: average pooling and visual feature enhancement.) ``LatentRewardModel`` calls
the operator for K·B candidates per denoising step. One launch reads every map once, and never the null branch
of unguided maps. Plain PyTorch launches one reduction per map and several small kernels for guidance and
concatenation, and its backward pass copies each half.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lpo_fast.system.launch import (
    channels_last,
    dense,
    expect,
    expect_table,
    expect_tensor,
    fused,
    jit,
    launch,
    power_of_2,
    tl,
)

# None of these sizes has been tuned on a GPU yet.
WARPS = 4  # per program
TILE = 4096  # elements loaded at once: 4 loads of 16 bytes per thread in fp16
CHUNK = 65536  # elements that one forward program reduces, at most (except for very large maps)


def reward_pool_reference(maps: Sequence[Tensor], guided: Sequence[bool], t: Tensor,
                          guidance: Tensor) -> Tensor:
    """Pool in plain PyTorch, in fp32 or the maps' dtype if that is more precise.

    Arguments and result as in ``reward_pool``.
    """
    g = guidance[t][:, None]
    features = []
    for stage, with_guidance in zip(maps, guided, strict=True):
        dtype = torch.promote_types(stage.dtype, torch.float32)
        text = stage[-len(t):] if len(t) else stage
        feature = text.mean((2, 3), dtype=dtype)
        if with_guidance:
            null = stage[:len(t)].mean((2, 3), dtype=dtype)
            feature = null + g * (feature - null)
        features.append(feature)
    return torch.cat(features, 1)


@jit
def _mean(rows, end, C: tl.constexpr, HW: tl.constexpr, LAST: tl.constexpr, c, CB: tl.constexpr,
          SB: tl.constexpr):
    """Return the mean over HW of channels c [CB] of one map. LAST: channels-last [HW, C], else [C, HW]."""
    total = tl.zeros([CB, SB], tl.float32)
    for first in range(0, end, SB):
        s = first + tl.arange(0, SB)
        offset = s[None, :] * C + c[:, None] if LAST else c[:, None] * HW + s[None, :]
        total += tl.load(rows + offset, mask=(c < C)[:, None] & (s < HW)[None, :], other=0.0).to(tl.float32)
    return tl.sum(total, 1) / HW


@jit
def _pool(stage, t_ptr, guidance_ptr, out_ptr, batch, b, block, size: tl.constexpr, WIDTH: tl.constexpr):
    """Store the feature of one block of channels of one map of sample b. size: an entry of ``_sizes``."""
    C: tl.constexpr = size[0]
    HW: tl.constexpr = size[1]
    LAST: tl.constexpr = size[2]
    CB: tl.constexpr = size[5]
    SB: tl.constexpr = size[6]
    c = block * CB + tl.arange(0, CB)
    end = tl.minimum(batch, 1) * HW  # HW, hidden from the compiler, which would unroll the loop and spill
    feature = _mean(stage + (b + (size[4] - 1) * batch) * (C * HW), end, C, HW, LAST, c, CB, SB)
    if size[3]:
        g = tl.load(guidance_ptr + tl.load(t_ptr + b))
        null = _mean(stage + b * (C * HW), end, C, HW, LAST, c, CB, SB)
        feature = null + g * (feature - null)
    tl.store(out_ptr + b * WIDTH + size[7] + c, feature, mask=c < C)


@jit
def _forward_kernel(maps, t_ptr, guidance_ptr, out_ptr, batch, sizes: tl.constexpr, WIDTH: tl.constexpr):
    # One program: a block of channels of one map of one sample.
    pid, b = tl.program_id(1), tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(sizes)):
        if (pid >= sizes[i][8]) & (pid < sizes[i][9]):
            _pool(maps[i], t_ptr, guidance_ptr, out_ptr, batch, b, pid - sizes[i][8], tl.constexpr(sizes[i]),
                  WIDTH)


@jit
def _distribute(out, t_ptr, guidance_ptr, grad_ptr, batch, row, block, size: tl.constexpr,
                WIDTH: tl.constexpr):
    """Store the gradient of a tile [CB, SB] of one row of a map; rows of the null branch come first."""
    C: tl.constexpr = size[0]
    HW: tl.constexpr = size[1]
    CB: tl.constexpr = size[5]
    SB: tl.constexpr = size[6]
    TILES: tl.constexpr = (HW + SB - 1) // SB
    c = block // TILES * CB + tl.arange(0, CB)
    s = block % TILES * SB + tl.arange(0, SB)
    null = (size[4] == 2) & (row < batch)
    b = row % batch
    grad = tl.load(grad_ptr + b * WIDTH + size[7] + c, mask=c < C, other=0.0) / HW
    if size[3]:
        g = tl.load(guidance_ptr + tl.load(t_ptr + b))
        grad *= tl.where(null, 1 - g, g)
    else:
        grad = tl.where(null, 0.0, grad)  # exactly 0, even if grad is infinite
    offset = s[None, :] * C + c[:, None] if size[2] else c[:, None] * HW + s[None, :]
    tile = tl.broadcast_to(grad.to(out.dtype.element_ty)[:, None], [CB, SB])
    tl.store(out + row * (C * HW) + offset, tile, mask=(c < C)[:, None] & (s < HW)[None, :])


@jit
def _backward_kernel(grad_ptr, t_ptr, guidance_ptr, outs, batch, sizes: tl.constexpr, WIDTH: tl.constexpr):
    # One program: a tile of one map of one row. Every element is written once.
    pid, row = tl.program_id(1), tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(sizes)):
        if (pid >= sizes[i][8]) & (pid < sizes[i][9]):
            _distribute(outs[i], t_ptr, guidance_ptr, grad_ptr, batch, row, pid - sizes[i][8],
                        tl.constexpr(sizes[i]), WIDTH)


def _sizes(maps: Sequence[Tensor], guided: Sequence[bool], batch: int,
           forward: bool) -> tuple[tuple, int, int]:
    """Return the compile-time constants of every map, the number of programs per row, and the width of the
    feature.

    Constants of a map: (C, HW, channels-last, guided, branches, CB, SB, its first column, its first program,
    the next map's).
    """
    sizes = []
    first, column = 0, 0
    for stage, with_guidance in zip(maps, guided, strict=True):
        c, hw, last = stage.shape[1], stage.shape[2] * stage.shape[3], channels_last(stage)
        if last:  # neighboring threads take neighboring channels; the backward pass has no reduction
            cb = min(power_of_2(c), 256,
                     max(power_of_2(-(-CHUNK // hw)), 32) if forward else max(math.gcd(c, 256), 32))
            sb = min(power_of_2(hw), TILE // cb)
        else:  # neighboring threads take neighboring pixels
            sb = min(power_of_2(hw), TILE // 8)
            cb = min(power_of_2(c), TILE // sb)
        blocks = -(-c // cb) * (1 if forward else -(-hw // sb))
        sizes.append((c, hw, last, bool(with_guidance), stage.shape[0] // batch, cb, sb, column, first,
                      first + blocks))
        first, column = first + blocks, column + c
    return tuple(sizes), first, column


@torch.library.custom_op("lpo_fast::reward_pool", mutates_args=())
def _op(maps: Sequence[Tensor], guided: Sequence[bool], t: Tensor, guidance: Tensor) -> Tensor:
    batch = len(t)
    maps = [dense(stage) for stage in maps]
    out = torch.empty(batch, sum(stage.shape[1] for stage in maps), device=t.device)
    if batch:
        sizes, programs, width = _sizes(maps, guided, batch, forward=True)
        launch(_forward_kernel, (batch, programs), tuple(maps), t.contiguous(), guidance.contiguous(), out,
               batch, sizes=sizes, WIDTH=width, warps=WARPS)
    return out


@_op.register_fake
def _(maps, guided, t, guidance):
    return t.new_empty((t.shape[0], sum(stage.shape[1] for stage in maps)), dtype=torch.float32)


@torch.library.custom_op("lpo_fast::reward_pool_backward", mutates_args=())
def _op_backward(grad: Tensor, maps: Sequence[Tensor], guided: Sequence[bool], t: Tensor,
                 guidance: Tensor) -> list[Tensor]:
    batch = len(t)
    grads = [torch.empty_like(dense(stage)) for stage in maps]
    if batch:
        sizes, programs, width = _sizes(grads, guided, batch, forward=False)
        launch(_backward_kernel, (len(maps[0]), programs), grad.contiguous(), t.contiguous(),
               guidance.contiguous(), tuple(grads), batch, sizes=sizes, WIDTH=width, warps=WARPS)
    return grads


@_op_backward.register_fake
def _(grad, maps, guided, t, guidance):
    return [torch.empty_like(dense(stage)) for stage in maps]


def _setup(ctx, inputs, output) -> None:
    maps, ctx.guided, t, guidance = inputs
    ctx.save_for_backward(t, guidance, *maps)


def _backward(ctx, grad: Tensor):
    t, guidance, *maps = ctx.saved_tensors
    return _op_backward(grad, maps, ctx.guided, t, guidance), None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def reward_pool(maps: Sequence[Tensor], guided: Sequence[bool], t: Tensor, guidance: Tensor) -> Tensor:
    """Return the pooled and guided features [B, ΣC] in fp32 of the maps of the denoiser's down and mid
    blocks.

    maps: [B, C_i, H_i, W_i], or [2B, C_i, H_i, W_i] with the null branch first; fp32, fp16 or bf16 (float64
    takes the reference and gives float64), NCHW or channels-last, all with the same number of rows, dtype and
    device. guided: for each map, whether guidance applies. t: int64 [B]; B may be 0. guidance: fp32 [N] (or
    float64 as the maps), g of every training timestep; it has no gradient.

    The values of t are not checked, because that would synchronize with the device: outside [0, N) the result
    is undefined. Raises ValueError for any other invalid argument.
    """
    expect(len(maps) > 0, "no maps")
    expect(len(maps) == len(guided), f"{len(maps)} maps, but {len(guided)} entries of guided")
    first = maps[0]
    expect_tensor("maps[0]", first, ("B", "C", "H", "W"), first)
    for i, stage in enumerate(maps):
        expect_tensor(f"maps[{i}]", stage, (len(first), "C", "H", "W"), first, (first.dtype,))
        size = math.prod(stage.shape[1:])
        expect(0 < size < 2**31, f"maps[{i}] has shape {tuple(stage.shape)}: nothing to pool, or too much")
    expect_tensor("t", t, ("B",), first, (torch.int64,))
    exact = (torch.float64,) if first.dtype == torch.float64 else ()
    expect_table("guidance", guidance, (), first, (torch.float32, *exact))
    expect(len(first) in (len(t), 2 * len(t)),
           f"maps have {len(first)} rows for {len(t)} timesteps, expected {len(t)} or {2 * len(t)}")
    expect(len(first) == 2 * len(t) or not any(guided), "a guided map needs the null branch too: 2B rows")
    return (_op if fused(first) else reward_pool_reference)(list(maps), list(guided), t, guidance)
