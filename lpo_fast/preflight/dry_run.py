"""Report what a run would train, hold and compute on a GPU (--dry-run), from the models' configs only.

After the complete preflight the networks are built without contents (see meta.py), and the run's own
functions are called on them, uncompiled, at the run's batch sizes. No weights are read, no GPU is needed, and
no run directory is written. Sizes are per process.
"""

import os

import torch
from torch import Tensor, nn

from lpo_fast.config import LPO, LRM
from lpo_fast.data import latent_cache
from lpo_fast.lpo import policies
from lpo_fast.lpo import sampling as lpo_sampling
from lpo_fast.lpo import steps as lpo_steps
from lpo_fast.lpo.sampling import CounterNoise, LatentPairs
from lpo_fast.lrm import encoding as lrm_encoding
from lpo_fast.lrm.reward import LatentRewardModel, encode_features
from lpo_fast.method import loss, schedule
from lpo_fast.models import configs, families, locate, texts, vaes
from lpo_fast.models.loras import trainable
from lpo_fast.models.texts import Text
from lpo_fast.preflight import meta, runs
from lpo_fast.run import optimization
from lpo_fast.run.optimization import optimizer_state
from lpo_fast.system import devices, distributed

DECODED = 4  # latents decoded at a time (drawing.pictures)


# Bytes


def held(module: nn.Module | None, trained: bool | None = None) -> int:
    """Return the bytes of a module's parameters; trained: only those that are trained, or only the others."""
    return sum(p.numel() * p.element_size() for p in (module.parameters() if module else ())
               if trained is None or p.requires_grad == trained)


def of_text(text: Text) -> int:
    """Return the bytes of text features."""
    return sum(x.numel() * x.element_size() for x in (text.context, text.pooled))


# The report


def report(config: LPO | LRM) -> list[str]:
    """Return the lines of the report. Raises InputError if the run could not start."""
    return lpo(config) if isinstance(config, LPO) else lrm(config)


def lpo(config: LPO) -> list[str]:
    """Return the report of an LPO run."""
    prompts, _ = runs.lpo(config)
    precision = "fp16" if config.mixed_precision == "auto" else config.mixed_precision
    model = locate.model(config)
    size, k, n = config.batch_size, config.num_candidates, config.train_batch_size
    family = families.family_of(configs.read_config(model / "unet", "--model"))
    encoders = [e.requires_grad_(False) for e in texts.load_text(model, family, weights=False)]
    text, encoding = meta.encoded(family, encoders, len(prompts) + len(config.validation_prompts))
    actor = meta.policy(config, precision, text.prepared(devices.DTYPES[precision]))
    parameters = trainable(actor.unet)
    shape = policies.latent_shape(config, actor.unet)
    pixels = shape[-1] * vaes.pixels_per_latent(model)
    judge = meta.scorer(config)
    words, judging = meta.encoded(judge.family, list(judge.text_encoders), len(prompts))
    vae = vaes.load_vae(locate.vae(config), weights=False)
    scheduler = configs.read_config(model / "scheduler", "--model", "scheduler_config.json")
    sched = schedule.from_config(scheduler, config.num_steps, config.eta).to(meta.META)
    first, steps = config.window
    judged, latent = steps - first, 4 * shape[0] * shape[1] * shape[2]
    x, t = meta.empty(n, *shape), meta.empty(n, dtype=torch.int64)
    index = meta.empty(size, dtype=torch.int64)
    pairs = LatentPairs(x, x.clone(), x.clone(), t, t, meta.empty(n, dtype=torch.bool))
    gradients, optimizers = held(actor.unet, True), optimizer_states(parameters)
    cut = processes() if config.shard else 1
    loading = max(
        held(actor.unet, config.full) // cut + sum(map(held, encoders)) + encoding.peak + 2 * of_text(text),
        held(actor.unet) // cut + of_text(actor.text) + held(judge) + judging.peak + 2 * of_text(words))
    judge_encoders, judge.text_encoders = judge.text_encoders, nn.ModuleList()
    judge.unet.to(devices.DTYPES[precision])
    words = words.prepared(devices.DTYPES[precision])

    def score(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        with devices.autocast(precision):
            return judge.score(x, t, words[index])
    with meta.on_cuda():
        sampling = meta.measure(lambda: lpo_sampling.trajectory(
            actor.predict, score, sched, meta.empty(1000), CounterNoise(config.seed, 0, index, shape), index,
            guidance=config.guidance_scale, num_candidates=k, window=(0, 1)))
        drawing = meta.measure(lambda: actor.predict(meta.empty(size, *shape), index, index))
        training = meta.training_pass(lambda: lpo_steps.evaluate(
            actor, sched, pairs, meta.empty(n), beta=config.beta, eps=config.clip_eps,
            guidance=config.train_guidance).loss, parameters, config.accumulate)
        decoding = meta.measure(lambda: vae.decode(meta.empty(min(DECODED, size), *shape)).sample)

    always = {
        f"denoiser, {'fp32' if config.full else names(precision)}": held(actor.unet) // cut,
        "reference, fp32": held(actor.frozen) // cut,
        f"reward model, {names(precision)}": held(judge),
        f"text features of {len(prompts):,} prompts": of_text(actor.text) + of_text(words),
        f"optimizer state ({config.optimizer})": optimizers[config.optimizer] // cut,
        "average of the weights": gradients // cut if config.ema_decay else 0,
        "pairs of a prompt batch": 2 * 3 * latent * judged * size,
        "sampling, kept by its CUDA graph (--compile)": 0 if config.compiled == "none" else sampling.peak}
    base = sum(always.values())
    phases = {
        "loading": loading,
        f"sampling, {size} prompts, {k * size} candidates":
            base + (sampling.peak if config.compiled == "none" else 0),
        f"training, {n} "
        f"pairs{'' if config.checkpointing == 'none' else f' with {config.checkpointing} checkpointing'}":
            base + training.peak - gradients + gradients // cut}
    if config.pictures or config.validation_prompts:
        phases["drawing pictures, VAE in fp32"] = base + held(vae) + max(decoding.peak, drawing.peak)
    scoring = sampling.flops - drawing.flops
    each, guided = training.flops / n, 2 if max(judge.guidance_scale) > 1 else 1
    sampled = steps * drawing.flops / size, judged * scoring / size
    return [
        heading("LPO", family, pixels, precision), "",
        *parameter_table({
            "denoiser": [p for name, p in actor.unet.named_parameters() if "lora_" not in name],
            **({} if config.full else {f"LoRA, rank {config.rank}": parameters}),
            "reward model's denoiser (down, mid)": list(judge.unet.parameters()),
            "reward model's projections": heads_of(judge),
            "its text encoders, while loading": list(judge_encoders.parameters()),
            "text encoders, while loading": [p for e in encoders for p in e.parameters()],
            "VAE, for pictures": list(vae.parameters())}), "",
        *memory_table(always, training.kept, gradients // cut, phases, optimizers),
        *(["sharded: weights, gradients, optimizer state and average are one process's share; activations "
           "are not sharded"] if config.shard else []), "",
        f"a batch of {size} prompts: up to {judged * size} pairs, "
        f"{-(-judged * size // (n * config.accumulate))} optimizer steps",
        *table(["network evaluations", "per prompt", "per batch"], [
            ["policy, sampling (null and text pass)", 2 * steps, 2 * steps * size],
            [f"reward model ({guided} per candidate)", guided * k * judged, guided * k * judged * size],
            ["policy, training (2 per pair, if all are valid)", 2 * judged, 2 * judged * size],
            ["reference, training (2 per pair)", 2 * judged, 2 * judged * size]]), "",
        *table(["TFLOP", "per prompt", "per batch"], [
            [name, f"{x / 1e12:,.1f}", f"{x * size / 1e12:,.1f}"] for name, x in (
                ("sampling, policy", sampled[0]), ("sampling, reward model", sampled[1]),
                (f"training, {each / 1e12:.2f} per pair, if all are valid", judged * each),
                ("total, if all are valid", sum(sampled) + judged * each),
                ("total, if half are valid", sum(sampled) + judged * each / 2))])]


def lrm(config: LRM) -> list[str]:
    """Return the report of an LRM run."""
    used = runs.lrm(config)
    precision = "bf16" if config.mixed_precision == "auto" else config.mixed_precision
    model, world = locate.model(config), processes()
    unet = configs.read_config(model / "unet", "--model")
    size = config.resolution // vaes.pixels_per_latent(model) or unet["sample_size"]
    vae = vaes.load_vae(locate.vae(config), weights=False)
    pixels = size * 2 ** (len(vae.config.block_out_channels) - 1)
    reward = meta.trained_lrm(config)
    parameters = trainable(reward)
    own = min(config.batch_size, len(used["train"])) // world  # as lrm.steps.own_size
    n = -(-own // config.accumulate)
    encoded_at_once = lrm_encoding.part_size(2 * own, pixels)
    ids = [meta.empty(n, e.config.max_position_embeddings, dtype=torch.int64) for e in reward.text_encoders]
    x = meta.empty(2, n, unet["in_channels"], size, size)
    t, label = meta.empty(2, n, dtype=torch.int64), meta.empty(n)

    def forward() -> Tensor:
        with devices.autocast(precision):
            unit = encode_features(reward, ids, [i[:1] for i in ids], x, t)
        return loss.preference(*unit, reward.logit_scale.exp(), label, label, t[0], t.T,
                               loss_type=config.loss_type, batch_coeff=config.batch_coeff,
                               aux_loss_coeff=config.aux_loss_coeff)
    with meta.on_cuda():
        encoding = meta.measure(lambda: lrm_encoding.encode(
            vae, meta.empty(encoded_at_once, 3, pixels, pixels), precision))
        training = meta.training_pass(forward, parameters, config.accumulate)
    gradients, optimizers = held(reward, True), optimizer_states(parameters)
    always = {"reward model, fp32": held(reward), "VAE, fp32": held(vae),
              f"optimizer state ({config.optimizer})": optimizers[config.optimizer]}
    # The mean and deviation of each of the step's pictures, in fp32, are held too.
    base = sum(always.values()) + 2 * 4 * x.numel() * own // n
    phases = {f"encoding, {encoded_at_once} pictures at a time": base + encoding.peak,
              f"training, {n} pairs per micro-batch": base + training.peak}
    evaluations = 2 * (2 if max(config.guidance_scale) > 1 else 1)
    work = 2 * encoding.flops / encoded_at_once, training.flops / n
    kept = latent_cache.needed(config, used, precision) if config.cache_latents else None
    return [
        heading("LRM", reward.family, pixels, precision), "",
        *parameter_table({"denoiser (down, mid)": list(reward.unet.parameters()),
                          "text encoders": list(reward.text_encoders.parameters()),
                          "projections, logit scale": heads_of(reward), "VAE": list(vae.parameters())}), "",
        *memory_table(always, training.kept, gradients, phases, optimizers), "",
        f"an optimizer step: {own} pairs per process in {-(-own // n)} micro-batches; {config.max_steps} "
        "steps", *([f"--cache-latents: {kept[0]:,} pictures to add, {kept[1] / 2**30:,.2f} GiB of disk space"]
                   if kept else []), *table(["network evaluations", "per pair", "per step"], [
            ["VAE's encoder", 2, 2 * own],
            [f"denoiser, down and mid ({evaluations // 2} per picture)", evaluations, evaluations * own]]),
        "", *table(["TFLOP", "per pair", "per step"],
                   [[name, f"{x / 1e12:,.2f}", f"{x * own / 1e12:,.1f}"] for name, x in (
                       ("VAE", work[0]), ("training", work[1]), ("total", sum(work)))])]


def processes() -> int:
    """Return the number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def heading(stage: str, family: families.Family, pixels: int, precision: str) -> str:
    """Return the first line."""
    return (f"dry run: {stage}, {family.name}, {pixels}×{pixels} pixels, networks in {names(precision)} "
            f"(on CUDA), {'' if processes() == 1 else 'one of '}{distributed.named(processes())}")


def names(precision: str) -> str:
    """Return the name of a precision: fp32 for "no"."""
    return "fp32" if precision == "no" else precision


def heads_of(lrm: LatentRewardModel) -> list[nn.Parameter]:
    """Return the parameters of an LRM that are not its networks'."""
    return [p for name, p in lrm.named_parameters() if not name.startswith(("unet.", "text_encoders."))]


def optimizer_states(parameters: list[nn.Parameter]) -> dict[str, int]:
    """Return the bytes of each optimizer's state."""
    return {name: optimizer_state(name, parameters) for name in optimization.OPTIMIZERS}


def parameter_table(parts: dict[str, list[nn.Parameter]]) -> list[str]:
    """Return the table of each part's parameters."""
    counts = [[name, sum(p.numel() for p in part if p.requires_grad),
               sum(p.numel() for p in part if not p.requires_grad)] for name, part in parts.items()]
    return table(["parameters", "trained", "frozen"], counts)


def memory_table(always: dict[str, int], activations: int, gradients: int, phases: dict[str, int],
                 optimizers: dict[str, int]) -> list[str]:
    """Return the table of memory: held, added by a training micro-batch, peak per phase, optimizer states."""
    def gib(size: int) -> str:
        return f"{size / 2**30:,.2f}"
    top = max(phases, key=lambda name: phases[name])
    training = next(size for name, size in phases.items() if name.startswith("training"))
    temporary = training - sum(always.values()) - activations - gradients
    return table(["memory, GiB: estimate, not yet checked on a GPU", ""], [
        *([name, gib(size)] for name, size in always.items() if size),
        ["held in all phases", gib(sum(always.values()))],
        ["activations of a training micro-batch", gib(activations)], ["gradients", gib(gradients)],
        ["temporary tensors of its backward pass", gib(temporary)],
        *([f"most while {name}", gib(size)] for name, size in phases.items()),
        [f"peak ({top.partition(',')[0]})", gib(phases[top])]]) + [
        "optimizer states: " + ", ".join(f"{name} {gib(size)}" for name, size in optimizers.items()),
        "uncompiled; not included: CUDA's context, its libraries' workspaces, PyTorch's cached blocks"]


def table(header: list[str], rows: list[list[object]]) -> list[str]:
    """Return aligned lines; integers get thousands separators."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [(f"{row[0]:<{max(widths[0], 48)}}" + "".join(f"  {cell:>{max(w, 13)}}" for cell, w in zip(
        row[1:], widths[1:], strict=True))).rstrip() for row in cells]
