"""The options that decide a run, for the commands that take them: `run` and `plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from fastkd.cli.common import Numbers, method_names, model_names, recipe_names

KEYS = {
    "method": "method.name",
    "teacher": "teacher.spec",
    "teacher_weights": "teacher.weights",
    "student": "student.spec",
    "student_weights": "student.weights",
    "data": "data",
    "condensed": "condensed",
    "seed": "seed",
    "device": "device",
    "precision": "precision",
    "mean": "teacher.mean",
    "std": "teacher.std",
    "input_size": "teacher.input_size",
    "classes": "teacher.classes",
    "channels": "teacher.channels",
    "class_names": "teacher.class_names",
}
"""Option → configuration key. A key that is not given stays as the recipe or the default has it."""

OPTIONS = (
    click.option("--method", metavar="NAME", shell_complete=method_names, help="`fastkd methods` lists them. Default: muse."),
    click.option("--recipe", metavar="NAME|FILE", shell_complete=recipe_names, help="A published setting by name, or a TOML file."),
    click.option("--teacher", metavar="SPEC", shell_complete=model_names, help="NAME, timm:NAME, torchvision:NAME or py:FILE:FUNCTION."),
    click.option("--teacher-weights", metavar="FILE", help="safetensors, or .pt that loads with weights_only."),
    click.option("--student", metavar="SPEC", shell_complete=model_names, help="The network to train; as --teacher, or ckpt:RUN_DIR."),
    click.option("--student-weights", metavar="FILE", help="Weights that the student starts from."),
    click.option(
        "--data", metavar="SPEC",
        help="Evaluation data: NAME, NAME:DIR, DIR or none. Only vanilla_kd learns from its train split.",
    ),
    click.option("--condensed", metavar="FILE|DIR", help="Condensed set for cde: a file, or the folder of `fastkd condense`."),
    click.option(
        "--set", "sets", metavar="KEY=VALUE", multiple=True,
        help="Any configuration key, such as method.epochs=20. May be repeated.",
    ),
    click.option("--seed", type=int, metavar="N", help="Root of all draws. Default: 0."),
    click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. Default: auto."),
    click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Default: bf16 on a GPU, fp32 on a CPU."),
    click.option("--mean", type=Numbers(), help="The teacher's normalisation, for inputs in [0, 1]."),
    click.option("--std", type=Numbers(), help="As --mean."),
    click.option("--input-size", type=int, metavar="PIXELS", help="Height and width of the teacher's input."),
    click.option("--classes", type=int, metavar="N", help="Number of classes."),
    click.option("--channels", type=int, metavar="N", help="Image channels."),
    click.option("--class-names", metavar="FILE", help="One class name a line, or a JSON list."),
    click.option("--gpus", type=click.IntRange(1), metavar="N", help="Ranks on this machine, one a GPU; with --device cpu, on the CPU."),
)


def deciding(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options: parameters `recipe`, `sets`, `gpus`, and the rest under the names of `KEYS`."""
    for option in reversed(OPTIONS):
        fn = option(fn)
    return fn


def check_data(options: dict[str, Any], sets: Iterable[str]) -> None:
    """Refuse data that are wrong as text, such as a misspelt name, before what else is missing is asked for.

    Raises:
      ConfigError, InputError: see `data.check_spec`.
    """
    from fastkd import config, data

    spec = config.merge(options, config.parse_sets(sets)).get("data")
    if isinstance(spec, str):
        data.check_spec(spec)
