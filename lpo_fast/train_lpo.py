"""The LPO loop: sample pairs for a batch of prompts, train the policy on them, repeat (arXiv 2502.01051)."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lpo_fast import checkpoint, models, noise, preflight, runs, sample, select, speed
from lpo_fast import policy as policies
from lpo_fast.config import LPO
from lpo_fast.kernels.pair_loss import pair_loss
from lpo_fast.loss import METRICS, StepDPO
from lpo_fast.policy import Policy, trainable
from lpo_fast.sample import CounterNoise, Pairs, Score
from lpo_fast.schedule import Schedule


def evaluate(policy: Policy, sched: Schedule, pairs: Pairs, weight: Tensor, *, guidance: float, beta: float,
             eps: float) -> StepDPO:
    """One policy and one reference evaluation serve both members of each pair. weight: [N], see ``loss.step_dpo``."""
    at = pairs.x_t, pairs.t, pairs.prompt
    return pair_loss(sched, pairs.x_t, pairs.winner, pairs.loser, pairs.t, policy.predict(*at), policy.reference(*at),
                     weight, guidance=guidance, beta=beta, eps=eps)


def padded(pairs: Pairs, size: int) -> Pairs:
    """Exactly ``size`` pairs: the last ones repeat the first, marked as not valid, so that shapes never change."""
    index = torch.arange(size, device=pairs.t.device)
    real = index < len(pairs.t)
    return pairs.take(torch.where(real, index, 0))._replace(valid=real)


def train_step(policy: Policy, sched: Schedule, pairs: Pairs, optimizer: torch.optim.Optimizer,
               scaler: torch.amp.GradScaler, config: LPO) -> dict[str, float]:
    """One optimizer step on up to train_batch_size · accumulate pairs; its metrics, official names first."""
    total, metrics = len(pairs.t), 0
    for first in range(0, total, config.train_batch_size):
        micro = padded(pairs.take(slice(first, first + config.train_batch_size)), config.train_batch_size)
        out = evaluate(policy, sched, micro, micro.valid / total, guidance=config.guidance_scale, beta=config.beta,
                       eps=config.clip_eps)
        scaler.scale(out.loss).backward()
        metrics = metrics + out.totals
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(trainable(policy.unet), config.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    values = torch.cat([metrics, grad_norm[None]]).tolist()
    return dict(zip((*METRICS, "grad_norm"), values, strict=True)) | {"lr": optimizer.param_groups[0]["lr"]}


def batch_metrics(pairs: Pairs, scores: Tensor) -> dict[str, object]:
    """What one prompt batch gave. pairs: all of them, step-major; scores: [steps, K, B]."""
    t, valid = pairs.t, pairs.valid
    bands = {"even_large": t > 751, "large": (t > 501) & (t <= 751), "mid": (t >= 251) & (t <= 501),
             "small": (t > 1) & (t < 251)}
    steps, _, size = scores.shape
    counts = {f"{name}_noise_samples_num": int((valid & band).sum()) for name, band in bands.items()}
    return {"preference_scores_mean": scores.mean().item(), "preference_scores_std": scores.std().item(),
            "total_valid_samples_num": int(valid.sum()), **counts, "timesteps": t.view(steps, size)[:, 0].tolist(),
            "valid_by_timestep": valid.view(steps, size).sum(1).tolist(), "pairs_possible": len(t)}


def order(config: LPO, epoch: int, prompts: int) -> list[Tensor]:
    """The prompt batches of an epoch, shuffled: a function of the seed and the epoch."""
    return list(noise.permutation(config.seed, epoch, 0, prompts).split(config.batch_size))


def shuffled(pairs: Pairs, config: LPO, epoch: int, batch: int) -> Pairs:
    """The valid pairs in random order: a function of the seed, the epoch and the batch."""
    index = pairs.valid.nonzero()[:, 0]
    return pairs.take(index[noise.permutation(config.seed, epoch, batch + 1, len(index)).to(index.device)])


def train(config: LPO, wrap_score: Callable[[Score], Score] = lambda score: score) -> Path:
    """Run LPO; the run directory. wrap_score may alter the reward (a control experiment, another scorer)."""
    prompts = preflight.lpo(config)
    device = speed.device()
    policy, sched = policies.load(config, prompts, device)
    score = wrap_score(policies.load_score(config, prompts, device))
    low, high = config.threshold_min, config.threshold_max
    gap = select.gaps(sched, config.threshold_shape, low, low if config.threshold_shape == "none" else high)
    shape = policies.latent_shape(config, policy.unet)
    optimizer = speed.optimizer(
        config.optimizer, policy.unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
    scaler = torch.amp.GradScaler(device.type, enabled=policy.precision == "fp16")
    ema = EMAModel(trainable(policy.unet), decay=config.ema_decay) if config.ema_decay else None

    out, run = Path(config.out), runs.Run(config, "lpo")
    parts = {"weights": checkpoint.Trained(policy.unet), "optimizer": optimizer, "scaler": scaler, "ema": ema}
    at = {"epoch": 0, "batch": 0, "step": 0}
    if config.resume:
        at = checkpoint.load_state(out / checkpoint.STATE, parts)
        run.truncate(at["metrics"])
        if ema:
            ema.to(device)
    else:
        draw_pictures(config, policy, sched, prompts, shape, "before")
    batches = -(-len(prompts) // config.batch_size)
    total = min(config.epochs * batches, config.max_batches or config.epochs * batches)
    done = at["epoch"] * batches + at["batch"]
    runs.say(f"LPO on {device}, precision {policy.precision} | {len(prompts)} prompts | batches {done} to {total} | "
             f"{sum(p.numel() for p in trainable(policy.unet)):,} parameters train")
    bar = tqdm(total=total, initial=done, desc="LPO", unit="batch", leave=False, disable=None)
    with runs.stoppable() as stopped:
        while done < total and not stopped:
            start = time.perf_counter()
            index = order(config, at["epoch"], len(prompts))[at["batch"]].to(device)
            draw = CounterNoise(config.seed, at["epoch"], index, shape)
            pairs, scores = sample.trajectory(
                policy.predict, score, sched, gap, draw, index, guidance=config.guidance_scale,
                num_candidates=config.num_candidates, start=config.start_step, stop=config.stop_step)
            run.log("batch", at["step"], epoch=at["epoch"], **batch_metrics(pairs, scores))
            sampled = time.perf_counter()
            pairs, trained = shuffled(pairs, config, at["epoch"], at["batch"]), []
            size = config.train_batch_size * config.accumulate
            for first in range(0, len(pairs.t), size):
                row = train_step(policy, sched, pairs.take(slice(first, first + size)), optimizer, scaler, config)
                trained.append(row)
                if ema and math.isfinite(row["grad_norm"]):  # else the scaler skipped the step
                    ema.step(trainable(policy.unet))
                run.log("train", at["step"], epoch=at["epoch"], **row)
                at["step"] += 1
            seconds = time.perf_counter() - start
            run.time(global_step=at["step"], sampling=sampled - start, seconds=seconds,
                     prompts_per_second=len(index) / seconds)
            runs.say(log_line(at["step"], trained, len(pairs.t), seconds, len(index)))
            at["batch"], done = at["batch"] + 1, done + 1
            bar.update()
            if at["batch"] == batches:
                at = at | {"epoch": at["epoch"] + 1, "batch": 0}
                if at["epoch"] % config.save_epochs == 0:
                    save_checkpoint(out / f"checkpoint_{at['epoch'] - 1}", policy.unet, config, at["step"])
            if done % config.save_batches == 0 or done == total or stopped:
                checkpoint.save_state(out / checkpoint.STATE, at | {"metrics": run.size}, parts)
    bar.close()
    if stopped:
        run.close()
        runs.say(f"stopped after step {at['step']}; go on with --resume")
        raise SystemExit(128 + stopped[0])
    if at["step"] == 0:
        runs.say("warning: no pair was valid, so nothing was trained: lower --threshold-min and --threshold-max, or check "
                 "the reward model's accuracy")
    finish(config, policy, sched, prompts, shape, ema)
    run.close()
    return out


def log_line(step: int, trained: list[dict[str, float]], pairs: int, seconds: float, prompts: int) -> str:
    """One prompt batch in one line; loss and accuracy are means over its optimizer steps."""
    loss_, accuracy = (sum(row[key] for row in trained) / max(len(trained), 1) for key in ("train_loss", "implicit_acc"))
    what = f"loss {loss_:.3f} | acc {accuracy:.2f}" if trained else "no valid pair"
    return (f"step {step} | {what} | pairs {pairs} | {seconds * 1e3:.0f} ms | "
            f"{prompts / seconds:.1f} prompts/s | {runs.memory()}")


def finish(config: LPO, policy: Policy, sched: Schedule, prompts: list[str], shape: tuple[int, int, int],
           ema: EMAModel | None) -> None:
    """Export the weights (their average, if one was kept) and draw the pictures after training."""
    if ema:
        ema.copy_to(trainable(policy.unet))
    out = Path(config.out)
    if config.full:
        with checkpoint.replacing(out / "unet") as aside:
            policy.unet.save_pretrained(aside)
    else:
        checkpoint.save_lora(policy.unet, out)
    draw_pictures(config, policy, sched, prompts, shape, "after")


def save_checkpoint(folder: Path, unet: UNet2DConditionModel, config: LPO, step: int) -> None:
    """An official checkpoint directory: unet_lora.pt or unet/, and global_step.json."""
    with checkpoint.replacing(folder) as aside:
        aside.mkdir()
        if config.full:
            unet.save_pretrained(aside / "unet")
        else:
            torch.save(checkpoint.lora_state(unet), aside / checkpoint.LORA_OFFICIAL)
        (aside / "global_step.json").write_text(json.dumps({"global_step": step}))


@torch.no_grad()
def draw_pictures(config: LPO, policy: Policy, sched: Schedule, prompts: list[str], shape: tuple[int, int, int],
                  when: str) -> None:
    """Pictures of the first prompts with the same noise before and after, for the report."""
    count = min(config.pictures, len(prompts))
    if count == 0:
        return
    folder = Path(config.out) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = policies.pictures(policy.predict, sched, models.vae(config), torch.arange(count), shape,
                           guidance=config.guidance_scale, seed=config.seed, batch=config.batch_size)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.numpy()).save(folder / f"{i:03d}_{when}.png")
    runs.write_json(folder / "captions.json", [{"caption": prompts[i]} for i in range(count)])
