"""python docs/generate_settings.py [--check]: write docs/settings.md, every setting of every command,
from the source.

The tables come from the settings dataclasses: flags and defaults from their fields, descriptions from the
strings below the fields, groups from the classes that define them, and the columns of the recipes from
config.sd15(), sd21() and sdxl().
"""

import ast
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path

from lpo_fast import config
from lpo_fast.evaluate import Evaluate
from lpo_fast.export import Export
from lpo_fast.score import Score
from lpo_fast.score_table import ScoreTable

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

<!-- Written by `python docs/generate_settings.py`. Do not edit: change the source and run it again. -->

Every setting of every command. In Python they are fields of frozen dataclasses with the same names
(`--train-batch-size` is `train_batch_size`). A switch is turned on by its name and off by `--no-` before it:
`--resume`, `--no-shuffle`. Defaults: – is empty.
`lrm` and `lpo` start from the recipe for the kind of model that `--model` names: where SD2.1 or SDXL differ
from SD1.5, the default is followed by theirs. `--help` after a command prints the same.
"""
RECIPES = {"SD2.1": config.sd21(), "SDXL": config.sdxl()}
COMMANDS = (
    ("python -m lpo_fast.train lrm", config.LRM, config.sd15().lrm,
     {name: r.lrm for name, r in RECIPES.items()}),
    ("python -m lpo_fast.train lpo", config.LPO, config.sd15().lpo,
     {name: r.lpo for name, r in RECIPES.items()}),
    ("python -m lpo_fast.train demo", config.Demo, config.Demo(), {}),
    ("python -m lpo_fast.evaluate", Evaluate, Evaluate(), {}),
    ("python -m lpo_fast.score", Score, Score(), {}),
    ("python -m lpo_fast.export", Export, Export(), {}),
    ("python -m lpo_fast.score_table", ScoreTable, ScoreTable(), {}),
)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, kind, default, recipes in COMMANDS:
        parts.append(f"\n## {command.removeprefix('python -m lpo_fast.')}\n\n`{command}`. {summary(kind)}\n")
        groups: dict[type, list[str]] = {}
        for field in fields(kind):
            owner = next(base for base in reversed(kind.__mro__)
                         if field.name in base.__dict__.get("__annotations__", {}))
            groups.setdefault(owner, []).extend(rows(kind, field, default, recipes))
        for owner, lines in groups.items():
            if len(groups) > 1:
                parts.append(
                    f"\n**{'Of this command alone' if owner is kind else summary(owner).rstrip('.')}**\n")
            parts.append("\n| setting | default | what it does |\n|---|---|---|\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def summary(kind: type) -> str:
    """The first paragraph of a class's own docstring, as one line; without one, its name."""
    return " ".join((kind.__dict__.get("__doc__") or kind.__name__).split("\n\n")[0].split())


def rows(kind: type, field: Field, default: object, recipes: dict[str, object],
         prefix: str = "") -> Iterator[str]:
    """Table rows of a field; a field that is a dataclass has a row for each of its own."""
    value = getattr(default, field.name)
    if is_dataclass(value):
        for inner in fields(value):
            yield from rows(type(value), inner, value, {}, f"{prefix}{field.name}.")
        return
    name = (prefix + field.name).replace("_", "-")
    hints = typing.get_type_hints(kind, include_extras=True)[field.name]
    positional = "Positional" in repr(hints)
    flag = f"`{name.upper()} …`" if positional else f"`--{name}`"
    others = {recipe: getattr(settings, field.name) for recipe, settings in recipes.items()}
    shown = shorten(value) + "".join(f"<br>{recipe}: {shorten(v)}" for recipe, v in others.items()
                                     if v != value)
    text = docstrings(kind).get(field.name, "")
    if choices := literal(hints):
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    yield f"| {flag} | {shown} | {' '.join(text.split()).replace('|', '&#124;').replace('<', '&lt;')} |"


def literal(hint: object) -> tuple:
    """The choices of a Literal, also inside Annotated."""
    if hasattr(hint, "__metadata__"):
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def shorten(value: object) -> str:
    """A default as it would be typed."""
    if value == "" or value == () or value is None:
        return "–"
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value}`"


def docstrings(kind: type) -> dict[str, str]:
    """The strings below the fields of a class and of the classes that it inherits from."""
    found = {}
    for owner in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        found |= {first.target.id: second.value.value for first, second in zip(body, body[1:], strict=False)
                  if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr)
                  and isinstance(second.value, ast.Constant)}
    return found


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text("utf-8") == page() else f"{PAGE} is not current: python {sys.argv[0]}")
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
