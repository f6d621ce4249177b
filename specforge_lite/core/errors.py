"""Errors a user can cause and mend. Scripts print them as one line and exit with code 2; anything else is a bug of
ours and keeps its traceback (`specforge_lite.core.log.run_script`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpecforgeError(Exception):
    """Base of every error that is about the user's input, files or servers rather than about our code."""


class ConfigError(SpecforgeError):
    """A flag, YAML key or config.json value is unknown, of the wrong type, or impossible in combination."""


class DataError(SpecforgeError):
    """A data file, row, cache or vocabulary map cannot be used. The message starts with `file:line` if it can."""


class CaptureError(SpecforgeError):
    """A target engine returned hidden states that are not those of the sample asked for, or none at all."""


class EngineError(SpecforgeError):
    """A serving process could not be started, reached, or kept alive within its budget."""


class CheckpointError(SpecforgeError):
    """A checkpoint or draft directory is incomplete, damaged, or belongs to something else."""


class TrainingError(SpecforgeError):
    """A run cannot go on: its numbers went bad more often than its budget allows."""


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, without control characters."""
    lines = ["".join(c for c in line if c.isprintable()).strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or "; known: a, b, c" where nothing is near.

    >>> suggest("lama3", ["chatml", "llama3"])
    "; did you mean 'llama3'?"
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(choices)}" if choices else ""
