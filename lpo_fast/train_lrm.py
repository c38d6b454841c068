"""The LRM loop: preference pairs of pictures, noised to a random timestep, teach the denoiser to score latents."""

import signal
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lpo_fast import (
    checkpoint,
    files,
    guard,
    inputs,
    keeping,
    latents,
    loss,
    models,
    noise,
    official_lrm,
    preflight,
    ranks,
    reward,
    runs,
    speed,
    surgery,
)
from lpo_fast.config import LRM
from lpo_fast.errors import InputError
from lpo_fast.guard import Update
from lpo_fast.inputs import Encoder
from lpo_fast.latents import Cache
from lpo_fast.pairs import Corrupt, PairDataset, Pairs, collate
from lpo_fast.reward import LatentRewardModel

VALIDATION_EPOCH = 0xFFFFFFFF  # validation noise is always the same
STEP = ("loss", "accuracy", "grad_norm", "logit_scale")


def parts(batch: dict, size: int) -> list[dict]:
    """A step's batch, ``size`` pairs at a time."""
    along = {"labels", "mean", "std"}  # [2, B, …]
    return [{key: value[i:i + size] if key not in along else value[:, i:i + size] for key, value in batch.items()}
            for i in range(0, len(batch["rows"]), size)]


def encoded(encoder: Encoder, batch: dict, step: int, config: LRM, cache: Cache | None = None) -> dict:
    """A batch (``pairs.collate``) on the device, with mean and std of its pictures' posterior in their place."""
    rows = batch["rows"].to(encoder.device, non_blocking=True)
    mean, std = encoder.posterior(
        batch, cache, inputs.flips(config, step, rows) if config.hflip else None, encoder.train_encode)
    return {key: value.to(encoder.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items() if key in ("captions", "labels", "counts", "compare")} | {
        "rows": rows, "mean": mean, "std": std, "corrupt": batch["corrupt"]}


def train_step(lrm: LatentRewardModel, encoder: Encoder, batch: dict, step: int, update: Update, config: LRM,
               cache: Cache | None = None) -> Tensor:
    """One optimizer step of all processes, each with its part of the pairs; its metrics, which are those of all: STEP, [4].

    Pairs that do not decode go through the networks, but not into the loss. One process reads nothing back from the device.
    A step without a finite gradient changes nothing (see guard.py).
    """
    batch = encoded(encoder, batch, step, config, cache)
    good = (~batch["corrupt"]).to(encoder.device, non_blocking=True)
    weight, count = ranks.total(torch.stack([(good / batch["counts"]).sum(), good.sum()]))

    def gradients(size: int) -> Tensor:
        made = []
        for part in parts(batch, size):
            value, right = pair_loss(lrm, encoder, part, step, config, weight)
            update.scaler.scale(value).backward()
            made.append(torch.stack([value.detach(), right]))
        return torch.stack(made).sum(0)
    (value, right), norm = update(gradients)
    with torch.no_grad():
        return torch.stack([value, right / count.clamp(min=1), norm, lrm.logit_scale.exp()])


def pair_loss(lrm: LatentRewardModel, encoder: Encoder, batch: dict, step: int, config: LRM,
              weight: Tensor) -> tuple[Tensor, Tensor]:
    """A pass's share of the step's loss, and its number of right pairs.

    weight: Σ_j 1/n_j over the step's pairs, of which the loss takes the share of this pass. Every process computes the loss
    of all processes' pairs, and its gradient for its own.
    """
    rows = batch["rows"]
    t, labels = inputs.timesteps(config, step, rows, batch["compare"], batch["labels"])
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
    return value, correct(((image_0 - image_1) * text).sum(-1).detach(), torch.stack([label_0, label_1])).sum()


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
                text, image_0, image_1 = reward.features(lrm, words, x, t)
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


def load(config: LRM, device: torch.device) -> tuple[LatentRewardModel, Encoder]:
    """The LRM that is to be trained, and what makes its inputs."""
    model = models.model(config)
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
    return lrm, encoder


def _train(config: LRM, used: dict[str, Pairs]) -> Path:
    device = speed.device()
    speed.deterministic(config.deterministic)
    lrm, encoder = load(config, device)
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
    own = own_size(config, len(used["train"]))
    # In-batch negatives are those of a pass, and with many processes all make their passes together.
    update = Update(optimizer, guard.scaler(device, encoder.precision), config.max_grad_norm, -(-own // config.accumulate),
                    "use a larger --accumulate", halves=config.loss_type == "pair" and ranks.count() == 1)

    out = Path(config.out)
    if ranks.main():
        keeping.check_room(out, lrm, config, validated="validation" in used)
    table = runs.digest([used["train"].captions, *(x.tolist() for x in (used["train"].rows, used["train"].labels))])
    resumed = config.resume and bool(checkpoint.states(out))  # else it was killed before its first state
    run = runs.Run(config, resumed)
    if ranks.main():
        with files.writing(out):
            (out / "config.yaml").write_text(official_lrm.render(config, lrm.family.name, ranks.count()), encoding="utf-8")
    state = {"weights": checkpoint.Trained(lrm), "optimizer": optimizer, "decay": decay,
             "scaler": update.scaler if encoder.precision == "fp16" else None}
    skips = guard.Steps(out, lambda rows: {"config": asdict(config), "rows": ranks.gather(rows.to(device))[0].cpu(),
                                           "weights": state["weights"].state_dict(), "after": at["step"],
                                           "size": update.pairs})
    at = {"step": 0, "checkpoints": [], "corrupt": {use: [] for use in used}, "stage": {"metrics": {}}}
    if resumed:
        at = checkpoint.load_state(out / checkpoint.STATE, state)
        run.truncate(at["metrics"])
        for use, rows in at["corrupt"].items():
            corrupt[use].rows = set(rows)
        skips.state = at["skips"]
        runs.same(at["pairs"], table, config.pairs, "--pairs")
    if at["step"] > config.max_steps:
        raise InputError(str(config.max_steps), f"the run in {out} is beyond, at step {at['step']}", "use more", "--max-steps")
    epoch = steps_an_epoch(config, len(used["train"]))
    loader = fetch(sets["train"], batch_sampler=list(batches(config, len(used["train"]), at["step"])))
    if config.resume and not resumed:
        runs.say(f"warning: {out} holds no saved state: the run starts from the beginning")
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
            keeping.keep(config, lrm, encoder.tokenizers, at)

    def report(unread: int) -> None:
        """Write and say the metrics of the queued steps but the last ``unread``: reading them waits for the device."""
        while len(queued) > unread:
            step, values, row, rows = queued.pop(0)
            row = dict(zip(STEP, values.tolist(), strict=True)) | row
            run.log("train", step, **row)
            at["stage"]["step_loss"] = row["loss"]
            seconds, waited = clock.lap()
            rate = own * ranks.count() / seconds
            run.time(global_step=step + 1, seconds=seconds, pairs_per_second=rate, data=waited / seconds)
            runs.say(f"step {step + 1} | loss {row['loss']:.3f} | acc {row['accuracy']:.2f} | {seconds * 1e3:.0f} ms | "
                     f"data {waited / seconds:.0%} | {rate:.1f} pairs/s | {runs.memory()}")
            if problem := skips.look(step, row["loss"], row["grad_norm"], rows):
                save()
                raise problem

    def save() -> None:
        """The state that --resume goes on from."""
        at.update(metrics=run.size, skips=skips.state, pairs=table,
                  corrupt={use: sorted(c.rows) for use, c in corrupt.items()})
        if ranks.main():
            checkpoint.save_state(out / checkpoint.STATE, at, state)
            keeping.prune(out, at)

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
            values = train_step(lrm, encoder, batch, at["step"], update, config, caches.get("train"))
            decay.step()
            unusable = sum(len(c.rows) for c in corrupt.values())
            queued.append((at["step"], values, {"lr": lr, "corrupt": unusable}, batch["rows"]))
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
            if saves:
                save()
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
    keeping.hand_on(config, lrm, encoder.tokenizers, at)
    best = max((accuracy for _, accuracy in at["checkpoints"]), default=1)
    if best <= at.get("untrained", 0):
        runs.say(f"warning: no validation (best {best:.3f}) is above the one before the first step ({at['untrained']:.3f}): "
                 "this reward model has learned nothing useful")
    if held_out:
        if at["handed_on"] != at["step"]:
            keeping.restore(lrm, out / keeping.FINAL)
        for use, pairs in held_out.items():
            shown = validate(lrm, encoder, pairs, shown_at, corrupt[use])
            run.log(use, at["step"], checkpoint=at["handed_on"], **shown)
            runs.say(f"handed on: step {at['handed_on']}, {use} accuracy {shown['accuracy']:.3f} at t = {shown_at[0]}")
    for use, found in corrupt.items():
        if found.rows:
            runs.say(f"{len(found.rows)} {use} pairs left out, whose pictures do not decode")
    skips.summary(config.max_steps)
    run.close()
    return out
