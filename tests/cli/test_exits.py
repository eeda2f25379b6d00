"""Exit codes and sentences of whatever can go wrong."""

from __future__ import annotations

import errno
import sys

import click
import pytest

from fastkd.cli.exits import DEBUG, guarded
from fastkd.errors import CheckpointError, ConfigError, FastkdError, InputError, MethodError, MethodTypeError, NumericalError, PlaceError


def raising(e: BaseException):
    def run() -> None:
        raise e

    return run


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEBUG, raising=False)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FastkdError("a"), 1),
        (ConfigError("a"), 2),
        (PlaceError("a"), 3),
        (InputError("a"), 4),
        (MethodError("a"), 2),
        (CheckpointError("a"), 5),
        (NumericalError("a"), 6),
        (MemoryError("a"), 7),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 7),
        (type("OutOfMemoryError", (RuntimeError,), {})("a"), 7),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 3),
        (OSError(errno.EFBIG, "File too large", "a"), 3),
        (OSError(errno.EROFS, "Read-only", "a"), 3),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 3),
        (click.Abort(), 130),
        (KeyboardInterrupt(), 130),
        (ValueError("a"), 1),
        (OSError(errno.EIO, "io", "a"), 1),
        (AssertionError(), 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else str(v),
)
def test_code_and_one_line(error: BaseException, code: int, capsys) -> None:
    assert guarded(raising(error)) == code
    said = capsys.readouterr().err
    assert said.startswith("fastkd: ") and said.count("\n") == 1 and "Traceback" not in said


def test_a_mistake_in_a_method_is_not_one_of_fastkd(capsys) -> None:
    guarded(raising(MethodTypeError("Mine.view would hide 'view' of the toolbox; choose another field name")))
    said = capsys.readouterr().err
    assert "choose another field name (a mistake in the method's file; --debug" in said and "fault of fastkd" not in said


def test_what_a_command_returns_is_the_code() -> None:
    assert [guarded(lambda v=v: v) for v in (0, 75, None, "text")] == [0, 75, 0, 0]


def test_usage_errors_are_2(capsys) -> None:
    assert guarded(raising(click.UsageError("no"))) == 2
    assert "no" in capsys.readouterr().err


def test_traceback_only_when_asked_for(capsys, monkeypatch) -> None:
    guarded(raising(ValueError("odd")))
    assert "unexpected ValueError: odd" in (said := capsys.readouterr().err) and "--debug" in said
    monkeypatch.setenv(DEBUG, "1")
    guarded(raising(ValueError("odd")))
    assert "Traceback" in capsys.readouterr().err


def test_notes_follow_the_sentence(capsys) -> None:
    e = NumericalError("it is not finite.")
    e.add_note("continue with: fastkd run --resume")
    guarded(raising(e))
    assert capsys.readouterr().err.splitlines() == ["fastkd: it is not finite.", "continue with: fastkd run --resume"]


def test_a_reader_that_went_away_is_no_error(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert guarded(raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 0
    assert capsys.readouterr().err == ""


def test_debug_option_shows_the_traceback_of_a_mistake(cli) -> None:
    done = cli("methods", "mues", "--debug")
    assert done.exit_code == 2 and "Traceback" in done.stderr and "did you mean 'muse'" in done.stderr
