"""What `fastkd teach` and `fastkd condense` share: the options of a task, its configuration (also from the folder), the run on screen."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastkd.cli import options
from fastkd.cli.common import checked, emit, say, stored
from fastkd.errors import STOPPED, ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

C = TypeVar("C", bound="BaseModel")

TASK_KEYS = ("input_size", "mean", "std", *options.WALK)
"""Keys of `config.TaskConfig` that `task_options` gives a flag."""


def task_options(task: str, named: str, *, size: str, norm: str, example: str) -> options.Option:
    """The options that every task has.

    Args:
      named: how the default folder is called. size, norm: what is said of --input-size and of --mean. example: of a --set.
    """
    return options.taking(
        [
            options.input_size_option(size),
            *options.normalisation_options(f"{norm} Default: the field's constants of the data."),
            *options.WALK.values(),
            options.set_option(f"Any key, such as {example}."),
            *options.run_folder_options(f"{task}-{named}"),
        ]
    )


def configuration(
    task: str,
    kind: type[C],
    given: dict[str, Any],
    sets: tuple[str, ...],
    out: Path | None,
    resume: str,
    refuse: Callable[[Path, dict[str, Any], dict[str, Any]], None] | None = None,
) -> C:
    """The configuration of a new run, or that of the folder that is continued with what was given written over them.

    Args:
      given: by options. refuse: called with the folder, its stored values and what was given.
    Raises:
      ConfigError: --resume without --out, or values that do not fit.
    """
    from fastkd.config import merge, parse_sets

    if resume != "no" and out is None:
        raise ConfigError("--resume does not say which run; expected --out DIR with the folder of the run to continue.")
    given, values, where = merge(given, parse_sets(sets)), {}, "options"
    if out is not None and (resume == "must" or (resume == "auto" and (out / "config.json").is_file())):
        values = stored(out, task)
        where = f"'{out / 'config.json'}' and options"
        if refuse is not None:
            refuse(out, values, given)
    return checked(kind, merge(values, given), where)


def walk(task: Callable[..., Any], config: Any, out: Path, resume: str, as_json: bool, again: list[str], following: list[str]) -> int:
    """Run a task, show it, say how it ended and how to go on; its exit code.

    Args:
      again: the words of the command that continues it. following: of the one that uses what it made.
    """
    from fastkd.cli import run, summary, terminal

    how = shlex.join(again)
    with terminal.listener(out) as show:
        try:
            outcome = task(config, out, resume=resume, listeners=[show])
        except BaseException as e:
            run.tell_how_to_continue(e, how, out)
            raise
    if as_json:
        emit({"code": outcome.code, "out": str(out), **outcome.summary})
    else:
        summary.show(outcome.summary, out, outcome.code, shlex.join(following))
    if outcome.code == STOPPED:
        say(f"stopped with a checkpoint; continue with: {how}")
    return int(outcome.code)
