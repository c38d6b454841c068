"""The LPO loop: sample pairs for a batch of prompts, train the policy on them, repeat (arXiv 2502.01051).

With many processes a prompt batch is batch_size prompts of each. Valid pairs of all are pooled in an order that does not
depend on who sampled them, shuffled, and dealt out; gradients are summed.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from lpo_fast import (
    accounting,
    checkpoint,
    cli,
    files,
    guard,
    noise,
    official,
    outputs,
    preflight,
    ranks,
    runs,
    sample,
    select,
    speed,
)
from lpo_fast import policy as policies
from lpo_fast.backbone import Windowed
from lpo_fast.config import LPO
from lpo_fast.errors import InputError
from lpo_fast.guard import Update
from lpo_fast.kernels.pair_loss import pair_loss
from lpo_fast.loss import METRICS, StepDPO
from lpo_fast.policy import Policy, trainable
from lpo_fast.sample import CounterNoise, Pairs, Score
from lpo_fast.schedule import Schedule

STEP = (*METRICS, "grad_norm")


def evaluate(policy: Policy, sched: Schedule, pairs: Pairs, weight: Tensor, *, guidance: float, beta: float,
             eps: float) -> StepDPO:
    """One policy and one reference evaluation serve both members of each pair. weight: [N], see ``loss.step_dpo``."""
    at = pairs.x_t, pairs.t, pairs.prompt
    return pair_loss(sched, pairs.x_t, pairs.winner, pairs.loser, pairs.t, policy.train(*at), policy.reference(*at),
                     weight, guidance=guidance, beta=beta, eps=eps)


def padded(pairs: Pairs, size: int) -> Pairs:
    """Exactly ``size`` pairs: the last ones repeat the first, marked as not valid, so that shapes never change."""
    index = torch.arange(size, device=pairs.t.device)
    real = index < len(pairs.t)
    return pairs.take(torch.where(real, index, 0))._replace(valid=real)


def micro_batches(pairs: Pairs, size: int) -> Iterator[Pairs]:
    """This process's part of an optimizer step's pairs, ``size`` at a time; as many times in every process."""
    rank, world, total = ranks.index(), ranks.count(), len(pairs.t)
    for first in range(0, -(-total // world), size):
        part = pairs.take(slice(rank + first * world, rank + (first + size) * world, world))
        yield padded(part, size) if len(part.t) else padded(pairs, size)._replace(valid=torch.zeros_like(
            pairs.valid[:1]).expand(size))


def train_step(policy: Policy, sched: Schedule, pairs: Pairs, update: Update, config: LPO) -> Tensor:
    """One optimizer step on up to train_batch_size · accumulate pairs a process; its metrics, STEP, on the device.

    A step without a finite gradient changes nothing (see guard.py).
    """
    def gradients(size: int) -> Tensor:
        metrics = 0
        for micro in micro_batches(pairs, size):
            out = evaluate(policy, sched, micro, micro.valid / len(pairs.t), beta=config.beta, eps=config.clip_eps,
                           guidance=config.train_guidance)
            update.scaler.scale(out.loss).backward()
            metrics = metrics + out.totals
        return metrics
    metrics, norm = update(gradients)
    return torch.cat([ranks.total(metrics), norm[None]])


def sample_pairs(policy: Policy, score: Score, sched: Schedule, gap: Tensor, shape: tuple[int, int, int], index: Tensor,
                 config: LPO, epoch: int, *, slots: int = 0, step: Callable = sample.choose) -> tuple[Pairs, dict[str, object]]:
    """The valid pairs of all processes for prompt numbers ``index``, step-major, and what they say of the batch.

    slots: prompts that each process samples; where it has fewer, the first one again, whose pairs are dropped: shapes never
    change, and a process without a prompt keeps the others company. step: see ``sample.trajectory``.
    """
    own = index[ranks.index()::ranks.count()]
    some = torch.cat([own, index[:1].expand(max(slots - len(own), len(own) == 0))])
    pairs, scores = sample.trajectory(
        policy.predict, score, sched, gap, CounterNoise(config.seed, epoch, some, shape), some, step=step,
        guidance=config.guidance_scale, num_candidates=config.num_candidates, window=config.window)
    steps, real = len(scores), torch.arange(len(some), device=some.device) < len(own)
    times, valid, scores = ranks.gather(*(x.movedim(-1, 0)[:len(own)].contiguous() for x in (
        pairs.t.view(steps, -1), pairs.valid.view(steps, -1).int(), scores)))  # [prompts, steps] or [prompts, steps, K]
    everything = pairs._replace(t=times.T.flatten(), valid=valid.T.flatten().bool())
    metrics = batch_metrics(everything, scores.movedim(0, -1))
    kept = pairs.take(pairs.valid & real.repeat(steps))
    kept = Pairs(*ranks.gather(*kept[:-1], kept.valid.int()))
    number, place = ((a[:, None] == b).int().argmax(1) for a, b in ((kept.t, sched.timesteps), (kept.prompt, index)))
    return kept.take((number * len(index) + place).argsort())._replace(valid=kept.valid.bool()), metrics


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


def order(config: LPO, epoch: int, prompts: int, done: int = 0) -> list[Tensor]:
    """The prompt batches of an epoch, for all processes together, that are left after ``done`` prompts. The order of the
    prompts is a function of the seed and the epoch; only how it is cut into batches depends on the number of processes."""
    size = config.batch_size * ranks.count()
    numbers = noise.permutation(config.seed, epoch, 0, prompts) if config.shuffle else torch.arange(prompts)
    left = prompts - done
    return list(numbers[done:][:left // size * size or left if config.drop_last else left].split(size))


def batches_left(config: LPO, prompts: int, at: dict[str, int], unfinished: bool) -> int:
    """Prompt batches that are left of a run, in whose epoch another number of processes may have begun. unfinished: whether
    the pairs of one more, whose prompts ``at`` counts already, are still to be trained on."""
    if at["epoch"] >= config.epochs:
        return 0
    size = config.batch_size * ranks.count()
    here = (prompts - at["prompts"] + (0 if config.drop_last else size - 1)) // size + unfinished
    return max(here, 1) + (config.epochs - at["epoch"] - 1) * len(order(config, 0, prompts))


def shuffled(pairs: Pairs, config: LPO, epoch: int, batch: int) -> Pairs:
    """The valid pairs in random order: a function of the seed, the epoch and the batch."""
    index = pairs.valid.nonzero()[:, 0]
    return pairs.take(index[noise.permutation(config.seed, epoch, batch + 1, len(index)).to(index.device)])


def train(config: LPO, wrap_score: Callable[[Score], Score] = lambda score: score) -> Path:
    """Run LPO; the run directory. wrap_score may alter the reward (a control experiment, another scorer).

    Raises InputError for what cannot be read, used or written, also if the disk is full; the last saved state is whole then.
    """
    prompts, source = preflight.lpo(config)
    ranks.state()
    with runs.claim(Path(config.out)):
        return _train(config, prompts, source, wrap_score)


def _train(config: LPO, prompts: list[str], source: Path | None, wrap_score: Callable[[Score], Score]) -> Path:
    device = speed.device()
    speed.deterministic(config.deterministic)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    policy, sched = policies.load(config, [*prompts, *config.validation_prompts], device)
    judge = policies.load_score(replace(config, attention=policy.attention), prompts, device)
    score = wrap_score(judge)
    low, high = config.threshold_min, config.threshold_max
    gap = select.gaps(sched, config.threshold_shape, low, low if config.threshold_shape == "none" else high)
    shape = policies.latent_shape(config, policy.unet)
    optimizer = speed.optimizer(
        config.optimizer, policy.unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
    scaler = guard.scaler(device, policy.precision) if not config.shard else torch.amp.GradScaler(enabled=False)
    update = Update(optimizer, scaler, config.max_grad_norm, config.train_batch_size,
                    "use --checkpointing, or a smaller --train-batch-size with a larger --accumulate", halves=not config.shard)
    batches = len(order(config, 0, len(prompts)))
    at, index, pairs = {"epoch": 0, "batch": 0, "prompts": 0, "done": 0, "step": 0}, None, None  # in the epoch: batch, prompts
    if source:
        at |= outputs.resume_from(source, policy.unet, optimizer)
        at["done"] = at["epoch"] * batches
    ema = EMAModel(trainable(policy.unet), decay=config.ema_decay) if config.ema_decay else None

    out = Path(config.out)
    if ranks.main():
        outputs.check_room(out, policy.unet, config, batches, shape)
    resumed = config.resume and bool(checkpoint.states(out))  # else it was killed before its first state
    run, draw = runs.Run(config, resumed or config.in_place), outputs.Pictures(config, policy, sched, prompts, shape)
    if ranks.main():
        with files.writing(out):
            (out / "exp_config.py").write_text(official.render(config, judge.lrm), encoding="utf-8")
    known = runs.digest(prompts)
    texts, trained_weights = [*prompts, *config.validation_prompts], checkpoint.Trained(policy.unet)

    def inputs(fed: Pairs) -> dict[str, object]:
        numbers = fed.prompt.unique().cpu()
        return {"config": asdict(config), "prompts": [texts[n] for n in numbers], "numbers": numbers, "after": at["step"],
                "size": update.pairs, "pairs": [x.cpu() for x in fed], "weights": trained_weights.state_dict()}
    skips, watch = guard.Steps(out, None if config.shard else inputs), guard.Watch(config.clip_eps)
    parts = {"weights": trained_weights, "optimizer": optimizer, "ema": ema,
             "scaler": scaler if policy.precision == "fp16" else None}  # else its scale is 1
    if resumed:
        at = checkpoint.load_state(out / checkpoint.STATE, parts)
        run.truncate(at.pop("metrics"))
        index, left, skips.state, watch.state = at.pop("index"), at.pop("pairs"), at.pop("skips"), at.pop("watch")
        runs.same(at.pop("texts"), known, config.prompts, "--prompts")
        pairs = left and Pairs(*(x.to(device) for x in left))
        if pairs and isinstance(policy.text, Windowed) and len(index) > config.batch_size * ranks.count():
            raise InputError(str(ranks.count()), f"processes hold the text of too few prompts for the {len(index)} of the "
                             "batch that is half done", "resume with at least as many as before", "WORLD_SIZE")
        if ema:
            ema.to(device)
    elif config.in_place:
        run.truncate_to_epoch(at["epoch"])
    elif not source:
        draw.compared("before")
    step = speed.compiled(sample.choose, config.compiled, graphs=True)
    speed.stay(*policy.text.tensors, *judge.text.tensors, sched.timesteps, sched.table, sched.alphas_cumprod, gap)
    slots = min(config.batch_size, -(-len(prompts) // ranks.count()))
    size = config.batch_size * ranks.count()
    left = batches_left(config, len(prompts), at, pairs is not None)
    total = min(at["done"] + left, at.setdefault("start", at["done"]) + (config.max_batches or math.inf))
    if at["epoch"] > config.epochs or at["done"] > total:
        key = "epochs" if at["epoch"] > config.epochs else "max_batches"
        raise InputError(str(getattr(config, key)), f"the run in {out} is beyond: {at['epoch']} epochs and {at['done']} "
                         "batches are done", "use more, or take a checkpoint_{epoch}", cli.flag(key))
    if config.resume and not resumed:
        runs.say(f"warning: {out} holds no saved state: the run starts from the beginning")
    runs.say(f"LPO on {device}, precision {policy.precision} | {len(prompts)} prompts | {at['done']} of {total} batches done | "
             f"{sum(p.numel() for p in trainable(policy.unet)):,} parameters train | {ranks.named(ranks.count())}")
    pooled = config.train_batch_size * config.accumulate * ranks.count()
    meter = accounting.Meter(device, speed.DTYPES[policy.precision], lambda: work(policy, judge, sched, shape, config))
    profiler = accounting.Profiler(out if config.profile and ranks.main() else None, "prompt batch", total - at["done"])
    bar = tqdm(total=total, initial=at["done"], desc="LPO", unit="batch", leave=False, disable=None if ranks.main() else True)

    def log(steps: list[tuple[Tensor, Pairs]]) -> list[dict[str, float]]:
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
        checkpoint.save_state(out / checkpoint.STATE, at | here, parts)

    if config.in_place:
        save()  # in place of the state that goes on elsewhere
    with runs.stoppable() as stopped:
        while at["done"] < total and not ranks.anywhere(stopped):
            profiler.round()
            start, trained, unread, metrics = time.perf_counter(), [], [], None
            if pairs is None:  # else the run went on inside a prompt batch
                index = order(config, at["epoch"], len(prompts), at["prompts"])[0]
                at["prompts"] += len(index)
            policy.bring(index)
            judge.bring(index)
            index = index.to(device)
            if pairs is None:
                try:
                    pairs, metrics = sample_pairs(policy, score, sched, gap, shape, index, config, at["epoch"],
                                                  slots=slots, step=step)
                except torch.OutOfMemoryError as error:
                    raise InputError(str(slots), "prompts at a time do not fit into the GPU's memory "
                                     f"({str(error).splitlines()[0]})", "use a smaller --batch-size", "--batch-size") from error
                pairs = shuffled(pairs, config, at["epoch"], at["batch"])
                run.log("batch", at["step"], epoch=at["epoch"], **metrics)
            sampled, count = time.perf_counter(), len(pairs.t)
            while len(pairs.t) and not ranks.anywhere(stopped):
                fed, pairs = pairs.take(slice(pooled)), pairs.take(slice(pooled, None))
                unread.append((train_step(policy, sched, fed, update, config), fed))
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
            rate = meter.row(seconds * ranks.count(), prompts=len(index), pairs=count)
            run.time(global_step=at["step"], sampling=sampled - start, seconds=seconds,
                     prompts_per_second=len(index) / seconds, **rate)
            runs.say(log_line(at["step"], trained, count, seconds, len(index), rate))
            for line in watch.batch(metrics, trained) if metrics else ():
                runs.say(line)
            at |= {"batch": at["batch"] + 1, "done": at["done"] + 1}
            bar.update()
            if len(prompts) - at["prompts"] < (size if config.drop_last else 1):
                at |= {"epoch": at["epoch"] + 1, "batch": 0, "prompts": 0}
                if at["epoch"] % config.save_epochs == 0:
                    outputs.save_checkpoint(out, at["epoch"] - 1, policy.unet, optimizer, config, at["step"])
                if config.validation_prompts and at["epoch"] % config.validate_epochs == 0:
                    run.show("validation", at["step"], drawn := draw.validation(at["epoch"] - 1))
                    for line in watch.pictures(drawn, config.validation_pictures):
                        runs.say(line)
        profiler.round()
        save()
    bar.close()
    if at["done"] < total:
        run.close()
        ranks.wait()  # a launcher ends all processes soon after the first
        runs.say(f"stopped after step {at['step']}; go on with --resume")
        raise SystemExit(config.preempt_exit_code or 128 + (stopped or [signal.SIGTERM])[0])
    skips.summary(at["step"])
    if at["step"] == 0:
        runs.say("warning: no pair was valid, so nothing was trained: lower --threshold-min and --threshold-max, or check "
                 "the reward model's accuracy")
    if ema:
        ema.copy_to(trainable(policy.unet))
        runs.say(f"what is exported is the average of the weights, --ema-decay {config.ema_decay:g}")
    outputs.export(out, policy.unet, config)
    draw.compared("after")
    run.close()
    ranks.wait()
    return out


def work(policy: Policy, score: Score, sched: Schedule, shape: tuple[int, int, int], config: LPO) -> dict[str, int]:
    """Operations that a prompt's sampling and a pair's training need."""
    x, t = torch.zeros(1, *shape, device=sched.table.device), sched.timesteps[:1]
    pair, k, (first, last) = Pairs(x, x, x, t, t * 0, t > 0), config.num_candidates, config.window
    with accounting.countable(policy.unet), policy.plain():
        step = accounting.operations(lambda: policy.predict(x, t, t * 0))
        judged = accounting.operations(lambda: score(x, t, t * 0))
        trained = accounting.operations(lambda: evaluate(
            policy, sched, pair, torch.ones(1, device=x.device), beta=config.beta, eps=config.clip_eps,
            guidance=config.train_guidance).loss, trainable(policy.unet))
    return {"prompts": last * step + (last - first) * k * judged, "pairs": trained}


def log_line(step: int, trained: list[dict[str, float]], pairs: int, seconds: float, prompts: int, rate: dict) -> str:
    """One prompt batch in one line; loss and accuracy are means over its optimizer steps. rate: ``accounting.Meter``'s."""
    loss_, accuracy = (sum(row[key] for row in trained) / max(len(trained), 1) for key in ("train_loss", "implicit_acc"))
    what = f"loss {loss_:.3f} | acc {accuracy:.2f}" if trained else "no valid pair"
    return (f"step {step} | {what} | pairs {pairs} | {seconds * 1e3:.0f} ms | "
            f"{prompts / seconds:.1f} prompts/s{accounting.text(rate)} | {runs.memory()}")
