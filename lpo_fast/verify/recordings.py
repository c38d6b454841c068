"""Check recorded runs of the official code: sampling with candidates, LoRA steps, and LoRA files."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from lpo_fast.lpo import sampling
from lpo_fast.lpo.policies import Policy
from lpo_fast.lpo.steps import evaluate
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.method import schedule, select
from lpo_fast.method.schedule import Schedule
from lpo_fast.models import loras, texts
from lpo_fast.verify.vectors import (
    CLEAR,
    EXACT,
    NETWORK,
    RECORDED,
    ROUNDING,
    TARGETS,
    TRAJECTORY,
    VALUES,
    Check,
    Golden,
    error,
    mismatches,
    worst,
)


class Recorded:
    """Stand in for ``sampling.CounterNoise`` with the random numbers of a recorded run."""

    def __init__(self, io: dict[str, Tensor]):
        self.io = io

    def initial(self) -> Tensor:
        """Return x_T."""
        return self.io["initial_latents"]

    def steps(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each step z of the candidates, and the candidate with which the run continued."""
        return zip(self.io["candidate_noise"][:count], self.io["chosen_candidate"][:count], strict=True)


def recorded_run(golden: Golden, family: str) -> Iterator[Check]:
    """Check a recorded sampling run and the LoRA steps on its first kept pairs."""
    io, lrm, sdxl = golden.tensors(f"lpo_{family}_io"), golden.lrm(family), family == "sdxl"
    with torch.no_grad():
        text = lrm.encode([io["input_ids"], *([io["input_ids_2"]] if sdxl else [])],
                          [io["neg_prompt_ids"]] * (1 + sdxl))
    policy_text = text
    if lrm.family.zero_null:
        policy_text = replace(text, null=texts.Text(text.null.context * 0, text.null.pooled * 0))
    yield from sampling_run(golden, family, lrm, text, policy_text)
    yield from training_steps(golden, family, policy_text)


def sampling_run(golden: Golden, family: str, lrm: LatentRewardModel, text: texts.Text,
                 policy_text: texts.Text) -> Iterator[Check]:
    """Check scores, choices and kept pairs of a run that continues with the recorded candidates.

    Every ``chosen_candidate`` decides the next step's scores, except the last: nothing is recorded after it.
    """
    io, meta = golden.tensors(f"lpo_{family}_io"), golden.metadata(f"lpo_{family}_io")
    sched, draw = recorded_schedule(golden, meta), Recorded(io)
    gap = select.gaps(sched, meta["dynamic_threshold"], float(meta["threshold_min"]),
                      float(meta["threshold_max"]))
    policy = Policy(golden.unet(family), policy_text, io.get("time_ids"), full=False)

    def score(x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        return lrm.score(x, t, text[prompts])

    pairs, scores = sampling.trajectory(
        policy.predict, score, sched, gap, draw, torch.arange(len(draw.initial())),
        guidance=float(meta["guidance_scale"]), num_candidates=io["candidate_noise"].shape[1],
        window=(0, len(io["candidate_noise"])))
    yield f"{family} sampling run, scores", error(scores, io["scores"]), TRAJECTORY

    # Which pairs the official scores keep, where neither a tie nor the threshold is within rounding.
    recorded, ours = (s.transpose(0, 1).flatten(1) for s in (io["scores"], scores))
    ranked, limit = recorded.sort(0).values, gap[pairs.t]
    clear = (ranked[1] - ranked[0] > CLEAR) & (ranked[-1] - ranked[-2] > CLEAR)
    official, own = select.pairs(recorded, limit), select.pairs(ours, limit)
    decided = (official.margin - limit).abs() > CLEAR
    wrong = ((own.best != official.best) | (own.worst != official.worst)) & clear
    wrong |= (own.valid != official.valid) & decided
    yield f"{family} sampling run, choices", float(wrong.sum()), 0.0

    kept, shown = pairs.take(official.valid & clear), clear[official.valid]
    values = {"current_latents": kept.x_t[:, None], "next_latents": torch.stack([kept.winner, kept.loser], 1),
              "prompt_embeds": text.context[kept.prompt][:, None],
              **({"pooled_prompt_embeds": text.pooled[kept.prompt][:, None]} if family == "sdxl" else {})}
    times = io["valid/timesteps"][:, 0]
    same = len(times) == len(shown) and not mismatches(kept.t, times[shown])
    apart = (worst([(value, io[f"valid/{name}"][shown]) for name, value in values.items()])
             if same else math.inf)
    yield f"{family} sampling run, {len(times)} kept pairs", apart, TRAJECTORY


def recorded_schedule(golden: Golden, meta: dict[str, str]) -> Schedule:
    """Return our own schedule of a recorded run, in float32."""
    config, steps = golden.configs["scheduler"], int(meta["num_inference_steps"])
    return schedule.from_config(config, steps, float(meta["eta"]))


def training_steps(golden: Golden, family: str, text: texts.Text) -> Iterator[Check]:
    """Check the LoRA steps against the official step evaluated in float64, ``train64``.

    In float64 ours must equal it, from the inputs that the recording had. In float32, from our own inputs,
    ours may be at most twice as far from it as the official float32 step, ``train``. text: our features of
    all prompts.
    """
    io, meta = golden.tensors(f"lpo_{family}_io"), golden.metadata(f"lpo_{family}_io")
    contexts, sched = io["valid/prompt_embeds"][:int(meta["train_pairs"]), 0], recorded_schedule(golden, meta)
    text = text[(contexts[:, None] - text.context).abs().flatten(2).amax(2).argmin(1)]
    exact_text, exact_sched = recorded_inputs(io, text, sched)
    null, exact_null = text.null.context, exact_text.null.context
    if exact_null.any():
        yield f"{family} LoRA step, recorded null text", error(null, exact_null), NETWORK
    t = io["valid/timesteps"][:len(contexts), 0]
    yield f"{family} LoRA step, recorded schedule", error(sched.table[t], exact_sched.table[t]), ROUNDING

    unet = adapted(golden, family)
    for loss_name in sorted(name for name in io if name.startswith("train/") and name.endswith("/loss")):
        case = loss_name.removeprefix("train").removesuffix("/loss")  # "" for the only one
        truth, official = step_of(io, f"train64{case}"), step_of(io, f"train{case}")
        name, grads = case[1:] or f"clip{meta['eps']}", official.keys() - set(VALUES)
        exact = lora_step(io, meta, name, unet, exact_text, exact_sched)
        yield f"{family} LoRA step, {name}, float64", distance(exact, truth, exact), EXACT
        step, limit = lora_step(io, meta, name, unet, text, sched), 2 * distance(official, truth, grads)
        yield f"{family} LoRA step, {name}, float32: loss and ratios", distance(step, truth, VALUES), NETWORK
        yield (f"{family} LoRA step, {name}, float32: {len(grads)} gradients", distance(step, truth, grads),
               limit if math.isfinite(limit) else 0.0)


def step_of(io: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    """Return the loss, the ratios and the gradients of a recorded LoRA step, as ``lora_step`` does."""
    recorded = {name.removeprefix(f"{case}/"): value for name, value in io.items() if name.startswith(case)}
    return {name: value for name, value in recorded.items() if name in VALUES or name.startswith("grad/")}


def distance(step: dict[str, Tensor], truth: dict[str, Tensor], names: Iterable[str]) -> float:
    """Return the largest error of the named tensors; infinite if the steps have different tensors."""
    return worst([(step[name], truth[name]) for name in names]) if step.keys() == truth.keys() else math.inf


def recorded_inputs(io: dict[str, Tensor], text: texts.Text, sched: Schedule) -> tuple[texts.Text, Schedule]:
    """Return text features and schedule of the recorded LoRA steps, in float64, from our own.

    ``train64`` evaluates networks and latents in float64, but text features and coefficients of the
    schedule are float32, as the recording machine rounded them. The prompts' features are recorded. The
    coefficients (each a square root, up to one unit in the last place off) and the null text of SD1.5 are
    not: RECORDED holds them, recovered from ``train64`` itself by tests/tools/golden_inputs.py.
    """
    recorded, count = load_file(RECORDED), len(text)
    text, sched = text.to(torch.float64), sched.to(torch.float64)
    text = replace(text, context=io["valid/prompt_embeds"][:count, 0].double())
    if "valid/pooled_prompt_embeds" in io:
        text = replace(text, pooled=io["valid/pooled_prompt_embeds"][:count, 0].double())
    if text.null.context.any():
        text = replace(text, null=replace(text.null, context=recorded["null_text"].double()))
    table = sched.table.clone()
    table[recorded["timesteps"]] = rows(recorded["coefficients"])
    return text, replace(sched, table=table)


def rows(coefficients: Tensor) -> Tensor:
    """Return rows of a schedule's table, [N, 7] in float64, from the official code's float32 coefficients.

    coefficients: [N, 5], sqrt(a_t), sqrt(1 − a_t), sqrt(a_p), sqrt(1 − a_p − sigma²), sigma².
    """
    signal, noise, signal_p, direction, variance = coefficients.double().T
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    return torch.stack([1 / signal, -noise / signal, zero, one, signal_p, direction, variance.sqrt()], 1)


def adapted(golden: Golden, family: str) -> UNet2DConditionModel:
    """Return the golden policy's denoiser with the adapter of the recorded LoRA steps."""
    io, meta = golden.tensors(f"lpo_{family}_io"), golden.metadata(f"lpo_{family}_io")
    unet, rank = golden.unet(family), int(meta["lora_rank"])
    loras.add_lora(unet, rank, rank, TARGETS, seed=0)
    own = {name.removeprefix("train/lora/"): value for name, value in io.items()
           if name.startswith("train/lora/")}
    if own:
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(own[name])
    else:
        loras.load_lora(unet, golden.root / f"lpo_{family}_checkpoint")
    return unet


def lora_step(io: dict[str, Tensor], meta: dict[str, str], case: str, unet: UNet2DConditionModel,
              text: texts.Text, sched: Schedule) -> dict[str, Tensor]:
    """Evaluate a LoRA step on the recorded pairs in the precision of the schedule.

    Returns loss, ratios, and gradients by name. text: the features of each pair's prompt. unet: its precision
    changes.
    """
    count, dtype = len(text), sched.table.dtype
    x_p = io["valid/next_latents"][:count].to(dtype)
    pairs = sampling.LatentPairs(
        io["valid/current_latents"][:count, 0].to(dtype), x_p[:, 0], x_p[:, 1],
        io["valid/timesteps"][:count, 0], torch.arange(count), torch.ones(count, dtype=torch.bool))
    policy = Policy(unet.to(dtype), text, io.get("time_ids"), full=False)
    beta, eps = meta.get(f"beta_{case}") or meta["beta"], meta.get(f"eps_{case}") or case.removeprefix("clip")
    out = evaluate(policy, sched, pairs, torch.full((count,), 1 / count, dtype=dtype),
                   guidance=float(meta["guidance_scale"]), beta=float(beta), eps=float(eps))
    parameters = {f"grad/{name}": p for name, p in unet.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.loss, list(parameters.values()))
    return {"loss": out.loss.detach(), "ratio_win": out.ratio_win, "ratio_lose": out.ratio_lose,
            **dict(zip(parameters, grads, strict=True))}


def lora_files(golden: Golden) -> Iterator[Check]:
    """Check that both forms of the LoRA hold the same adapter, and that reading and writing keeps them."""
    forms = [golden.root / "lpo_sd15_checkpoint" / loras.LORA_OFFICIAL, golden.root / loras.LORA_DIFFUSERS]
    states = [loras.read_lora(form) for form in forms]
    same = states[0].keys() == states[1].keys()
    apart = worst([(states[0][n], states[1][n]) for n in states[0]]) if same else math.inf
    yield "LoRA files, official = diffusers", apart, 0.0
    rank = next(len(tensor) for name, tensor in states[0].items() if "lora_A" in name)
    for form in forms:
        unet = golden.unet("sd15")
        loras.add_lora(unet, rank, rank, TARGETS, seed=0)
        loras.load_lora(unet, form)
        loras.save_lora(unet, golden.scratch)
        written = load_file(golden.scratch / loras.LORA_DIFFUSERS)
        original = load_file(forms[1])
        same = written.keys() == original.keys()
        apart = worst([(written[n], original[n]) for n in original]) if same else math.inf
        yield f"LoRA files, {form.name} read and written", apart, 0.0
