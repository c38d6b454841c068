"""Check the words: no private dialect in code and docs, and a docstring on every public module,
class and function."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PENDING = ("bench/results/", "tests/")
WORDS = {  # pattern: what to write instead
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bhand(s|ed|ing)? (on|over)\b": "pass, or name what is exported",
    r"\bgo(es|ne|ing)? on\b|\bwent on\b": "continue",
    r"\bright pictures?\b": "correct pictures",
    r"\b(is|are|was|were|be) told\b": "is logged, or reports",
    r"\bit is said\b|\bis said (once|here|so)\b": "is logged",
    r"\bit says (why|so|what)\b|\bsays so\b": "states, or reports",
    r"\bso many\b": "the number's name",
    r"\bbe (it|they|its?|their) [^.,;]* or not\b": "whether … or not",
    r"\bas ever\b": "as before",
    r"\bin (their|its) (place|turn)\b": "instead, or one after another",
    r"\banew\b": "again",
    r"\bdear(er|est)?\b": "expensive",
    r"\bha(s|ve) not(?= *[.,;:)\"]|$)": "does not have",
    r"\bwhoever\b|\bwho is who\b": "name the process, or the caller",
    r"\b(is|lies) there already\b|\bexists +already\b": "already exists",
    r"\bcut over the (processes|ranks)\b": "sharded across ranks",
    r"\bonce for all\b(?! processes)": "once for all processes",
    r"\b(an? (hour|second)|(pairs|samples|elements|bytes|steps) a (step|pair|second|sample|rank|thread))\b":
        "per …",
    r"\b(a|one) line a (scorer|run|picture|pair)\b": "one line per …",
    r"\bsomething else than\b": "something other than",
    r"\bis no (model|number|picture|object|mapping|list|directory|option|file)\b": "is not a …",
    r"\b(colour|centre|honour|neighbour|licence|normalis|optimis|initialis)[a-z]*\b": "American spelling",
    r"\btoken of\b|\bfor want of\b|\bbehind it\b|\bbeside (it|them|its)\b": "plain words: after, next to",
}
ALLOWED = re.compile(r'"colour"')  # a key of evaluation.json


def files() -> Iterator[Path]:
    """Yield the files whose words are checked, in order."""
    for part in ("lpo_fast", "kernels", "bench", "tests", "README.md", "docs"):
        place = ROOT / part
        for file in [place] if place.is_file() else sorted(place.rglob("*")):
            name = file.relative_to(ROOT).as_posix()
            if (file.suffix in (".py", ".md") and file.name != "test_words.py"
                and not name.startswith(PENDING) and not name.startswith("lpo_fast/kernels/")):
                yield file


@pytest.mark.parametrize("pattern", WORDS)
def test_no_private_dialect(pattern: str) -> None:
    found = [f"{file.relative_to(ROOT)}:{number}: {hit[0]!r}; write: {WORDS[pattern]}" for file in files()
             for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
             if (hit := re.search(pattern, line, re.IGNORECASE)) and not ALLOWED.search(line)]
    assert not found, "\n".join(found)


def undocumented(tree: ast.AST, name: str) -> Iterator[str]:
    """Yield the public classes and functions below ``tree`` that have no docstring, and ``tree`` itself."""
    if not ast.get_docstring(tree):
        yield name
    for node in tree.body if isinstance(tree, ast.Module | ast.ClassDef) else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield from undocumented(node, f"{name}:{node.lineno} {node.name}")


def test_docstrings() -> None:
    sources = [file for file in files()
               if file.suffix == ".py" and file.parts[len(ROOT.parts)] in ("lpo_fast", "kernels")]
    missing = [text for file in sources for text in undocumented(ast.parse(file.read_text(encoding="utf-8")),
                                                                 str(file.relative_to(ROOT)))]
    assert not missing, "\n".join(missing)
