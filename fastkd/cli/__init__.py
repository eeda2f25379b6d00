"""The command line: one file a command, loaded when it is named. Nothing here imports torch before a command runs."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code (see docs/cli.md); `argv` defaults to the process's own."""
    from fastkd.cli.app import app
    from fastkd.cli.exits import guarded

    return guarded(lambda: app.invoked(argv))
