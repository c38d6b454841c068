"""Time LPO from the official statement to all optimizations, one per row, on a half-valid prompt batch.

    pytest bench/bench_lpo.py --benchmark-only --results bench/results [-k sd15]

On CUDA: the real SD1.5, SD2.1 and SDXL shapes with random weights. On a CPU: SD1.5 with a quarter of every
width and of the pixels, two prompts, and the first two of twenty denoising steps. The rows before "static
shapes" are the official statement with some of our parts; the later rows call our loop's own functions, as
``train_lpo`` does. Rows that end in * are alternatives to the default and do not build on each other. Pairs
kept: share of the fp32 loop's pairs that a row finds too, given the same x_t. Signal kept: the squared
correlation of log r_w − log r_l with the fp32 loop's.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.official import loop as official_loop
from bench.support import random_models, waterfall
from bench.support.measure import clock
from lpo_fast import config
from lpo_fast.lpo import batches, judging, policies, sampling
from lpo_fast.lpo import steps as lpo_steps
from lpo_fast.lpo.sampling import CounterNoise, LatentPairs
from lpo_fast.method import schedule, select
from lpo_fast.method.loss import guide
from lpo_fast.models import attention, loras, texts
from lpo_fast.run import optimization
from lpo_fast.system import compilation, devices

CUDA = torch.cuda.is_available()
DEVICE = devices.device()
FAMILIES = ("sd15", "sd21", "sdxl") if CUDA else ("small",)
ROUNDS = 3 if CUDA else 7
OURS, DEFAULT = "static shapes, no host reads, kernels", "compiled"
# Settings of our loop by row, and whether denoisers are channels-last.
SETTINGS = {
    OURS: ({"compile": "none"}, False),
    "channels-last": ({"compile": "none"}, True),
    DEFAULT: ({"compile": "default"}, True),
    "8-bit AdamW *": ({"compile": "default", "optimizer": "adamw8bit"}, True),
    "xformers *": ({"compile": "default", "attention": "xformers"}, True),
    "fused norms *": ({"compile": "default", "fused_norms": True}, True),
    "compile max *": ({"compile": "max"}, True),
}
ROWS = ["official statement", "text features once", "one evaluation a pair", *SETTINGS]
if not CUDA:
    ROWS = [row for row in ROWS if row != "channels-last" and not row.endswith("*")]
Parts = dict[str, Callable[[], object]]


@contextmanager
def layout(channels_last: bool):
    """Let our loop's denoisers be channels-last, or not, within the block."""
    before = devices.layout
    if not channels_last:
        devices.layout = lambda unet: unet
    try:
        yield
    finally:
        devices.layout = before


class Ours:
    """Hold our loop's parts for one row."""

    def __init__(self, settings: config.LPO, prompts: list[str], channels_last: bool):
        with layout(channels_last):
            self.policy, self.sched = policies.load(settings, prompts, DEVICE)
            self.judge = judging.load_score(settings, prompts, DEVICE)
        self.config, self.shape = settings, policies.latent_shape(settings, self.policy.unet)
        self.gap = select.gaps(self.sched, "none", settings.threshold_min, settings.threshold_min)
        self.step = compilation.compiled(sampling.choose, settings.compiled, graphs=True)
        optimizer = optimization.optimizer(settings.optimizer, self.policy.unet.parameters(),
                                           lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.update = optimization.OptimizerStep(
            optimizer, optimization.scaler(DEVICE, self.policy.precision), settings.max_grad_norm,
            settings.train_batch_size, "use --checkpointing")
        self.index = torch.arange(settings.batch_size, device=DEVICE)

    def sample(self) -> LatentPairs:
        """Return a prompt batch's pairs."""
        return batches.sample_pairs(self.policy, self.judge, self.sched, self.gap, self.shape, self.index,
                                    self.config, 0, slots=len(self.index), step=self.step)[0]

    def train(self, pairs: LatentPairs) -> list[float]:
        """Take optimizer steps on the pairs; return the metrics, which are read at the end."""
        size = self.config.train_batch_size
        steps = [lpo_steps.train_step(self.policy, self.sched, pairs.take(slice(at, at + size)), self.update,
                                      self.config) for at in range(0, len(pairs.t), size)]
        return torch.stack(steps).tolist()

    @torch.no_grad()
    def chosen(self, pairs: LatentPairs) -> tuple[Tensor, Tensor]:
        """Return winner − loser [steps, B, …] and validity [steps, B] at the x_t of a trajectory's pairs."""
        b, found = len(self.index), []
        draw = CounterNoise(self.config.seed, 0, self.index, self.shape)
        for (z, choice), first in zip(draw.steps(len(pairs.t) // b), range(0, len(pairs.t), b), strict=True):
            at = pairs.take(slice(first, first + b))
            winner, loser, valid, *_ = self.step(self.policy.predict, self.judge, self.sched,
                                                 self.gap, at.x_t, at.t, self.index, z, choice,
                                                 self.config.guidance_scale, self.config.num_candidates)
            found.append((winner - loser, valid))
        return tuple(torch.stack(field) for field in zip(*found, strict=True))

    @torch.no_grad()
    def signal(self, pairs: LatentPairs) -> Tensor:
        """Return log r_w − log r_l, not clamped, [N]."""
        found = []
        for micro in lpo_steps.micro_batches(pairs, self.config.train_batch_size):
            at, how = (micro.x_t, micro.t, micro.prompt), self.config.guidance_scale
            means = [schedule.mean(self.sched, micro.x_t, guide(*out.float().chunk(2), how), micro.t)
                     for out in (self.policy.train(*at), self.policy.reference(*at))]
            sigma = self.sched.table[micro.t, schedule.SIGMA]
            found.append(((means[0] - means[1]) * (micro.winner - micro.loser)).flatten(1).mean(1) / sigma**2)
        return torch.cat(found)[:len(pairs.t)]

    def perturb(self) -> None:
        """Set the LoRAs to random values other than 0, the same in all rows."""
        generator = torch.Generator().manual_seed(0)
        for parameter in loras.trainable(self.policy.unet):
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class Bench:
    """Hold a family's models, their official statement, and the pairs that all rows train on."""

    def __init__(self, family: str, work: Path):
        model = work / family
        if not model.exists():
            random_models.make(family, model)
        judged = "sd15" if family == "sd21" else family
        if not (work / judged).exists():
            random_models.make(judged, work / judged)
        if not (work / f"lrm_{judged}").exists():
            random_models.make_lrm(work / judged, work / f"lrm_{judged}")
        recipe = {"sdxl": config.sdxl, "sd21": config.sd21}.get(family, config.sd15)().lpo
        recipe = recipe if CUDA else replace(recipe, batch_size=2, steps_used=":2", train_batch_size=2)
        self.prompts = [f"a photo of {i} red circles on a blue background" for i in range(recipe.batch_size)]
        (work / "prompts.txt").write_text("\n".join(self.prompts))
        self.config = replace(recipe, model=str(model), lrm=str(work / f"lrm_{judged}"),
                              lrm_base=str(work / judged), prompts=str(work / "prompts.txt"),
                              threshold_shape="none", threshold_min=0.0, checkpointing="none")
        fp32 = Ours(replace(self.config, mixed_precision="no", compile="none"), self.prompts, False)
        everything = fp32.sample()
        draw = torch.randperm(len(everything.t), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        self.pairs = everything.take(draw[:len(draw) // 2])
        margins = self.margins(fp32, everything)
        fp32.gap = fp32.gap * 0 + margins.median()
        self.config = replace(self.config, threshold_min=torch.tanh(margins.median() / 2).item())
        self.everything, self.chosen = everything, fp32.chosen(everything)
        fp32.perturb()
        self.signal = fp32.signal(self.pairs)
        with waterfall.plain_attention():
            each = lpo_steps.work(fp32.policy, fp32.judge, fp32.sched, fp32.shape, self.config)
        self.needed = each["prompts"] * len(self.prompts) + each["pairs"] * len(self.pairs.t)
        del fp32
        before = waterfall.allocated()
        # The official configuration of SDXL recomputes activations.
        recomputes = replace(self.config, checkpointing="full" if family == "sdxl" else "none")
        self.official = official_loop.load(recomputes, self.prompts, DEVICE)
        first, last = self.config.window
        self.official.scheduler.timesteps = self.official.scheduler.timesteps[first:last]
        text = self.official.encode(self.pairs.prompt)
        self.stated = official_loop.Pairs(*(x.to(self.official.dtype) for x in self.pairs[:3]), self.pairs.t,
                                          text.context, text.pooled, self.pairs.prompt)
        self.official_bytes = waterfall.allocated() - before
        self.rate = waterfall.matrix_rate(self.official.dtype)

    def margins(self, ours: Ours, pairs: LatentPairs) -> Tensor:
        """Return S_winner − S_loser of pairs, [N]."""
        with torch.no_grad():
            return (ours.judge(pairs.winner, pairs.t, pairs.prompt)
                    - ours.judge(pairs.loser, pairs.t, pairs.prompt))

    def statement(self, **instead: Callable) -> Parts:
        """Return the official statement's parts; instead: replacements for some of them."""
        index = torch.arange(len(self.prompts), device=DEVICE)
        size = self.official.unet.config.sample_size
        draw = official_loop.Random((len(index), 4, size, size), self.config.num_candidates, DEVICE,
                                    self.official.dtype)
        return {"sampling": lambda: self.official.sample(index, draw, **instead),
                "training": lambda: self.official.train(self.stated)}

    def parts(self, row: str) -> tuple[Parts, Ours | None]:
        """Return the parts that a row runs, and our loop, if the row uses it."""
        if row == ROWS[0]:
            return self.statement(), None
        if row not in SETTINGS:
            ours = Ours(replace(self.config, compile="none"), self.prompts, False)
            text = ours.policy.text
            parts = self.statement(encode=lambda prompts: texts.Text(text[prompts].context.to(
                self.official.dtype), text[prompts].pooled.to(self.official.dtype)), score=ours.judge)
            if row == ROWS[2]:
                parts["training"] = lambda: ours.train(self.pairs)
            return parts, None
        settings, channels_last = SETTINGS[row]
        ours = Ours(replace(self.config, **settings), self.prompts, channels_last)
        return {"sampling": ours.sample, "training": lambda: ours.train(self.pairs)}, ours


loaded = lru_cache(1)(Bench)  # the models of one family at a time


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test(family: str, row: str, work: Path, benchmark, request: pytest.FixtureRequest) -> None:
    if row.startswith("xformers") and (problem := attention.xformers_problem()):
        pytest.skip(f"xformers {problem}")
    waterfall.skip_if_known(request.config.getoption("--results"), f"lpo-{family}", row)
    torch.manual_seed(0)
    torch._dynamo.reset()
    bench = loaded(family, work)
    before = waterfall.allocated()
    parts, ours = bench.parts(row)
    run = lambda: [part() for part in parts.values()]  # noqa: E731
    start = clock()
    run()
    found = {"row": row, "family": family, "first_s": clock() - start}
    if row in (*ROWS[:3], OURS):
        found["host_reads"] = waterfall.host_reads(run)
        found["tflop"] = waterfall.operations(run) / 1e12
    found["launches"] = waterfall.launches(run)
    if ours or row == ROWS[0]:
        others = before - bench.official_bytes if row == ROWS[0] else before
        found["peak_gb"] = (peak := waterfall.peak_bytes(run, others)) and peak / 1e9
    found |= waterfall.measured(benchmark, bench.statement(), parts, ROUNDS)
    if ours:
        (difference, valid), (truth, truly) = ours.chosen(bench.everything), bench.chosen
        same = (difference - truth).flatten(2).norm(dim=-1) < 0.5 * truth.flatten(2).norm(dim=-1)
        found["pairs_kept"] = ((same & valid & truly).sum() / truly.sum()).item()
        ours.perturb()
        found["signal"] = torch.corrcoef(torch.stack([ours.signal(bench.pairs),
                                                      bench.signal]))[0, 1].square().item()
    rows = waterfall.keep(request.config.getoption("--results"), f"lpo-{family}", __doc__.partition("\n")[0],
                          waterfall.rated(found, bench.needed, bench.rate))
    print("\n" + waterfall.table(rows))
