"""`fastkd plan`: what a run would take, before it runs."""

from __future__ import annotations

from typing import Any

import click

from fastkd.cli.common import Size, emit, say, table, verb
from fastkd.cli.options import taking
from fastkd.cli.run_options import KEYS, OPTIONS, check_given


@verb("plan")
@taking(OPTIONS)
@click.option("--probe/--no-probe", "probed", default=True, help="Time one real step of each kind. Without: no hours, no activations.")
@click.option("--device-memory", type=Size(), metavar="SIZE", help="Plan for GPUs of this memory, such as 80GiB, which need not be here.")
def command(
    recipe: str | None, sets: tuple[str, ...], gpus: int | None, probed: bool, device_memory: int | None, as_json: bool, **options: Any
) -> int:
    """Memory by part and rank, steps, bytes over the wire, hours from a timed probe of the real steps, and whether it fits.

    Takes the options of `fastkd run` that decide a run; nothing is written. The steps are taken on this machine's device as rank 0 of
    --gpus N, so one GPU of the kind is enough to ask. Without a GPU here they are taken on the CPU, which tells what they need but not how
    long they take. Without --teacher-weights the teacher is a random one of the same size.

    \b
      fastkd plan --recipe muse-imagenet-112 --gpus 8
      fastkd plan --recipe fast-imagenet --device-memory 80GiB
    """
    from fastkd import config, methods
    from fastkd.cli import summary
    from fastkd.tasks.plan import plan

    given = table(KEYS, options)
    check_given(recipe, given, sets)
    asked = config.resolve(recipe, given, sets, methods=methods.names())
    if probed:
        say("taking a step of each kind on this machine (--no-probe leaves that out)")
    planned = plan(asked, gpus or 1, probed=probed, device_memory=device_memory)
    if as_json:
        emit(planned)
    else:
        summary.show_plan(planned)
    return 0
