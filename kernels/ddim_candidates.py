"""Compute the K candidates of one denoising step: from the network's outputs to the latents that are scored.

    m = null + g·(text − null),   x0 = x0_x·x_t + x0_m·m, clipped if the schedule clips,   e = e_x·x_t + e_m·m
    x_p[k] = sqrt(a_p)·x0 + direction·e + sigma·z[k]

The seven coefficients of every timestep are in method/schedule.py. ``sampling.trajectory`` calls the operator
once per denoising step. The noise z is given, or drawn in the kernel: Philox4x32-10 and Box–Muller in fp64,
as in ``noise.normal``, so the normals are the same on every device and for every split of the prompts into
batches.

One launch reads x_t and the outputs of both branches and writes the candidates. Plain PyTorch draws z in
about 90 small kernels on int64 and fp64 tensors, and needs about 20 more for guidance and the step.
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

# Elements per program, four per thread: one Philox block, 16 bytes of fp32. Not yet tuned on a GPU.
BLOCK = 512


def ddim_candidates_reference(sched: Schedule, x_t: Tensor, outputs: Tensor, t: Tensor, *, guidance: float,
                              noise: Tensor | Counter, candidates: int) -> Tensor:
    """Compute the candidates in plain PyTorch, in the dtype of x_t.

    Arguments and result as in ``ddim_candidates``.
    """
    if isinstance(noise, Counter):
        seed, epoch = noise.run
        noise = method_noise.normal(seed, epoch, noise.items, noise.step, candidates, x_t.shape[1:])
    mean = schedule.mean(sched, x_t, guide(*outputs.to(x_t.dtype).chunk(2), guidance), t)
    return (mean + sched.table[t, SIGMA][:, None, None, None] * noise).contiguous()


@jit
def _kernel(table_ptr, x_ptr, outputs_ptr, t_ptr, t_stride, noise, out_ptr, batch, guidance, clip,
            C: tl.constexpr, HW: tl.constexpr, LAST: tl.constexpr, CLIP: tl.constexpr, GIVEN: tl.constexpr,
            BLOCK: tl.constexpr):
    # One program computes BLOCK elements of one candidate of one item.
    # noise: (z,), or the run, step and items of a Counter.
    row = tl.program_id(0).to(tl.int64)
    k, b = row // batch, row % batch
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < C * HW
    position = element % HW * C + element // HW if LAST else element  # in memory
    x_t = tl.load(x_ptr + b * (C * HW) + element, mask=mask, other=0.0)
    null = tl.load(outputs_ptr + b * (C * HW) + position, mask=mask, other=0.0).to(tl.float32)
    text = tl.load(outputs_ptr + (b + batch) * (C * HW) + position, mask=mask, other=0.0).to(tl.float32)
    at = table_ptr + tl.load(t_ptr + b * t_stride) * 7  # x0_x, x0_m, e_x, e_m, sqrt_a_p, direction, sigma
    m = null + guidance * (text - null)
    x0 = tl.load(at) * x_t + tl.load(at + 1) * m
    if CLIP:
        x0 = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))  # NaN is kept
    mean = tl.load(at + 4) * x0 + tl.load(at + 5) * (tl.load(at + 2) * x_t + tl.load(at + 3) * m)
    if GIVEN:
        z = tl.load(noise[0] + row * (C * HW) + element, mask=mask, other=0.0)
    else:
        z = normals_at(noise[0], noise[1], noise[2], b, k, tl.program_id(1) * (BLOCK // 4), BLOCK)
    tl.store(out_ptr + row * (C * HW) + element, mean + tl.load(at + 6) * z, mask=mask)


@torch.library.custom_op("lpo_fast::ddim_candidates", mutates_args=())
def _op(table: Tensor, x_t: Tensor, outputs: Tensor, t: Tensor, noise: list[Tensor], candidates: int,
        guidance: float, clip: float | None) -> Tensor:
    batch, c, h, w = x_t.shape
    outputs = dense(outputs)
    out = torch.empty(candidates, batch, c, h, w, device=x_t.device)
    grid = candidates * batch, -(-c * h * w // BLOCK)
    launch(_kernel, grid, table.contiguous(), x_t.contiguous(), outputs, t, t.stride(0),
           tuple(n.contiguous() for n in noise), out, batch, guidance, 0.0 if clip is None else clip, C=c,
           HW=h * w, LAST=channels_last(outputs), CLIP=clip is not None, GIVEN=len(noise) == 1, BLOCK=BLOCK)
    return out


@_op.register_fake
def _(table, x_t, outputs, t, noise, candidates, guidance, clip):
    return x_t.new_empty((candidates, *x_t.shape))


def ddim_candidates(sched: Schedule, x_t: Tensor, outputs: Tensor, t: Tensor, *, guidance: float,
                    noise: Tensor | Counter, candidates: int) -> Tensor:
    """Return the K candidates x_p [K, B, C, H, W] of the next latent.

    x_t: [B, C, H, W], fp32 (float64 takes the reference). outputs: the network's outputs [2B, C, H, W], null
    branch first; fp32, fp16 or bf16, NCHW or channels-last. t: int64 [B], rows of the schedule's table.
    noise: z [K, B, C, H, W] in the dtype of x_t, or a Counter. B may be 0. guidance: a Python number; under
    torch.compile the kernel compiles once per value.

    There is no gradient: call it under torch.no_grad() if x_t, outputs or noise require one. The values of t
    are not checked, because that would synchronize with the device: outside [0, N) the result is undefined.
    Raises ValueError for any other invalid argument, and for guidance that is not finite.
    """
    expect_tensor("x_t", x_t, ("B", "C", "H", "W"), x_t, (torch.float32, torch.float64), gradient=False)
    dtype = x_t.dtype
    expect_tensor("outputs", outputs, (2 * len(x_t), *x_t.shape[1:]), x_t, (*DTYPES, dtype), gradient=False)
    expect_tensor("t", t, (len(x_t),), x_t, (torch.int64,))
    expect_table("sched.table", sched.table, (7,), x_t, (torch.float32, dtype))
    expect_type("candidates", candidates, int)
    if not 1 <= candidates <= CHOICE:  # not expect(): torch.compile cannot format a symbolic number
        raise ValueError(f"candidates is {int(candidates)}, expected 1 to {CHOICE}")
    expect_number("guidance", guidance)
    given = not isinstance(noise, Counter)
    if given:
        expect_tensor("noise", noise, (candidates, *x_t.shape), x_t, (dtype,), gradient=False)
    else:
        method_noise.expect_counter("noise", noise, x_t)
    if not fused(x_t):
        return ddim_candidates_reference(sched, x_t, outputs, t, guidance=guidance, noise=noise,
                                         candidates=candidates)
    return _op(sched.table, x_t, outputs, t, [noise] if given else list(noise), candidates, float(guidance),
               sched.clip)
