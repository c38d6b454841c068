"""The run report: its intervals, what it shows of complete, broken and empty runs, and that it stands alone.
"""

import base64
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpo_fast import report

ATTACK = '</title><script>alert("x")</script><img src=x onerror=alert(1)>'
SECTIONS = ["Pictures before", "Latent reward model", "Alignment (LPO)", "Time per stage", "Settings",
            "What ran"]


def lpo_rows(n: int) -> list[dict]:
    rows = []
    for step in range(1, n + 1):
        rows.append({"kind": "train", "epoch": 0, "global_step": step, "train_loss": 0.7 - 0.001 * step,
                     "lr": 6e-5, "implicit_acc": 0.5 + 0.2 * (step % 3), "train_margin": 1e-3 * step,
                     "grad_norm": 1.0 + step % 5})
        rows.append({"kind": "batch", "epoch": 0, "global_step": step, "total_valid_samples_num": 6,
                     "timesteps": [951, 501, 1], "valid_by_timestep": [3, 2, 1], "pairs_possible": 12,
                     "seconds": 0.5, "prompts_per_second": 8.0})
    return rows


def lrm_rows(n: int) -> list[dict]:
    rows = [{"kind": "train", "global_step": step, "loss": 0.5, "accuracy": 0.75, "lr": 1e-4,
             "grad_norm": 1.0} for step in range(1, n + 1)]
    return [*rows, {"kind": "validation", "global_step": n, "accuracy": 1.0, "n": 64,
                    "accuracy_by_timestep": {"951": 0.5, "51": 0.98, "1": 1.0}}]


def lines(path: Path, rows: list[dict], tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def picture(path: Path, size: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (size, size), (200, 30, 60)).save(path)


EVALUATION = {"captions": 40, "n": 100, "gained": 30, "lost": 5, "seconds": {"pairs": 12.4, "LPO": 3725.0},
              "before": {"right": 50, "diversity": 0.41, "by_attribute": {"shape": 0.8}},
              "after": {"right": 75, "diversity": 0.4, "by_attribute": {"shape": 0.9}}}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a complete run whose every text tries to break out of the page."""
    run = tmp_path_factory.mktemp("run")
    lines(run / "metrics.jsonl", lpo_rows(30))
    lines(run / "lrm" / "metrics.jsonl", lrm_rows(30))
    hostile = EVALUATION | {"seconds": EVALUATION["seconds"] | {ATTACK: 1.0}}
    hostile["after"] = hostile["after"] | {"by_attribute": {"shape": 0.9, ATTACK: 0.5}}
    (run / "evaluation.json").write_text(json.dumps(hostile))
    config = {"model": ATTACK, "lrm": {ATTACK: [ATTACK], "steps": 7}, "$title": "$body"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps({"date": ATTACK, "command": ATTACK, "torch": "2.13.0"}))
    captions = []
    for i in range(50):
        picture(run / "pictures" / f"{i:03d}_before.png", 8)
        picture(run / "pictures" / f"{i:03d}_after.png", 8)
        caption = f"caption {i} \ud83d" if i else ATTACK  # half a surrogate pair cannot be written as UTF-8
        captions.append({"caption": caption, "before_right": False, "after_right": True})
    (run / "pictures" / "captions.json").write_text(json.dumps(captions))
    path = report.write(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def page(run: Path) -> str:
    return report.write(str(run)).read_text(encoding="utf-8")


def test_wilson() -> None:
    assert report.wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert report.wilson(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-4)
    assert report.wilson(10, 10) == pytest.approx((0.72246, 1.0), abs=1e-4)
    for k, n in ((0, 0), (5, 4), (-1, 4), (math.nan, 4), (1, math.nan)):
        assert all(map(math.isnan, report.wilson(k, n)))


def test_paired() -> None:
    half = 1.96 * math.sqrt(35 - 25**2 / 100) / 100
    assert report.paired(30, 5, 100) == pytest.approx((0.25 - half, 0.25 + half))
    assert report.paired(0, 0, 10) == (0, 0)
    low, high = report.paired(5, 30, 100)
    assert low < high < 0


def test_smooth() -> None:
    assert report.smooth(np.array([2.0])) == [2.0]
    constant = np.full(100, 3.0)
    constant[[0, 50]] = np.nan
    assert np.allclose(report.smooth(constant), 3)  # neither edges nor gaps pull the mean down
    assert np.isnan(report.smooth(np.full(4, np.nan))).all()


def test_resumed_run_replaces_rows() -> None:
    steps = [(1, 0), (2, 0), (3, 0), (4, 0), (3, 1), (4, 1), (5, 1)]
    rows = [{"kind": "train", "global_step": step, "try": number} for step, number in steps]
    kept = report.of_kind(rows, "train")
    assert [(row["global_step"], row["try"]) for row in kept] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    batches = [{"kind": "batch", "global_step": 7}] * 3  # batches without a valid pair take no step
    assert report.of_kind(batches, "batch") == batches


def test_full_run(full: str) -> None:
    assert [full.count(f"<h2>{title}") for title in SECTIONS] == [1] * len(SECTIONS)
    assert "50.0%" in full and "correct before [40.4, 59.6]" in full and "correct after [65.7, 82.5]" in full
    assert "+25.0" in full and "points change [+14.5, +35.5]" in full
    assert "More pictures are correct after alignment than before." in full
    assert "100 pictures of 40 captions, paired by seed: 30 became correct, 5 became wrong" in full
    assert full.count('role="img"') == full.count("<svg") == 8
    assert "1:02:05" in full and "8 prompts/s" in full and "lrm.steps" in full
    assert full.count('<img class="small"') == 96 and "48 of 50 pairs" in full and "36 more" in full
    assert full.count("✗</b>") == full.count("✓</b>") == 48


def test_escaping_and_self_containedness(full: str) -> None:
    assert "<script" not in full.lower() and "<img src=x" not in full
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in full
    assert not re.search(r"https?://", full) and "url(http" not in full and "@import" not in full
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', full)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "<metadata" not in full and not re.search("#00000[1-4]", full)


def test_svg_parts_do_not_collide(full: str) -> None:
    """An id that occurs twice must name the same thing, as the first definition on the page wins."""
    seen: dict[str, str] = {}
    for name, inside in re.findall(r'<(?:clipPath|path)[^>]*? ?id="([^"]+)"(.*?)/>', full, flags=re.S):
        assert seen.setdefault(name, inside) == inside


def test_empty_directory(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "No evaluation is recorded" in text and not any(f"<h2>{title}" in text for title in SECTIONS)


@pytest.mark.parametrize("n", [1, 2])
def test_few_rows(tmp_path: Path, n: int) -> None:
    lines(tmp_path / "metrics.jsonl", lpo_rows(n))
    lines(tmp_path / "lrm" / "metrics.jsonl", lrm_rows(n))
    text = page(tmp_path)
    assert text.count('role="img"') == 8
    assert f"implicit accuracy of the policy, mean of the last {n} steps" in text
    assert f"pairs kept of {12 * n} possible" in text


def test_killed_run(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", lpo_rows(3), tail='{"kind": "train", "global_st')
    (tmp_path / "evaluation.json").write_text('{"n": 10, "before": {"ri')
    (tmp_path / "config.json").write_text("[1, 2]")
    picture(tmp_path / "pictures" / "000_before.png", 300)
    (tmp_path / "pictures" / "000_after.png").write_bytes((tmp_path / "pictures" / "000_before.png")
                                                          .read_bytes()[:60])
    text = page(tmp_path)
    assert "pairs kept of 36 possible" in text and "<h2>Settings" not in text
    assert text.count("<img") == 1 and "1 of 1 pairs" in text and "more</summary>" not in text


def test_reward_model_run_without_policy(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", lrm_rows(5))
    text = page(tmp_path)
    assert "100.0%</b>last validation accuracy of the reward model" in text
    assert "<h2>Latent reward model" in text and "<h2>Alignment" not in text


def test_odd_values(tmp_path: Path) -> None:
    """NaN, null, text and huge numbers, wrong types and missing keys:
    shown where they make sense, never an error."""
    rows = lpo_rows(4) + lrm_rows(4)
    for value in (math.nan, None, "text", math.inf, 10**400, [1], {}):
        rows += [dict.fromkeys(row, value) | {"kind": row["kind"], "global_step": 9}
                 for row in lpo_rows(1) + lrm_rows(1)]
    rows += [{"kind": "train"}, {"kind": "batch"}, {"kind": "validation"}, {"kind": None}]
    lines(tmp_path / "metrics.jsonl", rows, tail="7\n[]\nnull\n")
    (tmp_path / "environment.json").write_text('{"a": {"b": null, "c": NaN}, "d": [1, {"e": 2}]}')
    odd = {"n": 4, "before": {"right": math.nan}, "after": {"right": 9}, "seconds": [1]}
    (tmp_path / "evaluation.json").write_text(json.dumps(odd))
    assert "a.b" in page(tmp_path)
    assert "No evaluation is recorded" in page(tmp_path)


@pytest.mark.parametrize("change, expected, unexpected", [
    ({"gained": 15, "lost": 15, "after": {"right": 50}}, "no change is shown", "pictures are correct after"),
    ({"gained": 5, "lost": 30, "after": {"right": 25}}, "Fewer pictures are correct", "More pictures"),
    ({"gained": 3, "lost": 1, "after": {"right": 52}}, "Too few pictures changed for", "More pictures"),
    ({"gained": 30, "lost": 9}, "points change</div>", "paired by seed"),  # counts that contradict the shares
    ({"gained": None}, "points change</div>", "More pictures"),
    ({"after": None}, "correct before [40.4, 59.6]", "points change"),
])
def test_headline_claims_what_the_data_show(change: dict, expected: str, unexpected: str) -> None:
    text = report.headline(EVALUATION | change, [], [], [])
    assert expected in text and unexpected not in text


def test_spike_does_not_flatten_the_chart() -> None:
    y = np.ones(300) + 0.1 * np.sin(np.arange(300))
    y[100] = 1e6
    text = report.plot("Norm", "How.", "step", "norm", None, ("line", np.arange(300), y))
    assert "Spikes clipped in the drawing: 1." in text
    assert report.plot("Norm", "How.", "step", "norm", None, ("line", np.arange(3), np.full(3, np.nan))) == ""


def test_large_pictures_are_embedded_smaller(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "007_before.png", 1024)
    text = page(tmp_path)
    data = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    assert Image.open(io.BytesIO(data)).size == (384, 384) and 'class="small"' not in text


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lpo_fast.report"]
    root = Path(report.__file__).parents[1]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and Path(done.stdout.strip()) == tmp_path / "report.html" and not done.stderr
    failed = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True, cwd=root)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "no such directory" in failed.stderr
