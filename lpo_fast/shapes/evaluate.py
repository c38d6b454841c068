"""Train and evaluate the method on the toy world: both stages, judged from pixels (python -m
lpo_fast.shapes.evaluate).

The measure is the share of pictures that show what their caption asks for, on attribute combinations that
neither stage has seen, with the same noise before and after. As a control, the reward is shuffled among the
candidates of each step.
"""

import argparse
import io
import json
import math
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lpo_fast import config, train_lpo, train_lrm
from lpo_fast.config import LPO, Demo
from lpo_fast.data import dataset, preferences
from lpo_fast.errors import InputError
from lpo_fast.lpo import drawing, policies
from lpo_fast.lpo.sampling import Score
from lpo_fast.lrm import checkpoint, encoding, selection, validation
from lpo_fast.models import loras
from lpo_fast.preflight import models
from lpo_fast.run import logs
from lpo_fast.shapes import PIPELINE, world
from lpo_fast.system import devices

LRM_PAIRS, VALIDATION_PAIRS = 8000, 300
PROMPT_COPIES = 8  # of every training caption in the prompt file
MARK = "demo.json"  # marks a directory that a demo created, and may remove


def write_pairs(file: Path, n: int, seed: int, held_out: bool) -> None:
    """Render preference pairs and write them as .parquet in Pick-a-Pic layout."""
    pairs = world.pairs(n, seed, held_out)

    def png(picture: np.ndarray) -> bytes:
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "png", compress_level=1)
        return encoded.getvalue()

    columns = {"caption": pairs["caption"], "label_0": pairs["label_0"], "label_1": pairs["label_1"],
               **{f"jpg_{i}": [png(picture) for picture in pairs[f"picture_{i}"]] for i in (0, 1)}}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


def train_reward(out: Path, seed: int) -> Path:
    """Train stage one, the LRM, on rendered pairs of the training combinations; return its directory."""
    write_pairs(out / "pairs" / "train.parquet", LRM_PAIRS, seed, held_out=False)
    write_pairs(out / "pairs" / "validation.parquet", VALIDATION_PAIRS, seed + 1_000_000, held_out=False)
    settings = replace(config.shapes().lrm, model=str(PIPELINE), out=str(out / "lrm"), seed=seed,
                       pairs=str(out / "pairs" / "train.parquet"), cache_dir=str(out / "pairs" / "arrow"),
                       validation_pairs=str(out / "pairs" / "validation.parquet"))
    return train_lrm.train(settings) / selection.FINAL


def reward_accuracy(out: Path, lrm: Path, seed: int) -> dict[str, object]:
    """Return the LRM's accuracy by timestep on pairs of the held-out combinations, as a row of its metrics.
    """
    write_pairs(out / "pairs" / "held_out.parquet", VALIDATION_PAIRS, seed, held_out=True)
    model = checkpoint.load_lrm(lrm).to(devices.device())
    encoder = encoding.Encoder(PIPELINE, model, seed, "no")
    held_out = preferences.read(str(out / "pairs" / "held_out.parquet"),
                                cache_dir=str(out / "pairs" / "arrow"))
    loader = DataLoader(dataset.PairDataset(held_out, encoder.resolution), 100, collate_fn=dataset.collate)
    shown = validation.validate(model, encoder, loader, list(range(1, 1000, 50)))
    return {"kind": "validation", "global_step": config.shapes().lrm.max_steps, "held_out": True, **shown}


def settings(out: Path, lrm: Path, seed: int) -> LPO:
    """Return the settings of stage two, and write its prompt file."""
    prompts = out / "prompts.json"
    captions = [{"caption": caption} for caption in world.captions(held_out=False)] * PROMPT_COPIES
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text(json.dumps(captions))
    return replace(config.shapes().lpo, model=str(PIPELINE), lrm=str(lrm), prompts=str(prompts),
                   out=str(out / "lpo"), seed=seed, pictures=0)


def shuffled(score: Score) -> Score:
    """Return the control's scorer: the scores of each prompt, randomly permuted among its candidates."""
    generator, candidates = torch.Generator().manual_seed(0), config.shapes().lpo.num_candidates

    def control(x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        scores = score(x, t, prompts).view(candidates, -1)
        deal = torch.rand(scores.shape, generator=generator).argsort(0).to(scores.device)
        return scores.gather(0, deal).flatten()
    return control


def draw(lora: Path | None, n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Draw n pictures of held-out captions (in turn) with the base pipeline or with a LoRA.

    Returns the pictures, uint8 [n, H, W, 3], and their captions.
    """
    recipe = replace(config.shapes().lpo, model=str(PIPELINE), lora=str(lora or ""))
    captions = world.captions(held_out=True)
    model, sched = policies.load(recipe, captions, devices.device())
    shape = (model.unet.config.in_channels, *[model.unet.config.sample_size] * 2)
    index = torch.arange(n) % len(captions)
    pictures = drawing.pictures(model.predict, sched, PIPELINE, index, shape, guidance=recipe.guidance_scale,
                               seed=seed, batch=100)
    return pictures.numpy(), [captions[i] for i in index]


def judge(pictures: np.ndarray, captions: list[str]) -> dict[str, object]:
    """Return the number of correct pictures, shares by attribute, and diversity.

    Diversity: RMS pixel difference (0 … 255) of two correct pictures of one caption, averaged over all such
    pairs: how much position, size and shade vary where nothing is wrong.
    """
    right, wanted = world.right(pictures, captions), world.attributes(captions)
    distances = []
    for caption in sorted(set(captions)):
        same = pictures[right & (np.array(captions) == caption)].astype(np.float32)
        first, second = np.triu_indices(len(same), 1)
        distances += np.sqrt(((same[first] - same[second]) ** 2).mean((1, 2, 3))).tolist()
    shares = (world.measure(pictures) == wanted).mean(0).tolist()
    return {"right": int(right.sum()), "diversity": float(np.mean(distances)) if distances else math.nan,
            "by_attribute": dict(zip(("shape", "colour", "background"), shares, strict=True))}


def evaluate(out: Path, before: np.ndarray, after: np.ndarray, captions: list[str]) -> dict[str, object]:
    """Write evaluation.json and pictures/ of a run directory; return the evaluation.

    before, after: pictures uint8 [n, H, W, 3], drawn with the same noise.
    """
    n = len(captions)
    was, now = world.right(before, captions), world.right(after, captions)
    result = {"captions": len(set(captions)), "n": n,
              "before": judge(before, captions), "after": judge(after, captions),
              "gained": int((now & ~was).sum()), "lost": int((was & ~now).sum())}
    logs.write_json(out / "evaluation.json", result)
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    shown = min(n, 48)
    for i in range(shown):
        Image.fromarray(before[i]).save(folder / f"{i:03d}_before.png")
        Image.fromarray(after[i]).save(folder / f"{i:03d}_after.png")
    logs.write_json(folder / "captions.json", [{"caption": captions[i], "before_right": bool(was[i]),
                                                "after_right": bool(now[i])} for i in range(shown)])
    return result


def demo(options: Demo) -> tuple[dict[str, object], Path]:
    """Run the complete method, both stages and the evaluation.

    Returns the evaluation and the run directory for the report.
    """
    out, seconds, start = Path(options.out), {}, time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal start
        seconds[stage], start = time.perf_counter() - start, time.perf_counter()

    clear(out)
    logs.write_json(out / MARK, asdict(options))
    lrm = train_reward(out, options.seed)
    lap("latent reward model")
    run = train_lpo.train(settings(out, lrm, options.seed))
    lap("preference optimization")
    before, captions = draw(None, options.pictures, options.seed)
    after, _ = draw(run / loras.LORA_DIFFUSERS, options.pictures, options.seed)
    result = evaluate(run, before, after, captions)
    lap("evaluation")
    result |= {"seconds": seconds}
    logs.write_json(run / "evaluation.json", result)
    rows = ((out / "lrm" / "metrics.jsonl").read_text() + json.dumps(reward_accuracy(out, lrm, options.seed))
            + "\n")
    (run / "lrm").mkdir(exist_ok=True)
    (run / "lrm" / "metrics.jsonl").write_text(rows)
    return result, run


def clear(out: Path) -> None:
    """Remove an earlier demo, which its mark identifies, and create the directory."""
    models.writable(out)
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise InputError(str(out), "is not an earlier demo", "name another directory", "--out")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)


def verdict(result: dict) -> str:
    """Return the result as one line."""
    n = result["n"]
    before, after = (result[when]["right"] for when in ("before", "after"))
    return (f"correct pictures of {n}, held-out captions, same seeds: {before} before ({before / n:.1%}), "
            f"{after} after ({after / n:.1%})")


def main(argv: list[str] | None = None) -> int:
    """Train with several seeds and print the results as a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m lpo_fast.shapes.evaluate",
                                     description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="one complete run per seed (default: 0 1 2)")
    parser.add_argument("--n", type=int, default=500, help="held-out pictures per run (default: 500)")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary directory)")
    arguments = parser.parse_args(argv)
    if arguments.n < 1 or arguments.out and arguments.out.exists():
        parser.error("--n must be 1 or more, and --out a directory that does not exist yet")
    with tempfile.TemporaryDirectory() as scratch:
        root, rows = arguments.out or Path(scratch), []
        for seed in arguments.seeds:
            out = root / f"seed{seed}"
            lrm = train_reward(out, seed)
            accuracy = reward_accuracy(out, lrm, seed)["accuracy_by_timestep"]
            plain = settings(out, lrm, seed)
            control = replace(plain, out=str(out / "control"))
            before, captions = draw(None, arguments.n, seed)
            for name, run in (("LPO", train_lpo.train(plain)),
                              ("shuffled", train_lpo.train(control, shuffled))):
                after, _ = draw(run / loras.LORA_DIFFUSERS, arguments.n, seed)
                rows.append((seed, name, evaluate(run, before, after, captions), accuracy))
        print(table(rows, arguments.n))
    return 0


def table(rows: list[tuple[int, str, dict, dict]], n: int) -> str:
    """Return a Markdown table with one line per run."""
    lines = ["| seed | reward | correct before | correct after | change | diversity "
             "| LRM accuracy t = 1 / 501 / 751 |",
             "|---|---|---|---|---|---|---|"]
    for seed, name, result, accuracy in rows:
        before, after = (100 * result[when]["right"] / n for when in ("before", "after"))
        diversity = 100 * (result["after"]["diversity"] / result["before"]["diversity"] - 1)
        shown = " / ".join(f"{accuracy[t]:.3f}" for t in ("1", "501", "751"))
        lines.append(f"| {seed} | {name} | {before:.1f} % | {after:.1f} % | {after - before:+.1f} | "
                     f"{diversity:+.1f} % | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
