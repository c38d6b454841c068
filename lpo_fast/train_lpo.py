"""Run the LPO loop: sample pairs for a batch of prompts, train the policy on them, repeat (arXiv 2502.01051).

With several processes, a prompt batch consists of batch_size prompts per process. The valid pairs of all
ranks are gathered in an order that does not depend on which rank sampled them, shuffled, and divided among
the ranks; gradients are summed.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lpo_fast.config import LPO
from lpo_fast.lpo import batches, checkpoints, drawing, judging, policies, steps
from lpo_fast.lpo.sampling import Score
from lpo_fast.models.loras import trainable
from lpo_fast.official import lpo as official
from lpo_fast.preflight import runs
from lpo_fast.run import accounting, directory, environment, logs, monitor, profiling
from lpo_fast.run.session import Run
from lpo_fast.system import console, devices, distributed


def train(config: LPO, wrap_score: Callable[[Score], Score] = lambda score: score) -> Path:
    """Train a policy with LPO; return the run directory.

    wrap_score: changes the reward, e.g., for a control experiment or another scorer. Raises InputError if an
    input cannot be read or used, or an output cannot be written (also if the disk is full); the last saved
    state is then complete.
    """
    prompts, source = runs.lpo(config)
    distributed.state()
    with directory.lock(Path(config.out)):
        return _train(config, prompts, source, wrap_score)


def _train(config: LPO, prompts: list[str], source: Path | None,
           wrap_score: Callable[[Score], Score]) -> Path:
    # 1) Load the policy, its reference, and the reward model; encode all texts once.
    device = devices.device()
    out = Path(config.out)
    texts = [*prompts, *config.validation_prompts]
    devices.numerics(config.deterministic, config.tf32)
    policy, sched = policies.load(config, texts, device)
    judge = judging.load_score(replace(config, attention=policy.attention), prompts, device)

    # 2) Set up sampling (prompts → pairs), training (pairs → optimizer steps), and the run's progress.
    sampler = batches.Sampler(policy, judge, wrap_score(judge), sched, config, len(prompts))
    learner = steps.Learner(policy, sched, texts, config, device)
    at = batches.Progress(texts=environment.digest(prompts))
    if source:
        checkpoints.start_from(source, policy.unet, learner.optimizer, at, config, len(prompts))
    learner.average()

    # 3) Open the run directory; a resumed run continues exactly where it stopped.
    epoch_batches = batches.per_epoch(config, len(prompts))
    checkpoints.require_disk_space(out, policy.unet, config, epoch_batches, sampler.shape)
    skips = monitor.SkippedSteps(out, None if config.shard else learner.inputs)
    watch = monitor.CollapseMonitor(config.clip_eps)
    run = Run(config, at, learner.parts(), steps.STEP, skips=skips, watch=watch, appends=config.in_place,
              exit_code=config.preempt_exit_code)
    draw = drawing.Drawer(config, policy, sched, prompts, sampler.shape)
    logs.write_text(out / "exp_config.py", official.render(config, judge.lrm))
    if run.resumed:
        run.restore("texts", config.prompts, "--prompts")
        learner.to(device)
    elif config.in_place:
        run.log.truncate_to_epoch(at.epoch)
    elif not source:
        draw.compared("before")
    total = batches.total(config, len(prompts), at)
    if config.in_place:
        run.save()  # replaces the state of the earlier run in this directory
    console.say(f"LPO on {device}, precision {policy.precision} | {len(prompts)} prompts | "
                f"{at.done} of {total} batches done | "
                f"{sum(p.numel() for p in trainable(policy.unet)):,} trainable parameters | "
                f"{distributed.named(distributed.world_size())}")
    work = partial(steps.work, policy, judge, sched, sampler.shape, config)
    meter = accounting.Meter(device, devices.DTYPES[policy.precision], work)
    profiler = profiling.Profiler(out if config.profile else None, "prompt batch", total - at.done)

    # 4) Sample and train.
    with run.going("LPO", "batch", total) as bar:
        while at.done < total and not run.stopping:
            profiler.round()
            start = time.perf_counter()
            seen, rows = None, []
            count = sampler.fetch(at)
            if at.pairs is None:  # else the run was resumed inside a prompt batch
                at.pairs, seen = sampler.pairs(at)
                run.log.log("batch", at.step, epoch=at.epoch, **seen)
            sampled = time.perf_counter() - start
            found = at.pairs.number
            while at.pairs.number and not run.stopping:
                fed, at.pairs = at.pairs.cut(learner.size)
                run.queue(learner.step(fed), fed, epoch=at.epoch, lr=learner.rate)
                if at.step % config.save_steps == 0:
                    rows += run.flush()
                    run.save()
            rows += run.flush()
            if at.pairs.number:
                break  # stopped: the remaining pairs are saved in the state
            seconds = time.perf_counter() - start
            rate = meter.row(seconds * distributed.world_size(), prompts=count, pairs=found)
            rate = run.log.time(global_step=at.step, sampling=sampled, seconds=seconds,
                                prompts_per_second=count / seconds, **rate)
            console.say(log_line(at.step, rows, found, rate))
            for warning in watch.batch(seen, rows) if seen else ():
                console.say(warning)
            epoch = at.epoch
            at.next_batch(config, len(prompts))
            bar.update()
            if at.epoch > epoch:
                end_of_epoch(epoch, run, learner, draw, watch)
        profiler.round()

    # 5) Export the final weights, and draw the same pictures as before training.
    skips.summary(at.step)
    if at.step == 0:
        console.say("warning: no pair was valid, so nothing was trained: lower --threshold-min and "
                    "--threshold-max, or check the reward model's accuracy")
    learner.finish()
    checkpoints.export(out, policy.unet, config)
    draw.compared("after")
    run.close()
    return out


def end_of_epoch(epoch: int, run: Run, learner: steps.Learner, draw: drawing.Drawer,
                 watch: monitor.CollapseMonitor) -> None:
    """Save a checkpoint every save_epochs, and draw the validation prompts every validate_epochs."""
    config, at, unet = learner.config, run.at, learner.policy.unet
    if at.epoch % config.save_epochs == 0:
        checkpoints.save_checkpoint(run.out, epoch, unet, learner.optimizer, config, at.step)
    if config.validation_prompts and at.epoch % config.validate_epochs == 0:
        drawn = draw.validation(epoch)
        run.log.show("validation", at.step, drawn)
        for warning in watch.pictures(drawn, config.validation_pictures):
            console.say(warning)


def log_line(step: int, rows: list[dict[str, Any]], pairs: int, rate: dict[str, float]) -> str:
    """Return the log line of one prompt batch.

    rows: the metrics of its optimizer steps, whose mean loss and accuracy are shown. pairs: valid pairs.
    rate: timings: seconds, prompts per second, and on a GPU TFLOP/s.
    """
    loss, accuracy = (sum(row[key] for row in rows) / max(len(rows), 1)
                      for key in ("train_loss", "implicit_acc"))
    training = f"loss {loss:.3f} | acc {accuracy:.2f}" if rows else "no valid pair"
    return (f"step {step} | {training} | pairs {pairs} | {rate['seconds'] * 1e3:.0f} ms | "
            f"{rate['prompts_per_second']:.1f} prompts/s{accounting.text(rate)} | {console.memory()}")
