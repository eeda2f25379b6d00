"""What the commands share: the decorator, JSON, numbers in options, networks in options, the configuration of a run folder."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastkd.cli import exits

if TYPE_CHECKING:
    from pydantic import BaseModel

M = TypeVar("M", bound="BaseModel")


def verb(name: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with --json (parameter `as_json`) and --debug."""

    def decorate(fn: Callable[..., Any]) -> click.Command:
        fn = click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show tracebacks.")(fn)
        fn = click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout; everything else goes to stderr.")(fn)
        return click.command(name, **settings)(fn)

    return decorate


def _debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        exits.wanted["debug"] = True


def say(text: str) -> None:
    """A line of chatter; that stderr cannot take it ends nothing."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def emit(value: Any) -> None:
    """The result, as JSON; what is not a finite number becomes null."""
    click.echo(json.dumps(_plain(value), indent=1, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class Numbers(click.ParamType):
    """Numbers with commas or spaces between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            found = [float(part) for part in str(value).replace(",", " ").split()]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; expected one a channel, such as 0.485,0.456,0.406", param, ctx)
        if not found or not all(map(math.isfinite, found)):
            self.fail(f"{value!r} is not a list of finite numbers; expected one a channel, such as 0.485,0.456,0.406", param, ctx)
        return found


class Duration(click.ParamType):
    """A time such as 90s, 45m, 3h50m or 1d; seconds."""

    name = "duration"
    UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", str(value))
        if not parts or "".join(n + unit for n, unit in parts) != str(value):
            self.fail(f"{value!r} is not a time; expected one such as 90s, 45m, 3h50m or 1d", param, ctx)
        found = sum(float(n) * self.UNITS[unit] for n, unit in parts)
        if not found:
            self.fail(f"{value!r} leaves no time for a step; expected one such as 90s, 45m, 3h50m or 1d", param, ctx)
        return found


class Size(click.ParamType):
    """An amount of memory such as 80GiB, 80GB or 512MiB; bytes."""

    name = "size"
    UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
        units = {unit.lower(): factor for unit, factor in self.UNITS.items()}
        count = int(float(found[1]) * units[found[2].lower()]) if found and found[2].lower() in units else 0
        if not count:
            self.fail(f"{value!r} is not an amount of memory; expected one such as 80GiB, 80GB or 512MiB", param, ctx)
        return count


def method_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Completion of a method's name."""
    from fastkd import methods

    return [n for n in methods.names() if n.startswith(incomplete)]


def model_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Completion of a network's name."""
    from fastkd import models

    return [n for n in models.names() if n.startswith(incomplete)]


def recipe_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Completion of a recipe's name."""
    from fastkd import config

    return [n for n in config.recipes() if n.startswith(incomplete)]


def table(keys: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """Options that were given, under their configuration keys: {'teacher_weights': x} → {'teacher': {'weights': x}}."""
    from fastkd.config import merge, nested

    out: dict[str, Any] = {}
    for name, key in keys.items():
        if options.get(name) is not None:
            out = merge(out, nested(key, options[name]))
    return out


def checked(model: type[M], values: dict[str, Any], where: str) -> M:
    """A section of the configuration from plain values.

    Raises:
      ConfigError: the first thing that is wrong.
    """
    from pydantic import ValidationError

    from fastkd.config import sentence
    from fastkd.errors import ConfigError

    try:
        return model.model_validate(values)
    except ValidationError as e:
        raise ConfigError(sentence(dict(e.errors()[0]), model, where)) from None


def stored(out: Path, task: str | None) -> dict[str, Any]:
    """The configuration that a run folder holds; `task` is what its `task` entry must be (None: a distillation).

    Raises:
      CheckpointError: there is none, or it is damaged. ConfigError: it is of another kind of run.
    """
    from fastkd.errors import CheckpointError, ConfigError

    path = out / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"there is no run to continue in '{out}': it has no config.json; leave out --resume to start one.") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"'{path}' cannot be read ({type(e).__name__}); give the options of the run again, with --resume.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"'{path}' is damaged: expected a JSON object; give the options of the run again, with --resume.")
    kind = values.pop("task", None)
    if kind != task:
        raise ConfigError(f"'{out}' holds a run of `fastkd {kind or 'run'}`; continue it with that command.")
    return values


def out_folder(stem: str) -> Path:
    """runs/STEM-001, or the next number that is free; characters that a folder name should not have become '-'."""
    from fastkd.engine.folder import next_numbered

    clean = "".join(c if c.isascii() and (c.isalnum() or c in "._") else "-" for c in stem).strip("-.")[:80]
    return next_numbered(Path("runs"), clean or "run")


def data_word(data: str | None) -> str:
    """A short word for a data set in a folder name."""
    return "nodata" if data in (None, "none") else (str(data).split(":")[0] if ":" in str(data) else Path(str(data)).name) or "data"
