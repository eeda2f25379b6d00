"""`fastkd models`: the networks by name; what one is to fastkd; weights to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastkd.cli.common import checked, emit, model_names, table, verb
from fastkd.cli.options import NETWORK_KEYS, network_options, taking
from fastkd.errors import ConfigError

if TYPE_CHECKING:
    from fastkd.config import TeacherConfig

KEYS = {key: key for key in ("spec", "weights", *NETWORK_KEYS)}


@verb("models")
@click.argument("spec", required=False, metavar="[SPEC]", shell_complete=model_names)
@click.option("--model-weights", "--teacher-weights", "weights", metavar="FILE", help="Weights to load into it.")
@click.option(
    "--save", metavar="FILE.safetensors", type=click.Path(path_type=Path), help="Write the weights with all that is known of them."
)
@taking(network_options("network"))
def command(spec: str | None, save: Path | None, as_json: bool, **options: Any) -> int:
    """List the networks, or describe one: does it load, its BatchNorm layers, whether its activation map is exact.

    \b
      fastkd models
      fastkd models resnet20 --model-weights resnet20.pt --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --save resnet20.safetensors
    """
    if spec is None and not options["weights"]:
        given = [f"--{name.replace('_', '-')}" for name, value in {"save": save, **options}.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]} is of one network, and none is named; expected a SPEC, or --model-weights FILE.")
        return every(as_json)
    from fastkd.config import TeacherConfig

    if save and not options["weights"]:
        raise ConfigError("--save needs weights to write; expected --model-weights FILE.")
    if save and save.suffix != ".safetensors":
        raise ConfigError(f"--save '{save}' would be safetensors under another name; expected a name that ends in .safetensors.")
    if save and save.exists():
        raise ConfigError(f"--save '{save}' exists and is not overwritten; expected a name that is not taken.")
    network = checked(TeacherConfig, table(KEYS, {"spec": spec, **options}), "options")
    described = filled(network, save) if network.weights else fresh(network)
    if as_json:
        emit({**described, **({"saved": str(save)} if save else {})})
    else:
        show(described, save)
    return 0


def every(as_json: bool) -> int:
    """All names, without torch."""
    from fastkd.cli import summary
    from fastkd.models import MODELS, PREFIXES

    rows = [(name, entry.family, entry.description) for name, entry in MODELS.items()]
    if as_json:
        emit([{"name": n, "family": f, "what": d} for n, f, d in rows])
        return 0
    summary.print_table(("network", "family", "what it is"), rows)
    summary.print_facts([(form, meaning) for form, _, meaning in (said.partition(", ") for said in PREFIXES.values())])
    return 0


def filled(network: TeacherConfig, save: Path | None) -> dict[str, Any]:
    """A network with its weights; `save` writes them with their metadata, so that no option is needed again."""
    from fastkd import assemble, models

    described = assemble.describe_model(network)
    if save:
        found = assemble.load_network(network, what="model")
        state = {k: v.detach().cpu().contiguous() for k, v in found.net.state_dict().items()}
        said = assemble.metadata(found.spec, found.classes, found.shape, found.mean, found.std, found.class_names)
        models.save_weights(save, state, said)
    return described


def fresh(network: TeacherConfig) -> dict[str, Any]:
    """A network as it is built, without weights."""
    from fastkd import models
    from fastkd.nn import instrument

    spec = str(network.spec)
    size = network.input_size or (models.MODELS[spec].input_size if spec in models.MODELS else 224)
    shape, classes = (network.channels or 3, size, size), network.classes or (1000 if size >= 224 else 10)
    net = models.build(spec, classes=classes, channels=shape[0], input_size=size)
    teacher = instrument(net, shape=shape)
    return {
        "spec": spec, "parameters": sum(p.numel() for p in net.parameters()), "classes": classes, "shape": list(shape),
        "bn_layers": len(teacher.split) - 1, "bn_channels": teacher.split[-1],
        "cam": "exact" if teacher.head is not None else teacher.head_reason,
        "notes": ["built without weights; classes and shape are the options' or the name's own"],
    }  # fmt: skip


def show(described: dict[str, Any], saved: Path | None) -> None:
    """What was found, line by line."""
    from fastkd.cli import summary

    rows: list[tuple[str, object]] = []
    for key, value in described.items():
        if key in ("notes", "surgery") or value is None:
            continue
        plain = ", ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value:,}" if isinstance(value, int) else value
        rows.append((key.replace("_", " "), plain))
    rows += [("fused", line) for line in described.get("surgery", [])] + [("note", line) for line in described.get("notes", [])]
    if saved:
        rows.append(("saved", saved))
    summary.print_facts(rows)
