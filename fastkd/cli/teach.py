"""`fastkd teach`: train a teacher on real data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastkd.cli.common import Numbers, checked, data_word, emit, model_names, out_folder, say, stored, table, verb
from fastkd.errors import STOPPED, ConfigError

if TYPE_CHECKING:
    from fastkd.config import TeachConfig

KEYS = {
    key: key
    for key in ("model", "data", "epochs", "batch", "lr", "momentum", "weight_decay", "warmup", "label_smoothing", "aug", "input_size",
                "mean", "std", "seed", "device", "precision")
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
@click.option("--input-size", type=int, metavar="PIXELS", help="With labels of pixels that of a crop. Default: the data's own.")
@click.option("--mean", type=Numbers(), help="Normalisation for inputs in [0, 1]. Default: the field's constants of the data.")
@click.option("--std", type=Numbers(), help="As --mean.")
@click.option("--seed", type=int, metavar="N", help="Root of all draws. Default: 0.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. Default: auto.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Default: bf16 on a GPU, fp32 on a CPU.")
@click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Any key, such as checkpoint.keep=5.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Run folder. Default: the next runs/teach-DATA-MODEL-001.")
@click.option(
    "--resume", is_flag=False, flag_value="must", default="no", type=click.Choice(["must", "auto", "no"]),
    help="Continue the run in --out. --resume=auto: or start it, where there is none.",
)  # fmt: skip
def command(sets: tuple[str, ...], out: Path | None, resume: str, as_json: bool, **options: Any) -> int:
    """Train a teacher on real data; RUN_DIR/teacher.safetensors is then ready for `fastkd run`."""
    if resume != "no" and out is None:
        raise ConfigError("--resume does not say which run; expected --out DIR with the folder of the run to continue.")
    config = configuration(table(KEYS, options), sets, out if resume != "no" else None, resume)
    if out is None:
        out = out_folder(f"teach-{data_word(config.data)}-{config.model}")
    return train(config, out, resume, as_json)


def configuration(options: dict[str, Any], sets: tuple[str, ...], continued: Path | None, resume: str) -> TeachConfig:
    """The configuration of a new run, or that of the folder `continued` with what was given written over it."""
    from fastkd.config import TeachConfig, merge, parse_sets

    given, values = merge(options, parse_sets(sets)), {}
    if continued is not None and not (resume == "auto" and not (continued / "config.json").is_file()):
        values = stored(continued, "teach")
        code = str(values.get("model"))
        if code.startswith("py:") and code != given.get("model"):
            raise ConfigError(f"the run in '{continued}' used code ({code}); code runs only when it is typed: add --model {code}.")
    return checked(TeachConfig, merge(values, given), f"'{continued / 'config.json'}' and options" if continued and values else "options")


def train(config: TeachConfig, out: Path, resume: str, as_json: bool) -> int:
    """Train, show it, say how it ended and how to go on."""
    from fastkd.cli import run, summary, terminal
    from fastkd.tasks import teach

    words = ["fastkd", "teach", "--resume", "--out", str(out)]
    how = shlex.join([*words, "--model", config.model] if config.model.startswith("py:") else words)
    with terminal.listener(out) as show:
        try:
            outcome = teach.teach(config, out, resume=resume, listeners=[show])
        except BaseException as e:
            run.tell_how_to_continue(e, how, out)
            raise
    if as_json:
        emit({"code": outcome.code, "out": str(out), **outcome.summary})
    else:
        code = ["--teacher", config.model] if config.model.startswith("py:") else []
        following = shlex.join(["fastkd", "run", *code, "--teacher-weights", str(out), "--data", config.data, "--student", "SPEC"])
        summary.show(outcome.summary, out, outcome.code, following)
    if outcome.code == STOPPED:
        say(f"stopped with a checkpoint; continue with: {how}")
    return outcome.code
