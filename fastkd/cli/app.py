"""The program `fastkd`: commands by name, imported when they are needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from fastkd import __version__
from fastkd.cli.exits import guarded
from fastkd.errors import ConfigError, unknown

COMMANDS = {
    "run": "fastkd.cli.run",
    "eval": "fastkd.cli.eval",
    "teach": "fastkd.cli.teach",
    "condense": "fastkd.cli.condense",
    "demo": "fastkd.cli.demo",
    "methods": "fastkd.cli.methods",
    "models": "fastkd.cli.models",
    "plan": "fastkd.cli.plan",
    "info": "fastkd.cli.info",
    "bench": "fastkd.cli.bench",
    "completion": "fastkd.cli.completion",
}


class App(click.Group):
    """A group whose commands are modules; each holds its click command as `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise ConfigError(unknown("command", args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def invoked(self, argv: Sequence[str] | None = None) -> Any:
        """Run without click's own way out: errors are raised, the exit code is returned."""
        return super().main(args=None if argv is None else list(argv), prog_name="fastkd", standalone_mode=False)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """The way in of completion and of click's test runner: ends the process with our exit codes."""

        def call() -> Any:
            return super(App, self).main(args=args, prog_name=prog_name, complete_var=complete_var, standalone_mode=False, **extra)

        if not standalone_mode:
            return call()
        sys.exit(guarded(call))


@click.group(cls=App, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fastkd", message="%(prog)s %(version)s")
def app() -> None:
    """Data-free knowledge distillation: a trained classifier in, a smaller one out, without the training data.

    `fastkd run` with no options distils an embedded digits teacher on this machine in minutes.
    """
