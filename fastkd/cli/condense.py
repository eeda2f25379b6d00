"""`fastkd condense`: make a condensed set of real data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastkd.cli import task_command
from fastkd.cli.common import data_word, out_folder, table, verb

KEYS = {
    key: key
    for key in ("data", "method", "ipc", "epochs", "iterations", "batch", "lr", "aug", "init", *task_command.TASK_KEYS)
}


@verb("condense")
@click.option("--data", metavar="SPEC", help="Training and test images: NAME, NAME:DIR or DIR. Default: digits.")
@click.option("--method", type=click.Choice(["dm", "dc", "dsa"]), help="Match mean features, or gradients (dsa: augmented). Default: dm.")
@click.option("--ipc", type=int, metavar="N", help="Images a class. Default: 10.")
@click.option("--epochs", type=int, metavar="N", help="Parts of the run; the set is tested after each. Default: 20.")
@click.option("--iterations", type=int, metavar="N", help="Random networks an epoch. Default: 1000 (dc, dsa: 50).")
@click.option("--batch", type=int, metavar="N", help="Real images of a class in a step. Default: 256.")
@click.option("--lr", type=float, help="Of the images. Default: 1 (from 100 images a class 10; dc, dsa: 0.1).")
@click.option("--aug", type=click.Choice(["off", "dsa"]), help="Siamese augmentation. Default: dsa (dc: off).")
@click.option("--init", type=click.Choice(["real", "noise"]), help="First images. Default: real (dc: noise).")
@task_command.task_options(
    "condense", "DATA-METHOD", size="Default: the data's own.", norm="Normalised space of the set; best the teacher's.",
    example="eval_steps=300",
)  # fmt: skip
def command(sets: tuple[str, ...], out: Path | None, resume: str, as_json: bool, **options: Any) -> int:
    """Learn a few images a class that stand for a training set; RUN_DIR/condensed.safetensors is for `fastkd run --method cde`."""
    from fastkd.config import CondenseConfig
    from fastkd.tasks.condense import condense

    config = task_command.configuration("condense", CondenseConfig, table(KEYS, options), sets, out, resume)
    if out is None:
        out = out_folder(f"condense-{data_word(config.data)}-{config.method}")
    following = ["fastkd", "run", "--method", "cde", "--condensed", str(out), "--teacher-weights", "FILE", "--student", "SPEC"]
    return task_command.walk(condense, config, out, resume, as_json, ["fastkd", "condense", "--resume", "--out", str(out)], following)
