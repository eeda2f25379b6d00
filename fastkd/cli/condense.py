"""`fastkd condense`: make a condensed set of real data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastkd.cli.common import Numbers, checked, data_word, emit, out_folder, say, stored, table, verb
from fastkd.errors import STOPPED, ConfigError

if TYPE_CHECKING:
    from fastkd.config import CondenseConfig

KEYS = {
    key: key
    for key in ("data", "method", "ipc", "epochs", "iterations", "batch", "lr", "aug", "init", "input_size", "mean", "std", "seed",
                "device", "precision")
}  # fmt: skip


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
@click.option("--input-size", type=int, metavar="PIXELS", help="Default: the data's own.")
@click.option("--mean", type=Numbers(), help="Normalised space of the set; best the teacher's. Default: the field's constants of the data.")
@click.option("--std", type=Numbers(), help="As --mean.")
@click.option("--seed", type=int, metavar="N", help="Root of all draws. Default: 0.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. Default: auto.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Default: bf16 on a GPU, fp32 on a CPU.")
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Any key, such as eval_steps=300.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Run folder. Default: the next runs/condense-DATA-METHOD-001.")
@click.option(
    "--resume", is_flag=False, flag_value="must", default="no", type=click.Choice(["must", "auto", "no"]),
    help="Continue the run in --out. --resume=auto: or start it, where there is none.",
)  # fmt: skip
def command(sets: tuple[str, ...], out: Path | None, resume: str, as_json: bool, **options: Any) -> int:
    """Learn a few images a class that stand for a training set; RUN_DIR/condensed.safetensors is for `fastkd run --method cde`."""
    if resume != "no" and out is None:
        raise ConfigError("--resume does not say which run; expected --out DIR with the folder of the run to continue.")
    config = configuration(table(KEYS, options), sets, out if resume != "no" else None, resume)
    if out is None:
        out = out_folder(f"condense-{data_word(config.data)}-{config.method}")
    return condense(config, out, resume, as_json)


def configuration(options: dict[str, Any], sets: tuple[str, ...], continued: Path | None, resume: str) -> CondenseConfig:
    """The configuration of a new run, or that of the folder `continued` with what was given written over it."""
    from fastkd.config import CondenseConfig, merge, parse_sets

    given, values = merge(options, parse_sets(sets)), {}
    if continued is not None and not (resume == "auto" and not (continued / "config.json").is_file()):
        values = stored(continued, "condense")
    where = f"'{continued / 'config.json'}' and options" if continued and values else "options"
    return checked(CondenseConfig, merge(values, given), where)


def condense(config: CondenseConfig, out: Path, resume: str, as_json: bool) -> int:
    """Condense, show it, say how it ended and how to go on."""
    from fastkd.cli import run, summary, terminal
    from fastkd.tasks import condense

    how = shlex.join(["fastkd", "condense", "--resume", "--out", str(out)])
    with terminal.listener(out) as show:
        try:
            outcome = condense.condense(config, out, resume=resume, listeners=[show])
        except BaseException as e:
            run.tell_how_to_continue(e, how, out)
            raise
    if as_json:
        emit({"code": outcome.code, "out": str(out), **outcome.summary})
    else:
        words = ["fastkd", "run", "--method", "cde", "--condensed", str(out), "--teacher-weights", "FILE", "--student", "SPEC"]
        summary.show(outcome.summary, out, outcome.code, shlex.join(words))
    if outcome.code == STOPPED:
        say(f"stopped with a checkpoint; continue with: {how}")
    return outcome.code
