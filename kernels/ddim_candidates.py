"""K candidates of one denoising step: from the network's outputs to the latents that are scored.

    m = null + g·(text − null),   x0 = x0_x·x_t + x0_m·m, clipped if the schedule says so,   e = e_x·x_t + e_m·m
    x_p[k] = sqrt(a_p)·x0 + direction·e + sigma·z[k]          (schedule.py has the seven numbers of every timestep)

``sample.trajectory`` calls it once a step. z is given, or drawn in the kernel: Philox4x32-10 and Box–Muller in fp64 as in
``noise.normal``, so that the normals are the same on every device and however prompts are batched. One launch reads x_t and
both passes' outputs and writes the candidates; plain PyTorch draws z in some ninety small kernels of int64 and fp64
tensors, and guides and steps in twenty more.
"""


import torch
from torch import Tensor

from lpo_fast.method import noise as method_noise
from lpo_fast.method import schedule
from lpo_fast.method.loss import guide
from lpo_fast.method.noise import CHOICE, Counter, normals_at
from lpo_fast.method.schedule import SIGMA, Schedule
from lpo_fast.system.launch import (
    DTYPES,
    channels_last,
    dense,
    expect_number,
    expect_table,
    expect_tensor,
    expect_type,
    fused,
    jit,
    launch,
    tl,
)

BLOCK = 512  # elements of a program, four a thread: a Philox block, 16 bytes of fp32; not yet measured on a GPU


def ddim_candidates_reference(sched: Schedule, x_t: Tensor, outputs: Tensor, t: Tensor, *, guidance: float,
                              noise: Tensor | Counter, candidates: int) -> Tensor:
    """The definition, in the dtype of x_t; arguments as ``ddim_candidates``."""
    if isinstance(noise, Counter):
        seed, epoch = noise.run
        noise = method_noise.normal(seed, epoch, noise.items, noise.step, candidates, x_t.shape[1:])
    mean = schedule.mean(sched, x_t, guide(*outputs.to(x_t.dtype).chunk(2), guidance), t)
    return (mean + sched.table[t, SIGMA][:, None, None, None] * noise).contiguous()


@jit
def _kernel(table_ptr, x_ptr, outputs_ptr, t_ptr, t_stride, noise, out_ptr, batch, guidance, clip, C: tl.constexpr,
            HW: tl.constexpr, LAST: tl.constexpr, CLIP: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    # A program: BLOCK elements of one candidate of one item. noise: (z,), or run, step and items of a Counter.
    row = tl.program_id(0).to(tl.int64)
    k, b = row // batch, row % batch
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < C * HW
    place = element % HW * C + element // HW if LAST else element
    x_t = tl.load(x_ptr + b * (C * HW) + element, mask=mask, other=0.0)
    null = tl.load(outputs_ptr + b * (C * HW) + place, mask=mask, other=0.0).to(tl.float32)
    text = tl.load(outputs_ptr + (b + batch) * (C * HW) + place, mask=mask, other=0.0).to(tl.float32)
    at = table_ptr + tl.load(t_ptr + b * t_stride) * 7  # x0_x, x0_m, e_x, e_m, sqrt_a_p, direction, sigma
    m = null + guidance * (text - null)
    x0 = tl.load(at) * x_t + tl.load(at + 1) * m
    if CLIP:
        x0 = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))  # NaN stays
    mean = tl.load(at + 4) * x0 + tl.load(at + 5) * (tl.load(at + 2) * x_t + tl.load(at + 3) * m)
    if GIVEN:
        z = tl.load(noise[0] + row * (C * HW) + element, mask=mask, other=0.0)
    else:
        z = normals_at(noise[0], noise[1], noise[2], b, k, tl.program_id(1) * (BLOCK // 4), BLOCK)
    tl.store(out_ptr + row * (C * HW) + element, mean + tl.load(at + 6) * z, mask=mask)


@torch.library.custom_op("lpo_fast::ddim_candidates", mutates_args=())
def _op(table: Tensor, x_t: Tensor, outputs: Tensor, t: Tensor, noise: list[Tensor], candidates: int, guidance: float,
        clip: float | None) -> Tensor:
    (batch, c, h, w), outputs = x_t.shape, dense(outputs)
    out = torch.empty(candidates, batch, c, h, w, device=x_t.device)
    grid = candidates * batch, -(-c * h * w // BLOCK)
    launch(_kernel, grid, table.contiguous(), x_t.contiguous(), outputs, t, t.stride(0),
           tuple(n.contiguous() for n in noise), out, batch, guidance, 0.0 if clip is None else clip, C=c, HW=h * w,
           LAST=channels_last(outputs), CLIP=clip is not None, GIVEN=len(noise) == 1, BLOCK=BLOCK)
    return out


@_op.register_fake
def _(table, x_t, outputs, t, noise, candidates, guidance, clip):
    return x_t.new_empty((candidates, *x_t.shape))


def ddim_candidates(sched: Schedule, x_t: Tensor, outputs: Tensor, t: Tensor, *, guidance: float, noise: Tensor | Counter,
                    candidates: int) -> Tensor:
    """x_p [K, B, C, H, W] of x_t [B, C, H, W] and the network's outputs [2B, C, H, W], null pass first.

    x_t: fp32 (float64 takes the reference). outputs: fp32, fp16 or bf16, NCHW or channels-last. t: int64 [B], rows of the
    schedule's table. noise: z [K, B, C, H, W] in the dtype of x_t, or a Counter. B may be 0. guidance: a Python number; under
    torch.compile the kernel costs one compilation a value. There is no gradient: call it under no_grad if x_t, outputs or
    noise require one. t is not looked at (that would read it back): outside [0, N) the result is undefined. Raises
    ValueError for anything else, and for guidance that is not finite.
    """
    expect_tensor("x_t", x_t, ("B", "C", "H", "W"), x_t, (torch.float32, torch.float64), gradient=False)
    dtype = x_t.dtype
    expect_tensor("outputs", outputs, (2 * len(x_t), *x_t.shape[1:]), x_t, (*DTYPES, dtype), gradient=False)
    expect_tensor("t", t, (len(x_t),), x_t, (torch.int64,))
    expect_table("sched.table", sched.table, (7,), x_t, (torch.float32, dtype))
    expect_type("candidates", candidates, int)
    if not 1 <= candidates <= CHOICE:  # no expect: torch.compile, where candidates is a symbol, cannot format the message
        raise ValueError(f"candidates is {int(candidates)}, expected 1 to {CHOICE}")
    expect_number("guidance", guidance)
    given = not isinstance(noise, Counter)
    if given:
        expect_tensor("noise", noise, (candidates, *x_t.shape), x_t, (dtype,), gradient=False)
    else:
        method_noise.expect_counter("noise", noise, x_t)
    if not fused(x_t):
        return ddim_candidates_reference(sched, x_t, outputs, t, guidance=guidance, noise=noise, candidates=candidates)
    return _op(sched.table, x_t, outputs, t, [noise] if given else list(noise), candidates, float(guidance), sched.clip)
