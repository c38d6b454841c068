"""What the commands share: settings from a command line, and an error of the user's as one line and exit code 2."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from lpo_fast.errors import InputError

Settings = TypeVar("Settings")


def command(kind: type[Settings], run: Callable[[Settings], None], argv: list[str] | None, name: str) -> int:
    """Parse ``kind``, a frozen dataclass, and run; the exit code: 0, 2 for a user's error, 130 when interrupted."""
    settings = tyro.cli(kind, args=sys.argv[1:] if argv is None else argv, prog=f"python -m lpo_fast.{name}",
                        config=(tyro.conf.FlagCreatePairsOff,))
    try:
        run(settings)
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
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
