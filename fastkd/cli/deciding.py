"""The options that decide a run, for the commands that take them: `run` and `plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import click

from fastkd.cli.common import Numbers, method_names, model_names, recipe_names
from fastkd.errors import ConfigError

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
    "deterministic": "deterministic",
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
    click.option(
        "--deterministic", is_flag=True, default=None,
        help="Deterministic kernels alone: the same bits on the same GPUs, more slowly.",
    ),
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


def check_given(recipe: str | None, options: dict[str, Any], sets: Iterable[str]) -> None:
    """Refuse data that are wrong as text, such as a misspelt name, before what else is missing is asked for; and a method's key without
    its `method.`.

    Raises:
      ConfigError, InputError: see `data.check_spec`; or the key, with the right one.
    """
    from fastkd import config, data

    given = config.merge(options, config.parse_sets(sets))
    for key in given.keys() - config.RunConfig.model_fields.keys():
        if is_field(key, config.merge(config.read_recipe(recipe) if recipe else {}, given).get("method")):
            raise ConfigError(f"unknown key '{key}'; did you mean 'method.{key}'? It is the method's own.")
    if isinstance(given.get("data"), str):
        data.check_spec(given["data"])


def is_field(key: str, method: Any) -> bool:
    """Whether a `method` entry (its name alone, or a table that holds it) is of a method with this field."""
    from fastkd import methods

    table = method if isinstance(method, dict) else {"name": method or "muse"}
    name = table.get("name", "muse")
    return name in methods.names() and any(f.name == key for f in dataclasses.fields(methods.method_class(name, table)))
