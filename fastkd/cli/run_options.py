"""The options that decide a run, for the commands that take them: `run` and `plan`. Those of other commands too are in `options`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import click

from fastkd.cli import options
from fastkd.cli.common import method_names, model_names, recipe_names
from fastkd.errors import ConfigError

KEYS = {
    "method": "method.name",
    "teacher": "teacher.spec",
    "teacher_weights": "teacher.weights",
    "student": "student.spec",
    "student_weights": "student.weights",
    "data": "data",
    "condensed": "condensed",
    **{key: key for key in options.WALK},
    **{key: f"teacher.{key}" for key in options.NETWORK_KEYS},
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
    options.set_option("Any configuration key, such as method.epochs=20. May be repeated."),
    *options.WALK.values(),
    *options.network_options("teacher"),
    click.option("--gpus", type=click.IntRange(1), metavar="N", help="Ranks on this machine, one a GPU; with --device cpu, on the CPU."),
)
"""Their parameters are `recipe`, `sets`, `gpus`, and the rest under the names of `KEYS`."""


def check_given(recipe: str | None, given: dict[str, Any], sets: Iterable[str]) -> None:
    """Refuse data that are wrong as text, such as a misspelt name, before what else is missing is asked for; and a method's key without
    its `method.`.

    Raises:
      ConfigError, InputError: see `data.check_spec`; or the key, with the right one.
    """
    from fastkd import config, data

    given = config.merge(given, config.parse_sets(sets))
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
