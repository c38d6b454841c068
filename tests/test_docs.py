"""The documentation says what is there: links, tests, paths, modules, flags, make targets,
and the generated settings."""

import ast
import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest

from lpo_fast import config
from lpo_fast.evaluate import Evaluate
from lpo_fast.export import Export
from lpo_fast.score import Score
from lpo_fast.score_table import ScoreTable

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "kernels/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BY_HAND = [page for page in PAGES if page.name != "settings.md"]
LIMIT = 9216  # bytes of README.md: a screen and a half
# Flags of other programs, and official ones that our command takes over.
FOREIGN = set("""--benchmark-only --config --config-file --config-name --config-path --constraint --editable
    --help --kills --master-addr --master-port --nnodes --no --node-rank --nproc-per-node --num-processes
    --ranks --results --seconds --strict --triton --use-deepspeed""".split())
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="no checkout")


def program(name: str) -> ModuleType:
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(page: Path) -> str:
    """What a page says."""
    return page.read_text("utf-8")


def test_links_lead_somewhere() -> None:
    """Relative links and anchors of every Markdown file."""
    assert list(program("check_links").broken()) == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a missing heading; neither code nor addresses are links."""
    links = program("check_links")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    (tmp_path / "SECURITY.md").write_text("# One two: `three`\n")
    (tmp_path / "README.md").write_text("[a](SECURITY.md#one-two-three) [b](no.md) [c](SECURITY.md#no) "
                                        "`[d](no.md)`\n"
                                        "```\n[e](no.md)\n```\n[f](https://example.org/no.md)\n")
    assert ([line.split(": ", 1)[1] for line in links.broken()]
            == ["no.md: no such file", "SECURITY.md#no: no such heading"])


def test_settings_page_is_current() -> None:
    """`python docs/generate_settings.py` writes it."""
    assert text(ROOT / "docs" / "settings.md") == program("generate_settings").page()


def test_readme_is_short() -> None:
    """One screen and a half."""
    assert len((ROOT / "README.md").read_bytes()) <= LIMIT


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    """Outside of tables and code."""
    code = re.sub(r"^```.*?^```", "", text(page), flags=re.M | re.S)
    assert [line for line in code.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_tests_of_the_fault_table_exist() -> None:
    """By the name of the function, wherever it lies below tests/."""
    defined = {node.name for file in (ROOT / "tests").rglob("test_*.py")
               for node in ast.walk(ast.parse(text(file))) if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)`", text(ROOT / "docs" / "faults.md")))
    assert len(named) > 30
    assert sorted(named - defined) == []


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    """Files and folders of the repository, in backticks or in commands; <op> and {n} stand for any name."""
    named = re.findall(r"(?<![\w./-])((?:lpo_fast|kernels|bench|tests|docs|\.ci|\.github)/[\w./<>*-]*)",
                       text(page))
    missing = [name for name in named if not list(ROOT.glob(re.sub(r"<\w+>", "*", name.rstrip("./")) or "."))]
    assert [name for name in missing if name != "lpo_fast/<command>.py"] == []


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_modules_exist(page: Path) -> None:
    """What is run with -m or named with dots."""
    named = (re.findall(r"-m (lpo_fast[\w.]*)", text(page))
             + re.findall(r"(?:from|import) (lpo_fast[\w.]*)", text(page)))
    missing = [name for name in named if not (ROOT / name.rstrip(".").replace(".", "/")).with_suffix(".py")
               .is_file() and not (ROOT / name.replace(".", "/")).is_dir()]
    assert missing == []


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    """Each word after "make" in code."""
    targets = set(re.findall(r"^([a-z]+):", text(ROOT / "Makefile"), re.M))
    code = "\n".join(re.findall(r"^```\n(.*?)^```", text(page), re.M | re.S)
                     + re.findall(r"`([^`\n]+)`", text(page)))
    assert set(re.findall(r"^make ([a-z]+)", code, re.M)) <= targets


def flags() -> set[str]:
    """Every flag of our commands."""
    found = set()
    for kind in (config.LPO, config.LRM, config.Demo, Evaluate, Score, Export, ScoreTable):
        for field in fields(kind):
            names = [field.name]
            if is_dataclass(inner := getattr(kind(), field.name)):
                names = [f"{field.name}.{column.name}" for column in fields(inner)]
            found |= {f"--{no}{name.replace('_', '-')}" for name in names for no in ("", "no-")}
    for source in ("doctor", "report", "shapes/evaluate", "shapes/pretrain"):
        found |= set(re.findall(r"add_argument\(\"(--[\w-]+)", text(ROOT / "lpo_fast" / f"{source}.py")))
    return found


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_flags_exist(page: Path) -> None:
    """Flags of our commands, but for those of other programs; --columns.* stands for all columns."""
    named = {name.rstrip(".-").replace("_", "-")
             for name in re.findall(r"(?<![\w-])(--[a-z][\w.-]*)", text(page))}
    named = {name for name in named if not name.startswith("--config.") and name != "--columns"}
    assert sorted(named - flags() - FOREIGN) == []


def test_the_readmes_picture_is_made_by_its_program(tmp_path: Path) -> None:
    """docs/picture.py on a run directory in miniature."""
    import json

    from PIL import Image
    folder = tmp_path / "pictures"
    folder.mkdir()
    about = {"caption": "a red circle on a blue background", "before_right": False, "after_right": True}
    (folder / "captions.json").write_text(json.dumps([about] * 4))
    for i in range(4):
        for stage in ("before", "after"):
            Image.new("RGB", (32, 32), "red").save(folder / f"{i:03d}_{stage}.png")
    page = program("picture").compose(tmp_path)
    assert page.width > 2 * 96 and page.height > 2 * 96 and len(page.getcolors(10 ** 6)) > 2
