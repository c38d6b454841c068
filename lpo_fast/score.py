"""Score pictures with a latent reward model: python -m lpo_fast.score, or from Python.

    x0 = mean of VAE(picture) · scaling_factor,   x_t = sqrt(a_t)·x0 + sqrt(1 − a_t)·z,
    score = S(x_t, t, prompt)

    from lpo_fast.score import Scorer
    scorer = Scorer("lrm_sd15", base="stable-diffusion-v1-5")
    scores = scorer(pictures, prompts)
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lpo_fast import cli
from lpo_fast.config import LPO, Precision
from lpo_fast.data import images, tables
from lpo_fast.data.tables import KINDS, Picture
from lpo_fast.errors import InputError
from lpo_fast.lrm import checkpoint
from lpo_fast.method import noise, schedule
from lpo_fast.models import configs, locate, texts, vaes
from lpo_fast.models.families import family_of
from lpo_fast.preflight import models
from lpo_fast.system import devices, reading

LOOKED_AT = 100  # pictures of a table whose headers are checked before the model is loaded


@dataclass(frozen=True)
class Score:
    """Score pictures with a latent reward model: one line per picture, or a table with one more column."""

    pictures: tyro.conf.Positional[tuple[str, ...]] = ()
    """Picture files, all for --prompt."""
    lrm: str = ""
    """Latent reward model: a directory written by `lrm` or by the official code."""
    lrm_base: str = ""
    """Diffusers directory that supplies what the LRM's directory lacks: VAE, scheduler, tokenizer."""
    vae: str = ""
    """Another VAE: a directory or hub name; default: the base's."""
    resolution: int = 0
    """Height and width in pixels at which pictures are scored; 0: those of the LRM's training."""
    prompt: str = ""
    """The prompt of the pictures."""
    table: str = ""
    """Instead of pictures: a .csv, .jsonl or .parquet file with one row per picture."""
    out: str = ""
    """Output file for the table: .csv, .jsonl or .parquet."""
    prompt_key: str = "prompt"
    """Column of the prompt."""
    image_key: str = "image"
    """Column of the picture: a path (from the table's directory or the current one), or encoded bytes."""
    score_key: str = "lrm_score"
    """Column to add."""
    timestep: int = 1
    """Noise level at which the picture is scored, 0 to 999."""
    draws: int = 1
    """Number of noise draws to average."""
    batch_size: int = 8
    """Pictures per batch; the scores do not depend on it."""
    seed: int = 0
    """The noise is a function of the seed, the row, the timestep and the draw."""
    mixed_precision: Precision = "auto"
    """Precision of the reward model; auto: fp16 on CUDA, fp32 on a CPU."""


class Scorer:
    """A latent reward model as a function of pictures and prompts.

    lrm: its directory or hub name. base: a diffusers directory of its family, for the VAE and whatever else
    the LRM's directory lacks; "": the one named in the LRM's directory. vae: another VAE. resolution: pixels
    to which pictures are resized; 0: the resolution of the LRM's training. Raises InputError if these do not
    fit together.
    """

    def __init__(self, lrm: str | os.PathLike, base: str | os.PathLike = "", *,
                 vae: str = "", resolution: int = 0, batch_size: int = 8, seed: int = 0,
                 mixed_precision: Precision = "auto"):
        path, base = locate.locate(str(lrm), "--lrm"), check_lrm(str(lrm), str(base), vae, resolution)
        self.device, self.batch_size, self.seed = devices.device(), batch_size, seed
        self.precision = devices.precision(mixed_precision, "fp16")
        self.lrm = checkpoint.load_lrm(path, base, resolution=resolution).to(self.device)
        self.tokenizers = texts.load_tokenizers(path if (path / "tokenizer").is_dir() else base,
                                                self.lrm.family)
        self.vae = vaes.load_vae(locate.locate(vae, "--vae") if vae else base).to(self.device)
        scheduler = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
        self.sched = schedule.from_config(scheduler, 20).to(self.device)
        self.resolution = self.lrm.resolution

    def __call__(self, pictures: Sequence[Picture], prompts: Sequence[str] | str, *, timestep: int = 1,
                 draws: int = 1, rows: Sequence[int] | None = None) -> Tensor:
        """Return scores [N], fp32 on the CPU.

        pictures: PIL pictures, paths or encoded bytes. prompts: one per picture, or one for all. rows:
        numbers that key the noise (default: 0 … N−1). Raises InputError, which names the picture, for a
        picture that cannot be decoded.
        """
        prompts = [prompts] * len(pictures) if isinstance(prompts, str) else list(prompts)
        rows = range(len(pictures)) if rows is None else rows
        if not len(pictures) == len(prompts) == len(rows):
            raise InputError(f"{len(pictures)} pictures",
                             f"come with {len(prompts)} prompts and {len(rows)} rows",
                             "give one prompt per picture, or one for all")
        scores = [torch.zeros(0)]
        bar = tqdm(total=len(pictures), desc="score", unit="picture", leave=False, disable=None)
        for pixels, at in self._decoded(pictures, rows):
            scores.append(self._score(pixels, prompts[at], torch.tensor(rows[at]), timestep, draws).cpu())
            bar.update(len(pixels))
        bar.close()
        return torch.cat(scores)

    def _decoded(self, pictures: Sequence[Picture], rows: Sequence[int]) -> Iterator[tuple[Tensor, slice]]:
        """Yield batches of pixels [B, 3, r, r] and the slice of their pictures.

        The next batch is decoded while one is scored.
        """
        slices = [slice(i, i + self.batch_size) for i in range(0, len(pictures), self.batch_size)]
        read = partial(pixels, resolution=self.resolution)
        with ThreadPoolExecutor(4) as pool:
            pending = None
            for at in [*slices, None]:
                following = at and ([pool.submit(read, *pair)
                                     for pair in zip(pictures[at], rows[at], strict=True)], at)
                if pending:
                    yield torch.stack([future.result() for future in pending[0]]), pending[1]
                pending = following

    @torch.no_grad()
    def _score(self, pixels: Tensor, prompts: list[str], rows: Tensor, timestep: int, draws: int) -> Tensor:
        """Return the scores [B] of one batch."""
        unique = list(dict.fromkeys(prompts))
        text = texts.encode_prompts(self.lrm.family, self.tokenizers, list(self.lrm.text_encoders), unique,
                                    zero_null=False)[torch.tensor(
            [unique.index(p) for p in prompts], device=self.device)]
        x0 = self.vae.encode(pixels.to(self.device)).latent_dist.mean * self.vae.config.scaling_factor
        z = noise.normal(self.seed, 0, rows.to(self.device), timestep, draws, tuple(x0.shape[1:]))
        t = torch.full((len(x0),), timestep, device=self.device)
        with devices.autocast(self.precision):
            scores = [self.lrm.score(schedule.add_noise(self.sched, x0, one, t), t, text) for one in z]
        return torch.stack(scores).float().mean(0)


def pixels(picture: Picture, row: int, resolution: int) -> Tensor:
    """Return fp32 [3, r, r] in [−1, 1] of a picture, upright. Raises InputError, which names the picture."""
    try:
        if isinstance(picture, Image.Image):
            return images.pixels(picture, resolution)
        return images.decode(picture if isinstance(picture, bytes) else reading.read_picture(Path(picture)),
                             resolution)
    except Exception as error:  # Pillow raises many kinds
        name = str(picture) if isinstance(picture, str | os.PathLike) else f"picture {row}"
        raise InputError(name, f"row {row} cannot be decoded as a picture ({type(error).__name__})",
                         "fix or remove it") from error


def check_lrm(lrm: str, base: str, vae: str = "", resolution: int = 0) -> Path:
    """Return the base directory of an LRM: the given one or the one that it names.

    Raises InputError unless all parts fit.
    """
    path = locate.locate(lrm, "--lrm")
    if not base and (path / "lrm.json").is_file():
        base = configs.read_config(path, "--lrm", "lrm.json").get("base") or ""
    if not base and lrm and path.exists():
        raise InputError(lrm, "names no base, and holds no VAE",
                         "name the diffusers directory on which it is based", "--lrm-base")
    unet = models.pipeline(base, "--lrm-base") if base else {}
    own = models.reward_model(LPO(model=base, lrm=lrm))
    families = [family_of(config) for config in (own, unet)]
    if families[0] != families[1] or own["in_channels"] != unet["in_channels"]:
        raise InputError(lrm, f"scores {families[0].name} latents, {base} makes {families[1].name} latents",
                         "name the diffusers directory on which it is based", "--lrm-base")
    models.picture(LPO(model=base, vae=vae, resolution=resolution), unet)
    models.buildable(own, lrm, "--lrm")
    return locate.locate(base, "--lrm-base")


def check(settings: Score) -> None:
    """Refuse settings that cannot work."""
    cli.required(settings, "lrm")
    cli.within(settings, 0, 999, "timestep")
    cli.within(settings, 1, float("inf"), "draws", "batch_size")
    cli.within(settings, 0, float("inf"), "seed", "resolution")
    if bool(settings.pictures) == bool(settings.table):
        raise InputError(settings.table or "(none)", "give either pictures or a table", "see --help",
                         "--table")
    if settings.pictures:
        cli.required(settings, "prompt")
        return
    out = Path(settings.out)
    cli.required(settings, "out")
    if out.suffix not in KINDS:
        raise InputError(settings.out, f"unknown file type {out.suffix!r}", f"use {', '.join(KINDS)}",
                         "--out")
    if out.exists():
        raise InputError(settings.out, "already exists", "name another file", "--out")
    models.writable(out.parent)


def check_pictures(pictures: Sequence[Picture]) -> None:
    """Raise InputError for files that are missing or do not begin like a picture."""
    for row, picture in enumerate(pictures):
        if not isinstance(picture, bytes):
            try:
                images.opened(Path(picture)).close()
            except FileNotFoundError as error:
                raise InputError(str(picture), "no such picture", "name a picture file") from error
            except Exception as error:  # Pillow raises many kinds
                raise InputError(str(picture), f"row {row} is not a picture",
                                 "name a picture file") from error


def run(settings: Score) -> None:
    """Run the command."""
    check(settings)
    rows, prompts, pictures = None, settings.prompt, settings.pictures
    if settings.table:
        rows, prompts, pictures = tables.read(settings.table, settings.prompt_key, settings.image_key,
                                              settings.score_key)
    if (settings.table and not settings.out.endswith(".parquet")
            and any(isinstance(picture, bytes) for picture in pictures)):
        raise InputError(settings.out, "cannot hold the pictures' bytes", "name a .parquet file", "--out")
    check_pictures(pictures[:LOOKED_AT] if settings.table else pictures)
    scorer = Scorer(settings.lrm, settings.lrm_base, vae=settings.vae, resolution=settings.resolution,
                    batch_size=settings.batch_size, seed=settings.seed,
                    mixed_precision=settings.mixed_precision)
    scores = scorer(pictures, prompts, timestep=settings.timestep, draws=settings.draws)
    if settings.table:
        tables.write(rows, scores, Path(settings.out), settings.score_key)
        print(f"{settings.out}: {len(scores)} rows, mean score {scores.mean():.4f}")
    else:
        for score, picture in zip(scores.tolist(), pictures, strict=True):
            print(f"{score:.4f}\t{picture}")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.command(Score, run, argv, "score")


if __name__ == "__main__":
    sys.exit(main())
