"""Time an optimizer step of LRM training, from the official statement to all optimizations, one per row.

    pytest bench/bench_lrm.py --benchmark-only --results bench/results [-k sd15]

On CUDA: the real SD1.5 (16 pairs) and SDXL shapes (4 pairs) with random weights. On a CPU: SD1.5 with a
quarter of every width, and two pairs of 256² pixels. Pictures are random pixels, so nothing is decoded. From
the second row on, our loop's own functions are called, as ``train_lrm`` does. Cached latents are read from a
full --cache-latents (in a run, the data loader's workers do that); the row needs no VAE evaluations. Rows
that end in * are alternatives to "compiled" and do not build on each other. Loss − fp32: the first step's
loss minus the fp32 loop's, for the same weights, pictures and noise. Work is counted on the meta device. SDXL
is estimated to need an H200: the statement's single process holds all master weights and moments, which eight
processes would divide.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.official import lrm_loop as official_lrm_loop
from bench.support import random_models, waterfall
from bench.support.measure import clock
from lpo_fast import config
from lpo_fast.data import latent_cache
from lpo_fast.lrm import checkpoint, encoding, steps
from lpo_fast.method import noise
from lpo_fast.models import locate, vaes
from lpo_fast.run import optimization
from lpo_fast.system import devices

CUDA = torch.cuda.is_available()
DEVICE, META = devices.device(), torch.device("meta")
PAIRS = {"sd15": 16, "sdxl": 4} if CUDA else {"small": 2}  # per process: an eighth of the recipe's batch
ROUNDS = 3 if CUDA else 7
OURS, CACHED = "one null prompt, no up blocks", "cached latents"
# Settings of our loop by row, and whether the denoiser is channels-last.
SETTINGS = {
    OURS: ({"compile": "none"}, False),
    "channels-last": ({"compile": "none"}, True),
    "compiled": ({"compile": "default"}, True),
    CACHED: ({"compile": "default"}, True),
    "8-bit AdamW *": ({"compile": "default", "optimizer": "adamw8bit"}, True),
}
ROWS = ["official statement", *SETTINGS]
if not CUDA:
    ROWS = [row for row in ROWS if row != "channels-last" and not row.endswith("*")]
Parts = dict[str, Callable[[], object]]


class Ours:
    """Hold our loop's parts for one row, as ``train_lrm.train`` makes them."""

    def __init__(self, settings: config.LRM, batch: dict, channels_last: bool = False,
                 device: torch.device = DEVICE):
        model = locate.model(settings)
        self.lrm = (checkpoint.new_lrm(model, generator=torch.Generator().manual_seed(settings.seed))
                    .to(device).train())
        if channels_last:
            devices.layout(self.lrm.unet)
        self.encoder = encoding.Encoder(model, self.lrm, settings.seed,
                                        devices.precision(settings.mixed_precision, "bf16"),
                                        compile=settings.compile)
        if device != META:
            optimizer = optimization.optimizer(settings.optimizer, self.lrm.parameters(),
                                               lr=settings.learning_rate, weight_decay=settings.weight_decay)
            self.update = optimization.OptimizerStep(
                optimizer, optimization.scaler(device, self.encoder.precision), settings.max_grad_norm,
                -(-len(batch["rows"]) // settings.accumulate), "use a larger --accumulate")
        self.config, self.pixels = settings, batch["pixels"]
        self.batch = {key: value for key, value in batch.items() if key != "pixels"}
        self.moments: Tensor | None = None

    def encode(self) -> None:
        """Compute the VAE's moments of all pictures."""
        self.moments = self.encoder.moments(self.pixels, None, self.encoder.train_encode)

    def train(self) -> Tensor:
        """Take an optimizer step on the encoded pictures; return its metrics."""
        return steps.train_step(self.lrm, self.encoder, self.batch | {"moments": self.moments}, 0,
                                self.update, self.config)

    def backward(self) -> None:
        """Compute gradients without an optimizer step, for the meta device: the optimizer reads its scale."""
        batch = steps.encoded(self.encoder, self.batch | {"moments": self.moments}, 0, self.config)
        steps.pair_loss(self.lrm, self.encoder, batch, 0, self.config,
                        torch.ones((), device=META))[0].backward()

    def parts(self, cache: Path | None = None) -> Parts:
        """Return the timed parts. cache: an empty folder, in which a full cache is made."""
        parts = {"encoding": self.encode, "training": lambda: self.train().tolist()}
        if cache is None:
            return parts
        self.encode()
        full = latent_cache.Cache(cache, tuple(self.moments.shape[2:]), self.moments.dtype, {})
        numbers = torch.arange(self.moments.shape[:2].numel())
        full.write(numbers, self.moments.flatten(0, 1))

        def read() -> None:
            self.moments = full.read(numbers)[0].unflatten(0, (2, -1))
        return parts | {"encoding": read}


class Stated:
    """Hold the official statement's parts, with our pictures, timesteps and, if requested, noise."""

    def __init__(self, settings: config.LRM, batch: dict, ids: list[Tensor], device: torch.device = DEVICE):
        self.loop, self.pixels, self.ids = official_lrm_loop.load(settings, device), batch["pixels"], ids
        rows, labels, counts, compare = (batch[key].to(device)
                                         for key in ("rows", "labels", "counts", "compare"))
        self.how = *encoding.timesteps(settings, 0, rows, compare, labels), counts
        self.latents: Tensor | None = None

    def encode(self, z: Tensor | None = None) -> None:
        """Sample latents from the posterior; z: the noise, None: the statement's own."""
        self.latents = self.loop.latents(self.pixels, z)

    def arguments(self) -> tuple:
        """Return the arguments of a training step."""
        return [i.to(self.loop.device) for i in self.ids], self.latents, *self.how

    def parts(self) -> Parts:
        """Return the timed parts."""
        return {"encoding": self.encode, "training": lambda: self.loop.train_step(*self.arguments())}


class Bench:
    """Hold a family's model and batch, their official statement, and the values rows are compared with."""

    def __init__(self, model: Path, family: str, n: int):
        recipe = config.sdxl() if family == "sdxl" else config.sd15()
        self.config, self.family = replace(recipe.lrm, model=str(model), batch_size=n), family
        exact = replace(self.config, mixed_precision="no", compile="none")
        size = json.loads((model / "unet" / "config.json").read_text())["sample_size"]
        self.batch = batch(n, size * vaes.pixels_per_latent(model))
        one_by_one = Ours(replace(exact, accumulate=n), self.batch)
        one_by_one.encode()
        self.loss = one_by_one.train()[0].item()
        self.ids = [i.cpu() for i in one_by_one.encoder.ids(self.batch["captions"])[0]]
        del one_by_one
        self.count(exact)
        before = waterfall.allocated()
        self.stated = Stated(self.config, self.batch, self.ids)
        z = noise.normal(exact.seed, 0, self.batch["rows"].to(DEVICE), 0, 4,
                         (4, size, size)).unflatten(0, (2, 2)).flatten(1, 2)
        with torch.no_grad():
            self.stated.encode(z[0])
            self.stated_loss = self.stated.loop.loss(*self.stated.arguments(), noise=z[1]).item()
        self.official_bytes = waterfall.allocated() - before
        self.rate = waterfall.matrix_rate(self.stated.loop.weights.dtype)

    def count(self, exact: config.LRM) -> None:
        """Count operations of both on the meta device, where plain attention's matrices need no memory."""
        on_meta = {key: value.to(META) if key == "pixels" else value for key, value in self.batch.items()}
        ours, stated = Ours(exact, on_meta, device=META), Stated(exact, on_meta, self.ids, META)
        self.needed = waterfall.operations(ours.encode), waterfall.operations(ours.backward)
        self.counted = {OURS: sum(self.needed),
                        ROWS[0]: waterfall.operations(stated.encode) + waterfall.operations(
                            lambda: stated.loop.loss(*stated.arguments()).backward())}


def batch(n: int, side: int) -> dict:
    """Return n pairs of random pictures, as ``dataset.collate`` does; the last is a tie."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, n, 3, side, side, generator=generator) * 2 - 1
    first = torch.randint(2, (n,), generator=generator).float()
    first[-1] = 0.5
    no = torch.zeros(n, dtype=torch.bool)
    return {"rows": torch.arange(n),
            "captions": [f"a photo of {i} red circles on a blue background" for i in range(n)],
            "pixels": pixels.pin_memory() if CUDA else pixels, "labels": torch.stack([first, 1 - first]),
            "counts": torch.randint(1, 9, (n,), generator=generator), "compare": no, "corrupt": no}


@lru_cache(1)  # the models of one family at a time
def loaded(family: str, work: Path) -> Bench:
    """Return a family's bench; its random weights are made if they do not exist."""
    if not (work / family).exists():
        random_models.make(family, work / family)
    return Bench(work / family, family, PAIRS[family])


def measure(bench: Bench, row: str, benchmark, cache: Path, results: Path | None) -> list[dict]:
    """Measure a row; return all rows so far. cache: an empty folder. results: folder of the results."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    before, ours, found = waterfall.allocated(), None, {"row": row, "family": bench.family}
    if row in SETTINGS:
        settings, channels_last = SETTINGS[row]
        ours = Ours(replace(bench.config, **settings), bench.batch, channels_last)
        ours.encoder.vae  # noqa: B018  # loaded before anything is timed
    parts = ours.parts(cache if row == CACHED else None) if ours else bench.stated.parts()
    run = lambda: [part() for part in parts.values()]  # noqa: E731
    start = clock()
    _, first = run()
    found["first_s"] = clock() - start
    found["loss_difference"] = (first[0] if ours else bench.stated_loss) - bench.loss
    if row in bench.counted:
        found["tflop"] = bench.counted[row] / 1e12
        # AdamW on a CPU reads its own step numbers
        found["host_reads"] = waterfall.host_reads(run) if CUDA else None
    found["launches"] = waterfall.launches(run)
    found["peak_gb"] = ((peak := waterfall.peak_bytes(run, before if ours else before - bench.official_bytes))
                        and peak / 1e9)
    found |= waterfall.measured(benchmark, bench.stated.parts(), parts, ROUNDS)
    needed = bench.needed[1] if row == CACHED else sum(bench.needed)
    return waterfall.keep(results, f"lrm-{bench.family}", __doc__.partition("\n")[0],
                          waterfall.rated(found, needed, bench.rate))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", PAIRS)
def test(family: str, row: str, work: Path, benchmark, tmp_path: Path,
         request: pytest.FixtureRequest) -> None:
    waterfall.skip_if_known(request.config.getoption("--results"), f"lrm-{family}", row)
    rows = measure(loaded(family, work), row, benchmark, tmp_path, request.config.getoption("--results"))
    print("\n" + waterfall.table(rows))
