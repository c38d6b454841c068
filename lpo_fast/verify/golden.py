"""Check golden vectors: inputs and outputs of the official code on tiny models.

The checks call the functions of the training loops. Each prints one line, with its largest error
max|a − b| / max|b| over its tensors and its tolerance.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from lpo_fast.data import mpcf
from lpo_fast.errors import InputError
from lpo_fast.kernels.ddim_candidates import ddim_candidates
from lpo_fast.kernels.pair_loss import pair_loss
from lpo_fast.lrm import checkpoint
from lpo_fast.method import loss, schedule, select
from lpo_fast.verify.recordings import lora_files, recorded_run
from lpo_fast.verify.vectors import (
    FLOAT64,
    NETWORK,
    Check,
    Golden,
    error,
    mismatches,
    worst,
)


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
