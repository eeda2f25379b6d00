"""What the metadata of a weights file says about the images and classes of its network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .weights import Weights

HEADS = (
    *("linear", "fc", "classifier", "classifier.1", "conv_preds", "_fc"),
    *("fc2", "head", "head.fc", "heads.head", "classifier.3", "classifier.4", "classifier.6"),
)
"""Where classifiers keep their last layer."""

STEM = re.compile(r"(backbone\.)?_?(conv1|conv_?stem|stem|features\.0|block0\.0|conv)\b")


def head_of(state: Mapping[str, Tensor]) -> str | None:
    """Prefix of the last layer's keys, or None where it has none of the usual names."""
    heads = [h for h in HEADS if f"{h}.weight" in state and state[f"{h}.weight"].dim() in (2, 4)]
    return heads[-1] if heads else None  # "classifier.6" and "fc2" stand behind layers whose names come earlier in the list


def describe(weights: Weights) -> dict[str, Any]:
    """Constants of a network as its file states them; a value that is missing or cannot be read is None, never an error.

    Returns:
      mean, std:   tuple of floats, one a channel, for images in [0, 1]; `mean_exact`, `std_exact` are preferred.
      classes:     int; `classes_in_head`: the outputs of the last layer, whatever the metadata says.
      channels:    int.
      input_size:  int, height and width of the images.
      class_names: list of str.
      spec:        a model specification (`architecture`, where it is one).
      accuracy:    float, in the unit of the file.
      data:        str, the data set it was trained on.
      notes:       list of str, one sentence for each value that could not be read.
    """
    from . import MODELS, PREFIXES

    text, notes = weights.metadata, list[str]()
    channels = _int(text, "channels", notes)
    mean, std = (_constants(text, key, channels or channels_of(weights.state), notes) for key in ("mean", "std"))
    if std is not None and min(std) <= 0:
        notes.append(f"'std' must be positive, found '{text.get('std_exact', text.get('std'))}'; it is not used")
        std = None
    classes = _int(text, "classes", notes)
    head, names = head_of(weights.state), _names(text, notes)
    in_head = int(weights.state[f"{head}.weight"].shape[0]) if head else None
    if names is not None and len(names) != (classes or in_head or len(names)):
        notes.append(f"{len(names)} class names stand in the metadata for {classes or in_head} classes; they are not used")
        names = None
    architecture = text.get("architecture", "")
    known = architecture in MODELS or architecture.partition(":")[0] in PREFIXES.keys() - {"py", "ckpt"}
    return {
        "mean": mean,
        "std": std,
        "classes": classes,
        "classes_in_head": in_head,
        "channels": channels,
        "input_size": _size(text, notes),
        "class_names": names,
        "spec": architecture if known else None,
        "accuracy": _accuracy(text),
        "data": text.get("data") or None,
        "notes": notes,
    }


def channels_of(state: Mapping[str, Tensor]) -> int | None:
    """Channels of the images: what the first convolution takes, where its name or its being the only candidate tells it."""
    thin = {k: int(t.shape[1]) for k, t in state.items() if t.dim() == 4 and t.shape[1] <= 4}
    named = {n for k, n in thin.items() if STEM.match(k)}
    others = {n for k, n in thin.items() if n > 1 or state[k].shape[0] == 1}  # [C, 1, k, k] elsewhere is a depthwise one
    found = named or others
    return found.pop() if len(found) == 1 else None


def _numbers(value: str) -> tuple[float, ...]:
    """Numbers of "0.5,0.5", "[0.5, 0.5]", "(0.5 0.5)" or "127/255"; ValueError for anything else."""
    parts = [p for p in re.split(r"[,;\s]+", value.strip().strip("[]()")) if p]
    numbers = tuple(float(Fraction(p)) for p in parts)
    if not numbers or not all(math.isfinite(n) for n in numbers):
        raise ValueError(value)
    return numbers


def _constants(text: Mapping[str, str], key: str, channels: int | None, notes: list[str]) -> tuple[float, ...] | None:
    for name in (f"{key}_exact", key):
        if name not in text:
            continue
        try:
            numbers = _numbers(text[name])
        except (ValueError, ZeroDivisionError, OverflowError):
            notes.append(f"'{name}' is not a list of numbers, found '{text[name][:60]}'; it is not used")
            continue
        if len(numbers) == 1 and channels:
            numbers *= channels
        if channels and len(numbers) != channels:
            notes.append(f"'{name}' has {len(numbers)} numbers for {channels} channels; it is not used")
            continue
        return numbers
    return None


def _int(text: Mapping[str, str], key: str, notes: list[str]) -> int | None:
    if key not in text:
        return None
    try:
        value = int(text[key])
    except ValueError:
        value = 0
    if value < 1:
        notes.append(f"'{key}' is not a positive whole number, found '{text[key][:60]}'; it is not used")
        return None
    return value


def _size(text: Mapping[str, str], notes: list[str]) -> int | None:
    if "input_size" in text:
        sizes = [int(s) for s in re.findall(r"\d+", text["input_size"])][-2:]  # "3,224,224" too
        if sizes and min(sizes) > 0 and len(set(sizes)) == 1:
            return sizes[0]
        notes.append(f"'input_size' is not the side of a square image, found '{text['input_size'][:60]}'; it is not used")
    at = re.search(r"\bat (\d{2,4})\b", text.get("architecture", ""))
    return int(at[1]) if at else None


def _names(text: Mapping[str, str], notes: list[str]) -> list[str] | None:
    if "class_names" not in text:
        return None
    try:
        names = json.loads(text["class_names"])
    except (ValueError, RecursionError):
        names = None
    if isinstance(names, list) and names and all(isinstance(n, str) for n in names):
        return names
    notes.append("'class_names' is not a JSON list of strings; it is not used")
    return None


def _accuracy(text: Mapping[str, str]) -> float | None:
    try:
        return float(text["accuracy"])
    except (KeyError, ValueError):
        return None
