"""Compare two models by the scores of their pictures: intervals, win rates, a table, and an HTML page of
picture pairs.
"""

import base64
import io
import math
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from lpo_fast.report import EMBED, PAGE, SMALL, wilson

ROUNDS = 5000  # of the bootstrap
SHOWN = 50  # picture pairs on the page
SIDES = ("base", "tuned")


def bootstrap(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return the mean of independent values [P] and its 95 % percentile bootstrap interval (NaN for fewer
    than two values).
    """
    low = high = math.nan
    if len(values) > 1:
        generator = np.random.default_rng(seed)
        means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(ROUNDS)]
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return {"mean": float(values.mean()), "low": low, "high": high}


def summary(scores: dict[str, np.ndarray]) -> dict[str, dict]:
    """Return, with 95 % intervals, the mean score of each side, their difference and the win rate.

    scores: [P, k] by side, of k pictures for each of P prompts. Prompts are resampled, not pictures, because
    the pictures of one prompt are alike. Win rate: share of pairs that the tuned model wins, where a tie
    counts as half; its interval is Wilson's for P trials.
    """
    result: dict[str, dict] = {side: bootstrap(values.mean(1)) for side, values in scores.items()}
    if len(scores) == 2:
        gap = scores["tuned"] - scores["base"]
        share = float((gap > 0).mean() + 0.5 * (gap == 0).mean())
        low, high = wilson(share * len(gap), len(gap))
        result |= {"difference": bootstrap(gap.mean(1)),
                   "win_rate": {"mean": share, "low": low, "high": high}}
    return result


def table(result: dict[str, dict]) -> str:
    """Return a Markdown table with one line per scorer; brackets hold 95 % intervals."""
    columns = list(next(iter(result.values())))
    lines = [f"| scorer | {' | '.join(columns).replace('_', ' ')} |", "|---" * (len(columns) + 1) + "|"]
    for name, entry in result.items():
        lines.append(f"| {name} | " + " | ".join(_cell(entry[column], column) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: dict[str, float], column: str) -> str:
    form = {"win_rate": "{:.1%}", "difference": "{:+.4f}"}.get(column, "{:.4f}")
    mean, low, high = (form.format(value[key]) for key in ("mean", "low", "high"))
    return mean if math.isnan(value["low"]) else f"{mean} [{low}, {high}]"


def page(rows: list[dict], result: dict[str, dict], out: Path, note: str) -> Path:
    """Write page.html with the table and the first picture pairs, their prompts and scores.

    It loads nothing from outside.
    """
    cards = []
    for row in rows[:SHOWN]:
        pair = "".join(f"<span>{_embedded(out / row[side], side)}{side}{_scores(row, result, side)}</span>"
                       for side in SIDES if side in row)
        cards.append(f'<figure><figcaption>{escape(row["prompt"])}</figcaption><div '
                     f'class="pair">{pair}</div></figure>')
    lines = table(result).splitlines() if result else []
    cells = [[f"<td>{escape(cell.strip())}</td>" for cell in line.strip("|").split("|")]
             for line in lines[:1] + lines[2:]]
    numbers = "".join(f"<tr>{''.join(line)}</tr>" for line in cells)
    body = (
        f'<h1>Base and tuned</h1><p class="muted">{escape(note)}</p><table>{numbers}</table><h2>Pictures</h2>'
        f'<p class="muted">The first {len(cards)} of {len(rows)} pairs, drawn with the same noise.</p>'
        f'<div class="pictures">{"".join(cards)}</div>')
    (file := out / "page.html").write_text(PAGE.substitute(title="evaluation", body=body), "utf-8", "replace")
    return file


def _scores(row: dict, result: dict[str, dict], side: str) -> str:
    return "".join(f"<br>{escape(name)} {row[f'{side} {name}']:.3f}" for name in result)


def _embedded(file: Path, alt: str) -> str:
    """Return an <img> with the picture embedded; large pictures are scaled down."""
    image = Image.open(file, formats=("PNG",)).convert("RGB")
    image.thumbnail((EMBED, EMBED))
    small = image.width <= SMALL
    image.save(data := io.BytesIO(), "PNG" if small else "JPEG", quality=85)
    return (f'<img class="{"small" * small}" alt="{alt}" width="{image.width}" '
            f'src="data:image/{"png" if small else "jpeg"};'
            f'base64,{base64.b64encode(data.getvalue()).decode()}">')
