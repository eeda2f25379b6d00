"""`fastkd completion`: a shell's completion script."""

from __future__ import annotations

import click

from fastkd.cli.common import emit, verb

SHELLS = ("bash", "zsh", "fish")


@verb("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str, as_json: bool) -> int:
    """Print the completion script of a shell.

    \b
      bash:  fastkd completion bash > ~/.local/share/bash-completion/completions/fastkd
      zsh:   fastkd completion zsh > "${fpath[1]}/_fastkd"
      fish:  fastkd completion fish > ~/.config/fish/completions/fastkd.fish
    """
    from click.shell_completion import get_completion_class

    from fastkd.cli.app import app

    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"click has no completion for {shell}")
    writer = found(app, {}, "fastkd", "_FASTKD_COMPLETE")
    script = writer.source_template % writer.source_vars()  # `source()` of bash starts a bash to ask for its version
    if as_json:
        emit({"shell": shell, "script": script})
    else:
        click.echo(script)
    return 0
