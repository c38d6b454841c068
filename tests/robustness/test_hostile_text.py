"""Hostile text: no prompt gets markup into a page or a cell into a table,
and no credential gets into a run directory."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lpo_fast import evaluate, report
from lpo_fast.config import LPO, LRM
from lpo_fast.data import tables
from lpo_fast.run import environment, logs

PROMPTS = ['</title><script>alert(1)</script>', '" onload="alert(1)',
           "' onerror='alert(1)' x='", "javascript:alert(1)", "<img src=x onerror=alert(1)>",
           "</figcaption></svg><a href='javascript:alert(1)'>", "&lt;b&gt;", "$body ${title}",
           "a\nb, \"c\"", "]]><!-- ", "\ud83d"]


OWNED = "document.body.append('has been ' + 'owned')"


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.seen, self.text, self.values = [], "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value for _, value in attrs if value]

    def handle_data(self, text: str) -> None:
        self.text += text

    def handle_comment(self, text: str) -> None:
        self.seen.append(("comment", ()))


def run_page(folder: Path, prompts: list[str]) -> str:
    """report.html of a run whose every text is a prompt."""
    (pictures := folder / "pictures").mkdir(parents=True)
    for i, _ in enumerate(prompts):
        for when in ("before", "after"):
            Image.new("RGB", (8, 8)).save(pictures / f"{i:03d}_{when}.png")
    Image.new("RGB", (8, 8)).save(pictures / "validation_0.png")
    (pictures / "captions.json").write_text(json.dumps([{"caption": prompt} for prompt in prompts]))
    (pictures / "validation.json").write_text(json.dumps(prompts))
    named = {f"{i}{prompt}": prompt for i, prompt in enumerate(prompts)}
    (folder / "config.json").write_text(json.dumps({"model": prompts[0], "prompts": named}))
    (folder / "environment.json").write_text(json.dumps({"date": prompts[1], "command": " ".join(prompts)}))
    return report.write(folder).read_text(encoding="utf-8")


def evaluation(folder: Path, prompts: list[str]) -> str:
    """page.html of an evaluation of these prompts, whose model is called like one."""
    rows = []
    for i, prompt in enumerate(prompts):
        row = {"item": i, "prompt": prompt}
        for side in ("base", "tuned"):
            (folder / side).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / side / f"{i}.png")
            row |= {side: f"{side}/{i}.png", f"{side} {prompts[2]}": 0.5}
        rows.append(row)
    settings = evaluate.Evaluate(model=prompts[0], lora=prompts[1], out=str(folder))
    evaluate.write(settings, rows, [prompts[2]], len(prompts))
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [run_page, evaluation])
def test_no_element_or_attribute_of_a_page_comes_from_a_prompt(make, tmp_path: Path) -> None:
    prompts = PROMPTS if make is run_page else PROMPTS[:-1]  # read_prompts refuses lone surrogates
    hostile = Elements(make(tmp_path / "hostile", prompts))
    harmless = Elements(make(tmp_path / "harmless", [f"word {i}" for i in range(len(prompts))]))
    assert hostile.seen == harmless.seen
    assert {tag for tag, _ in hostile.seen} & {"script", "a", "iframe", "object", "form", "link"} == set()
    assert not any(name.startswith("on") for _, names in hostile.seen for name in names)
    assert not any("javascript:" in value or "alert" in value for value in hostile.values)
    assert all(prompt in hostile.text for prompt in prompts[:8])
    policy = next(value for value in hostile.values if "default-src" in value)
    assert policy.startswith("default-src 'none'")  # were there a script, it would not run


def browser(page: Path) -> Elements:
    """What Chromium has made of a page when its scripts, if any, have run."""
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([*line, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True,
                          timeout=120)
    return Elements(done.stdout.replace("<tbody>", ""))  # which browsers add


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
@pytest.mark.parametrize("make, name", [(run_page, "report.html"), (evaluation, "page.html")])
def test_a_browser_sees_the_same_elements_and_runs_nothing(make, name: str, tmp_path: Path) -> None:
    attacks = [f"{end}{how}" for how in (f"<script>{OWNED}</script>", f'<img src=x onerror="{OWNED}">',
                                         f"<svg onload='{OWNED}'>")
               for end in ("", '">', "</title>", "</style>", "</td>")]
    written, seen = Elements(make(tmp_path / "page", attacks)), browser(tmp_path / "page" / name)
    assert seen.seen == written.seen and "owned" in seen.text and "has been owned" not in seen.text
    (tmp_path / "raw.html").write_text(f"<!doctype html><html><head></head><body>{attacks[5]}</body></html>")
    assert "has been owned" in browser(tmp_path / "raw.html").text  # the attacks are real ones


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    prompts = [*PROMPTS[:-1], "=1+1", "a;b", "\r\n", '""']
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    evaluation(tmp_path / "out", prompts)
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == prompts
    rows = [{"prompt": prompt, "image": "x.png"} for prompt in prompts]
    for suffix in (".csv", ".jsonl", ".parquet"):
        tables.write(rows, torch.zeros(len(rows)), tmp_path / f"t{suffix}", "score")
        assert tables.read(str(tmp_path / f"t{suffix}"), "prompt", "image", "new")[1] == prompts


@pytest.mark.parametrize("given, kept", [
    ("train lpo --hub-token hf_abcdefghijklmnopqrst --out x", "train lpo --hub-token *** --out x"),
    ("--config.api_key=s3cret --seed 1", "--config.api_key=*** --seed 1"),
    ("--model https://user:pass@host/x", "--model https://***@host/x"),
    ("--lrm-tokenizer DIR --out hf_short", "--lrm-tokenizer DIR --out hf_short"),
    ("x=very-secret-value", "x=***"), ("--out a@b/c", "--out a@b/c")])
def test_credentials_are_not_recorded(given: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-value")
    assert environment.redacted(given) == kept


@pytest.mark.parametrize("settings", [LPO(model="m"), LRM(model="m")])
def test_trackers_and_run_directories_get_no_environment(settings: LPO | LRM, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {name: f"secret-of-{name}"
               for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lpo_fast.train", *secrets.values()])
    sent = []

    def send(*words, **named) -> None:
        sent.append(repr((words, named)))
    monkeypatch.setattr(logs, "Accelerator", lambda **_: SimpleNamespace(
        init_trackers=send, trackers=[1], log=send, end_training=lambda: None))
    run = logs.RunLog(replace(settings, out=str(tmp_path / "run"), log_with="wandb",
                              model="https://me:secret-of-HF_TOKEN@host/m"))
    run.log("train", 1, loss=1.0, note="text")
    run.close()
    assert len(sent) == 2 and "note" not in sent[1]
    written = "".join(file.read_text() for file in (tmp_path / "run").iterdir() if file.name != "config.json")
    for text in (*sent, written):
        assert "secret-of" not in text and not any(name in text for name in secrets)
