"""What all commands share: parsing settings, and reporting a user's error as one line with exit code 2."""

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
    """Return settings parsed from a command line.

    For a wrong command line, print one line on stderr and exit with code 2.
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(kind, args=list(map(_current, sys.argv[1:] if argv is None else argv)),
                            prog=f"python -m lpo_fast.{name}", **more)
    except SystemExit as end:
        if end.code:  # tyro prints a box, in Unicode or ASCII: paragraphs between rulers
            inside = (line.strip("│| ") for line in box.getvalue().splitlines() if line[:1] not in "╭╰+")
            text = re.sub(" +", " ", " ".join(inside))
            if unknown := re.search(r"Unrecognized (?:or misplaced )?options?: (--[\w.-]+)", text):
                text = f"{unknown[1]}: {_unknown(unknown[1], name)}"
            print(f"error: {re.sub('[.]? (─|-){4,} ', '; ', text)}", file=sys.stderr)
        raise


def _current(word: str) -> str:
    """Return a word of a command line, with the earlier name of a flag (``config.RENAMED``) replaced."""
    name, sign, value = word.partition("=")
    flags = {flag(old): flag(new) for new, old in config.RENAMED.items()}
    return flags.get(name.replace("_", "-"), name) + sign + value


def _unknown(option: str, name: str) -> str:
    """Return the message for an option that a command does not have."""
    key = option.removeprefix("--").replace("-", "_")
    known = {stage.__name__.lower(): [field.name for field in fields(stage)]
             for stage in (config.LPO, config.LRM)}
    stages = [stage for stage, names in known.items() if key.removeprefix("no_") in names]
    near = difflib.get_close_matches(key, sum(known.values(), []), 1)
    return ("is not an option here" + (f", but of {' and '.join(stages)}" if stages else "")
            + (f"; did you mean {flag(near[0])}?" if near and not stages else
               f"; see python -m lpo_fast.{name} --help"))


def command(kind: type[Settings], run: Callable[[Settings], None], argv: list[str] | None, name: str,
            stopped: str = "stopped") -> int:
    """Parse ``kind``, a frozen dataclass, run the command, and return its exit code."""
    settings = parse(kind, argv, name)
    return code(lambda: run(settings), stopped)


def code(run: Callable[[], None], stopped: str = "stopped") -> int:
    """Run a command and return its exit code.

    0: success; 2: a user's error; 1: another rank failed; 130: interrupted. stopped: what to print when
    interrupted.
    """
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
    """Raise InputError for settings that are empty."""
    for key in keys:
        if not getattr(settings, key):
            raise InputError("(none)", "is required", "see --help", flag(key))


def within(settings: object, low: float, high: float, *keys: str) -> None:
    """Raise InputError for numbers outside [low, high]; NaN is outside."""
    for key in keys:
        if not low <= getattr(settings, key) <= high:
            span = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
            raise InputError(str(getattr(settings, key)), "is out of range", f"use {span}", flag(key))


def flag(key: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + key.replace("_", "-")


def lora_flags(given: config.LPO, defaults: config.LPO) -> None:
    """Refuse LoRA flags on a command line with --full, which trains no LoRA. defaults: the settings without
    that command line.
    """
    for key in ("rank", "alpha", "targets"):
        if given.full and getattr(given, key) != getattr(defaults, key):
            raise InputError(str(getattr(given, key)), "full fine-tuning has no LoRA",
                             f"drop {flag(key)} or --full", flag(key))
