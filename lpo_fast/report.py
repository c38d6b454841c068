"""Write the report of a run: python -m lpo_fast.report RUN_DIR turns a run directory into one file,
report.html.

Everything is optional: a section appears if its data exists. The page loads nothing from outside and runs no
script; its charts are inline SVG, colored by the style sheet, so they follow the reader's light or dark mode.
"""

import argparse
import base64
import io
import json
import math
import re
from collections import Counter
from datetime import timedelta
from html import escape
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lpo_fast.system import writing

SHOWN = 48  # picture pairs in the report
OPEN = 12  # picture pairs that are visible at once
EMBED = 384  # largest width and height of an embedded picture, in pixels
SMALL = 128  # widths up to this are shown pixelated
COLORS = {"#000001": "accent", "#000002": "second", "#000003": "muted", "#000004": "line"}  # to CSS
ACCENT, SECOND, MUTED, LINE = COLORS
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lpo_fast", "font.size": 8.5, "axes.labelsize": 8.5,
         "text.color": MUTED, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
         "grid.color": LINE, "xtick.major.size": 0, "ytick.major.size": 0, "axes.grid": True,
         "axes.grid.axis": "y", "axes.axisbelow": True}
CHANCE = (0.5, "chance")
MARKS = {"True": '<b class="right">✓</b>', "False": '<b class="wrong">✗</b>'}
PAGE = Template("""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>:root { --page: #fdfdfc; --ink: #1d2129; --muted: #666d78; --line: #e3e5e8; --accent: #1f66d1; --second: #c2570c;
  --before: #a3aab5; --good: #1a7f45; --bad: #c0362c }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e7e9ed; --muted: #9aa3b0;
  --line: #2b3038; --accent: #6ea8ff; --second: #f0a35e; --before: #747d8b; --good: #5cc98a; --bad: #f2837a } }
* { box-sizing: border-box; print-color-adjust: exact } .pair img { border-radius: 4px; outline: 1px solid var(--line) }
body { margin: 0 auto; padding: 40px 24px 64px; max-width: 908px; font: 16px/1.5 system-ui, "Segoe UI", sans-serif;
  background: var(--page); color: var(--ink); overflow-wrap: anywhere } table { border-collapse: collapse; width: 100% }
h1 { font-size: 28px; line-height: 1.2; margin: 0 } svg, img { display: block; width: 100%; height: auto }
h3 { font-size: 15px; margin: 0 } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 5px; font-size: 13px }
h2 { font-size: 20px; margin: 48px 0 6px; padding-top: 20px; border-top: 1px solid var(--line); break-after: avoid }
p { margin: 6px 0; max-width: 74ch } .tiles b { display: block; color: var(--ink); font-size: 30px; line-height: 1.2 }
.muted, figcaption { color: var(--muted); font-size: 14px; line-height: 1.45 } .small { image-rendering: pixelated }
.tiles { display: flex; flex-wrap: wrap; gap: 20px 26px; margin: 26px 0 20px; font-size: 14px; color: var(--muted) }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 5px 14px; align-items: center; max-width: 660px;
  font-size: 14px; margin: 14px 0 } figure { margin: 12px 0 0; break-inside: avoid; min-width: 0; max-width: 520px }
.bars h3 { grid-column: 1/-1; margin-top: 8px } .track .before { background: var(--before) }
.track { position: relative; height: 16px; background: var(--line); border-radius: 3px } .right { color: var(--good) }
.track * { position: absolute; height: 100%; border-radius: 3px; background: var(--accent) }
.track u { top: 3px; height: 10px; border: solid var(--ink); border-width: 0 2px; border-radius: 0; background:
  linear-gradient(var(--ink) 0 0) 0/100% 2px no-repeat } svg text { font-family: inherit !important }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 370px), 1fr)); gap: 20px 40px }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(16em, 1fr)); gap: 8px 2em; align-items: end }
.pictures figcaption, ol { max-height: 8.7em; overflow: auto } .wrong { color: var(--bad) } li { text-align: left }
ol { grid-column: 1/-1; margin: 0; max-height: 17.4em } figcaption, li, td, h1 { unicode-bidi: plaintext }
th { width: 34%; font-weight: 400; text-align: left; vertical-align: top }
details { margin: 12px 0 } td, th { padding: 5px 9px 5px 0; border-bottom: 1px solid var(--line); font-size: 14px }
</style></head><body>$body</body></html>
""")


def num(value: object) -> float:
    """Return a finite number as float, and NaN for anything else (null, NaN, infinity, text, true)."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan


def parse(text: str, kind: type = dict) -> dict | list:
    """Return the JSON value if it is of that kind, else an empty one: a killed run may have left a partial
    line.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def read(path: Path) -> str:
    """Return a file's text, or "" if there is no such file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def of_kind(rows: list[dict], kind: str, reward: bool = False) -> list[dict]:
    """Return the rows of one kind, of the reward model or of LPO.

    Where the step goes back a run was resumed: the later rows replace the earlier ones.
    """
    kept: list[dict] = []
    for row in rows:
        if row.get("kind") == kind and ("loss" in row or "accuracy" in row) == reward:
            step = num(row.get("global_step"))
            if kept and step < num(kept[-1].get("global_step")):
                kept = [old for old in kept if num(old.get("global_step")) < step]
            kept.append(row)
    return kept


def column(rows: list[dict], key: str) -> np.ndarray:
    """Return one entry of all rows as an array, NaN where it is missing."""
    return np.array([num(row.get(key)) for row in rows])


def wilson(k: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of the share k/n; NaN if it is undefined."""
    if not (n > 0 and 0 <= k <= n):
        return math.nan, math.nan
    p, z2 = k / n, 1.96**2 / n
    center, half = p + z2 / 2, math.sqrt(z2 * p * (1 - p) + z2**2 / 4)
    return max(0.0, (center - half) / (1 + z2)), min(1.0, (center + half) / (1 + z2))


def paired(gained: float, lost: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of the change (b − c)/n: b of n pictures became correct, c became wrong."""
    change, half = ((gained - lost) / n,
                    1.96 * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / n)) / n)
    return change - half, change + half


def smooth(y: np.ndarray) -> np.ndarray:
    """Return the centered running mean over about a tenth of the values (triangular weights), skipping
    missing ones.
    """
    kernel, good = np.bartlett(len(y) // 15 * 2 + 3)[1:-1], np.isfinite(y)
    weight = np.convolve(good, kernel, "same")
    return np.convolve(np.where(good, y, 0), kernel, "same") / np.where(weight > 1e-9, weight, np.nan)


def plot(title: str, how: str, x_name: str, y_name: str, ref: tuple | None, *series: tuple) -> str:
    """Return a chart and the sentence that explains it, or "" without data.

    series: ("line", x, y), drawn faint, with its running mean; ("bar", x, y); ("dots", x, y, [distance down,
    distance up]). ref: (y, name), a dashed line.
    """
    series = [(kind, x, y, *error) for kind, x, y, *error in series if np.isfinite(y).any()]
    if not series:
        return ""
    with matplotlib.rc_context(STYLE):
        axes = (figure := Figure((4.3, 2.3), layout="constrained")).subplots()
        for kind, x, y, *error in series:
            if kind == "bar":
                axes.bar(x, y, 0.7 * (np.ptp(x) or 1) / max(1, len(x) - 1), color=ACCENT)
            elif kind == "dots":
                axes.errorbar(x, y, *error, fmt="o", markersize=3.5, linewidth=1, color=SECOND)
            else:
                low, high = np.nanquantile(y, (0.01, 0.99))
                room = high - low or math.inf  # a single spike must not flatten the chart
                axes.plot(x, drawn := y.clip(low - room, high + room), color=ACCENT, alpha=0.3, linewidth=0.7)
                axes.plot(x, smooth(y), "-o" if len(y) == 1 else "-", color=ACCENT, linewidth=1.6,
                          markersize=3.5)
                how += f" Spikes clipped in the drawing: {n}." if (n := (np.abs(drawn - y) > 0).sum()) else ""
        if ref:
            axes.axhline(ref[0], color=MUTED, linestyle=(0, (4, 3)), linewidth=0.9)
            axes.annotate(ref[1], (1.01, ref[0]), xycoords=("axes fraction", "data"), va="center")
        if y_name.startswith("share"):
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.locator_params("x", integer=True, nbins=7)
        axes.set(xlabel=x_name, ylabel=y_name, frame_on=False)
        figure.savefig(text := io.StringIO(), format="svg", transparent=True)
    svg = re.sub(r'<metadata>.*?</metadata>|^.*?<svg[^>]*>| id="[a-z]+_[0-9]+"', "", text.getvalue(),
                 flags=re.S)
    svg = re.sub("#00000[1-4]", lambda hit: f"var(--{COLORS[hit[0]]})", svg)
    return (f'<figure><h3>{title}</h3><svg viewBox="0 0 309.6 165.6" role="img" aria-label="{title}: '
            f'{y_name} against {x_name}">{svg}<figcaption>{how}</figcaption></figure>')


def section(title: str, how: str, *parts: str, cls: str = "charts") -> str:
    """Return a section of the page, or "" if all its parts are empty."""
    return (f'<h2>{title}</h2><p class="muted">{how}</p><div class="{cls}">{"".join(parts)}</div>'
            if any(parts) else "")


def table(value: object, name: str = "") -> str:
    """Return table rows of a nested dict, with dotted names."""
    if isinstance(value, dict):
        return "".join(table(inner, f"{name}.{key}" if name else key) for key, inner in value.items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"


def headline(found: dict, train: list[dict], batches: list[dict], checks: list[dict]) -> str:
    """Return the share of correct pictures before and after alignment, and its change.

    Without an evaluation, return the accuracies and pair counts that training logged.
    """
    n, captions, gained, lost = (num(found.get(key)) for key in ("n", "captions", "gained", "lost"))
    stages = {s: found[s] for s in ("before", "after") if isinstance(found.get(s), dict)}
    stages = {s: value for s, value in stages.items() if n > 0 and 0 <= num(value.get("right")) <= n}
    tiles, bars, verdict, note = ([], {}, "",
                                  f"{n:,.0f} pictures" + f" of {captions:,.0f} captions" * (captions > 0))
    for stage, value in stages.items():
        low, high = wilson(value["right"], n)
        tiles.append((f"{value['right'] / n:.1%}", f"correct {stage} [{100 * low:.1f}, {100 * high:.1f}]"))
        for name, share in {"complete picture": value["right"] / n,
                            **(value.get("by_attribute") or {})}.items():
            if 0 <= num(share) <= 1:
                low, high = wilson(share * n, n)
                bars[name] = bars.get(name, f"<h3>{escape(name)}</h3>") + (
                    f'<span>{stage}</span><span class="track"><i '
                    f'class="{stage}" style="width:{share:.1%}"></i><u '
                    f'style="left:{low:.1%};width:{high - low:.1%}"></u></span><span>{share:.1%}</span>')
    if len(stages) == 2:
        change, text = stages["after"]["right"] - stages["before"]["right"], "points change"
        if min(gained, lost) >= 0 and gained - lost == change:  # the counts exist and are consistent
            low, high = paired(gained, lost, n)
            text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
            note += f", paired by seed: {gained:,.0f} became correct, {lost:,.0f} became wrong"
            verdict = (
                "Too few pictures changed for a reliable interval of the change." if gained + lost < 10 else
                "The interval of the change includes 0: no change is shown." if low <= 0 <= high else
                f"{'More' if change > 0 else 'Fewer'} pictures are correct after alignment than before.")
        tiles.append((f"{100 * change / n:+.1f}", text))
    varied = [num(value.get("diversity")) for value in stages.values()]
    if np.isfinite(varied).all() and stages:
        tiles.append((" → ".join(f"{v:.3g}" for v in varied), "diversity " + " → ".join(stages)))
    note = ("Bars: share of correct pictures, full at 100 %. Brackets and whiskers: 95 % intervals over "
            f"pictures, assumed independent, not over training runs. {note}.")
    if not stages:
        valid, implicit = column(checks, "accuracy"), column(train, "implicit_acc")
        late = implicit[-max(len(implicit) // 10, 10):]
        late = late[np.isfinite(late)]
        logged = [(valid[-1:], "last validation accuracy of the reward model"),
                  (late, f"implicit accuracy of the policy, mean of the last {len(late)} steps")]
        tiles = [(f"{y.mean():.1%}", text) for y, text in logged if np.isfinite(y).any()]
        kept, possible = (np.nansum(column(batches, key))
                          for key in ("total_valid_samples_num", "pairs_possible"))
        tiles += [(f"{kept:,.0f}", f"pairs kept of {possible:,.0f} possible")] * bool(possible)
        note = "No evaluation is recorded in this run; python -m lpo_fast.evaluate judges a model's pictures."
    return (f'<div class="tiles">{"".join(f"<div><b>{value}</b>{text}</div>" for value, text in tiles)}</div>'
            f'<p>{verdict}</p><div class="bars">{"".join(bars.values())}</div><p class="muted">{note}</p>')


def pictures(folder: Path) -> str:
    """Return the pictures before and after alignment, by number; large ones are scaled down."""
    captions, cards = parse(read(folder / "captions.json"), list), []
    numbers = sorted({int(path.stem[:-7]) for path in folder.glob("*_before.png")
                      if path.stem[:-7].isdecimal()})
    for i in numbers[:SHOWN]:
        about = captions[i] if i < len(captions) and isinstance(captions[i], dict) else {}
        card = f'<figure><figcaption>{escape(str(about.get("caption", i)))}</figcaption><div class="pair">'
        for stage in ("before", "after"):
            image = embedded(folder / f"{i:03d}_{stage}.png", EMBED)
            if image:
                card += (f'<span>{image} alt="{stage}">{stage} '
                         f"{MARKS.get(str(about.get(f'{stage}_right')), '')}</span>")
        cards.append(card + "</div></figure>")
    rest = (f'<details><summary>{len(cards) - OPEN} more</summary><div '
            f'class="pictures">{"".join(cards[OPEN:])}</div>')
    how = f"The first {len(cards)} of {len(numbers)} pairs, drawn with the same seeds."
    if any("after_right" in c for c in captions if isinstance(c, dict)):
        how += " ✓: shows what the caption asks for."
    grid = section("Pictures before and after alignment", how, *cards[:OPEN], cls="pictures")
    return grid + (rest + "</details>" if len(cards) > OPEN else "")


def embedded(file: Path, size: int) -> str:
    """Return the start of an <img> tag with the picture, at most ``size`` pixels wide and high; "" if it
    cannot be read.
    """
    try:
        image = Image.open(file, formats=("PNG",)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # missing or truncated
        return ""
    image.thumbnail((size, size))
    image.save(data := io.BytesIO(), "PNG")
    return (f'<img class="{"small" * (image.width <= SMALL)}" width="{image.width}" '
            f'src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"')


def validation(folder: Path) -> str:
    """Return the first and the last three grids drawn during training."""
    files = sorted((int(p.stem.partition("_")[2]), p) for p in folder.glob("validation_*.png")
                   if p.stem.partition("_")[2].isdecimal())
    shown = files[:1] + files[1:][-3:]
    grids = [f'<figure>{image} alt="epoch {epoch}"><figcaption>after epoch {epoch}</figcaption></figure>'
             for epoch, file in shown if (image := embedded(file, 2 * EMBED))]
    prompts = "".join(f"<li>{escape(str(prompt))}</li>"
                      for prompt in parse(read(folder / "validation.json"), list))
    return section("Validation pictures", "One row per prompt, with the same noise every time.",
                   *([f'<ol class="muted">{prompts}</ol>', *grids] if grids else []))


def lrm(train: list[dict], checks: list[dict]) -> str:
    """Return the section on the latent reward model: accuracy by timestep and over training."""
    last = [row for row in checks if isinstance(row.get("accuracy_by_timestep"), dict)][-1:]
    points = [(float(t), num(a), *wilson(num(a) * num(row.get("n")), num(row.get("n"))))
              for row in last for t, a in row["accuracy_by_timestep"].items() if t.isdecimal()]
    t, share, low, high = np.array(points).reshape(-1, 4).T
    curves = [(k, column(r, "global_step"), column(r, "accuracy"))
              for k, r in (("line", train), ("dots", checks))]
    return section(
        "Latent reward model", "The model predicts which of two noisy latents fits a prompt better.",
        plot("Accuracy by timestep", "Share of pairs that the last validation ranked correctly, with both "
             "pictures noised to that timestep (high: nearly pure noise). Error bars: 95 % intervals.",
             "timestep", "share of pairs", CHANCE,
             ("dots", t, share, np.nan_to_num([share - low, high - share]).clip(0))),
        plot("Accuracy over training", "Lines: training batches, running mean. Dots: validation "
             "at timestep 1.", "optimizer step", "share of pairs", CHANCE, *curves))


def lpo(train: list[dict], batches: list[dict]) -> str:
    """Return the section on alignment: what was logged per optimizer step and per prompt batch."""
    kept, possible = Counter(), Counter()
    for row in batches:
        times, valid, pairs = (row.get("timesteps"), row.get("valid_by_timestep"),
                               num(row.get("pairs_possible")))
        row["share"] = num(row.get("total_valid_samples_num")) / pairs if pairs else None
        if pairs > 0 and isinstance(times, list) and isinstance(valid, list):
            for t, count in zip(map(num, times), map(num, valid), strict=False):
                if t >= 0 and count >= 0:
                    kept[t], possible[t] = kept[t] + count, possible[t] + pairs / len(times)
    t = np.array(sorted(possible))
    curves = [
        (train, "train_loss", "Loss", "step DPO loss", (math.log(2), "ln 2"),
         "At ln 2 the policy tells winners from losers no better than its reference; lower is better."),
        (train, "implicit_acc", "Implicit accuracy", "share of pairs", CHANCE,
         "How often the winner gained more likelihood over the reference than the loser did."),
        (train, "train_margin", "Margin", "ratio difference", (0.0, "0"),
         "The winner's likelihood ratio minus the loser's; above 0 the policy prefers winners."),
        (train, "grad_norm", "Gradient norm", "norm", None,
         "Norm of each step's gradient; lasting growth is a warning sign."),
        (batches, "share", "Valid pairs", "share of possible pairs", None,
         "The share of a prompt batch's pairs whose scores differ enough to train on.")]
    return section("Alignment (LPO)", "Faint: every logged value. Strong: running mean.",
                   *(plot(title, how, "optimizer step", name, ref,
                          ("line", column(rows, "global_step"), column(rows, key)))
                     for rows, key, title, name, ref, how in curves), plot(
                       "Pairs kept by timestep", "Which denoising steps yield training pairs, over all "
                       "batches; high timesteps are nearly noise.", "timestep", "share of possible pairs",
                       None, ("bar", t, np.array([kept[i] / possible[i] for i in t]))))


def write(run_dir: str | Path) -> Path:
    """Write run_dir/report.html from the files in run_dir, and return its path."""
    run, name = Path(run_dir), escape(Path(run_dir).resolve().name)
    config, environment, found = (parse(read(run / f"{f}.json"))
                                  for f in ("config", "environment", "evaluation"))
    rows = [parse(line) for part in (run / "lrm", run) for line in read(part / "metrics.jsonl").split("\n")]
    train, batches, checks = of_kind(rows, "train"), of_kind(rows, "batch"), of_kind(rows, "validation", True)
    times = found.get("seconds") if isinstance(found.get("seconds"), dict) else {}
    times = {stage: str(timedelta(seconds=round(num(s)))) for stage, s in times.items() if num(s) >= 0}
    if np.isfinite(speed := column(batches, "prompts_per_second")).any():
        times["LPO, median prompt batch"] = f"{np.nanmedian(speed):.3g} prompts/s"
    about = (escape(d[key]) for d, key in ((config, "model"), (environment, "date"))
             if isinstance(d.get(key), str))
    body = [f'<h1>{name}</h1><p class="muted">{" · ".join(about)}</p>',
            headline(found, train, batches, checks), pictures(run / "pictures"), validation(run / "pictures"),
            lrm(of_kind(rows, "train", True), checks), lpo(train, batches)]
    for title, value in ("Time per stage (h:mm:ss)", times), ("Settings", config), ("What ran", environment):
        inner = (f"<summary>{len(value)} entries</summary><table>{table(value)}</table></details>"
                 if value else "")
        body.append(section(title, "", inner and f"<details{' open' * (value is not config)}>{inner}",
                            cls=""))
    with writing.replacing(path := run / "report.html") as aside:
        aside.write_text(PAGE.substitute(title=name, body="\n".join(body)), "utf-8", "replace")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lpo_fast.report",
                                     description="Write RUN_DIR/report.html.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    if not (folder := parser.parse_args().run_dir).is_dir():
        parser.exit(2, f"no such directory: {folder}\n")
    print(write(folder))
