"""`fastkd eval`: accuracy of a network, or its mIoU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastkd.cli.common import checked, emit, model_names, say, stored, table, verb
from fastkd.cli.options import NETWORK_KEYS, network_options, taking
from fastkd.errors import ConfigError, InputError

KEYS = {key: key for key in ("spec", "weights", *NETWORK_KEYS)}


@verb("eval")
@click.argument("network", required=False, metavar="[RUN_DIR|FILE]")
@click.option("--model", "--teacher", "spec", metavar="SPEC", shell_complete=model_names, help="Where the weights do not name it.")
@click.option("--model-weights", "--teacher-weights", "weights", metavar="FILE", help="The weights, as another way to give FILE.")
@click.option("--data", metavar="SPEC", help="NAME, NAME:DIR or DIR. Default: the data of the run folder.")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N",
    help="Only a draw of N images, always the same one: every class in proportion, but of sets with labels of pixels any.",
)  # fmt: skip
@click.option("--device", metavar="NAME", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@taking(network_options("network"))
def command(network: str | None, data: str | None, limit: int | None, device: str, as_json: bool, **options: Any) -> int:
    """Top-1 and top-5 accuracy of a run's student, or of any network, on a data set; with labels of pixels mIoU.

    \b
      fastkd eval runs/muse-digits-001
      fastkd eval --model resnet20 --model-weights resnet20.pt --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --data cifar10:DIR
    """
    from fastkd.config import TeacherConfig

    if network and options["weights"]:
        raise ConfigError(f"two networks are given, '{network}' and --model-weights '{options['weights']}'; expected one.")
    options["weights"] = network or options["weights"]
    if not options["weights"]:
        raise ConfigError("no network is given; expected a run folder, a weights file, or --model SPEC --model-weights FILE.")
    asked = checked(TeacherConfig, table(KEYS, options), "options")
    folder = Path(options["weights"])
    if data is None and (folder / "config.json").is_file():
        data = data_of(folder)
    if data is None and not folder.exists() and not options["weights"].startswith("embedded:"):
        raise InputError(f"there is no '{folder}'; expected a run folder, or a file of weights.")
    if data is None:
        raise ConfigError("no data to measure on; expected --data NAME (cifar10, digits, …), NAME:DIR or DIR.")
    from fastkd import assemble
    from fastkd.cli import summary
    from fastkd.cli.words import duration, percent

    result = assemble.evaluate(asked, data, device=device, limit=limit)
    if as_json:
        emit({**result, "data": data})
        return 0
    for note in result.get("notes", []):
        say(f"  {note}")
    words = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "pixel_accuracy": "pixels right"}
    scores = [(word, percent(result[key])) for key, word in words.items() if key in result]
    where = ("network", result["spec"]), ("data", f"{data}, {result['images']:,} images")
    summary.print_facts([*where, *scores, ("time", duration(result.get("seconds")))])
    return 0


def data_of(folder: Path) -> str | None:
    """The data that a run was measured on."""
    for task in (None, "teach", "condense"):
        try:
            data = stored(folder, task).get("data")
            return None if data == "none" else data
        except ConfigError:
            continue
    return None
