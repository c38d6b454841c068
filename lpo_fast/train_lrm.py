"""The LRM loop: preference pairs of pictures, noised to a random timestep, teach the denoiser to score latents."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTokenizer

from lpo_fast import backbone, checkpoint, loss, models, noise, preflight, runs, schedule, speed, surgery
from lpo_fast.backbone import Text
from lpo_fast.config import LRM
from lpo_fast.data import PairDataset, collate
from lpo_fast.reward import LatentRewardModel
from lpo_fast.schedule import Schedule

VALIDATION_EPOCH = 0xFFFFFFFF  # validation noise is always the same
FINAL, BEST = "checkpoint-final", "checkpoint-gstep{}"


class Encoder:
    """Pictures to noisy latents and captions to token ids: all that stands before the LRM and does not train."""

    def __init__(self, model: Path, lrm: LatentRewardModel, seed: int, precision: str, vae: Path | None = None):
        device = next(lrm.parameters()).device
        scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
        self.vae = backbone.load_vae(vae or model).to(device)
        self.tokenizers: list[CLIPTokenizer] = backbone.load_tokenizers(model, lrm.family)
        self.sched: Schedule = schedule.from_config(scheduler, 20).to(device)
        self.seed, self.precision, self.null_ids = seed, precision, backbone.tokenize(self.tokenizers, [""])
        self.resolution = lrm.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each [2, B, C, h, w], of the VAE's posterior for pixels [2, B, 3, H, W]."""
        with speed.autocast(self.precision):
            posterior = self.vae.encode(pixels.flatten(0, 1)).latent_dist
        return tuple(x.float().unflatten(0, (2, -1)) for x in (posterior.mean, posterior.std))

    def latents(self, mean: Tensor, std: Tensor, rows: Tensor, step: int, t: Tensor) -> Tensor:
        """x_t [2, B, C, h, w] at timesteps t [B] from a sample of the posterior, independent noise for the two.

        Noise is keyed by (seed, step, row): candidates 0 and 1 are the posterior's, 2 and 3 the diffusion's.
        """
        z = noise.normal(self.seed, step, rows, 0, 4, tuple(mean.shape[2:]))
        x0 = (mean + std * z[:2]) * self.vae.config.scaling_factor
        x_t = schedule.add_noise(self.sched, x0.flatten(0, 1), z[2:].flatten(0, 1), t.repeat(2))
        return x_t.view_as(mean)

    def text(self, lrm: LatentRewardModel, captions: list[str]) -> Text:
        """Text features of captions, with gradient where the text encoders train."""
        device = self.sched.table.device
        ids = [i.to(device) for i in backbone.tokenize(self.tokenizers, captions)]
        return lrm.encode(ids, [i.to(device) for i in self.null_ids])


def features(lrm: LatentRewardModel, text: Text, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features (text, image_0, image_1), each [B, P], of noisy pairs x [2, B, C, h, w] at t [B]."""
    both = backbone.concatenate([text, text])
    image_0, image_1 = lrm.image_features(x.flatten(0, 1), t.repeat(2), both).chunk(2)
    return lrm.text_features(text), image_0, image_1


def train_step(lrm: LatentRewardModel, encoder: Encoder, batch: dict, step: int, optimizer: torch.optim.Optimizer,
               config: LRM) -> dict[str, float]:
    """One optimizer step; its metrics."""
    device = encoder.sched.table.device
    rows, labels = batch["rows"].to(device), batch["labels"].to(device)
    timesteps = torch.arange(1, config.largest_timestep + 1, 50, device=device)
    t = timesteps[noise.integers(config.seed, step, rows, 0, len(timesteps))]
    x = encoder.latents(*encoder.posterior(batch["pixels"].to(device)), rows, step, t)
    with speed.autocast(encoder.precision):
        text, image_0, image_1 = features(lrm, encoder.text(lrm, batch["captions"]), x, t)
    value = loss.preference(
        text, image_0, image_1, lrm.logit_scale.exp(), *labels, batch["counts"].to(device),
        torch.stack([t, t], 1), loss_type=config.loss_type, batch_coeff=config.batch_coeff)
    value.backward()
    norm = nn.utils.clip_grad_norm_([p for p in lrm.parameters() if p.requires_grad], config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        right = correct(((image_0 - image_1) * text).sum(-1), labels).mean()
        values = torch.stack([value.detach(), right, norm, lrm.logit_scale.exp()]).tolist()
    return dict(zip(("loss", "accuracy", "grad_norm", "logit_scale"), values, strict=True))


def correct(margin: Tensor, labels: Tensor) -> Tensor:
    """[B]: 1 where the preferred picture scores higher, ½ for a tie of scores or of labels. margin: S_0 − S_1 [B]."""
    return 0.5 + 0.5 * margin.sign() * (labels[0] - labels[1]).sign()


@torch.no_grad()
def validate(lrm: LatentRewardModel, encoder: Encoder, loader: DataLoader, timesteps: list[int]) -> dict[str, object]:
    """Accuracy on held-out pairs at each timestep; ``accuracy`` is the one at the first, t = 1."""
    lrm.eval()
    device = encoder.sched.table.device
    right: dict[int, list[Tensor]] = {t: [] for t in timesteps}
    for batch in loader:
        rows, posterior = batch["rows"].to(device), encoder.posterior(batch["pixels"].to(device))
        with speed.autocast(encoder.precision):
            words = encoder.text(lrm, batch["captions"])
        for timestep in timesteps:
            t = torch.full_like(rows, timestep)
            with speed.autocast(encoder.precision):
                x = encoder.latents(*posterior, rows, VALIDATION_EPOCH - timestep, t)
                text, image_0, image_1 = features(lrm, words, x, t)
            right[timestep].append(correct(((image_0 - image_1) * text).sum(-1), batch["labels"].to(device)))
    lrm.train()
    accuracy = {str(t): torch.cat(parts).mean().item() for t, parts in right.items()}
    return {"accuracy": accuracy[str(timesteps[0])], "accuracy_by_timestep": accuracy, "n": len(loader.dataset)}


def batches(config: LRM, pairs: int, step: int) -> Iterator[list[int]]:
    """Pair numbers of every batch from ``step`` on: each epoch a new order, a function of the seed and the epoch."""
    size = min(config.batch_size, pairs)
    each = pairs // size
    for k in range(step, config.max_steps):
        if k % each == 0 or k == step:
            order = noise.permutation(config.seed, k // each, 0, pairs)
        yield order[k % each * size:(k % each + 1) * size].tolist()


def train(config: LRM) -> Path:
    """Train an LRM; the run directory, whose checkpoint-final/ is the best LRM by validation accuracy at t = 1."""
    keep = preflight.lrm(config)
    device, model = speed.device(), models.model(config)
    lrm = checkpoint.new_lrm(
        model, clip=models.clip(config), generator=torch.Generator().manual_seed(config.seed), resolution=config.resolution,
        multi_scale=config.multi_scale, multi_scale_cfg=config.multi_scale_cfg, guidance_scale=config.guidance_scale)
    lrm.to(device).train()
    lrm.text_encoders.requires_grad_(not config.freeze_text_encoder)
    if config.fused_norms:
        surgery.fuse_norms(lrm.unet)
    encoder = Encoder(model, lrm, config.seed, speed.precision(config.mixed_precision, "bf16"), models.vae(config))
    resolution = config.resolution or encoder.resolution
    pairs = PairDataset(Path(config.pairs), resolution, keep)
    held_out = None
    if config.validation_pairs:
        held_out = PairDataset(Path(config.validation_pairs), resolution, flag="--validation-pairs")
        held_out = DataLoader(held_out, config.batch_size, num_workers=config.num_workers, collate_fn=collate)
    optimizer = speed.optimizer(config.optimizer, lrm.parameters(), lr=config.learning_rate,
                                weight_decay=config.weight_decay)
    factor = speed.learning_rate(config.warmup, config.warmup_steps, config.max_steps)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    out, run = Path(config.out), runs.Run(config, "lrm")
    parts = {"weights": checkpoint.Trained(lrm), "optimizer": optimizer, "decay": decay}
    at = {"step": 0, "best": -1.0, "best_step": 0}
    if config.resume:
        at = checkpoint.load_state(out / checkpoint.STATE, parts)
        run.truncate(at["metrics"])
    loader = DataLoader(pairs, batch_sampler=list(batches(config, len(pairs), at["step"])),
                        num_workers=config.num_workers, collate_fn=collate)
    runs.say(f"LRM on {device}, precision {encoder.precision} | {len(pairs)} pairs | steps {at['step']} to {config.max_steps}"
             f" | {sum(p.numel() for p in lrm.parameters() if p.requires_grad):,} parameters train")
    all_timesteps = list(range(1, config.largest_timestep + 1, 50))
    bar = tqdm(total=config.max_steps, initial=at["step"], desc="LRM", unit="step", leave=False, disable=None)
    with runs.stoppable() as stopped:
        start = time.perf_counter()
        for batch in loader:
            lr = decay.get_last_lr()[0]
            row = train_step(lrm, encoder, batch, at["step"], optimizer, config)
            decay.step()
            run.log("train", at["step"], **row, lr=lr)
            at["step"] += 1
            bar.update()
            seconds, start = time.perf_counter() - start, time.perf_counter()
            run.time(global_step=at["step"], seconds=seconds, pairs_per_second=len(batch["rows"]) / seconds)
            runs.say(f"step {at['step']} | loss {row['loss']:.3f} | acc {row['accuracy']:.2f} | {seconds * 1e3:.0f} ms | "
                     f"{len(batch['rows']) / seconds:.1f} pairs/s | {runs.memory()}")
            last = at["step"] == config.max_steps
            if held_out and (at["step"] % config.validate_steps == 0 or last):
                shown = validate(lrm, encoder, held_out, all_timesteps[::5])
                run.log("validation", at["step"], **shown)
                runs.say(f"step {at['step']} | validation accuracy {shown['accuracy']:.3f} at t = 1 "
                         f"({shown['n']} pairs)")
                if shown["accuracy"] >= at["best"]:
                    keep_best(out, lrm, encoder.tokenizers, at, shown, row, lr)
            if at["step"] % config.validate_steps == 0 or last or stopped:
                checkpoint.save_state(out / checkpoint.STATE, at | {"metrics": run.size}, parts)
            if stopped:
                break
    bar.close()
    if stopped:
        run.close()
        runs.say(f"stopped after step {at['step']}; go on with --resume")
        raise SystemExit(128 + stopped[0])
    if held_out:
        best = out / BEST.format(at["best_step"])
        with checkpoint.replacing(out / FINAL) as aside:
            shutil.copytree(best, aside)
        shown = validate(checkpoint.load_lrm(best).to(device), encoder, held_out, all_timesteps)
        run.log("validation", at["step"], checkpoint=at["best_step"], **shown)
        runs.say(f"handed on: step {at['best_step']}, validation accuracy {shown['accuracy']:.3f} at t = 1")
    else:
        checkpoint.save_lrm(lrm, encoder.tokenizers, out / FINAL)
    run.close()
    return out


def keep_best(out: Path, lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], at: dict, shown: dict, row: dict,
              lr: float) -> None:
    """Save the best LRM so far in place of the one before, with the official training_stage.json."""
    before = out / BEST.format(at["best_step"])
    at |= {"best": shown["accuracy"], "best_step": at["step"]}
    folder = out / BEST.format(at["step"])
    checkpoint.save_lrm(lrm, tokenizers, folder)
    stage = {"epoch": 0, "step": at["step"], "global_step": at["step"], "step_loss": row["loss"], "lr": lr,
             "metrics": {"accuracy": shown["accuracy"]}}
    runs.write_json(folder / "training_stage.json", stage)
    if before != folder and before.is_dir():
        shutil.rmtree(before)
