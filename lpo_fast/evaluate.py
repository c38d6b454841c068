"""Compare a tuned model with its base: pictures from the same noise, scored, and shown side by side.

Run as python -m lpo_fast.evaluate. Noise is keyed by (seed, picture number), so both models share it, and it
depends neither on batches nor on ranks. Under ``torchrun`` or ``accelerate launch`` the prompts are
distributed over the ranks. A stopped run continues where it was.
"""

import csv
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from lpo_fast import cli, export
from lpo_fast.config import LPO, Precision
from lpo_fast.data.prompts import read_prompts
from lpo_fast.errors import InputError
from lpo_fast.evaluation import compare, scorers
from lpo_fast.lpo import drawing, policies
from lpo_fast.models import configs, locate
from lpo_fast.models.loras import LORA_OFFICIAL
from lpo_fast.preflight import models
from lpo_fast.run import environment, logs
from lpo_fast.score import Scorer, check_lrm
from lpo_fast.system import writing

RECORD = "settings.json"
DRAWN = ("model", "vae", "resolution", "lora", "tuned", "caption_key", "seed", "steps", "guidance", "eta",
         "pictures_per_prompt", "mixed_precision")


@dataclass(frozen=True)
class Evaluate:
    """Compare a tuned model with its base: same-seed pictures, scores, win rates, and a page of pictures."""

    model: str = ""
    """The base: a diffusers directory, a hub name, or a single-file checkpoint."""
    vae: str = ""
    """Another VAE: a directory or hub name; default: the base's."""
    resolution: int = 0
    """Height and width of the pictures in pixels; 0: the denoiser's own. The LRM scores at its own
    resolution.
    """
    lora: str = ""
    """The tuned model as a LoRA: a run directory, checkpoint_{n}/ or file."""
    tuned: str = ""
    """The tuned model as a directory: a full model, a fine-tuning run or a U-Net; the base supplies the rest.
    """
    prompts: str = ""
    """Prompts: .json (strings, or objects with the caption key), .jsonl, .txt, .csv or .parquet."""
    caption_key: str = "caption"
    """Key or column of the prompt."""
    out: str = "runs/evaluation"
    """Directory for pictures, scores.csv, summary.json and page.html."""
    lrm: str = ""
    """Latent reward model that scores the pictures at t = 1."""
    lrm_base: str = ""
    """Diffusers directory with the LRM's VAE and tokenizer (default: the one it names, else the model)."""
    scorer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """module:function, or pickscore, clipscore, aesthetic, hpsv2, imagereward; repeatable."""
    number: int = 0
    """Number of prompts to use, from the first; 0: all."""
    pictures_per_prompt: int = 1
    """Pictures per prompt."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance."""
    eta: float = 1.0
    """DDIM's eta; 0 is deterministic sampling."""
    seed: int = 0
    """The noise is a function of the seed, the picture's number and the step."""
    batch_size: int = 4
    """Pictures drawn or scored per batch."""
    mixed_precision: Precision = "auto"
    """Precision of the networks; auto: fp16 on CUDA, fp32 on a CPU."""


def check(settings: Evaluate) -> tuple[list[str], dict[str, scorers.Score]]:
    """Refuse settings that cannot work, before a model is downloaded or converted.

    Returns all prompts, and the scorers by name. Raises InputError.
    """
    cli.required(settings, "model", "prompts", "out")
    cli.within(settings, 0, float("inf"), "number", "seed", "resolution")
    cli.within(settings, 1, float("inf"), "pictures_per_prompt", "batch_size")
    cli.within(settings, 1, 999, "steps")
    cli.within(settings, 0, 1e6, "guidance")
    cli.within(settings, 0, 1, "eta")
    if settings.lora and settings.tuned:
        raise InputError(settings.tuned, "--lora is given as well", "give one of them", "--tuned")
    prompts = read_prompts(settings.prompts, settings.caption_key)
    specs = dict.fromkeys(settings.scorer)
    short = [spec.rpartition(":")[2] for spec in specs]
    named = {s if short.count(s) == 1 and s != "lrm" else spec: spec
             for s, spec in zip(short, specs, strict=True)}
    functions = {name: scorers.resolve(spec) for name, spec in named.items()}
    if settings.lora:
        export.read(settings.lora)
    models.writable(Path(settings.out))
    return prompts, functions


def check_models(settings: Evaluate, prompts: list[str]) -> None:
    """Refuse models that do not fit together, and an output directory with pictures of other models."""
    unet = models.pipeline(settings.model, "--model")
    models.picture(LPO(model=settings.model, vae=settings.vae, resolution=settings.resolution), unet)
    if settings.lora:
        lora = export.read(settings.lora)
        with torch.device("meta"):
            export.check_fit(lora, policies.UNet2DConditionModel.from_config(unet), settings.lora)
        lora.rank  # noqa: B018 - raises if ranks differ
    if settings.tuned:
        with export.assembled(settings.tuned, settings.model) as folder:
            other = models.pipeline(folder, "--tuned")
        if differ := [key for key in ("in_channels", "sample_size") if other.get(key) != unet.get(key)]:
            raise InputError(settings.tuned,
                             f"its {differ[0]} is {other.get(differ[0])}, the base's {unet.get(differ[0])}",
                             "compare models of one latent size", "--tuned")
    if settings.lrm:
        check_lrm(settings.lrm, lrm_base(settings), settings.vae)
    directory(settings, record(settings, prompts))


def lrm_base(settings: Evaluate) -> str:
    """Return the directory that completes the LRM; "" for the one that it names."""
    file = locate.locate(settings.lrm, "--lrm") / "lrm.json"
    named = file.is_file() and configs.read_config(file.parent, "--lrm", file.name).get("base")
    return settings.lrm_base or ("" if named else settings.model)


def record(settings: Evaluate, prompts: list[str]) -> dict[str, object]:
    """Return everything that determines the pictures; a run continues only pictures with an equal record."""
    kept = {key: value for key, value in asdict(settings).items() if key in DRAWN}
    weights = {}
    for path in filter(None, (settings.model, settings.vae, settings.lora, settings.tuned)):
        root = Path(path)
        folders = [root] if root.is_file() else [p for p in (root, *(root / part for part in ("unet", "vae")))
                                                 if p.is_dir()]
        files = [f for p in folders for f in ([p] if p.is_file() else p.iterdir())
                 if f.suffix == ".safetensors" or f.name == LORA_OFFICIAL]
        weights |= {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)}
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return kept | {"prompts": digest, "weights": weights}


def directory(settings: Evaluate, wanted: dict[str, object]) -> None:
    """Refuse an output directory that cannot be written, or that holds other files.

    Pictures of other settings are refused too. Raises InputError, which names the first setting that differs.
    """
    out = Path(settings.out)
    models.writable(out)
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / RECORD).is_file():
        raise InputError(settings.out, "holds something other than an evaluation", "name another directory",
                         "--out")
    before = configs.read_config(out, "--out", RECORD)
    for key, value in wanted.items():
        if before.get(key) != value:
            had = ("" if isinstance(value, dict) or key == "prompts" else
                   f" ({before.get(key)} then, {value} now)")
            raise InputError(settings.out, f"holds pictures drawn with other {key.replace('_', ' ')}{had}",
                             "name another directory, or use its own settings", "--out")


def sides(settings: Evaluate) -> tuple[str, ...]:
    """Return the sides to draw: base, and tuned if there is a tuned model."""
    return compare.SIDES if settings.lora or settings.tuned else compare.SIDES[:1]


def picture(out: Path, side: str, item: int) -> Path:
    """Return the path of a picture."""
    return out / side / f"{item:05d}.png"


def draw(settings: Evaluate, prompts: list[str], items: list[int]) -> None:
    """Draw those pictures that do not exist yet; picture i belongs to prompt i // pictures_per_prompt."""
    if not settings.tuned:
        draw_with(settings, settings.model, prompts, items, sides(settings))
        return
    draw_with(settings, settings.model, prompts, items, ("base",))
    with export.assembled(settings.tuned, settings.model) as folder:
        draw_with(settings, folder, prompts, items, ("tuned",))


def draw_with(settings: Evaluate, model: str, prompts: list[str], items: list[int],
              names: tuple[str, ...]) -> None:
    """Draw the missing pictures of one model.

    With a LoRA, the base is the policy's reference, which has the adapters off.
    """
    out = Path(settings.out)
    missing = {side: [i for i in items if not picture(out, side, i).is_file()] for side in names}
    numbers = sorted({i // settings.pictures_per_prompt for wanted in missing.values() for i in wanted})
    if not numbers:
        return
    config = LPO(model=model, resolution=settings.resolution, num_steps=settings.steps, eta=settings.eta,
                 mixed_precision=settings.mixed_precision, batch_size=settings.batch_size)
    if settings.lora:
        lora = export.read(settings.lora)
        config = replace(config, lora=settings.lora, rank=lora.rank, targets=tuple(lora.pairs))
    device = PartialState().device
    loaded, sched = policies.load(config, [prompts[n] for n in numbers], device)
    shape = policies.latent_shape(config, loaded.unet)
    place = {number: i for i, number in enumerate(numbers)}
    for side, wanted in missing.items():
        predict = loaded.predict if side == "tuned" and settings.lora else loaded.reference
        bar = tqdm(total=len(wanted), desc=f"draw {side}", unit="picture", leave=False, disable=None)
        for first in range(0, len(wanted), size := 8 * settings.batch_size):
            part = wanted[first:first + size]
            index = torch.tensor([place[i // settings.pictures_per_prompt] for i in part])
            drawn = drawing.pictures(predict, sched, Path(settings.vae or model),
                                     index, shape, guidance=settings.guidance,
                                     seed=settings.seed, batch=settings.batch_size, items=torch.tensor(part),
                                     prefetch=loaded.prefetch)
            for i, pixels in zip(part, drawn.numpy(), strict=True):
                save(pixels, picture(out, side, i))
            bar.update(len(part))
        bar.close()


def save(pixels: np.ndarray, file: Path) -> None:
    """Write a PNG atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing.replacing(file) as aside:
        Image.fromarray(pixels).save(aside, "PNG")


def score(settings: Evaluate, prompts: list[str], items: list[int],
          functions: dict[str, scorers.Score]) -> list[dict]:
    """Return one row per picture number: prompt, the files by side, and the scores as "{side} {scorer}"."""
    out, size = Path(settings.out), settings.batch_size
    texts = [prompts[i // settings.pictures_per_prompt] for i in items]
    rows = [{"item": i, "prompt": text}
            | {side: str(picture(out, side, i).relative_to(out)) for side in sides(settings)}
            for i, text in zip(items, texts, strict=True)]
    reward = None
    if settings.lrm and items:
        reward = Scorer(settings.lrm, lrm_base(settings), vae=settings.vae, batch_size=size,
                        mixed_precision=settings.mixed_precision)
    for side in sides(settings):
        files = [picture(out, side, i) for i in items]
        values = {"lrm": reward(files, texts, rows=items).tolist()} if reward else {}
        for name, function in functions.items():
            values[name] = []
            for at in (slice(i, i + size) for i in range(0, len(files), size)):
                pictures = [Image.open(file, formats=("PNG",)).convert("RGB") for file in files[at]]
                values[name] += scorers.call(function, name, pictures, texts[at])
        for name, column in values.items():
            for row, value in zip(rows, column, strict=True):
                row[f"{side} {name}"] = value
    return rows


def write(settings: Evaluate, rows: list[dict], names: list[str], prompts: int) -> str:
    """Write scores.csv, summary.json and page.html; return the table as text."""
    out = Path(settings.out)
    with writing.replacing(out / "scores.csv") as aside, open(aside, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    result = {name: compare.summary({side: np.array([row[f"{side} {name}"] for row in rows]).reshape(
        prompts, -1) for side in sides(settings)}) for name in names}
    finite = {name: {key: {k: v if np.isfinite(v) else None for k, v in value.items()}
                     for key, value in entry.items()} for name, entry in result.items()}
    logs.write_json(out / "summary.json",
                    {"prompts": prompts, "pictures": len(rows), "scores": finite,
                     "settings": asdict(settings), "environment": environment.environment()})
    note = (f"{settings.lora or settings.tuned or 'no tuned model'} against {settings.model}: {prompts} "
            f"prompts, {len(rows)} pictures each, {settings.steps} steps, guidance {settings.guidance:g}, "
            f"eta {settings.eta:g}, seed {settings.seed}. Brackets: 95 % intervals over prompts. Win rate: a "
            "tie counts as half.")
    file = compare.page(rows, result, out, note)
    return (compare.table(result) + "\n\n" if result else "") + f"{note}\npictures: {file}"


def run(settings: Evaluate) -> None:
    """Run the command, on every rank."""
    prompts, functions = check(settings)
    given = {key: getattr(settings, key) for key in ("model", "vae", "tuned") if getattr(settings, key)}
    settings = replace(settings,
                       **{key: str(locate.locate(name, cli.flag(key))) for key, name in given.items()})
    check_models(settings, prompts)
    wanted, prompts = record(settings, prompts), prompts[:settings.number or None]
    state = PartialState(cpu=not torch.cuda.is_available())
    state.wait_for_everyone()  # barrier: every rank has checked --out before rank 0 writes there
    out = Path(settings.out)
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        logs.write_json(out / RECORD, wanted)
    each = settings.pictures_per_prompt
    items = [n * each + k for n in range(state.process_index, len(prompts), state.num_processes)
             for k in range(each)]
    draw(settings, prompts, items)
    rows = sorted(gather_object(score(settings, prompts, items, functions)), key=lambda row: row["item"])
    if state.is_main_process:
        print(write(settings, rows, (["lrm"] if settings.lrm else []) + list(functions), len(prompts)))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.command(Evaluate, run, argv, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
