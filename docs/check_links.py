"""python docs/check_links.py: every relative link and anchor of the project's Markdown files leads somewhere.

Prints what does not, a line each, and exits with 1. tests/test_docs.py and the pre-commit hook run it.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "kernels/README.md", "docs/*.md",
         "bench/results/**/*.md")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def pages() -> list[Path]:
    """The Markdown files that are checked."""
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and mkdocs make them."""
    names: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", page.read_text("utf-8")), re.M):
        name = re.sub(r"\s", "-",
                      re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "]", heading)).strip().lower())
        found.add(f"{name}-{names[name]}" if name in names else name)
        names[name] = names.get(name, 0) + 1
    return found


def broken() -> Iterator[str]:
    """Links that lead nowhere: page, link and reason."""
    for page in pages():
        text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text("utf-8")))
        for link in LINK.findall(text):
            if re.match(r"[a-z][a-z0-9+.-]*:", link):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            where = f"{page.relative_to(ROOT)}: {link}"
            if not target.exists():
                yield f"{where}: no such file"
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                yield f"{where}: no such heading"


if __name__ == "__main__":
    problems = list(broken())
    print(*problems, sep="\n", end="\n" if problems else "")
    sys.exit(bool(problems))
