"""Networks with all that is known of them: from options, from the weights' metadata, never from a guess."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import fastkd
from fastkd import data, models
from fastkd.config import RunConfig, TeacherConfig
from fastkd.data.constants import constants
from fastkd.errors import ConfigError, InputError
from fastkd.models.metadata import channels_of

ASSETS = Path(fastkd.__file__).parent / "assets"
EMBEDDED = "embedded:"


Net = TypeVar("Net", bound=nn.Module)


def placed(net: Net, device: torch.device, *, channels_last: bool = True) -> Net:
    """The network itself, moved to a device in the memory format of the run."""
    return net.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


@dataclass
class Network:
    """A classifier with all that is known of it."""

    net: nn.Module
    spec: str
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: list[str] | None
    sha256: str
    notes: list[str]
    data: str | None = None


def is_embedded(name: str) -> bool:
    """Whether a file that comes with fastkd is meant."""
    return name.startswith(EMBEDDED)


def embedded(name: str, folder: str = "") -> Path:
    """The file of `embedded:NAME` in a folder of the assets.

    Raises:
      ConfigError: there is none of that name.
    """
    path = ASSETS / folder / f"{name.removeprefix(EMBEDDED)}.safetensors"
    if not path.exists():
        known = [p.stem for p in (ASSETS / folder).glob("*.safetensors")]
        raise ConfigError(f"'{name}' is not embedded; expected one of {', '.join(EMBEDDED + k for k in sorted(known))}.")
    return path


def weights_path(name: str) -> Path:
    """The file of `embedded:NAME`, of a run folder, or of a path."""
    if is_embedded(name):
        return embedded(name)
    path = Path(name)
    for inner in ("student.safetensors", "teacher.safetensors", "convnet.safetensors"):
        if path.is_dir() and (path / inner).exists():
            return path / inner
    if path.is_dir() and (path / "checkpoints").is_dir():
        again = shlex.join(["fastkd", "run", "--resume", "--out", name, *_typed_again(path)])
        raise InputError(f"the run in '{name}' is not finished; continue it with: {again}")
    return path


def _typed_again(folder: Path) -> list[str]:
    """The options of a run that name code, which runs only when it is typed."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        specs = {part: str((config.get(part) or {}).get("spec")) for part in ("teacher", "student")}
    except (OSError, ValueError, AttributeError):
        return []
    return [word for part, spec in specs.items() if spec.startswith("py:") for word in (f"--{part}", spec)]


def read_names(path: str) -> list[str]:
    """Class names of a file: a JSON list, or one a line."""
    if not Path(path).is_file():
        raise InputError(
            f"the class names '{path}' are {'a directory' if Path(path).is_dir() else 'no file'}; expected one name a line, or a JSON list."
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith(("[", "{")) else [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(
            f"the class names in '{path}' cannot be read ({type(e).__name__}); expected one name a line, or a JSON list."
        ) from None
    if not isinstance(names, list):
        raise InputError(
            f"the class names in '{path}' are a JSON object; expected one name a line, or a JSON list in the order of the classes."
        )
    return [str(n) for n in names]


def load_network(config: TeacherConfig, default_data: str | None = None, *, what: str = "teacher") -> Network:
    """Build and fill a classifier; what the options leave open is taken from the weights' metadata, and said. Nothing is guessed.

    Raises:
      ConfigError, InputError: the first thing that is missing or wrong.
    """
    if config.weights is None:
        raise ConfigError(f"the {what} has no weights; expected --{what}-weights FILE (safetensors, or .pt that loads with weights_only).")
    weights = models.load_weights(weights_path(config.weights))
    said, notes = models.describe(weights), list(weights.notes)
    spec = config.spec or said.get("spec")
    if spec is None:
        code = coded(weights)
        if code:
            raise ConfigError(f"'{config.weights}' is of code ({code}); code runs only when it is typed: add --{what} py:FILE:FUNCTION.")
        raise ConfigError(
            f"'{config.weights}' does not name its architecture; expected --{what} SPEC, such as resnet20 (`fastkd models` lists them)."
        )

    def known(key: str, option: Any, fallback: Any = None) -> Any:
        if option is not None:
            if said.get(key) is not None and _differ(said[key], option):
                notes.append(f"{key} = {_short(option)} as given; the weights' metadata says {_short(said[key])}")
            return option
        if said.get(key) is not None:
            notes.append(f"{key} = {_short(said[key])} from the weights' metadata")
            return said[key]
        return fallback

    names = known("class_names", read_names(config.class_names) if config.class_names else None)
    classes = known("classes", config.classes, said.get("classes_in_head") or (len(names) if names else None))
    entry = entry_of(default_data)
    mean, std = known("mean", config.mean), known("std", config.std)
    size = known("input_size", config.input_size, entry.size if entry else None)
    if classes is None or mean is None or std is None or size is None:
        raise ConfigError(_missing(config.weights, what, classes, mean, std, size, constants(entry.constants if entry else "imagenet")))
    if names is not None and len(names) != classes and config.classes is not None and config.class_names is None:
        raise InputError(f"the {what} '{config.weights}' has {len(names)} classes, found --classes {classes}; leave that option out.")
    if names is not None and len(names) != classes:
        raise InputError(f"{len(names)} class names for {classes} classes; expected one a class.")
    if max(mean) > 1:
        raise ConfigError(f"mean is {_short(mean)}; expected values for images in [0, 1] (divide mean and std by 255).")
    channels = known("channels", config.channels, channels_of(weights.state) or len(mean))
    mean, std = ([*v] * channels if len(v) == 1 else v for v in (mean, std))  # one number is that of all channels
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(f"mean has {len(mean)} and std {len(std)} numbers; expected one for each of the {channels} channels.")
    net = models.build(spec, classes=classes, channels=channels, input_size=size)
    notes += [n for n in models.fit(net, weights, what=what) if n not in notes]
    return Network(net, spec, (channels, size, size), classes, tuple(mean), tuple(std), names, weights.sha256, notes, said.get("data"))


def _missing(weights: str, what: str, classes: Any, mean: Any, std: Any, size: Any, example: Any) -> str:
    """One sentence for all that is not known of a network, and the options that tell it."""
    unknown, options, trained = [], [], ""
    if classes is None:
        unknown, options = ["the number of classes"], ["--classes N"]
    if mean is None or std is None:
        unknown.append("the normalisation")
        options += [f"--mean {','.join(map(str, example.mean))}", f"--std {','.join(map(str, example.std))}"]
        trained = f" (mean and std as the {what} was trained)"
    if size is None:
        unknown.append("the input size")
        options.append("--input-size PIXELS")
    said = " and ".join(filter(None, [", ".join(unknown[:-1]), unknown[-1]]))
    return f"{said} of '{weights}' {'is' if len(unknown) == 1 else 'are'} not known; expected {' '.join(options)}{trained}."


def coded(weights: models.Weights) -> str | None:
    """The `py:` specification (without its folder) that a file of weights names; it tells the user which code to type, and runs nothing."""
    said = weights.metadata.get("architecture", "")
    return said if said.startswith("py:") else None


def entry_of(spec: str | None) -> data.DatasetEntry | None:
    """The table's line of a data set by name, also of NAME:DIR."""
    return data.DATASETS.get((spec or "").partition(":")[0])


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) != len(b) or any(_differ(x, y) for x, y in zip(a, b, strict=True))
    return abs(a - b) > 1e-6 if isinstance(a, int | float) and isinstance(b, int | float) else bool(a != b)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value[:4])) + (", …" if len(value) > 4 else "") if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def make_student(config: RunConfig, teacher: Network) -> tuple[nn.Module, str, list[str]]:
    """The network to train: fresh by name, or a student of another run, or with weights to start from."""
    spec, weights = config.student.spec, config.student.weights
    if spec is None:
        raise ConfigError("no student is named; expected --student SPEC, such as wrn16_1 (`fastkd models` lists them).")
    if spec.startswith("ckpt:"):
        spec, weights = _of_run(spec), spec.removeprefix("ckpt:")
    net = models.build(spec, classes=teacher.classes, channels=teacher.shape[0], input_size=teacher.shape[1])
    notes = models.fit(net, models.load_weights(weights_path(weights)), what="student") if weights else []
    return net, spec, notes


def _of_run(spec: str) -> str:
    """The architecture of `ckpt:RUN_DIR`, or of the file of weights that stands there."""
    place = spec.removeprefix("ckpt:")
    path = weights_path(place)
    if not path.exists() or path.is_dir():
        why = "no network lies in" if path.is_dir() else "there is no"
        raise InputError(f"'{spec}' is no run: {why} '{place}'; expected a run folder of fastkd.")
    found = models.load_weights(path)
    inner, code = models.describe(found).get("spec"), coded(found)
    if code:
        raise InputError(
            f"the network of '{place}' is of code ({code}), which runs only when it is typed; "
            f"use --student py:FILE:FUNCTION --student-weights {place}."
        )
    if not isinstance(inner, str):
        raise InputError(f"'{spec}' does not name its architecture; expected a run folder of fastkd.")
    return inner


def network_facts(spec: str, net: nn.Module) -> dict[str, Any]:
    """What the summary says of a network."""
    return {"spec": spec, "parameters": sum(p.numel() for p in net.parameters())}


def _without_folder(spec: str) -> str:
    """`py:FILE:FUNCTION` with the name of the file alone: weights are handed on, and where their code lay is nobody's business."""
    return f"py:{Path(spec.removeprefix('py:')).name}" if spec.startswith("py:") else spec


def metadata(
    spec: str, classes: int, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], names: list[str] | None, **more: str
) -> dict[str, str]:
    """The metadata of a network's safetensors: all that a later command needs to use it."""
    named = {"class_names": json.dumps(names)} if names else {}
    if "teacher" in more:
        more["teacher"] = _without_folder(more["teacher"])
    return {
        "architecture": _without_folder(spec),
        "classes": str(classes),
        "channels": str(shape[0]),
        "input_size": str(shape[1]),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "fastkd": fastkd.__version__,
        **named,
        **more,
    }
