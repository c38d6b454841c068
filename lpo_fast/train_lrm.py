"""The LRM loop: preference pairs of pictures, noised to a random timestep, teach the denoiser to score latents."""

import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from lpo_fast.config import LRM
from lpo_fast.data import latent_cache
from lpo_fast.data.dataset import Corrupt, PairDataset, collate
from lpo_fast.data.preferences import PairTable
from lpo_fast.errors import InputError
from lpo_fast.lrm import selection, steps
from lpo_fast.lrm import validation as lrm_validation
from lpo_fast.lrm.steps import STEP
from lpo_fast.official import lrm as official_lrm
from lpo_fast.preflight import runs
from lpo_fast.run import clock as run_clock
from lpo_fast.run import directory, environment, logs, monitor, optimization, states
from lpo_fast.run.optimization import OptimizerStep
from lpo_fast.system import compilation, console, devices, distributed, writing


def train(config: LRM) -> Path:
    """Train an LRM; the run directory, whose checkpoint-final/ is the best LRM by validation accuracy, or the last.

    Raises InputError for what cannot be read, used or written, also if the disk is full; the last saved state is whole then.
    """
    used = runs.lrm(config)
    distributed.state()
    with directory.lock(Path(config.out)):
        return _train(config, used)


def _train(config: LRM, used: dict[str, PairTable]) -> Path:
    device = devices.device()
    devices.deterministic(config.deterministic)
    lrm, encoder = steps.load(config, device)
    caches = {use: latent_cache.of(config, pairs, encoder.precision) for use, pairs in used.items() if config.cache_latents}
    sets = {use: PairDataset(pairs, config.resolution or encoder.resolution, caches.get(use)) for use, pairs in used.items()}
    fetch = partial(DataLoader, collate_fn=collate, num_workers=config.num_workers, persistent_workers=config.num_workers > 0,
                    pin_memory=device.type == "cuda")
    held_out = {use: fetch(pairs, config.batch_size // config.accumulate // distributed.world_size(),
                           sampler=range(distributed.rank(), len(pairs), distributed.world_size()))
                for use, pairs in sets.items() if use != "train"}
    corrupt = {use: Corrupt(pairs, config.max_corrupt) for use, pairs in used.items()}
    optimizer = optimization.optimizer(config.optimizer, lrm.parameters(), lr=config.learning_rate,
                                weight_decay=config.weight_decay)
    factor = optimization.learning_rate(config.warmup, config.warmup_steps, config.max_steps)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    own = steps.own_size(config, len(used["train"]))
    # In-batch negatives are those of a pass, and with many processes all make their passes together.
    update = OptimizerStep(optimizer, optimization.scaler(device, encoder.precision), config.max_grad_norm, -(-own // config.accumulate),
                    "use a larger --accumulate", halves=config.loss_type == "pair" and distributed.world_size() == 1)

    out = Path(config.out)
    if distributed.is_main():
        selection.require_disk_space(out, lrm, config, validated="validation" in used)
    table = environment.digest([used["train"].captions, *(x.tolist() for x in (used["train"].rows, used["train"].labels))])
    resumed = config.resume and bool(states.states(out))  # else it was killed before its first state
    run = logs.RunLog(config, resumed)
    if distributed.is_main():
        with writing.writing(out):
            (out / "config.yaml").write_text(official_lrm.render(config, lrm.family.name, distributed.world_size()), encoding="utf-8")
    state = {"weights": states.Trained(lrm), "optimizer": optimizer, "decay": decay,
             "scaler": update.scaler if encoder.precision == "fp16" else None}
    skips = monitor.SkippedSteps(out, lambda rows: {"config": asdict(config), "rows": distributed.gather(rows.to(device))[0].cpu(),
                                           "weights": state["weights"].state_dict(), "after": at["step"],
                                           "size": update.pairs})
    at = {"step": 0, "checkpoints": [], "corrupt": {use: [] for use in used}, "stage": {"metrics": {}}}
    if resumed:
        at = states.load_state(out / states.STATE, state)
        run.truncate(at["metrics"])
        for use, rows in at["corrupt"].items():
            corrupt[use].rows = set(rows)
        skips.state = at["skips"]
        logs.require_same(at["pairs"], table, config.pairs, "--pairs")
    if at["step"] > config.max_steps:
        raise InputError(str(config.max_steps), f"the run in {out} is beyond, at step {at['step']}", "use more", "--max-steps")
    epoch = steps.steps_an_epoch(config, len(used["train"]))
    loader = fetch(sets["train"], batch_sampler=list(steps.batches(config, len(used["train"]), at["step"])))
    if config.resume and not resumed:
        console.say(f"warning: {out} holds no saved state: the run starts from the beginning")
    console.say(
        f"LRM on {device}, precision {encoder.precision} | {len(used['train'])} of {len(used['train'].captions)} pairs | "
        f"{at['step']} of {config.max_steps} steps done | "
        f"{sum(p.numel() for p in lrm.parameters() if p.requires_grad):,} parameters train | {distributed.named(distributed.world_size())}"
    )
    for use, cache in caches.items():
        found = latent_cache.numbers(used[use])
        console.say(f"latents of {use} pairs: {cache.folder} holds {len(found) - cache.missing(found):,} of {len(found):,}")
    clock, queued = run_clock.Clock(config.num_workers), []
    every = list(range(1, config.largest_timestep + 1, 50))
    shown_at = list(dict.fromkeys([1 if config.variable_timestep else config.constant_timestep, *every]))

    def validation() -> None:
        """Validate, and keep the LRM if its accuracy deserves it."""
        shown = lrm_validation.validate(lrm, encoder, held_out["validation"], shown_at[::5], corrupt["validation"])
        run.log("validation", at["step"], **shown)
        console.say(f"step {at['step']} | validation accuracy {shown['accuracy']:.3f} at t = {shown_at[0]} ({shown['n']} pairs)")
        if at["step"] == 0:
            at["untrained"] = shown["accuracy"]
        else:
            at["stage"]["metrics"] = {"accuracy": shown["accuracy"]}
            selection.keep(config, lrm, encoder.tokenizers, at)

    def report(unread: int) -> None:
        """Write and say the metrics of the queued steps but the last ``unread``: reading them waits for the device."""
        while len(queued) > unread:
            step, values, row, rows = queued.pop(0)
            row = dict(zip(STEP, values.tolist(), strict=True)) | row
            run.log("train", step, **row)
            at["stage"]["step_loss"] = row["loss"]
            seconds, waited = clock.lap()
            rate = own * distributed.world_size() / seconds
            run.time(global_step=step + 1, seconds=seconds, pairs_per_second=rate, data=waited / seconds)
            console.say(f"step {step + 1} | loss {row['loss']:.3f} | acc {row['accuracy']:.2f} | {seconds * 1e3:.0f} ms | "
                     f"data {waited / seconds:.0%} | {rate:.1f} pairs/s | {console.memory()}")
            if problem := skips.look(step, row["loss"], row["grad_norm"], rows):
                save()
                raise problem

    def save() -> None:
        """The state that --resume goes on from."""
        at.update(metrics=run.size, skips=skips.state, pairs=table,
                  corrupt={use: sorted(c.rows) for use, c in corrupt.items()})
        if distributed.is_main():
            states.save_state(out / states.STATE, at, state)
            selection.prune(out, at)

    bar = tqdm(total=config.max_steps, initial=at["step"], desc="LRM", unit="step", leave=False,
               disable=None if distributed.is_main() else True)
    with run_clock.stoppable() as stopped:
        if "validation" in held_out and config.eval_on_start and at["step"] == 0:
            validation()
        clock.start()
        for batch in clock.fetched(loader):
            lr = decay.get_last_lr()[0]
            corrupt["train"].count(batch)
            corrupt["train"].share()
            values = steps.train_step(lrm, encoder, batch, at["step"], update, config, caches.get("train"))
            decay.step()
            unusable = sum(len(c.rows) for c in corrupt.values())
            queued.append((at["step"], values, {"lr": lr, "corrupt": unusable}, batch["rows"]))
            at["step"] += 1
            at["stage"] |= {"epoch": (at["step"] - 1) // epoch, "step": (at["step"] - 1) % epoch + 1, "lr": lr,
                            "global_step": at["step"]}
            bar.update()
            last, stop = at["step"] == config.max_steps, distributed.any_rank(stopped)
            validates = "validation" in held_out and (at["step"] % config.validate_steps == 0 or last)
            saves = at["step"] % config.save_steps == 0 or last or stop
            report(0 if validates or saves else compilation.metric_lag())
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
        distributed.barrier()  # a launcher ends all processes soon after the first
        console.say(f"stopped after step {at['step']}; go on with --resume")
        raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])
    selection.export_final(config, lrm, encoder.tokenizers, at)
    best = max((accuracy for _, accuracy in at["checkpoints"]), default=1)
    if best <= at.get("untrained", 0):
        console.say(f"warning: no validation (best {best:.3f}) is above the one before the first step ({at['untrained']:.3f}): "
                 "this reward model has learned nothing useful")
    if held_out:
        if at["exported"] != at["step"]:
            selection.restore(lrm, out / selection.FINAL)
        for use, pairs in held_out.items():
            shown = lrm_validation.validate(lrm, encoder, pairs, shown_at, corrupt[use])
            run.log(use, at["step"], checkpoint=at["exported"], **shown)
            console.say(f"kept as final: step {at['exported']}, {use} accuracy {shown['accuracy']:.3f} at t = {shown_at[0]}")
    for use, found in corrupt.items():
        if found.rows:
            console.say(f"{len(found.rows)} {use} pairs left out, whose pictures do not decode")
    skips.summary(config.max_steps)
    run.close()
    return out
