"""What went wrong, as one line on stderr and an exit code. No traceback for a user's mistake."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from fastkd.errors import OUT_OF_MEMORY, FastkdError, MethodError, no_memory

UNEXPECTED, USAGE, PLACE, INTERRUPTED = 1, 2, 3, 130
DEBUG = "FASTKD_DEBUG"
wanted = {"debug": False}
"""Whether this command line asked for tracebacks; the environment variable asks for all of them."""
PLACE_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EDQUOT}


def guarded(run: Callable[[], Any]) -> int:
    """The exit code of a command line: its own number, or that of what it raised, which is said on stderr."""
    wanted["debug"] = bool(os.environ.get(DEBUG))
    return attempted(run)


def attempted(run: Callable[[], Any]) -> int:
    """`guarded`, for a part of a command."""
    try:
        code = run()
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return e.exit_code
    except click.ClickException as e:
        return _say(_of_click(e), e, e.exit_code)
    except (click.Abort, KeyboardInterrupt) as e:
        return _say("interrupted.", e, INTERRUPTED)
    except MethodError as e:
        return _say(f"{str(e).rstrip('.')} (a mistake in the method's file; --debug shows where)", e, e.exit_code)
    except FastkdError as e:
        return _say(str(e), e, e.exit_code)
    except OSError as e:
        if e.errno == errno.EPIPE:  # the reader of stdout has gone, as with `| head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (closed at exit; keeps the last flush quiet)
            return 0
        if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _say(f"'{e.filename}' cannot be a file or folder here: {os.strerror(e.errno).lower()}.", e, PLACE)
        if e.errno in PLACE_ERRNOS:
            where = f"'{e.filename}'" if e.filename else "where the output goes"
            return _say(f"{os.strerror(e.errno or 0).lower()}: {where}; choose a place with room and write permission.", e, PLACE)
        return _unexpected(e)
    except Exception as e:
        if no_memory(e):
            return _say(f"out of memory ({_first(e)[:160] or type(e).__name__}); lower method.batch or method.kd_batch.", e, OUT_OF_MEMORY)
        return _unexpected(e)
    return code if isinstance(code, int) else 0


def _of_click(e: click.ClickException) -> str:
    """What click says of a command line, as one sentence, and where its options are listed."""
    said = " ".join(e.format_message().split()).rstrip(".").replace(". (", " (")
    context = e.ctx if isinstance(e, click.UsageError) else None
    return f"{said[:1].lower()}{said[1:]}{f'; see `{context.command_path} --help`' if context else ''}."


def _unexpected(e: BaseException) -> int:
    first = _first(e)
    hint = "" if wanted["debug"] else " (this is a fault of fastkd; --debug shows the traceback to report)"
    return _say(f"unexpected {type(e).__name__}{': ' + first if first else ''}{hint}", e, UNEXPECTED)


def _first(e: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(e).splitlines() or [""])[0]


def _say(sentence: str, e: BaseException, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be what is full: the code still says it
        if wanted["debug"]:
            traceback.print_exception(e)
            click.echo(f"fastkd: {sentence}", err=True)
            return code
        click.echo(f"fastkd: {sentence}", err=True)
        for note in getattr(e, "__notes__", []):
            click.echo(note, err=True)
    return code
