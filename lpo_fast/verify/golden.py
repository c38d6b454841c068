"""Check golden vectors: inputs and outputs of the official code on tiny models.

The checks call the functions of the training loops. Each prints one line, with its largest error
max|a − b| / max|b| over its tensors and its tolerance.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig

from lpo_fast.data import mpcf
from lpo_fast.errors import InputError
from lpo_fast.kernels.ddim_candidates import ddim_candidates
from lpo_fast.kernels.pair_loss import pair_loss
from lpo_fast.lpo import sampling
from lpo_fast.lpo.policies import Policy
from lpo_fast.lpo.steps import evaluate
from lpo_fast.lrm import checkpoint
from lpo_fast.lrm.reward import LatentRewardModel
from lpo_fast.method import loss, schedule, select
from lpo_fast.method.schedule import Schedule
from lpo_fast.models import loras, texts

FLOAT64, NETWORK = 1e-10, 2e-5  # formulas in float64; one evaluation of a network in float32
TRAJECTORY, EXACT = 1e-4, 1e-9  # a complete sampling run in float32; a LoRA step in float64
ROUNDING = 4 * torch.finfo(torch.float32).eps  # coefficients in float32, each of a few operations
CLEAR = 1e-4  # choices are compared where scores differ by more than this
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
VALUES = ("loss", "ratio_win", "ratio_lose")  # of a LoRA step, besides its gradients
RECORDED = Path(__file__).with_name("recorded_inputs.safetensors")  # see recorded_inputs

Check = tuple[str, float, float]  # what, error, tolerance


def error(a: Tensor, b: Tensor) -> float:
    """Return max|a − b| / max|b|; infinite where shapes differ or a is not finite."""
    if a.shape != b.shape or not a.isfinite().all():
        return math.inf
    scale = b.abs().max().item() if b.numel() else 0.0
    return ((a - b).abs().max().item() / scale) if scale else (0.0 if not a.any() else math.inf)


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the largest error of several tensors."""
    return max(error(a.detach(), b) for a, b in pairs)


def mismatches(a: Tensor, b: Tensor) -> float:
    """Return how many entries differ; infinite where shapes differ."""
    return float((a != b).sum()) if a.shape == b.shape else math.inf


class Golden:
    """Read a directory of golden vectors; models become directories, so that the real loaders read them."""

    def __init__(self, root: Path, scratch: Path):
        self.root, self.scratch = root, scratch
        self.configs = json.loads((root / "configs.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a safetensors file."""
        return load_file(self.root / f"{name}.safetensors")

    def metadata(self, name: str) -> dict[str, str]:
        """Return its metadata."""
        with safe_open(self.root / f"{name}.safetensors", "pt") as file:
            return file.metadata() or {}

    def lrm(self, family: str, multi_scale: bool = True, **settings) -> LatentRewardModel:
        """Return the golden LRM of a family, read through an official directory and ``load_lrm``."""
        weights = self.tensors(f"lrm_{family}_weights")
        folder = self.scratch / f"lrm_{family}_{multi_scale}"
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor.clone()
        configs = {"unet": f"unet_{family}", "text_encoder": "text_encoder",
                   "text_encoder_2": "text_encoder_2"}
        for part in configs.keys() & parts.keys():
            (folder / part).mkdir(parents=True, exist_ok=True)
            config = dict(self.configs[configs[part]])
            if part != "unet":
                config = CLIPTextConfig(**config).to_dict()
            (folder / part / "config.json").write_text(json.dumps(config))
            file = "diffusion_pytorch_model.safetensors" if part == "unet" else "model.safetensors"
            save_file(parts[part], folder / part / file, {"format": "pt"})
        heads = {"visual_projection": parts["visual_projection" if multi_scale else "visual_projection_mid"],
                 "logit_scale": weights["logit_scale"]}
        if "text_projection" in parts:
            heads["text_projection"] = parts["text_projection"]
        torch.save(heads, folder / "state_dict.pt")
        return checkpoint.load_lrm(folder, **settings)

    def unet(self, family: str) -> UNet2DConditionModel:
        """Return the golden policy's denoiser."""
        unet = UNet2DConditionModel(**self.configs[f"unet_{family}"])
        weights = self.tensors(f"lpo_{family}_weights")
        unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()})
        return unet.eval()


def lrm_scores(golden: Golden) -> Iterator[Check]:
    """Check SD1.5 scores and features for every (multi_scale, multi_scale_cfg, guidance)."""
    io = golden.tensors("lrm_sd15_io")
    for name in sorted(n for n in io if n.startswith("score/")):
        setting = name.removeprefix("score/")
        multi, cfg, guidance = (part.lstrip("mscfg") for part in setting.split("_"))
        lrm = golden.lrm("sd15", multi == "1", multi_scale_cfg=cfg == "1", guidance_scale=float(guidance))
        with torch.no_grad():
            text = lrm.encode([io["input_ids"]], [io["neg_prompt_ids"]])
            at = io["latents"], io["timesteps"], text
            image, words, scores = lrm.image_features(*at), lrm.text_features(text), lrm.score(*at)
        features = [(image, F.normalize(io[f"image_features/{setting}"], dim=-1)),
                    (words, F.normalize(io[f"text_features/{setting}"], dim=-1))]
        yield f"SD1.5 scores and features, {setting}", max(error(scores, io[name]), worst(features)), NETWORK


def lrm_scores_sdxl(golden: Golden) -> Iterator[Check]:
    """Check SDXL scores: two text encoders, added conditions."""
    io = golden.tensors("lrm_sdxl_io")
    for name in sorted(n for n in io if n.startswith("score/")):
        lrm = golden.lrm("sdxl", guidance_scale=float(name.rpartition("gs")[2]),
                         multi_scale_cfg="mscfg1" in name)
        sizes = mismatches(lrm.sizes[0, :2], io["height_width"])
        with torch.no_grad():
            text = lrm.encode([io["input_ids"], io["input_ids_2"]], [io["neg_prompt_ids"]] * 2)
            scores = lrm.score(io["latents"], io["timesteps"], text)
        yield f"SDXL scores, {name.removeprefix('score/')}", sizes or error(scores, io[name]), NETWORK


def lrm_directory(golden: Golden) -> Iterator[Check]:
    """Check that an official LRM directory gives the same scores."""
    io = golden.tensors("lrm_sd15_io")
    lrm = checkpoint.load_lrm(golden.root / "lrm_sd15_checkpoint")
    with torch.no_grad():
        text = lrm.encode([io["input_ids"]], [io["neg_prompt_ids"]])
        scores = lrm.score(io["latents"], io["timesteps"], text)
    yield "official LRM directory", error(scores, io["score/ms1_mscfg0_gs7.5"]), NETWORK


def reward_loss(golden: Golden) -> Iterator[Check]:
    """Check the reward model's loss and its gradients."""
    io, meta = golden.tensors("lrm_loss"), golden.metadata("lrm_loss")
    for setting in sorted({name.rpartition("/")[0] for name in io if "/" in name}):
        loss_type, _, auxiliary = setting.partition("/aux")
        text, image_0, image_1 = (io[name].clone().requires_grad_()
                                  for name in ("text", "image_0", "image_1"))
        logit_scale = torch.tensor(2.6592, dtype=torch.float64, requires_grad=True)
        out = loss.preference(
            *(F.normalize(f, dim=-1, eps=0) for f in (text, image_0, image_1)), logit_scale.exp(),
            io["label_0"], io["label_1"], io["num_examples_per_prompt"], io["timesteps"].view(-1, 2),
            loss_type=loss_type, batch_coeff=float(meta["batch_coeff"]), aux_loss_coeff=float(auxiliary))
        out.backward()
        names = ("loss", "grad_text", "grad_image_0", "grad_image_1", "grad_logit_scale")
        values = (out, text.grad, image_0.grad, image_1.grad, logit_scale.grad)
        pairs = [(value, io[f"{setting}/{name}"]) for name, value in zip(names, values, strict=True)]
        yield f"reward loss and gradients, {setting}", worst(pairs), FLOAT64


def consistent_filter(golden: Golden) -> Iterator[Check]:
    """Check the rows that each strategy of the filter keeps."""
    for strategy, kept in json.loads((golden.root / "pseudo_preference_kept.json").read_text()).items():
        rows = mpcf.mpcf(golden.root / "pseudo_preference.csv", int(strategy))[0].tolist()
        yield f"consistent filter, strategy {strategy}", float(len(set(rows) ^ set(kept))), 0.0


def pair_selection(golden: Golden) -> Iterator[Check]:
    """Check best, worst and valid for every threshold shape."""
    io, meta = golden.tensors("pair_selection"), golden.metadata("pair_selection")
    sched = schedule.from_config(golden.configs["scheduler"], 20)
    for setting in sorted(name.rpartition("/")[0] for name in io if name.endswith("/valid")):
        count, shape = setting.split("/")
        low, high = float(meta["threshold_min"]), float(meta["threshold_max"])
        if shape == "None":
            shape, low, high = "none", *[float(meta["threshold"])] * 2
        gap = select.gaps(sched, shape, low, high)[io[f"{count}/timesteps"]]
        pair = select.pairs(io[f"{count}/scores"], gap)
        wrong = mismatches(torch.stack([pair.best, pair.worst]), io[f"{setting}/indices"])
        yield f"pair selection, {setting}", wrong + mismatches(pair.valid, io[f"{setting}/valid"].bool()), 0.0


def ddim(golden: Golden) -> Iterator[Check]:
    """Check candidates and mean log densities of all timesteps, prediction types and etas."""
    io, meta = golden.tensors("ddim"), golden.metadata("ddim")
    for setting in sorted({name.rpartition("/")[0] for name in io if "/eta" in name}):
        kind, _, eta = setting.partition("/eta")
        x, out, t, z = (io[f"{kind}/{name}"] for name in ("sample", "model_output", "timesteps", "noise"))
        sched = schedule.ddim(io[f"{kind}/alphas_cumprod"], t, int(meta["num_inference_steps"]), float(eta),
                              kind)
        x_p = ddim_candidates(sched, x, torch.cat([out, out]), t, guidance=1.0, noise=z, candidates=len(z))
        other = schedule.mean(sched, x, out + 0.05 * out.roll(1, 0), t)
        pairs = [(x_p, io[f"{setting}/candidates"])]
        for name, mean in (("log_prob", schedule.mean(sched, x, out, t)), ("log_prob_other_model", other)):
            density = torch.stack([loss.log_density(sched, k, mean, t) for k in io[f"{setting}/candidates"]])
            pairs.append((density, io[f"{setting}/{name}"]))
        yield f"DDIM candidates and log densities, {setting}", worst(pairs), FLOAT64


def pairwise_loss(golden: Golden) -> Iterator[Check]:
    """Check the step DPO loss, its ratios and both gradients."""
    io, meta = golden.tensors("pairwise_loss"), golden.metadata("pairwise_loss")
    for setting in sorted({name.rpartition("/")[0] for name in io if "/eps" in name}):
        kind, _, eps = setting.partition("/eps")
        got = {name.partition("/")[2]: tensor for name, tensor in io.items() if name.startswith(f"{kind}/")}
        t, policy = got["timesteps"], torch.cat([got["noise_uncond"], got["noise_cond"]]).requires_grad_()
        sched = schedule.ddim(got["alphas_cumprod"], t, 20, float(meta["eta"]), kind)
        out = pair_loss(
            sched, got["x_t"], got["x_win"], got["x_lose"], t,
            policy, torch.cat([got["ref_uncond"], got["ref_cond"]]),
            torch.full((len(t),), 1 / len(t), dtype=torch.float64), guidance=float(meta["guidance_scale"]),
            beta=float(meta["beta"]), eps=float(eps))
        out.loss.backward()
        names = ("loss", "per_pair_loss", "ratio_win", "ratio_lose")
        pairs = [(value, io[f"{setting}/{name}"]) for name, value in zip(names, out[:4], strict=True)]
        names = ("log_prob_win", "ref_log_prob_win", "log_prob_lose", "ref_log_prob_lose")
        pairs += [(value, got[name]) for name, value in zip(names, out[4:8], strict=True)]
        grads = torch.cat([io[f"{setting}/grad_uncond"], io[f"{setting}/grad_cond"]])
        pairs.append((policy.grad, grads))
        yield f"pair loss and gradients, {setting}", worst(pairs), FLOAT64


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


# The files that a check needs, and the check.
CHECKS = {
    ("lrm_sd15_weights.safetensors", "lrm_sd15_io.safetensors"): lrm_scores,
    ("lrm_sdxl_weights.safetensors", "lrm_sdxl_io.safetensors"): lrm_scores_sdxl,
    ("lrm_sd15_checkpoint/state_dict.pt", "lrm_sd15_io.safetensors"): lrm_directory,
    ("lrm_loss.safetensors",): reward_loss,
    ("pseudo_preference.csv", "pseudo_preference_kept.json"): consistent_filter,
    ("pair_selection.safetensors",): pair_selection,
    ("ddim.safetensors",): ddim,
    ("pairwise_loss.safetensors",): pairwise_loss,
    ("lpo_sd15_weights.safetensors", "lpo_sd15_io.safetensors", "lrm_sd15_weights.safetensors",
     "lpo_sd15_checkpoint/unet_lora.pt"): lambda golden: recorded_run(golden, "sd15"),
    ("lpo_sdxl_weights.safetensors", "lpo_sdxl_io.safetensors",
     "lrm_sdxl_weights.safetensors"): lambda golden: recorded_run(golden, "sdxl"),
    ("lpo_sd15_weights.safetensors", "lpo_sd15_checkpoint/unet_lora.pt",
     "pytorch_lora_weights.safetensors"): lora_files,
}


def check(root: Path) -> int:
    """Run every check whose files are present, print a line for each, and return how many failed."""
    if not (root / "configs.json").is_file():
        raise InputError(str(root), "holds no golden vectors (configs.json is missing)",
                         "name their directory", "--golden")
    failed = passed = 0
    used = {"configs.json", "README.md"}
    with tempfile.TemporaryDirectory() as scratch:
        golden = Golden(root, Path(scratch))
        for files, checks in CHECKS.items():
            if missing := [file for file in files if not (root / file).is_file()]:
                print(f"absent  {missing[0]}")
                continue
            used |= {file.partition("/")[0] for file in files}
            for what, apart, tolerance in checks(golden):
                ok = apart <= tolerance
                failed, passed = failed + (not ok), passed + ok
                print(f"{'ok  ' if ok else 'FAIL'}  {what}: {apart:.1e} (tolerance {tolerance:.0e})",
                      flush=True)
    for name in sorted({file.name for file in root.iterdir()} - used):
        failed += 1
        print(f"FAIL  {name}: no check knows this file")
    print(f"golden vectors: {passed} passed, {failed} failed")
    return failed
