"""A hook of mkdocs: the site also holds the Markdown files outside docs/ that its pages link to,
README.md as its home page.

Links are written as they work in the repository (docs/using.md links to ../SECURITY.md). In the site docs/ is
the top folder, so a link out of it loses its "../", and a link into it its "docs/".
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff",
           "constraints.txt", "kernels/README.md", "bench/results/**/*.md", "bench/results/**/*.png")


def on_files(files, config):
    """Add the files outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, "index.md" if name == "README.md" else name,
                                        abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links from the repository's layout to the site's."""
    inside = (ROOT / "docs" / page.file.src_uri).exists()
    up = r"(\]\()\.\./" if inside else r"(\]\((?:\.\./)*)docs/"
    return re.sub(r"(\]\()README\.md", r"\1index.md", re.sub(up, r"\1", markdown))
