"""`fastkd teach`: train a teacher on real data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastkd.cli import task_command
from fastkd.cli.common import data_word, model_names, out_folder, table, verb
from fastkd.errors import ConfigError

KEYS = {
    key: key
    for key in ("model", "data", "epochs", "batch", "lr", "momentum", "weight_decay", "warmup", "label_smoothing", "aug",
                *task_command.TASK_KEYS)
}  # fmt: skip


@verb("teach")
@click.option("--model", metavar="SPEC", shell_complete=model_names, help="`fastkd models` lists them. Default: resnet20.")
@click.option("--data", metavar="SPEC", help="Training and test images: NAME, NAME:DIR or DIR. Default: digits.")
@click.option("--epochs", type=int, metavar="N", help="Passes over the training images. Default: 200.")
@click.option("--batch", type=int, metavar="N", help="Images a step. Default: 256.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 0.1.")
@click.option("--momentum", type=float, help="Of SGD (Nesterov). Default: 0.9.")
@click.option("--weight-decay", type=float, help="Of SGD. Default: 5e-4.")
@click.option("--warmup", type=float, metavar="SHARE", help="Share of steps with a rising rate. Default: 0.05.")
@click.option("--label-smoothing", type=float, metavar="SHARE", help="Default: 0.")
@click.option("--aug", type=click.Choice(["none", "crop", "crop_flip", "resized_crop"]), help="Default: crop_flip.")
@task_command.task_options(
    "teach", "DATA-MODEL", size="With labels of pixels that of a crop. Default: the data's own.",
    norm="Normalisation for inputs in [0, 1].", example="checkpoint.keep=5",
)  # fmt: skip
def command(sets: tuple[str, ...], out: Path | None, resume: str, as_json: bool, **options: Any) -> int:
    """Train a teacher on real data; RUN_DIR/teacher.safetensors is then ready for `fastkd run`."""
    from fastkd.config import TeachConfig
    from fastkd.tasks.teach import teach

    config = task_command.configuration("teach", TeachConfig, table(KEYS, options), sets, out, resume, typed)
    if out is None:
        out = out_folder(f"teach-{data_word(config.data)}-{config.model}")
    code = [config.model] if config.model.startswith("py:") else []
    again = ["fastkd", "teach", "--resume", "--out", str(out), *(["--model", *code] if code else [])]
    teacher = [*(["--teacher", *code] if code else []), "--teacher-weights", str(out)]
    following = ["fastkd", "run", *teacher, "--data", config.data, "--student", "SPEC"]
    return task_command.walk(teach, config, out, resume, as_json, again, following)


def typed(folder: Path, values: dict[str, Any], given: dict[str, Any]) -> None:
    """Code that a folder names runs only when it is typed again."""
    code = str(values.get("model"))
    if code.startswith("py:") and code != given.get("model"):
        raise ConfigError(f"the run in '{folder}' used code ({code}); code runs only when it is typed: add --model {code}.")
