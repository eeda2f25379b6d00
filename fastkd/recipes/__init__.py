"""The recipes that come with fastkd, one file a published setting, and the figures that were published for them.

A recipe file is a configuration that names only what differs from the defaults, with three keys of its own: `base`, another recipe it is
written over; `[pairs]`, the pairs of networks it was published for, by data set; `[where.PATTERN]`, what differs for the pairs whose
DATA-TEACHER-STUDENT matches. Every pair is a recipe by itself, such as fast-5-cifar10-r34-r18. No torch here.
"""

from __future__ import annotations

import copy
import functools
import math
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastkd.errors import ConfigError, unknown

__all__ = ["Figure", "merge", "name", "names", "pairs", "published", "read"]

FOLDER = Path(__file__).parent
TABLES = "published.toml"
SMALL = {"r18": "cifar_resnet18", "r34": "cifar_resnet34", "v11": "vgg11_bn", "mbv2": "mobilenetv2_s2"}
"""What the short names of networks mean; any other name is that of `fastkd.models`."""
IMAGENET = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "mbv2": "mobilenet_v2"}
"""The same for networks with an ImageNet stem."""


@dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
      method: name of the method; one without a file in `fastkd.methods` may stand here. label: what the source calls the row.
      recipe: the recipe of this pair, or None where none reaches it. data: name of the data set.
      teacher, student: networks of `fastkd.models`, None where the source does not name them.
      value: percent. metric: top-1, or mIoU (segmentation).
      which: best (epoch, selected on test data), last (epoch), mean (over epochs), or "not stated".
      spread: printed beside the value, in points, or None. hours: published, or None. hours_of: what they cover; never compare two kinds.
      teacher_value, student_value: of the teacher, and of the student trained on the real data, same metric, or None.
      source: where it stands. evidence: readme, paper, code, issue or note (third-party notes: transcription slips are possible).
      note: what a reader must know to compare with it.
    """

    method: str
    label: str
    recipe: str | None
    data: str
    teacher: str | None
    student: str | None
    value: float
    metric: str
    which: str
    spread: float | None
    hours: float | None
    hours_of: str
    teacher_value: float | None
    student_value: float | None
    source: str
    evidence: str
    note: str


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` written on it, table by table; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


@functools.cache
def _file(stem: str) -> dict[str, Any]:
    """A recipe file with the one it is based on.

    Raises:
      ConfigError: a `[where.PATTERN]` of its own that is for none of its pairs.
    """
    own = tomllib.loads((FOLDER / f"{stem}.toml").read_text(encoding="utf-8"))
    base = own.pop("base", None)
    values = merge(_file(base), own) if base else own
    known = [f"{data}-{pair}" for data, listed in values.get("pairs", {}).items() for pair in listed]
    for pattern in own.get("where", {}):
        if not any(fnmatchcase(pair, pattern) for pair in known):
            raise ConfigError(f"recipe '{stem}': [where.\"{pattern}\"] matches none of its pairs: {', '.join(known) or 'it has none'}.")
    return values


@functools.cache
def _named() -> dict[str, tuple[str, str, str]]:
    """Every recipe → (its file, data set, pair); the last two are empty for the file alone."""
    found = {}
    for stem in sorted(p.stem for p in FOLDER.glob("*.toml") if p.name != TABLES):
        found[stem] = (stem, "", "")
        for data, listed in _file(stem).get("pairs", {}).items():
            found |= {name(stem, data, pair): (stem, data, pair) for pair in listed}
    return found


def _networks(data: str, pair: str) -> list[str]:
    """`fastkd.models` names of the teacher and the student of a pair."""
    short = IMAGENET if data == "imagenet" else SMALL
    return [short.get(word, word) for word in pair.split("-")]


def names() -> list[str]:
    """Every recipe: the files, and each pair of theirs."""
    return sorted(_named())


def name(stem: str, data: str, pair: str) -> str:
    """The recipe of a pair: fast-5, cifar10, r34-r18 → fast-5-cifar10-r34-r18.

    A last word of the file's name that begins that of the data set is not repeated: fast-imagenet, imagenet → fast-imagenet-r50-r18.
    """
    head, _, last = stem.rpartition("-")
    return "-".join([head if head and data.startswith(last) else stem, data, pair])


def pairs(method: str) -> dict[str, dict[str, list[str]]]:
    """The recipe files of a method → data set → its pairs, in the order of the file; {} for settings without published pairs."""
    stems = [stem for stem, (_, data, _) in _named().items() if not data]
    return {s: {d: list(p) for d, p in _file(s).get("pairs", {}).items()} for s in stems if _file(s)["method"]["name"] == method}


def read(recipe: str) -> dict[str, Any]:
    """The configuration of a recipe, as far as it differs from the defaults; that of a pair names its networks and its data set.

    Raises:
      ConfigError: no such recipe, with the nearest.
    """
    if recipe not in _named():
        raise ConfigError(unknown("recipe", recipe, names()))
    stem, data, pair = _named()[recipe]
    values = copy.deepcopy(_file(stem))
    values.pop("pairs", None)
    where = values.pop("where", {})
    if not data:
        return values
    teacher, student = _networks(data, pair)
    values = merge(values, {"data": data, "teacher": {"spec": teacher}, "student": {"spec": student}})
    for pattern, over in where.items():
        if fnmatchcase(f"{data}-{pair}", pattern):
            values = merge(values, over)
    return values


@functools.cache
def _figures() -> tuple[Figure, ...]:
    tables = tomllib.loads((FOLDER / TABLES).read_text(encoding="utf-8"))["tables"]
    cells = [({**table, **row}, i) for table in tables for row in table["rows"] for i in range(len(table["pairs"]))]
    return tuple(_figure(said, i) for said, i in cells if not math.isnan(said["values"][i]))


def _figure(said: dict[str, Any], i: int) -> Figure:
    """Cell `i` of a row; `said`: the keys of its table, with the row's own written over them."""

    def cell(key: str) -> float | None:
        value = said[key][i] if key in said else math.nan
        return None if math.isnan(value) else float(value)

    data, pair, stem = said["data"], said["pairs"][i], said.get("recipe")
    teacher, student = _networks(data, pair) if pair else (None, None)
    return Figure(
        method=_file(stem)["method"]["name"] if stem else said["method"],
        recipe=name(stem, data, pair) if stem else None,
        label=said["label"],
        data=data,
        teacher=teacher,
        student=student,
        value=float(said["values"][i]),
        metric=said.get("metric", "top-1"),
        which=said["which"],
        spread=cell("spread"),
        hours=cell("hours"),
        hours_of=said.get("hours_of", ""),
        teacher_value=cell("teacher"),
        student_value=cell("student"),
        source=said["source"],
        evidence=said["evidence"],
        note=said.get("note", ""),
    )


def published(**match: str) -> list[Figure]:
    """The published figures whose attributes are as given, in the order of `published.toml`.

        for f in published(data="cifar100", teacher="wrn40_2", student="wrn16_2"):
            print(f.label, f.value, f.which, f.source)

    Args:
      match: attributes of `Figure`, such as method, recipe, data, teacher, student or which.
    Raises:
      ConfigError: a recipe of that name does not exist. AttributeError: an attribute that a figure has not.
    """
    if "recipe" in match and match["recipe"] not in _named():
        raise ConfigError(unknown("recipe", match["recipe"], names()))
    return [f for f in _figures() if all(getattr(f, key) == value for key, value in match.items())]
