"""Golden vectors: inputs and outputs of the official code on tiny models, checked through the training loops' functions.

One line a check, with its largest error max|a − b| / max|b| over its tensors and its tolerance.
"""

import json
import math
import tempfile
from collections.abc import Iterator
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
from lpo_fast.models import loras, texts

FLOAT64, NETWORK, TRAJECTORY = 1e-10, 2e-5, 1e-4  # float64 formulas; one float32 evaluation; a whole sampling run
CLEAR = 1e-4  # choices are compared where scores differ by more than this
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

Check = tuple[str, float, float]  # what, error, tolerance


def error(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|b|; infinite where shapes differ or a is not finite."""
    if a.shape != b.shape or not a.isfinite().all():
        return math.inf
    scale = b.abs().max().item() if b.numel() else 0.0
    return ((a - b).abs().max().item() / scale) if scale else (0.0 if not a.any() else math.inf)


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest error of several tensors."""
    return max(error(a.detach(), b) for a, b in pairs)


def mismatches(a: Tensor, b: Tensor) -> float:
    """How many entries differ; infinite where shapes differ."""
    return float((a != b).sum()) if a.shape == b.shape else math.inf


class Golden:
    """A directory of golden vectors; models are rebuilt as directories so that the real loaders read them."""

    def __init__(self, root: Path, scratch: Path):
        self.root, self.scratch = root, scratch
        self.configs = json.loads((root / "configs.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A safetensors file."""
        return load_file(self.root / f"{name}.safetensors")

    def metadata(self, name: str) -> dict[str, str]:
        """Its metadata."""
        with safe_open(self.root / f"{name}.safetensors", "pt") as file:
            return file.metadata() or {}

    def lrm(self, family: str, multi_scale: bool = True, **settings) -> LatentRewardModel:
        """The golden LRM of a family, through an official directory and ``load_lrm``."""
        weights = self.tensors(f"lrm_{family}_weights")
        folder = self.scratch / f"lrm_{family}_{multi_scale}"
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor.clone()
        configs = {"unet": f"unet_{family}", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
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
        """The golden policy's denoiser."""
        unet = UNet2DConditionModel(**self.configs[f"unet_{family}"])
        weights = self.tensors(f"lpo_{family}_weights")
        unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()})
        return unet.eval()


def lrm_scores(golden: Golden) -> Iterator[Check]:
    """SD1.5 scores and features for every (multi_scale, multi_scale_cfg, guidance)."""
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
    """SDXL scores: two text encoders, added conditions."""
    io = golden.tensors("lrm_sdxl_io")
    for name in sorted(n for n in io if n.startswith("score/")):
        lrm = golden.lrm("sdxl", guidance_scale=float(name.rpartition("gs")[2]), multi_scale_cfg="mscfg1" in name)
        sizes = mismatches(lrm.sizes[0, :2], io["height_width"])
        with torch.no_grad():
            text = lrm.encode([io["input_ids"], io["input_ids_2"]], [io["neg_prompt_ids"]] * 2)
            scores = lrm.score(io["latents"], io["timesteps"], text)
        yield f"SDXL scores, {name.removeprefix('score/')}", sizes or error(scores, io[name]), NETWORK


def lrm_directory(golden: Golden) -> Iterator[Check]:
    """An official LRM directory gives the same scores."""
    io = golden.tensors("lrm_sd15_io")
    lrm = checkpoint.load_lrm(golden.root / "lrm_sd15_checkpoint")
    with torch.no_grad():
        text = lrm.encode([io["input_ids"]], [io["neg_prompt_ids"]])
        scores = lrm.score(io["latents"], io["timesteps"], text)
    yield "official LRM directory", error(scores, io["score/ms1_mscfg0_gs7.5"]), NETWORK


def reward_loss(golden: Golden) -> Iterator[Check]:
    """The reward model's loss and its gradients."""
    io, meta = golden.tensors("lrm_loss"), golden.metadata("lrm_loss")
    for setting in sorted({name.rpartition("/")[0] for name in io if "/" in name}):
        loss_type, _, auxiliary = setting.partition("/aux")
        text, image_0, image_1 = (io[name].clone().requires_grad_() for name in ("text", "image_0", "image_1"))
        logit_scale = torch.tensor(2.6592, dtype=torch.float64, requires_grad=True)
        out = loss.preference(
            *(F.normalize(f, dim=-1, eps=0) for f in (text, image_0, image_1)), logit_scale.exp(), io["label_0"],
            io["label_1"], io["num_examples_per_prompt"], io["timesteps"].view(-1, 2), loss_type=loss_type,
            batch_coeff=float(meta["batch_coeff"]), aux_loss_coeff=float(auxiliary))
        out.backward()
        names = ("loss", "grad_text", "grad_image_0", "grad_image_1", "grad_logit_scale")
        values = (out, text.grad, image_0.grad, image_1.grad, logit_scale.grad)
        pairs = [(value, io[f"{setting}/{name}"]) for name, value in zip(names, values, strict=True)]
        yield f"reward loss and gradients, {setting}", worst(pairs), FLOAT64


def consistent_filter(golden: Golden) -> Iterator[Check]:
    """The rows that each strategy of the filter keeps."""
    for strategy, kept in json.loads((golden.root / "pseudo_preference_kept.json").read_text()).items():
        rows = mpcf.mpcf(golden.root / "pseudo_preference.csv", int(strategy))[0].tolist()
        yield f"consistent filter, strategy {strategy}", float(len(set(rows) ^ set(kept))), 0.0


def pair_selection(golden: Golden) -> Iterator[Check]:
    """Best, worst and valid for every threshold shape."""
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
    """Candidates and mean log densities of all timesteps, prediction types and etas."""
    io, meta = golden.tensors("ddim"), golden.metadata("ddim")
    for setting in sorted({name.rpartition("/")[0] for name in io if "/eta" in name}):
        kind, _, eta = setting.partition("/eta")
        x, out, t, z = (io[f"{kind}/{name}"] for name in ("sample", "model_output", "timesteps", "noise"))
        sched = schedule.ddim(io[f"{kind}/alphas_cumprod"], t, int(meta["num_inference_steps"]), float(eta), kind)
        x_p = ddim_candidates(sched, x, torch.cat([out, out]), t, guidance=1.0, noise=z, candidates=len(z))
        other = schedule.mean(sched, x, out + 0.05 * out.roll(1, 0), t)
        pairs = [(x_p, io[f"{setting}/candidates"])]
        for name, mean in (("log_prob", schedule.mean(sched, x, out, t)), ("log_prob_other_model", other)):
            density = torch.stack([loss.log_density(sched, k, mean, t) for k in io[f"{setting}/candidates"]])
            pairs.append((density, io[f"{setting}/{name}"]))
        yield f"DDIM candidates and log densities, {setting}", worst(pairs), FLOAT64


def pairwise_loss(golden: Golden) -> Iterator[Check]:
    """The step DPO loss, its ratios and both gradients."""
    io, meta = golden.tensors("pairwise_loss"), golden.metadata("pairwise_loss")
    for setting in sorted({name.rpartition("/")[0] for name in io if "/eps" in name}):
        kind, _, eps = setting.partition("/eps")
        got = {name.partition("/")[2]: tensor for name, tensor in io.items() if name.startswith(f"{kind}/")}
        t, policy = got["timesteps"], torch.cat([got["noise_uncond"], got["noise_cond"]]).requires_grad_()
        sched = schedule.ddim(got["alphas_cumprod"], t, 20, float(meta["eta"]), kind)
        out = pair_loss(
            sched, got["x_t"], got["x_win"], got["x_lose"], t, policy, torch.cat([got["ref_uncond"], got["ref_cond"]]),
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
    """A recorded run's random numbers, in place of ``sample.CounterNoise``."""

    def __init__(self, io: dict[str, Tensor]):
        self.io, self.choices = io, io["chosen_candidate"].clone()

    def initial(self) -> Tensor:
        """x_T."""
        return self.io["initial_latents"]

    def steps(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each step, z of the candidates and the candidate that the run went on from."""
        return zip(self.io["candidate_noise"][:count], self.choices[:count], strict=True)

    @torch.no_grad()
    def follow(self, predict: sampling.Predict, score: sampling.Score, sched: schedule.Schedule, guidance: float) -> int:
        """Correct the choices to those whose successors have the recorded scores; how many were recorded otherwise.

        A recorder that draws the choice twice writes down another draw than the run's own; the scores cannot lie.
        """
        x, rows = self.initial(), torch.arange(len(self.initial()))
        for step in range(len(self.choices)):
            t, z = sched.timesteps[step].expand(len(x)), self.io["candidate_noise"][step]
            x_p = ddim_candidates(sched, x, predict(x, t, rows), t, guidance=guidance, noise=z, candidates=len(z))
            if step + 1 == len(self.choices):
                break
            count, following = len(z), self.io["scores"][step + 1]
            flat, prompts = x_p.flatten(0, 1), rows.repeat(count)
            t = sched.timesteps[step + 1].expand(len(flat))
            z = self.io["candidate_noise"][step + 1].repeat(1, count, 1, 1, 1)
            after = ddim_candidates(sched, flat, predict(flat, t, prompts), t, guidance=guidance, noise=z, candidates=count)
            scores = score(after.flatten(0, 1), t.repeat(count), prompts.repeat(count)).view(count, count, len(x))
            self.choices[step] = (scores - following[:, None]).abs().amax(0).argmin(0)
            x = x_p[self.choices[step], rows]
        return int((self.choices != self.io["chosen_candidate"])[:-1].sum())


def recorded_run(golden: Golden, family: str) -> Iterator[Check]:
    """A whole sampling run (scores, choices, pairs) and the LoRA training steps on its first pairs."""
    io, meta = golden.tensors(f"lpo_{family}_io"), golden.metadata(f"lpo_{family}_io")
    lrm, sdxl = golden.lrm(family), family == "sdxl"
    with torch.no_grad():
        text = lrm.encode([io["input_ids"], *([io["input_ids_2"]] if sdxl else [])],
                          [io["neg_prompt_ids"]] * (1 + sdxl))
    policy_text = text
    if lrm.family.zero_null:
        policy_text = replace(text, null=texts.Text(text.null.context * 0, text.null.pooled * 0))
    sched = schedule.from_config(golden.configs["scheduler"], int(meta["num_inference_steps"]), float(meta["eta"]))
    gap = select.gaps(sched, meta["dynamic_threshold"], float(meta["threshold_min"]), float(meta["threshold_max"]))
    policy = Policy(golden.unet(family), policy_text, io.get("time_ids"), full=False)
    guidance, draw = float(meta["guidance_scale"]), Recorded(io)

    def score(x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        return lrm.score(x, t, text[prompts])

    otherwise = draw.follow(policy.predict, score, sched, guidance)
    pairs, scores = sampling.trajectory(policy.predict, score, sched, gap, draw, torch.arange(len(draw.initial())),
                                      guidance=guidance, num_candidates=io["candidate_noise"].shape[1],
                                      window=(0, len(io["candidate_noise"])))
    note = f" ({otherwise} choices recorded otherwise)" if otherwise else ""
    yield f"{family} sampling run, scores{note}", error(scores, io["scores"]), TRAJECTORY

    # Which pairs the official scores keep, where neither a tie nor the threshold is within rounding.
    recorded, ours = (s.transpose(0, 1).flatten(1) for s in (io["scores"], scores))
    ranked, limit = recorded.sort(0).values, gap[pairs.t]
    clear = (ranked[1] - ranked[0] > CLEAR) & (ranked[-1] - ranked[-2] > CLEAR)
    official, own = select.pairs(recorded, limit), select.pairs(ours, limit)
    decided = (official.margin - limit).abs() > CLEAR
    wrong = ((own.best != official.best) | (own.worst != official.worst)) & clear | (own.valid != official.valid) & decided
    yield f"{family} sampling run, choices", float(wrong.sum()), 0.0

    kept, shown = pairs.take(official.valid & clear), clear[official.valid]
    values = {"current_latents": kept.x_t[:, None], "next_latents": torch.stack([kept.winner, kept.loser], 1),
              "prompt_embeds": text.context[kept.prompt][:, None],
              **({"pooled_prompt_embeds": text.pooled[kept.prompt][:, None]} if sdxl else {})}
    times = io["valid/timesteps"][:, 0]
    same = len(times) == len(shown) and not mismatches(kept.t, times[shown])
    apart = worst([(value, io[f"valid/{name}"][shown]) for name, value in values.items()]) if same else math.inf
    yield f"{family} sampling run, {len(times)} kept pairs", apart, TRAJECTORY

    for setting in sorted(n.rpartition("/")[0] for n in io if n.startswith("train/") and n.endswith("/loss")):
        yield from training_step(golden, family, setting, policy_text, sched)


def training_step(golden: Golden, family: str, setting: str, text: texts.Text,
                  sched: schedule.Schedule) -> Iterator[Check]:
    """One LoRA step on the recorded pairs: loss, ratios and every adapter gradient."""
    io, meta = golden.tensors(f"lpo_{family}_io"), golden.metadata(f"lpo_{family}_io")
    case = setting.rpartition("/")[2]
    count, rank = int(meta["train_pairs"]), int(meta["lora_rank"])
    beta = float(meta.get(f"beta_{case}") or meta["beta"])
    eps = float(meta.get(f"eps_{case}") or meta.get("eps") or case.removeprefix("clip"))
    x_p, contexts = io["valid/next_latents"][:count], io["valid/prompt_embeds"][:count, 0]
    prompt = (contexts[:, None] - text.context).abs().flatten(2).amax(2).argmin(1)
    pairs = sampling.LatentPairs(io["valid/current_latents"][:count, 0], x_p[:, 0], x_p[:, 1],
                         io["valid/timesteps"][:count, 0], prompt, torch.ones(count, dtype=torch.bool))
    unet = golden.unet(family)
    loras.add_lora(unet, rank, rank, TARGETS, seed=0)
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    own = {name.removeprefix("train/lora/"): value for name, value in io.items() if name.startswith("train/lora/")}
    if own:
        for name, parameter in parameters.items():
            parameter.data.copy_(own[name])
    else:
        loras.load_lora(unet, golden.root / f"lpo_{family}_checkpoint")
    policy = Policy(unet, text, io.get("time_ids"), full=False)
    out = evaluate(policy, sched, pairs, torch.full((count,), 1 / count), guidance=float(meta["guidance_scale"]),
                   beta=beta, eps=eps)
    out.loss.backward()
    values = {"loss": out.loss, "ratio_win": out.ratio_win, "ratio_lose": out.ratio_lose}
    yield (f"{family} LoRA step, {case}: loss and ratios",
           worst([(value, io[f"{setting}/{name}"]) for name, value in values.items()]), NETWORK)
    # Forward and backward of two float32 computations (without the clamp the recording is 4e-5 from float64 and ours 3e-5),
    # and what the official code loses by subtracting four float32 log densities, times beta.
    densities = max(density.abs().max().item() for density in out[4:8])
    tolerance = 4 * NETWORK + beta * 4 * torch.finfo(torch.float32).eps / 2 * max(densities, 1.0)
    grads = {name.removeprefix(f"{setting}/grad/"): g for name, g in io.items() if name.startswith(f"{setting}/grad/")}
    apart = worst([(parameters[name].grad, grads[name]) for name in grads]) if grads.keys() == parameters.keys() else math.inf
    yield f"{family} LoRA step, {case}: {len(grads)} gradients", apart, tolerance


def lora_files(golden: Golden) -> Iterator[Check]:
    """Both forms of the LoRA hold the same adapter, and each is read and written again unchanged."""
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
    """Run every check whose files are there, printing a line each; how many failed."""
    if not (root / "configs.json").is_file():
        raise InputError(str(root), "holds no golden vectors (configs.json is missing)", "name their directory", "--golden")
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
                print(f"{'ok  ' if ok else 'FAIL'}  {what}: {apart:.1e} (tolerance {tolerance:.0e})", flush=True)
    for name in sorted({file.name for file in root.iterdir()} - used):
        failed += 1
        print(f"FAIL  {name}: no check knows this file")
    print(f"golden vectors: {passed} passed, {failed} failed")
    return failed
