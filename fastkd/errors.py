"""What fastkd tells a user who made a mistake: one sentence, and the exit code that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastkdError(Exception):
    """A problem that has one clear sentence; the command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1


class ConfigError(FastkdError):
    """Usage or configuration: an unknown key, name or value."""

    exit_code = 2


class PlaceError(FastkdError):
    """The environment: an output folder that cannot be written, a device that is not there."""

    exit_code = 3


class InputError(FastkdError):
    """A model or data file that cannot be used."""

    exit_code = 4


class CheckpointError(FastkdError):
    """A checkpoint that is damaged, with no older good one."""

    exit_code = 5


class NumericalError(FastkdError):
    """The run stopped being finite and did not recover."""

    exit_code = 6


class NoMemoryError(FastkdError):
    """Memory ran out, and backing off did not help."""

    exit_code = 7


class MethodError(FastkdError):
    """A mistake in the file of a method: it declares or does what the engine cannot run."""

    exit_code = 2


class MethodTypeError(MethodError, TypeError):
    """Something of a kind that cannot stand there."""


class MethodAttributeError(MethodError, AttributeError):
    """An attribute that cannot be set."""


class StartAgain(FastkdError):
    """A rank cannot go on alone: all must start again from the last checkpoint. For a launcher it is a crash."""

    exit_code = 1


OUT_OF_MEMORY = NoMemoryError.exit_code
STOPPED = 75
"""Exit code of what stopped early with a checkpoint: start it again to continue (EX_TEMPFAIL of sysexits.h)."""


def no_memory(e: BaseException) -> bool:
    """Whether memory ran out; torch says it in a RuntimeError on the CPU and in a class of its own on a GPU."""
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return True
    return any(said in str(e) for said in ("can't allocate memory", "not enough memory", "CUDA error: out of memory"))


def exit_code(e: BaseException) -> int:
    """The exit code of a run that an exception ended: its own, 7 where memory ran out, 1 for what nobody expected."""
    return e.exit_code if isinstance(e, FastkdError) else OUT_OF_MEMORY if no_memory(e) else FastkdError.exit_code


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None where nothing resembles it."""
    found = difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """The sentence for a name that is not among `choices`: what was found, the nearest valid one, what is expected."""
    known = sorted(choices)
    close = nearest(name, known)
    hint = f"; did you mean '{close}'?" if close else "."
    shown = known if len(known) <= 12 else [*known[:12], f"… ({len(known)} in all)"]
    return f"unknown {kind} '{name}'{hint} Known: {', '.join(shown)}."
