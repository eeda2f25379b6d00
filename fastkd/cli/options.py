"""Options that several commands take, written once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from fastkd.cli.common import Numbers

Option = Callable[[Any], Any]

WALK = {
    "seed": click.option("--seed", type=int, metavar="N", help="Root of all draws. Default: 0."),
    "device": click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. Default: auto."),
    "precision": click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Default: bf16 on a GPU, fp32 on a CPU."),
    "deterministic": click.option(
        "--deterministic", is_flag=True, default=None, help="Deterministic kernels alone: the same bits on the same GPUs, more slowly."
    ),
}
"""Of everything that walks steps: the keys of `config.WalkConfig` that deserve a flag, each with its option."""

NETWORK_KEYS = ("mean", "std", "input_size", "classes", "channels", "class_names")
"""What `network_options` ask of a network whose weights do not say it: keys of `config.TeacherConfig`."""


def network_options(whose: str) -> tuple[Option, ...]:
    """The options of `NETWORK_KEYS`. `whose`: what the network is, such as "teacher"."""
    return (
        *normalisation_options(f"The {whose}'s normalisation, for inputs in [0, 1]."),
        input_size_option(f"Height and width of the {whose}'s input."),
        click.option("--classes", type=int, metavar="N", help="Number of classes."),
        click.option("--channels", type=int, metavar="N", help="Image channels."),
        click.option("--class-names", metavar="FILE", help="One class name a line, or a JSON list."),
    )


def normalisation_options(what: str) -> tuple[Option, Option]:
    return click.option("--mean", type=Numbers(), help=what), click.option("--std", type=Numbers(), help="As --mean.")


def input_size_option(what: str) -> Option:
    return click.option("--input-size", type=int, metavar="PIXELS", help=what)


def set_option(what: str) -> Option:
    return click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help=what)


def run_folder_options(default: str) -> tuple[Option, Option]:
    """--out and --resume; `default`: how a folder is called that is not named."""
    return (
        click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help=f"Run folder. Default: the next runs/{default}-001."),
        click.option(
            "--resume", is_flag=False, flag_value="must", default="no", type=click.Choice(["must", "auto", "no"]),
            help="Continue the run in --out. --resume=auto: or start it, where there is none (for job scripts).",
        ),
    )  # fmt: skip


def taking(options: Iterable[Option]) -> Option:
    """Give a command these options, in this order."""

    def add(command: Any) -> Any:
        for option in reversed(tuple(options)):
            command = option(command)
        return command

    return add
