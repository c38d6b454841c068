"""What the commands share: settings from a command line, and an error of the user's as one line and exit code 2."""

import difflib
import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import fields
from typing import Any, TypeVar

import tyro

from lpo_fast import config
from lpo_fast.errors import InputError, PeerError

Settings = TypeVar("Settings")


def parse(kind: Any, argv: list[str] | None, name: str, **more: Any) -> Any:
    """Settings from a command line. What is wrong with it is one line on stderr, and ends the process with exit code 2."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(kind, args=sys.argv[1:] if argv is None else argv, prog=f"python -m lpo_fast.{name}", **more)
    except SystemExit as end:
        if end.code:  # tyro's box, in Unicode or ASCII: paragraphs between rulers
            inside = (line.strip("│| ") for line in box.getvalue().splitlines() if line[:1] not in "╭╰+")
            text = re.sub(" +", " ", " ".join(inside))
            if unknown := re.search(r"Unrecognized (?:or misplaced )?options?: (--[\w.-]+)", text):
                text = f"{unknown[1]}: {_unknown(unknown[1], name)}"
            print(f"error: {re.sub('[.]? (─|-){4,} ', '; ', text)}", file=sys.stderr)
        raise


def _unknown(option: str, name: str) -> str:
    """What to say of an option that a command does not have."""
    key = option.removeprefix("--").replace("-", "_")
    known = {stage.__name__.lower(): [field.name for field in fields(stage)] for stage in (config.LPO, config.LRM)}
    stages = [stage for stage, names in known.items() if key.removeprefix("no_") in names]
    near = difflib.get_close_matches(key, sum(known.values(), []), 1)
    return ("is no option here" + (f", but one of {' and '.join(stages)}" if stages else "")
            + (f"; did you mean {flag(near[0])}?" if near and not stages else f"; see python -m lpo_fast.{name} --help"))


def command(kind: type[Settings], run: Callable[[Settings], None], argv: list[str] | None, name: str,
            stopped: str = "stopped") -> int:
    """Parse ``kind``, a frozen dataclass, and run; the exit code."""
    settings = parse(kind, argv, name)
    return code(lambda: run(settings), stopped)


def code(run: Callable[[], None], stopped: str = "stopped") -> int:
    """A command's exit code: 0, 2 for a user's error, 1 if another process failed, 130 when interrupted: then it says
    ``stopped``."""
    try:
        run()
    except (InputError, PeerError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, InputError) else 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    return 0


def required(settings: object, *keys: str) -> None:
    """Refuse settings that were left empty."""
    for key in keys:
        if not getattr(settings, key):
            raise InputError("(none)", "is required", "see --help", flag(key))


def within(settings: object, low: float, high: float, *keys: str) -> None:
    """Refuse numbers outside [low, high]; NaN is outside."""
    for key in keys:
        if not low <= getattr(settings, key) <= high:
            span = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
            raise InputError(str(getattr(settings, key)), "is out of range", f"use {span}", flag(key))


def flag(key: str) -> str:
    """The option of a setting."""
    return "--" + key.replace("_", "-")
