"""The LPO loop: sample pairs for a batch of prompts, train the policy on them, repeat (arXiv 2502.01051).

With many processes a prompt batch is batch_size prompts of each. Valid pairs of all are pooled in an order that does not
depend on who sampled them, shuffled, and dealt out; gradients are summed.
"""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from lpo_fast import cli
from lpo_fast.config import LPO
from lpo_fast.errors import InputError
from lpo_fast.lpo import batches as lpo_batches
from lpo_fast.lpo import checkpoints, drawing, judging, policies, sampling, steps
from lpo_fast.lpo.sampling import LatentPairs, Score
from lpo_fast.lpo.steps import STEP
from lpo_fast.method import select
from lpo_fast.models.loras import trainable
from lpo_fast.models.texts import TextWindow
from lpo_fast.official import lpo
from lpo_fast.preflight import runs
from lpo_fast.run import accounting, clock, directory, environment, logs, monitor, optimization, profiling, states
from lpo_fast.run.optimization import OptimizerStep
from lpo_fast.system import compilation, console, devices, distributed, writing


def train(config: LPO, wrap_score: Callable[[Score], Score] = lambda score: score) -> Path:
    """Run LPO; the run directory. wrap_score may alter the reward (a control experiment, another scorer).

    Raises InputError for what cannot be read, used or written, also if the disk is full; the last saved state is whole then.
    """
    prompts, source = runs.lpo(config)
    distributed.state()
    with directory.lock(Path(config.out)):
        return _train(config, prompts, source, wrap_score)


def _train(config: LPO, prompts: list[str], source: Path | None, wrap_score: Callable[[Score], Score]) -> Path:
    device = devices.device()
    devices.deterministic(config.deterministic)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    policy, sched = policies.load(config, [*prompts, *config.validation_prompts], device)
    judge = judging.load_score(replace(config, attention=policy.attention), prompts, device)
    score = wrap_score(judge)
    low, high = config.threshold_min, config.threshold_max
    gap = select.gaps(sched, config.threshold_shape, low, low if config.threshold_shape == "none" else high)
    shape = policies.latent_shape(config, policy.unet)
    optimizer = optimization.optimizer(
        config.optimizer, policy.unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
    scaler = optimization.scaler(device, policy.precision) if not config.shard else torch.amp.GradScaler(enabled=False)
    update = OptimizerStep(optimizer, scaler, config.max_grad_norm, config.train_batch_size,
                    "use --checkpointing, or a smaller --train-batch-size with a larger --accumulate", halves=not config.shard)
    batches = len(lpo_batches.order(config, 0, len(prompts)))
    at, index, pairs = {"epoch": 0, "batch": 0, "prompts": 0, "done": 0, "step": 0}, None, None  # in the epoch: batch, prompts
    if source:
        at |= checkpoints.resume_from(source, policy.unet, optimizer)
        at["done"] = at["epoch"] * batches
    ema = EMAModel(trainable(policy.unet), decay=config.ema_decay) if config.ema_decay else None

    out = Path(config.out)
    if distributed.is_main():
        checkpoints.require_disk_space(out, policy.unet, config, batches, shape)
    resumed = config.resume and bool(states.states(out))  # else it was killed before its first state
    run, draw = logs.RunLog(config, resumed or config.in_place), drawing.Drawer(config, policy, sched, prompts, shape)
    if distributed.is_main():
        with writing.writing(out):
            (out / "exp_config.py").write_text(lpo.render(config, judge.lrm), encoding="utf-8")
    known = environment.digest(prompts)
    texts, trained_weights = [*prompts, *config.validation_prompts], states.Trained(policy.unet)

    def inputs(fed: LatentPairs) -> dict[str, object]:
        numbers = fed.prompt.unique().cpu()
        return {"config": asdict(config), "prompts": [texts[n] for n in numbers], "numbers": numbers, "after": at["step"],
                "size": update.pairs, "pairs": [x.cpu() for x in fed], "weights": trained_weights.state_dict()}
    skips, watch = monitor.SkippedSteps(out, None if config.shard else inputs), monitor.CollapseMonitor(config.clip_eps)
    parts = {"weights": trained_weights, "optimizer": optimizer, "ema": ema,
             "scaler": scaler if policy.precision == "fp16" else None}  # else its scale is 1
    if resumed:
        at = states.load_state(out / states.STATE, parts)
        run.truncate(at.pop("metrics"))
        index, left, skips.state, watch.state = at.pop("index"), at.pop("pairs"), at.pop("skips"), at.pop("watch")
        logs.require_same(at.pop("texts"), known, config.prompts, "--prompts")
        pairs = left and LatentPairs(*(x.to(device) for x in left))
        if pairs and isinstance(policy.text, TextWindow) and len(index) > config.batch_size * distributed.world_size():
            raise InputError(str(distributed.world_size()), f"processes hold the text of too few prompts for the {len(index)} of the "
                             "batch that is half done", "resume with at least as many as before", "WORLD_SIZE")
        if ema:
            ema.to(device)
    elif config.in_place:
        run.truncate_to_epoch(at["epoch"])
    elif not source:
        draw.compared("before")
    step = compilation.compiled(sampling.choose, config.compiled, graphs=True)
    compilation.mark_static(*policy.text.tensors, *judge.text.tensors, sched.timesteps, sched.table, sched.alphas_cumprod, gap)
    slots = min(config.batch_size, -(-len(prompts) // distributed.world_size()))
    size = config.batch_size * distributed.world_size()
    left = lpo_batches.batches_left(config, len(prompts), at, pairs is not None)
    total = min(at["done"] + left, at.setdefault("start", at["done"]) + (config.max_batches or math.inf))
    if at["epoch"] > config.epochs or at["done"] > total:
        key = "epochs" if at["epoch"] > config.epochs else "max_batches"
        raise InputError(str(getattr(config, key)), f"the run in {out} is beyond: {at['epoch']} epochs and {at['done']} "
                         "batches are done", "use more, or take a checkpoint_{epoch}", cli.flag(key))
    if config.resume and not resumed:
        console.say(f"warning: {out} holds no saved state: the run starts from the beginning")
    console.say(f"LPO on {device}, precision {policy.precision} | {len(prompts)} prompts | {at['done']} of {total} batches done | "
             f"{sum(p.numel() for p in trainable(policy.unet)):,} parameters train | {distributed.named(distributed.world_size())}")
    pooled = config.train_batch_size * config.accumulate * distributed.world_size()
    meter = accounting.Meter(device, devices.DTYPES[policy.precision], lambda: steps.work(policy, judge, sched, shape, config))
    profiler = profiling.Profiler(out if config.profile and distributed.is_main() else None, "prompt batch", total - at["done"])
    bar = tqdm(total=total, initial=at["done"], desc="LPO", unit="batch", leave=False, disable=None if distributed.is_main() else True)

    def log(steps: list[tuple[Tensor, LatentPairs]]) -> list[dict[str, float]]:
        """Rows of the latest optimizer steps, read from the device at once."""
        read = torch.stack([values for values, _ in steps]).tolist() if steps else []
        made = [dict(zip(STEP, values, strict=True)) | {"lr": optimizer.param_groups[0]["lr"]} for values in read]
        problem = None
        for number, row, (_, fed) in zip(range(at["step"] - len(made), at["step"]), made, steps, strict=True):
            problem = skips.look(number, row["train_loss"], row["grad_norm"], fed)
            run.log("train", number, epoch=at["epoch"], **row)
        steps.clear()
        if problem:
            save()
            raise problem
        return made

    def save() -> None:
        """The state that --resume goes on from; pairs that are still to be trained on are part of it."""
        here = {"metrics": run.size, "skips": skips.state, "watch": watch.state, "texts": known,
                "index": None if pairs is None else index.cpu(), "pairs": None if pairs is None else [x.cpu() for x in pairs]}
        states.save_state(out / states.STATE, at | here, parts)

    if config.in_place:
        save()  # in place of the state that goes on elsewhere
    with clock.stoppable() as stopped:
        while at["done"] < total and not distributed.any_rank(stopped):
            profiler.round()
            start, trained, unread, metrics = time.perf_counter(), [], [], None
            if pairs is None:  # else the run went on inside a prompt batch
                index = lpo_batches.order(config, at["epoch"], len(prompts), at["prompts"])[0]
                at["prompts"] += len(index)
            policy.prefetch(index)
            judge.prefetch(index)
            index = index.to(device)
            if pairs is None:
                try:
                    pairs, metrics = lpo_batches.sample_pairs(policy, score, sched, gap, shape, index, config, at["epoch"],
                                                  slots=slots, step=step)
                except torch.OutOfMemoryError as error:
                    raise InputError(str(slots), "prompts at a time do not fit into the GPU's memory "
                                     f"({str(error).splitlines()[0]})", "use a smaller --batch-size", "--batch-size") from error
                pairs = lpo_batches.shuffled(pairs, config, at["epoch"], at["batch"])
                run.log("batch", at["step"], epoch=at["epoch"], **metrics)
            sampled, count = time.perf_counter(), len(pairs.t)
            while len(pairs.t) and not distributed.any_rank(stopped):
                fed, pairs = pairs.take(slice(pooled)), pairs.take(slice(pooled, None))
                unread.append((steps.train_step(policy, sched, fed, update, config), fed))
                if ema and unread[-1][0][-1].isfinite():  # else the step was skipped
                    ema.step(trainable(policy.unet))
                at["step"] += 1
                if at["step"] % config.save_steps == 0:
                    trained += log(unread)
                    save()
            trained += log(unread)
            if len(pairs.t):
                break
            pairs, seconds = None, time.perf_counter() - start
            rate = meter.row(seconds * distributed.world_size(), prompts=len(index), pairs=count)
            run.time(global_step=at["step"], sampling=sampled - start, seconds=seconds,
                     prompts_per_second=len(index) / seconds, **rate)
            console.say(log_line(at["step"], trained, count, seconds, len(index), rate))
            for line in watch.batch(metrics, trained) if metrics else ():
                console.say(line)
            at |= {"batch": at["batch"] + 1, "done": at["done"] + 1}
            bar.update()
            if len(prompts) - at["prompts"] < (size if config.drop_last else 1):
                at |= {"epoch": at["epoch"] + 1, "batch": 0, "prompts": 0}
                if at["epoch"] % config.save_epochs == 0:
                    checkpoints.save_checkpoint(out, at["epoch"] - 1, policy.unet, optimizer, config, at["step"])
                if config.validation_prompts and at["epoch"] % config.validate_epochs == 0:
                    run.show("validation", at["step"], drawn := draw.validation(at["epoch"] - 1))
                    for line in watch.pictures(drawn, config.validation_pictures):
                        console.say(line)
        profiler.round()
        save()
    bar.close()
    if at["done"] < total:
        run.close()
        distributed.barrier()  # a launcher ends all processes soon after the first
        console.say(f"stopped after step {at['step']}; go on with --resume")
        raise SystemExit(config.preempt_exit_code or 128 + (stopped or [signal.SIGTERM])[0])
    skips.summary(at["step"])
    if at["step"] == 0:
        console.say("warning: no pair was valid, so nothing was trained: lower --threshold-min and --threshold-max, or check "
                 "the reward model's accuracy")
    if ema:
        ema.copy_to(trainable(policy.unet))
        console.say(f"what is exported is the average of the weights, --ema-decay {config.ema_decay:g}")
    checkpoints.export(out, policy.unet, config)
    draw.compared("after")
    run.close()
    distributed.barrier()
    return out


def log_line(step: int, trained: list[dict[str, float]], pairs: int, seconds: float, prompts: int, rate: dict) -> str:
    """One prompt batch in one line; loss and accuracy are means over its optimizer steps. rate: ``accounting.Meter``'s."""
    loss_, accuracy = (sum(row[key] for row in trained) / max(len(trained), 1) for key in ("train_loss", "implicit_acc"))
    what = f"loss {loss_:.3f} | acc {accuracy:.2f}" if trained else "no valid pair"
    return (f"step {step} | {what} | pairs {pairs} | {seconds * 1e3:.0f} ms | "
            f"{prompts / seconds:.1f} prompts/s{accounting.text(rate)} | {console.memory()}")
