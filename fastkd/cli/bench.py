"""`fastkd bench`: the ops and a generator step against plain torch, torch.compile and other libraries, beside their targets."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from fastkd.cli.common import emit, say, verb
from fastkd.errors import PlaceError


@verb("bench")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), help="Write one JSON a bench there.")
@click.option("--only", metavar="NAME", multiple=True, help="This bench only; may be given again.")
@click.option("--quick", is_flag=True, help="Tiny shapes, few rounds: shows that everything runs, its times mean nothing.")
@click.option("--swap", is_flag=True, help="The providers in reverse order.")
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N. Default: a GPU where there is one.")
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    multiple=True,
    help="Torch threads of a CPU run; may be given again. Default: 1, and all cores.",
)
@click.option("--compile/--no-compile", default=None, help="torch.compile rows. Default: yes, but for --quick.")
@click.option("--graphs/--no-graphs", default=True, show_default=True, help="On a GPU, times inside CUDA graphs too.")
@click.option("--without", multiple=True, type=click.Choice(("cuda", "triton", "cpp")), help="Leave this backend out; may be given again.")
@click.option("--seconds", metavar="S", type=click.FloatRange(min=0), help="Budget: what does not fit is skipped, and its row says so.")
@click.option(
    "--baseline",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True),
    help="An older record, or a folder of them: exit code 8 where ours became slower than both spreads explain.",
)
def command(only: tuple[str, ...], threads: tuple[int, ...], as_json: bool, **options: Any) -> int:
    """Measure the ops on this machine; every op is compared with its definition first.

    \b
      fastkd bench --only cam
      fastkd bench --out bench --quick
      fastkd bench --out after --baseline before
    """
    try:
        suite = importlib.import_module("fastkd.benches.suite")
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith("fastkd.benches"):
            raise
        raise PlaceError("the benches are not part of this installation; expected fastkd.benches, which `pip install .` brings.") from None
    request = suite.Request(only=only, threads=threads or None, **options)
    result = suite.run(request, say if as_json else click.echo)
    if as_json:
        head = result.head
        emit({"targets": [dict(zip(head, line)) for line in result.lines], "slower": result.slower, "records": result.records})
    code: int = result.code
    return code
