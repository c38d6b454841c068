"""The LRM loop: preference pairs of pictures, noised to a random timestep, teach the denoiser to score latents."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTokenizer

from lpo_fast import (
    backbone,
    checkpoint,
    files,
    latents,
    loss,
    models,
    noise,
    official_lrm,
    preflight,
    ranks,
    runs,
    schedule,
    speed,
    surgery,
)
from lpo_fast.backbone import Text
from lpo_fast.config import LRM
from lpo_fast.errors import InputError
from lpo_fast.latents import Cache
from lpo_fast.pairs import Corrupt, PairDataset, Pairs, collate
from lpo_fast.reward import LatentRewardModel
from lpo_fast.schedule import Schedule

VALIDATION_EPOCH = 0xFFFFFFFF  # validation noise is always the same
FINAL, CHECKPOINT = "checkpoint-final", "checkpoint-gstep{}"
STEP = ("loss", "accuracy", "grad_norm", "logit_scale")
ENCODED = 2**22  # pixels at a time, SDXL's 4 or SD1.5's 16 pictures: 7 GiB in bf16 by --dry-run; SDXL's 32 pairs at once: 113
NEIGHBOUR, MIRROR, OFFSET = 1, 2, 4  # "steps" of a pair's further draws; its latents' and its timestep's is 0


class Encoder:
    """Pictures to noisy latents and captions to token ids: all that stands before the LRM and does not train."""

    def __init__(self, model: Path, lrm: LatentRewardModel, seed: int, precision: str, vae: Path | None = None,
                 noise_offset: float = 0.0, compile: str = "none"):
        self.device = device = next(lrm.parameters()).device
        scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
        self.vae_path = vae or model
        self.vae_config = backbone.vae_config(self.vae_path)
        self.tokenizers: list[CLIPTokenizer] = backbone.load_tokenizers(model, lrm.family)
        self.sched: Schedule = schedule.from_config(scheduler, 20).to(device)
        self.noise_offset = noise_offset
        self.seed, self.precision, self.null_ids = seed, precision, backbone.tokenize(self.tokenizers, [""])
        self.train_encode = speed.compiled(encode, compile)
        self.train_features = speed.compiled(encode_features, compile)
        self.resolution = lrm.unet.config.sample_size * 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """Loaded when a picture is to be encoded: where all latents are cached, never."""
        return backbone.load_vae(self.vae_path).to(self.device)

    def moments(self, pixels: Tensor, flips: Tensor | None = None, compiled: Callable | None = None) -> Tensor:
        """The VAE's moments (``encode``) [2, B, 2C, h, w] of pixels [2, B, 3, H, W], mirrored where flips, bool [2, B], says
        so. In equal parts of at most ENCODED pixels, which come to the device one by one."""
        size, made = part_size(pixels.shape[1] * 2, pixels.shape[-1]), []
        for i, part in enumerate(pixels.flatten(0, 1).split(size)):
            part = part.to(self.device, non_blocking=True)
            if flips is not None:
                part = mirrored(part, flips.flatten().split(size)[i])
            made.append((compiled or encode)(self.vae, part, self.precision))
        return torch.cat(made).contiguous().unflatten(0, (2, -1))  # as in the cache: another layout, other roundings

    def posterior(self, batch: dict, cache: Cache | None = None, flips: Tensor | None = None,
                  compiled: Callable | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, fp32 [2, B, C, h, w] each, of the VAE's posterior for the pictures of a batch
        (``pairs.collate``): from the cache, or from the pixels, which then go into the cache."""
        moments = batch["moments"].to(self.device, non_blocking=True) if "moments" in batch else None
        if "pixels" in batch:
            made = self.moments(batch["pixels"], flips, compiled)
            if cache is not None:
                cache.keep(batch, made)
            cached = None if moments is None else batch["cached"].to(self.device, non_blocking=True)[:, None, None, None]
            moments = made if moments is None else torch.where(cached, moments, made)
        return split(moments)

    def latents(self, mean: Tensor, std: Tensor, rows: Tensor, step: int, t: Tensor) -> Tensor:
        """x_t [2, B, C, h, w] at timesteps t ([B] or [2, B]) from a sample of the posterior, independent noise for the two.

        Noise is keyed by (seed, step, row): candidates 0 and 1 are the posterior's, 2 and 3 the diffusion's.
        """
        z = noise.normal(self.seed, step, rows, 0, 4, tuple(mean.shape[2:]))
        x0, eps = (mean + std * z[:2]) * self.vae_config["scaling_factor"], z[2:]
        if self.noise_offset:
            eps = eps + self.noise_offset * noise.normal(self.seed, step, rows, OFFSET, 2, (mean.shape[2], 1, 1))
        x_t = schedule.add_noise(self.sched, x0.flatten(0, 1), eps.flatten(0, 1), t.expand(2, -1).flatten())
        return x_t.view_as(mean)

    def ids(self, captions: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Token ids of captions and of the null prompt, a tensor an encoder."""
        return tuple([i.to(self.device, non_blocking=True) for i in ids]
                     for ids in (backbone.tokenize(self.tokenizers, captions), self.null_ids))


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, precision: str) -> Tensor:
    """Mean and log-variance [n, 2C, h, w] of the VAE's posterior for pixels [n, 3, H, W], in the networks' precision."""
    with speed.autocast(precision):
        return vae.encode(pixels).latent_dist.parameters


def split(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, fp32 [2, B, C, h, w] each, of moments [2, B, 2C, h, w]; diffusers' bounds."""
    mean, log_variance = moments.float().chunk(2, 2)
    return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


def part_size(count: int, side: int) -> int:
    """Pictures that the VAE encodes at a time, of ``count`` of side² pixels."""
    return -(-count // min(-(-count * side**2 // ENCODED), count))


def encode_features(lrm: LatentRewardModel, ids: list[Tensor], null_ids: list[Tensor], x: Tensor,
                    t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``features`` of token ids: all of a training step's forward pass that has gradient, one null prompt a batch."""
    return features(lrm, lrm.encode(ids, null_ids), x, t)


def features(lrm: LatentRewardModel, text: Text, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features (text, image_0, image_1), each [B, P], of noisy pairs x [2, B, C, h, w] at t ([B] or [2, B])."""
    both = backbone.concatenate([text, text])
    image_0, image_1 = lrm.image_features(x.flatten(0, 1), t.expand(2, -1).flatten(), both).chunk(2)
    return lrm.text_features(text), image_0, image_1


def timesteps(config: LRM, step: int, rows: Tensor, compare: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps [2, B] of the pairs of a step, and their labels [2, B]: of a picture compared with itself (compare [B])
    the second is a neighbour timestep_interval away, and the less noisy one is preferred. Keyed by (seed, step, row)."""
    if not config.variable_timestep:
        return torch.full_like(labels, config.constant_timestep, dtype=torch.int64), labels
    every = torch.arange(1, config.largest_timestep + 1, 50, device=rows.device)
    first = noise.integers(config.seed, step, rows, 0, len(every))
    if not config.compare_between_timestep:
        return every[first].expand(2, -1), labels
    up = noise.integers(config.seed, step, rows, NEIGHBOUR, 2) == 1
    up = torch.where(first < config.timestep_interval, True, up)
    up = torch.where(first >= len(every) - config.timestep_interval, False, up)
    second = torch.where(compare, first + torch.where(up, 1, -1) * config.timestep_interval, first)
    labels = torch.where(compare, torch.stack([up, ~up]).to(labels.dtype), labels)
    return every[torch.stack([first, second])], labels


def flips(config: LRM, step: int, rows: Tensor) -> Tensor:
    """bool [2, B]: which pictures are mirrored, each with probability ½. Keyed by (seed, step, row)."""
    return torch.stack([noise.integers(config.seed, step, rows, MIRROR + side, 2) for side in (0, 1)]) == 1


def mirrored(pixels: Tensor, flips: Tensor) -> Tensor:
    """pixels [n, 3, H, W], mirrored where flips, bool [n], says so."""
    return torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)


def parts(batch: dict, count: int) -> list[dict]:
    """A step's batch in at most ``count`` passes, all but the last of equal size."""
    size = -(-len(batch["rows"]) // count)
    along = {"labels", "mean", "std"}  # [2, B, …]
    return [{key: value[i:i + size] if key not in along else value[:, i:i + size] for key, value in batch.items()}
            for i in range(0, len(batch["rows"]), size)]


def train_step(lrm: LatentRewardModel, encoder: Encoder, batch: dict, step: int, optimizer: torch.optim.Optimizer,
               config: LRM, cache: Cache | None = None) -> Tensor:
    """One optimizer step of all processes, each with its part of the pairs; its metrics, which are those of all: STEP, [4].

    Pairs that do not decode go through the networks, but not into the loss. One process reads nothing back from the device.
    """
    rows = batch["rows"].to(encoder.device, non_blocking=True)
    mean, std = encoder.posterior(batch, cache, flips(config, step, rows) if config.hflip else None, encoder.train_encode)
    batch = {key: value.to(encoder.device, non_blocking=True) if isinstance(value, Tensor) else value
             for key, value in batch.items() if key in ("captions", "labels", "counts", "compare")} | {
        "rows": rows, "mean": mean, "std": std, "corrupt": batch["corrupt"]}
    good = (~batch["corrupt"]).to(encoder.device, non_blocking=True)
    weight, count = ranks.total(torch.stack([(good / batch["counts"]).sum(), good.sum()]))
    values = [pair_loss(lrm, encoder, part, step, config, weight) for part in parts(batch, config.accumulate)]
    ranks.sum_gradients(p for p in lrm.parameters() if p.requires_grad)
    norm = nn.utils.clip_grad_norm_([p for p in lrm.parameters() if p.requires_grad], config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        value, right = torch.stack(values).sum(0)
        return torch.stack([value, right / count.clamp(min=1), norm, lrm.logit_scale.exp()])


def pair_loss(lrm: LatentRewardModel, encoder: Encoder, batch: dict, step: int, config: LRM, weight: Tensor) -> Tensor:
    """Forward and backward of a pass; its share of the step's loss and its number of right pairs, [2].

    weight: Σ_j 1/n_j over the step's pairs, of which the loss takes the share of this pass. Every process computes the loss
    of all processes' pairs, and its gradient for its own.
    """
    rows = batch["rows"]
    t, labels = timesteps(config, step, rows, batch["compare"], batch["labels"])
    x = encoder.latents(batch["mean"], batch["std"], rows, step, t)
    with speed.autocast(encoder.precision):
        unit = encoder.train_features(lrm, *encoder.ids(batch["captions"]), x, t)
    good = (~batch["corrupt"]).nonzero()[:, 0].to(encoder.device, non_blocking=True)  # found on the host, which need not wait
    text, image_0, image_1, label_0, label_1, counts, t = ranks.gather(
        *(feature[good] for feature in unit), *labels[:, good], batch["counts"][good], t[:, good].T)
    scale = lrm.logit_scale.exp()  # its gradient is the same in every process, and counts once
    share = ((1 / counts).sum() / weight).nan_to_num()
    value = share * loss.preference(
        text, image_0, image_1, scale if ranks.index() == 0 else scale.detach(), label_0, label_1, counts, t,
        loss_type=config.loss_type, batch_coeff=config.batch_coeff, aux_loss_coeff=config.aux_loss_coeff)
    value.backward()
    right = correct(((image_0 - image_1) * text).sum(-1), torch.stack([label_0, label_1])).sum()
    return torch.stack([value, right]).detach()


def correct(margin: Tensor, labels: Tensor) -> Tensor:
    """[B]: 1 where the preferred picture scores higher, ½ for a tie of scores or of labels. margin: S_0 − S_1 [B]."""
    return 0.5 + 0.5 * margin.sign() * (labels[0] - labels[1]).sign()


@torch.no_grad()
def validate(lrm: LatentRewardModel, encoder: Encoder, loader: DataLoader, timesteps: list[int],
             corrupt: Corrupt | None = None) -> dict[str, object]:
    """Accuracy on held-out pairs at each timestep; ``accuracy`` is the one at the first, t = 1."""
    lrm.eval()
    device = encoder.device
    right = torch.zeros(len(timesteps) + 1, dtype=torch.float64, device=device)  # and the number of pairs
    for batch in loader:
        if corrupt is not None:
            corrupt.count(batch)
        good = (~batch["corrupt"]).nonzero()[:, 0].to(device)
        rows, posterior = batch["rows"].to(device), encoder.posterior(batch, loader.dataset.cache)
        with speed.autocast(encoder.precision):
            words = lrm.encode(*encoder.ids(batch["captions"]))
        right[-1] += len(good)
        for k, timestep in enumerate(timesteps):
            t = torch.full_like(rows, timestep)
            with speed.autocast(encoder.precision):
                x = encoder.latents(*posterior, rows, VALIDATION_EPOCH - timestep, t)
                text, image_0, image_1 = features(lrm, words, x, t)
            right[k] += correct(((image_0 - image_1) * text).sum(-1), batch["labels"].to(device))[good].sum()
    lrm.train()
    if corrupt is not None:
        corrupt.share()
    *shares, count = [*(ranks.total(right)[:-1] / right[-1]).tolist(), int(right[-1])]
    if corrupt is not None and not count:
        raise InputError(corrupt.pairs.source.path, "has no pair whose pictures decode", "mend them, or name other pairs",
                         corrupt.pairs.source.flag)
    accuracy = dict(zip(map(str, timesteps), shares, strict=True))
    return {"accuracy": accuracy[str(timesteps[0])], "accuracy_by_timestep": accuracy, "n": count}


def steps_an_epoch(config: LRM, pairs: int) -> int:
    """Steps of whole batches in a pass over the pairs; the rest is left to the next pass's order."""
    return pairs // (own_size(config, pairs) * ranks.count())


def own_size(config: LRM, pairs: int) -> int:
    """Pairs of a step in each process."""
    return min(config.batch_size, pairs) // ranks.count()


def batches(config: LRM, pairs: int, step: int) -> Iterator[list[int]]:
    """This process's pair numbers of every batch from ``step`` on: each epoch a new order, a function of the seed and the
    epoch."""
    own, world, each = own_size(config, pairs), ranks.count(), steps_an_epoch(config, pairs)
    for k in range(step, config.max_steps):
        if k % each == 0 or k == step:
            order = noise.permutation(config.seed, k // each, 0, pairs)
        first = (k % each * world + ranks.index()) * own
        yield order[first:first + own].tolist()


def train(config: LRM) -> Path:
    """Train an LRM; the run directory, whose checkpoint-final/ is the best LRM by validation accuracy, or the last.

    Raises InputError for what cannot be read, used or written, also if the disk is full; the last saved state is whole then.
    """
    used = preflight.lrm(config)
    ranks.state()
    with runs.claim(Path(config.out)):
        return _train(config, used)


def _train(config: LRM, used: dict[str, Pairs]) -> Path:
    device, model = speed.device(), models.model(config)
    speed.deterministic(config.deterministic)
    lrm = checkpoint.new_lrm(
        model, clip=models.clip(config), generator=torch.Generator().manual_seed(config.seed), resolution=config.resolution,
        multi_scale=config.multi_scale, multi_scale_cfg=config.multi_scale_cfg, guidance_scale=config.guidance_scale)
    lrm.logit_scale.data.fill_(config.logit_scale)
    lrm.to(device).train()
    lrm.text_encoders.requires_grad_(not config.freeze_text_encoder)
    speed.layout(lrm.unet)
    if config.fused_norms:
        surgery.fuse_norms(lrm.unet)
    encoder = Encoder(model, lrm, config.seed, speed.precision(config.mixed_precision, "bf16"), models.vae(config),
                      config.noise_offset, config.compile)
    caches = {use: latents.of(config, pairs, encoder.precision) for use, pairs in used.items() if config.cache_latents}
    sets = {use: PairDataset(pairs, config.resolution or encoder.resolution, caches.get(use)) for use, pairs in used.items()}
    fetch = partial(DataLoader, collate_fn=collate, num_workers=config.num_workers, persistent_workers=config.num_workers > 0,
                    pin_memory=device.type == "cuda")
    held_out = {use: fetch(pairs, config.batch_size // config.accumulate // ranks.count(),
                           sampler=range(ranks.index(), len(pairs), ranks.count()))
                for use, pairs in sets.items() if use != "train"}
    corrupt = {use: Corrupt(pairs, config.max_corrupt) for use, pairs in used.items()}
    optimizer = speed.optimizer(config.optimizer, lrm.parameters(), lr=config.learning_rate,
                                weight_decay=config.weight_decay)
    factor = speed.learning_rate(config.warmup, config.warmup_steps, config.max_steps)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    out = Path(config.out)
    if ranks.main():
        check_room(out, lrm, config, validated="validation" in used)
    resumed = config.resume and bool(checkpoint.states(out))  # else it was killed before its first state
    run = runs.Run(config, resumed)
    if ranks.main():
        with files.writing(out):
            (out / "config.yaml").write_text(official_lrm.render(config, lrm.family.name, ranks.count()), encoding="utf-8")
    state = {"weights": checkpoint.Trained(lrm), "optimizer": optimizer, "decay": decay}
    at = {"step": 0, "checkpoints": [], "corrupt": {use: [] for use in used}, "stage": {"metrics": {}}}
    if resumed:
        at = checkpoint.load_state(out / checkpoint.STATE, state)
        run.truncate(at["metrics"])
        for use, rows in at["corrupt"].items():
            corrupt[use].rows = set(rows)
    epoch = steps_an_epoch(config, len(used["train"]))
    loader = fetch(sets["train"], batch_sampler=list(batches(config, len(used["train"]), at["step"])))
    if config.resume and not resumed:
        runs.say(f"{out} holds no saved state: the run starts from the beginning")
    runs.say(f"LRM on {device}, precision {encoder.precision} | {len(used['train'])} of {len(used['train'].captions)} pairs | "
             f"{at['step']} of {config.max_steps} steps done | "
             f"{sum(p.numel() for p in lrm.parameters() if p.requires_grad):,} parameters train | {ranks.named(ranks.count())}")
    for use, cache in caches.items():
        found = latents.numbers(used[use])
        runs.say(f"latents of {use} pairs: {cache.folder} holds {len(found) - cache.missing(found):,} of {len(found):,}")
    clock, queued = runs.Clock(config.num_workers), []
    every = list(range(1, config.largest_timestep + 1, 50))
    shown_at = list(dict.fromkeys([1 if config.variable_timestep else config.constant_timestep, *every]))

    def validation() -> None:
        """Validate, and keep the LRM if its accuracy deserves it."""
        shown = validate(lrm, encoder, held_out["validation"], shown_at[::5], corrupt["validation"])
        run.log("validation", at["step"], **shown)
        runs.say(f"step {at['step']} | validation accuracy {shown['accuracy']:.3f} at t = {shown_at[0]} ({shown['n']} pairs)")
        if at["step"] == 0:
            at["untrained"] = shown["accuracy"]
        else:
            at["stage"]["metrics"] = {"accuracy": shown["accuracy"]}
            keep(config, lrm, encoder.tokenizers, at)

    def report(unread: int) -> None:
        """Write and say the metrics of the queued steps but the last ``unread``: reading them waits for the device."""
        while len(queued) > unread:
            step, values, row = queued.pop(0)
            row = dict(zip(STEP, values.tolist(), strict=True)) | row
            run.log("train", step, **row)
            at["stage"]["step_loss"] = row["loss"]
            seconds, waited = clock.lap()
            rate = own_size(config, len(used["train"])) * ranks.count() / seconds
            run.time(global_step=step + 1, seconds=seconds, pairs_per_second=rate, data=waited / seconds)
            runs.say(f"step {step + 1} | loss {row['loss']:.3f} | acc {row['accuracy']:.2f} | {seconds * 1e3:.0f} ms | "
                     f"data {waited / seconds:.0%} | {rate:.1f} pairs/s | {runs.memory()}")

    bar = tqdm(total=config.max_steps, initial=at["step"], desc="LRM", unit="step", leave=False,
               disable=None if ranks.main() else True)
    with runs.stoppable() as stopped:
        if "validation" in held_out and config.eval_on_start and at["step"] == 0:
            validation()
        clock.start()
        for batch in clock.fetched(loader):
            lr = decay.get_last_lr()[0]
            corrupt["train"].count(batch)
            corrupt["train"].share()
            values = train_step(lrm, encoder, batch, at["step"], optimizer, config, caches.get("train"))
            decay.step()
            queued.append((at["step"], values, {"lr": lr, "corrupt": sum(len(c.rows) for c in corrupt.values())}))
            at["step"] += 1
            at["stage"] |= {"epoch": (at["step"] - 1) // epoch, "step": (at["step"] - 1) % epoch + 1, "lr": lr,
                            "global_step": at["step"]}
            bar.update()
            last, stop = at["step"] == config.max_steps, ranks.anywhere(stopped)
            validates = "validation" in held_out and (at["step"] % config.validate_steps == 0 or last)
            saves = at["step"] % config.save_steps == 0 or last or stop
            report(0 if validates or saves else speed.unread())
            if validates:
                validation()
            if saves and ranks.main():
                at |= {"metrics": run.size, "corrupt": {use: sorted(c.rows) for use, c in corrupt.items()}}
                checkpoint.save_state(out / checkpoint.STATE, at, state)
                prune(out, at)
            if validates or saves:
                clock.start()
            if stop:
                break
    bar.close()
    clock.advise()
    if at["step"] < config.max_steps:
        run.close()
        ranks.wait()  # a launcher ends all processes soon after the first
        runs.say(f"stopped after step {at['step']}; go on with --resume")
        raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])
    hand_on(config, lrm, encoder.tokenizers, at)
    best = max((accuracy for _, accuracy in at["checkpoints"]), default=1)
    if best <= at.get("untrained", 0):
        runs.say(f"warning: no validation (best {best:.3f}) is above the one before the first step ({at['untrained']:.3f}): "
                 "this reward model has learned nothing useful")
    if held_out:
        if at["handed_on"] != at["step"]:
            restore(lrm, out / FINAL)
        for use, pairs in held_out.items():
            shown = validate(lrm, encoder, pairs, shown_at, corrupt[use])
            run.log(use, at["step"], checkpoint=at["handed_on"], **shown)
            runs.say(f"handed on: step {at['handed_on']}, {use} accuracy {shown['accuracy']:.3f} at t = {shown_at[0]}")
    for use, found in corrupt.items():
        if found.rows:
            runs.say(f"{len(found.rows)} {use} pairs left out, whose pictures do not decode")
    run.close()
    return out


def restore(lrm: LatentRewardModel, folder: Path) -> None:
    """Weights of a checkpoint in every process, of which the main one alone need see the directory."""
    if ranks.main():
        lrm.load_state_dict(checkpoint.load_lrm(folder).state_dict())
    ranks.share(lrm.parameters())


def keep(config: LRM, lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], at: dict) -> None:
    """Save the LRM just validated unless an earlier one (after step 0) is better, so of equals the later is kept; forget
    checkpoints that are too many, which ``prune`` removes. The best one stays in any case if it is to be handed on."""
    out, accuracy = Path(config.out), at["stage"]["metrics"]["accuracy"]
    if config.save_only_if_best and any(accuracy < known for _, known in at["checkpoints"]):
        return
    at["checkpoints"] = [*(known for known in at["checkpoints"] if known[0] != at["step"]), (at["step"], accuracy)]
    if ranks.main():
        save(lrm, tokenizers, out / CHECKPOINT.format(at["step"]), at["stage"])
    order = sorted(at["checkpoints"], key=lambda known: (known[1] if config.keep_best else 0, known[0]), reverse=True)
    best = [max(order, key=lambda known: (known[1], known[0]))] if config.handed_on == "best" else []
    at["checkpoints"] = sorted({*order[:config.keep_checkpoints or len(order)], *best})


def prune(out: Path, at: dict) -> None:
    """Remove checkpoints that the run does not keep, once no saved state names them."""
    kept = {CHECKPOINT.format(step) for step, _ in at["checkpoints"]}
    for folder in out.glob(CHECKPOINT.format("*")):
        if folder.name not in kept:
            files.discard(folder)


def save(lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], folder: Path, stage: dict) -> None:
    """An LRM's directory with the official training_stage.json."""
    with checkpoint.replacing(folder) as aside:
        checkpoint.save_lrm(lrm, tokenizers, aside)
        runs.write_json(aside / "training_stage.json", stage)


def check_room(out: Path, lrm: LatentRewardModel, config: LRM, validated: bool) -> None:
    """Raise InputError unless there is room for what the run will yet write, at most: states, checkpoints, checkpoint-final.

    validated: whether there are checkpoints. The state counts three times: it, the one before, and the next one while it is
    written. Checkpoints that are written only if they are the best are counted as if the first were.
    """
    with torch.device("meta"):
        rest = UNet2DConditionModel.from_config(lrm.unet.config).num_parameters() - lrm.unet.num_parameters()
    whole = 4 * (rest + sum(p.numel() for p in lrm.parameters()))  # with the up blocks, fp32
    trained = [p for p in lrm.parameters() if p.requires_grad]
    state = sum(p.numel() * p.element_size() + files.RECORD for p in trained)
    state += speed.optimizer_state(config.optimizer, trained)
    times = -(-config.max_steps // config.validate_steps) if validated else 0
    if config.save_only_if_best:
        times = min(times, 1)
    if config.keep_checkpoints:
        times = min(times, config.keep_checkpoints + 1)  # the new one is there before the oldest goes
    there = len(list(out.glob(CHECKPOINT.format("*"))))
    size = (3 - len(checkpoint.states(out))) * state + (max(times - there, 0) + 1) * whole
    files.check_room(out, size, "make room, limit --keep-checkpoints, or choose a directory on another disk")


def hand_on(config: LRM, lrm: LatentRewardModel, tokenizers: list[CLIPTokenizer], at: dict) -> None:
    """Write checkpoint-final: the best of the checkpoints, or the LRM as it is."""
    out = Path(config.out)
    last = config.handed_on == "last" or not at["checkpoints"]
    at["handed_on"] = at["step"] if last else max(at["checkpoints"], key=lambda known: (known[1], known[0]))[0]
    if ranks.main() and last:
        save(lrm, tokenizers, out / FINAL, at["stage"])
    elif ranks.main():
        with checkpoint.replacing(out / FINAL) as aside:
            shutil.copytree(out / CHECKPOINT.format(at["handed_on"]), aside)
    ranks.wait()
