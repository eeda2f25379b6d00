"""Weights from files: read without executing anything, mended where that is safe, refused with the cause where it is not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.errors import InputError, PlaceError
from fastkd.files import tensor_bytes, write_atomic

from .metadata import channels_of, describe, head_of
from .readers import EXPECTED, read

__all__ = ["Weights", "describe", "fit", "load_weights", "recognise", "save_weights"]

NESTED = ("state_dict", "model_state_dict", "model", "net", "student")
"""Keys under which training scripts keep the state dict."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every key."""


@dataclass
class Weights:
    """What a file of weights holds.

    Attributes:
      state:    key → tensor on the CPU, dtypes as in the file but for half precision.
      metadata: the strings of a safetensors file; empty for others.
      notes:    one sentence for everything that was mended.
      sha256:   of the file.
      path:     where it was read from.
    """

    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sha256: str = ""
    path: str = ""


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a state dict from a .safetensors file, or from a .pt, .pth or .th file without executing anything in it.

    Nested dictionaries are opened, prefixes of wrappers removed, half precision widened to the default dtype; each is said in
    `notes`. Which of the two formats it is follows from the content, not from the name.

    Raises:
      InputError: the file is missing, damaged, something else, hostile, or holds weights that are not finite.
    """
    path = os.fspath(path)
    found, metadata, notes = read(path)
    state = _tensors(path, _unwrap(path, found, notes), notes)
    state = _strip(state, notes)
    _check(path, state)
    half = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point() and t.element_size() < 4}
    if half:
        default = torch.get_default_dtype()
        state = {k: t.to(default) if t.is_floating_point() and t.element_size() < 4 else t for k, t in state.items()}
        notes.append(f"weights of {', '.join(sorted(half))} were widened to {str(default).removeprefix('torch.')}")
    return Weights(state, metadata, notes, _sha256(path), path)


def _unwrap(path: str, found: Any, notes: list[str]) -> Mapping[Any, Any]:
    """The innermost dictionary of weights."""
    for _ in range(4):
        if not isinstance(found, Mapping):
            raise InputError(f"'{path}' holds a {type(found).__name__}; expected {EXPECTED}.")
        inner = next((k for k in NESTED if isinstance(found.get(k), Mapping) and len(found[k]) > 0), None)
        if inner is None:
            return found
        notes.append(f"the weights were taken from the key '{inner}'")
        found = found[inner]
    return found


def _tensors(path: str, found: Mapping[Any, Any], notes: list[str]) -> dict[str, Tensor]:
    state = {str(k): v.detach() for k, v in found.items() if isinstance(v, Tensor)}
    if not state:
        keys = ", ".join(f"'{k}'" for k in list(found)[:5]) or "nothing"
        raise InputError(f"'{path}' holds no weights (found {keys}); expected {EXPECTED}.")
    other = [str(k) for k, v in found.items() if not isinstance(v, Tensor)]
    if other:
        notes.append(f"{len(other)} entries that are no tensors were left out (first: '{other[0]}')")
    return state


def _strip(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    said: list[str] = []
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) and k != p for k in state)), None):
        state = {k.removeprefix(prefix): t for k, t in state.items()}
        said.append(prefix)
    if any("._orig_mod." in k for k in state):
        plain = {k.replace("._orig_mod.", "."): t for k, t in state.items()}
        if len(plain) == len(state):
            state = plain
            said.append("_orig_mod.")
    if said:
        notes.append(f"the prefix '{''.join(said)}' was removed from the keys")
    return state


def _check(path: str, state: dict[str, Tensor]) -> None:
    """Every tensor must be a plain one on the CPU with finite values."""
    for key, t in state.items():
        if t.is_meta or t.is_quantized or t.is_complex() or t.layout != torch.strided:
            kind = "meta" if t.is_meta else "quantised" if t.is_quantized else "complex" if t.is_complex() else "sparse"
            raise InputError(f"'{path}' holds a {kind} tensor under '{key}'; expected plain floating-point weights.")
        if t.is_floating_point() and not torch.isfinite(t).all():
            bad = int((~torch.isfinite(t)).sum())
            cause = "the training that wrote it diverged"
            raise InputError(f"'{path}' holds weights that are not finite: {bad} of {t.numel()} values of '{key}'; {cause}.")


def _sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# Into a network -----------------------------------------------------------------------------------------------------------


def fit(net: nn.Module, weights: Weights, *, what: str) -> list[str]:
    """Copy weights into a network, key by key; all of them or, where they do not fit, none.

    Args:
      what: how messages call the network, such as "teacher 'resnet20'".
    Returns:
      what was mended, one sentence each (`weights.notes` and what this copy adds).
    Raises:
      InputError: missing, unexpected or mis-shaped keys, another number of classes or channels; the sentence names the first.
    """
    own, found = net.state_dict(), weights.state
    missing = _without_counters(own.keys() - found.keys(), own)
    unexpected = _without_counters(found.keys() - own.keys(), found)
    shaped = [k for k in own if k in found and own[k].shape != found[k].shape]
    start = f"the weights of '{weights.path}' do not fit {what}: "
    if not missing and not unexpected and shaped:
        _class_or_channel(start, own, found, shaped)
    if missing or unexpected or shaped:
        raise InputError(start + _differences(own, found, missing, unexpected, shaped) + _hint(weights))
    for key, t in own.items():
        counter = key.endswith("num_batches_tracked")  # some converters write it as a float
        if key in found and not counter and t.is_floating_point() != found[key].is_floating_point():
            raise InputError(f"{start}'{key}' is {found[key].dtype}, expected {t.dtype}.".replace("torch.", ""))
    notes = list(weights.notes)
    changed = {(found[k].dtype, t.dtype) for k, t in own.items() if k in found and t.is_floating_point() and found[k].dtype != t.dtype}
    for was, now in sorted(changed, key=str):
        notes.append(f"weights of {was} were converted to {now}".replace("torch.", ""))
    net.load_state_dict({k: found[k] for k in own if k in found}, strict=False)
    return notes


def _without_counters(keys: Iterable[str], order: Mapping[str, Any]) -> list[str]:
    """In the order of the network; BatchNorm's step counters do not matter to anybody."""
    keys = set(keys)
    return [k for k in order if k in keys and not k.endswith("num_batches_tracked")]


def _class_or_channel(start: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor], shaped: list[str]) -> None:
    """Raise the sentence of its own for weights that differ in nothing but the number of classes, or of image channels."""
    stems = {k.rpartition(".")[0] for k in shaped}
    if len(stems) == 1 and all(own[k].shape[1:] == found[k].shape[1:] for k in shaped) and stems == {head_of(own)}:
        n, expected = found[shaped[0]].shape[0], own[shaped[0]].shape[0]
        raise InputError(f"{start}found {n} classes, expected {expected}; use `--classes {n}` if {n} is right.")
    if len(shaped) == 1 and own[shaped[0]].dim() == 4:
        a, b = own[shaped[0]].shape, found[shaped[0]].shape
        if a[0] == b[0] and a[2:] == b[2:]:
            raise InputError(f"{start}'{shaped[0]}' takes images of {b[1]} channels, expected {a[1]}.")


def _differences(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], missing: list[str], unexpected: list[str], shaped: list[str]
) -> str:
    parts = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            shown = ", ".join(f"'{k}'" for k in keys[:3]) + (", …" if len(keys) > 3 else "")
            parts.append(f"{len(keys)} {kind} key{'s' if len(keys) > 1 else ''} ({shown})")
    if shaped:
        k = shaped[0]
        parts.append(f"{len(shaped)} of another shape (first: '{k}' is {list(found[k].shape)}, expected {list(own[k].shape)})")
    return "; ".join(parts)


def _hint(weights: Weights) -> str:
    likely = " or ".join(f"'{name}'" for name in recognise(weights))
    return f"; the keys and shapes are those of {likely}." if likely else "; is it the right architecture?"


def recognise(weights: Weights) -> list[str]:
    """The named classifiers whose keys and shapes these weights have, whatever the number of classes; often none."""
    found = {k: t.shape for k, t in weights.state.items() if not k.endswith("num_batches_tracked")}
    same: list[str] = []
    for name, (head, own) in _named(channels_of(weights.state) or 3).items():
        if own.keys() != found.keys():
            continue
        differ = [k for k, shape in own.items() if shape != found[k]]
        if all(k.rpartition(".")[0] == head and own[k][1:] == found[k][1:] for k in differ):
            same.append(name)
    return same


@cache
def _named(channels: int) -> dict[str, tuple[str | None, dict[str, torch.Size]]]:
    """Head and shapes of every named network, found without allocating its weights."""
    from . import build, names

    table = {}
    for name in names():
        with torch.device("meta"):
            state = build(name, classes=2, channels=channels).state_dict()
        table[name] = head_of(state), {k: t.shape for k, t in state.items() if not k.endswith("num_batches_tracked")}
    return table


# Into a file --------------------------------------------------------------------------------------------------------------


def save_weights(path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file: into a temporary one beside its place, flushed to the disk, then renamed.

    Args:
      state:    key → tensor, any device; shared storage is written once per key.
      metadata: values become strings: numbers and tuples of numbers as `0.5,0.5`, other lists and dictionaries as JSON; None is left out.
    Raises:
      PlaceError: the place cannot be written; what stood there before still does.
    """
    own = {k: t.detach().cpu().contiguous().clone() for k, t in state.items()}
    text = {str(k): _text(v) for k, v in (metadata or {}).items() if v is not None}
    try:
        write_atomic(Path(path), tensor_bytes(own, text))
    except OSError as e:
        raise PlaceError(f"cannot write '{os.fspath(path)}': {e}.") from None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return ",".join(str(v) for v in value)
    return json.dumps(value, ensure_ascii=False)
