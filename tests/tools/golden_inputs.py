"""python tests/tools/golden_inputs.py DIR: recover inputs of the recorded float64 LoRA steps that DIR lacks.

The steps' networks and latents are float64, but the schedule's coefficients and the null text of SD1.5 are
float32, as the recording machine rounded them, and one unit in the last place moves gradients by 1e-7. The
gradients determine the null text: Gauss-Newton steps find it from our own, together with one factor of
sigma per timestep. That the solution consists of float32 numbers proves it. Then one of the 3⁵ ways to
round the square roots of the official formulas gives the recorded ratios. Writes
lpo_fast/verify/recorded_inputs.safetensors; takes about 20 minutes on one core.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lpo_fast.lpo.policies import Policy
from lpo_fast.method import loss
from lpo_fast.method.schedule import SIGMA, Schedule
from lpo_fast.models import texts
from lpo_fast.verify import recordings, vectors
from lpo_fast.verify.vectors import Golden

CASE = "noclip"
NUDGE, ITERATIONS = 1e-5, 3  # of forward differences; of Gauss-Newton steps
KEEP = 1e-7  # singular values above this share of the largest


def own_inputs(golden: Golden, family: str) -> tuple[dict[str, Tensor], dict[str, str], texts.Text, Schedule]:
    """Return recording, metadata, and in float64 the recorded prompts with our own null text and schedule."""
    io, meta = golden.tensors(f"lpo_{family}_io"), golden.metadata(f"lpo_{family}_io")
    lrm, count = golden.lrm(family), int(meta["train_pairs"])
    ids = [io["neg_prompt_ids"]] * len(lrm.text_encoders)
    with torch.no_grad():
        null = texts.encode(lrm.family, list(lrm.text_encoders), ids).to(torch.float64)
    if lrm.family.zero_null:
        null = texts.Text(null.context * 0, null.pooled * 0)
    context = io["valid/prompt_embeds"][:count, 0].double()
    pooled = io["valid/pooled_prompt_embeds"][:count, 0].double() if family == "sdxl" else context[:, 0]
    sched = recordings.recorded_schedule(golden, meta)
    return io, meta, texts.Text(context, pooled, null), sched.to(torch.float64)


def null_text(golden: Golden) -> Tensor:
    """Return the null text [1, L, D] of the recorded SD1.5 steps, float32."""
    io, meta, text, sched = own_inputs(golden, "sd15")
    unet, times = recordings.adapted(golden, "sd15"), io["valid/timesteps"][:len(text), 0].unique()
    truth = recordings.step_of(io, f"train64/{CASE}")
    names = sorted(name for name in truth if name.startswith("grad/"))
    shape = text.null.context.shape

    def gradients(x: Tensor) -> Tensor:
        table = sched.table.clone()
        table[times, SIGMA] *= 1 + x[:len(times)]
        null = replace(text.null, context=x[len(times):].view(shape))
        nudged_text, nudged_sched = replace(text, null=null), replace(sched, table=table)
        step = recordings.lora_step(io, meta, CASE, unet, nudged_text, nudged_sched)
        return torch.cat([(step[name] / truth[name].abs().max()).flatten() for name in names])

    target = torch.cat([(truth[name] / truth[name].abs().max()).flatten() for name in names])
    x = torch.cat([torch.zeros(len(times), dtype=torch.float64), text.null.context.flatten()])
    start, columns = gradients(x), []
    for index in range(len(x)):
        nudged = x.clone()
        nudged[index] += NUDGE
        columns.append((gradients(nudged) - start) / NUDGE)
        print(f"\rcolumn {index + 1} of {len(x)}", end="", file=sys.stderr, flush=True)
    u, s, v = torch.linalg.svd(torch.stack(columns, 1), full_matrices=False)
    kept = s > KEEP * s[0]
    for _ in range(ITERATIONS):
        residual = target - gradients(x)
        print(f"\nlargest residual {residual.abs().max():.1e}")
        x += v[kept].T @ (u[:, kept].T @ residual / s[kept])
    found = x[len(times):].view(shape)
    exponent = found.abs().float().log2().floor()
    off = (found - found.float()).abs() / 2 ** (exponent.double() - 23)
    print(f"units in the last place off float32: median {off.median():.1e}, of 90 % {off.quantile(0.9):.1e}")
    return found.float()


def roundings(sched: Schedule, t: int, num_steps: int) -> Iterator[Tensor]:
    """Yield the official float32 coefficients of timestep t, [5], for each way to round the square roots."""
    a, a_p = (sched.alphas_cumprod[i].float() for i in (t, max(t - len(sched.table) // num_steps, 0)))

    def root(x: Tensor, units: int) -> Tensor:
        near = x.double().sqrt().float()
        return torch.nextafter(near, near + units) if units else near
    for d in itertools.product((0, 1, -1), repeat=5):
        variance = root((1 - a_p) / (1 - a) * (1 - a / a_p), d[3]) ** 2
        direction = root(1 - a_p - variance, d[4])
        yield torch.stack([root(a, d[0]), root(1 - a, d[1]), root(a_p, d[2]), direction, variance])


@torch.no_grad()
def coefficients(golden: Golden, family: str, case: str, null: Tensor | None) -> dict[int, Tensor]:
    """Return by timestep the coefficients that give the recorded ratios of a family's step."""
    io, meta, text, sched = own_inputs(golden, family)
    if null is not None:
        text = replace(text, null=replace(text.null, context=null.double()))
    policy = Policy(recordings.adapted(golden, family).double(), text, io.get("time_ids"), full=False)
    x, x_p = (io[f"valid/{name}"][:len(text)].double() for name in ("current_latents", "next_latents"))
    t, index = io["valid/timesteps"][:len(text), 0], torch.arange(len(text))
    outputs = [run(x[:, 0], t, index) for run in (policy.predict, policy.reference)]
    found = {}
    for time in t.unique().tolist():
        at, tried = t == time, []
        for candidate in roundings(sched, time, int(meta["num_inference_steps"])):
            table = sched.table.clone()
            table[time] = recordings.rows(candidate[None])[0]
            ours = loss.step_dpo(
                replace(sched, table=table), x[at, 0], x_p[at, 0], x_p[at, 1], t[at],
                *([half[at] for half in out.chunk(2)] for out in outputs), beta=1.0, eps=10.0,
                guidance=float(meta["guidance_scale"]), weight=torch.ones(int(at.sum()), dtype=torch.float64))
            wrong = max((getattr(ours, name) - io[f"{case}/{name}"][at]).abs().max().item()
                        for name in ("ratio_win", "ratio_lose"))
            tried.append((wrong, candidate))
        tried.sort(key=lambda pair: pair[0])
        found[time] = tried[0][1]
        best, second = tried[0][0], tried[1][0]
        print(f"{family}, t = {time}: ratios apart by {best:.1e}, with any other rounding {second:.1e}")
    return found


def main(source: Path) -> None:
    """Recover the inputs and write them."""
    with tempfile.TemporaryDirectory() as scratch:
        golden = Golden(source, Path(scratch))
        null = null_text(golden)
        found = coefficients(golden, "sd15", f"train64/{CASE}", null)
        for time, other in coefficients(golden, "sdxl", "train64", None).items():
            if not torch.equal(found.setdefault(time, other), other):
                raise SystemExit(f"t = {time}: SD1.5 and SDXL were recorded with different coefficients")
    recorded = {"timesteps": torch.tensor(list(found)), "coefficients": torch.stack(list(found.values()))}
    save_file({"null_text": null, **recorded}, vectors.RECORDED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
