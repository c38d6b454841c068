"""Run the LRM loop: train the denoiser to score latents, on preference pairs noised to random timesteps."""

from functools import partial
from pathlib import Path

from lpo_fast.config import LRM
from lpo_fast.data.preferences import PairTable
from lpo_fast.errors import InputError
from lpo_fast.lrm import loaders, selection, steps, validation
from lpo_fast.official import lrm as official
from lpo_fast.preflight import runs
from lpo_fast.run import directory, logs, monitor
from lpo_fast.run.clock import Clock
from lpo_fast.run.session import Run
from lpo_fast.system import compilation, console, devices, distributed


def train(config: LRM) -> Path:
    """Train an LRM; return the run directory.

    Its checkpoint-final/ is the LRM with the best validation accuracy, or the last one. Raises InputError if
    an input cannot be read or used, or an output cannot be written (also if the disk is full); the last saved
    state is then complete.
    """
    used = runs.lrm(config)
    distributed.state()
    with directory.lock(Path(config.out)):
        return _train(config, used)


def _train(config: LRM, used: dict[str, PairTable]) -> Path:
    # 1) Load the reward model, the encoder of its inputs, and the pairs.
    device = devices.device()
    out = Path(config.out)
    devices.numerics(config.deterministic)
    lrm, encoder = steps.load(config, device)
    data = loaders.Loaders(config, used, encoder)

    # 2) Set up training (pairs → optimizer steps), validation, and the run's progress.
    learner = steps.Learner(lrm, encoder, config, data.number, data.caches.get("train"))
    validate = validation.Validator(lrm, encoder, data, config)
    at = selection.Progress(corrupt=data.corrupt, pairs=data.digest)

    # 3) Open the run directory; a resumed run continues exactly where it stopped.
    selection.require_disk_space(out, lrm, config, validated="validation" in used)
    skips = monitor.SkippedSteps(out, learner.inputs)
    run = Run(config, at, learner.parts(), steps.STEP, skips=skips,
              after_save=partial(selection.prune, out, at))
    logs.write_text(out / "config.yaml", official.render(config, lrm.family.name, distributed.world_size()))
    if run.resumed:
        run.restore("pairs", config.pairs, "--pairs")
    if at.step > config.max_steps:
        raise InputError(str(config.max_steps), f"is less than the {at.step} steps done by the run in {out}",
                         f"use at least {at.step}", "--max-steps")
    console.say(f"LRM on {device}, precision {encoder.precision} | "
                f"{data.number} of {len(used['train'].captions)} pairs | "
                f"{at.step} of {config.max_steps} steps done | "
                f"{sum(p.numel() for p in lrm.parameters() if p.requires_grad):,} trainable parameters | "
                f"{distributed.named(distributed.world_size())}")
    data.announce()
    clock = Clock(config.num_workers)

    # 4) Train and validate.
    with run.going("LRM", "step", config.max_steps) as bar:
        if "validation" in used and config.eval_on_start and at.step == 0:
            at.untrained = validated(run, validate)
        clock.start()
        for batch in clock.fetched(data.train(at.step)):
            rate = learner.rate
            data.corrupt["train"].count(batch)
            data.corrupt["train"].share()
            metrics = learner.step(batch, at.step)
            run.queue(metrics, batch["rows"], lr=rate, corrupt=data.unusable)
            at.stepped(rate, learner.epoch)
            bar.update()
            last = at.step == config.max_steps
            stop = run.stopping
            validates = "validation" in used and (at.step % config.validate_steps == 0 or last)
            saves = at.step % config.save_steps == 0 or last or stop
            report(run, clock, learner.size, 0 if validates or saves else compilation.metric_lag())
            run.check()
            if validates:
                at.stage["metrics"] = {"accuracy": validated(run, validate)}
                selection.keep(config, lrm, encoder.tokenizers, at)
            if stop:
                break
            if saves and not last:
                run.save()
            if validates or saves:
                clock.start()
        clock.advise()

    # 5) Export the final LRM, and measure its accuracy on held-out pairs at all timesteps.
    step = selection.export_final(config, lrm, encoder.tokenizers, at)
    if step != at.step and data.held_out:
        selection.restore(lrm, out / selection.FINAL)
    for use in data.held_out:
        shown = validate(use)
        run.log.log(use, at.step, checkpoint=step, **shown)
        console.say(f"final checkpoint: step {step}, {use} accuracy {shown['accuracy']:.3f} "
                    f"at t = {validate.timesteps[0]}")
    data.summary()
    skips.summary(config.max_steps)
    run.close()
    return out


def validated(run: Run, validate: validation.Validator) -> float:
    """Validate at every fifth validation timestep, log it, and return the accuracy at the first one."""
    shown = validate("validation", every=5)
    step = run.at.step
    run.log.log("validation", step, **shown)
    console.say(f"step {step} | validation accuracy {shown['accuracy']:.3f} at t = {validate.timesteps[0]} "
                f"({shown['n']} pairs)")
    return shown["accuracy"]


def report(run: Run, clock: Clock, size: int, lag: int) -> None:
    """Log and print all queued steps except the last ``lag``; size: pairs per step of all ranks together."""
    rows = run.flush(lag, check=False)
    first = run.at.step - lag - len(rows) + 1
    seconds, waited = clock.lap() if rows else (0.0, 0.0)
    for step, row in enumerate(rows, first):
        run.at.stage["step_loss"] = row["loss"]
        each = seconds / len(rows)
        idle = waited / seconds
        run.log.time(global_step=step, seconds=each, pairs_per_second=size / each, data=idle)
        console.say(f"step {step} | loss {row['loss']:.3f} | acc {row['accuracy']:.2f} | "
                    f"{each * 1e3:.0f} ms | data {idle:.0%} | {size / each:.1f} pairs/s | {console.memory()}")
