"""Condensed sets: a few images a class that stand for a whole training set, learned from it (`fastkd condense`) or taken from it
(few-shot); and the safetensors files they come in. Nothing here is clipped: learned images leave [0, 1]."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastkd.data.image_set import ImageSet
from fastkd.errors import InputError, PlaceError
from fastkd.files import tensor_bytes, write_atomic

FILE = "condensed.safetensors"
"""What a run folder of `fastkd condense` calls its set."""
EXPECTED = "a .safetensors file with `images` [N, C, H, W] and `labels` [N], or a folder of `fastkd condense`"
FARTHEST = 50.0
"""No normalised image has a value beyond this (what DM makes reaches about 7); images of 0 … 255 do."""
_LARGEST = 4 << 30


@dataclass
class CondensedSet:
    """A few labelled images a class, class after class.

    Attributes:
      name: where it is from.
      images: floating [N, C, H, W], [0, 1] with what lies outside.
      labels: int64 [N], ascending; every class at least once.
      counts, starts: int64 [classes], how many images a class has and where they begin.
      method: how the images were made ("dm", …; "real": they were not), "" where the file does not say.
      notes: what was found unusual, one sentence each.
    """

    name: str
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    counts: Tensor = field(repr=False)
    starts: Tensor = field(repr=False)
    method: str = ""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, images: Tensor, labels: Tensor, classes: int, method: str = "", notes: list[str] | None = None) -> CondensedSet:
        """Images [N, C, H, W] in any order, brought into that of the classes.

        Raises:
          InputError: labels outside 0 … classes - 1, or a class without an image.
        """
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
            found = f"labels {int(labels.min())} … {int(labels.max())}" if len(labels) else "no image"
            raise InputError(f"'{name}' has {found}, the teacher {classes} classes; expected labels 0 … {classes - 1}.")
        counts = torch.bincount(labels, minlength=classes)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise InputError(f"'{name}' has no image of class {empty[0]} ({len(empty)} of {classes} classes are empty); expected all.")
        order = torch.argsort(labels, stable=True)
        return cls(name, images[order], labels[order], counts, counts.cumsum(0) - counts, method, list(notes or []))

    @classmethod
    def of_real(cls, real: ImageSet, classes: int, n: int, seed: int = 0) -> CondensedSet:
        """Few-shot: `n` real images of each class, drawn by `seed`; a larger `n` holds the smaller one's.

        Raises:
          InputError: images without labels, or of other classes. ConfigError: a class with fewer images.
        """
        if bool((real.labels < 0).any()):
            raise InputError(f"'{real.name}' has no labels; expected a folder with one sub-folder a class, or a data set by name.")
        real.expect(classes)
        real = real.per_class(n, seed)
        images = real.images.permute(0, 3, 1, 2).to(torch.float32) / 255
        return cls.of(real.name, images.contiguous(), real.labels, classes, "real", real.notes)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> CondensedSet:
        """The same set on `device`."""
        moved = {k: getattr(self, k).to(device) for k in ("images", "labels", "counts", "starts")}
        return dataclasses.replace(self, **moved)

    def per_class(self, n: int) -> CondensedSet:
        """The first `n` images of every class.

        Raises:
          InputError: a class has fewer.
        """
        fewest = int(self.counts.min())
        if n > fewest:
            raise InputError(f"'{self.name}' has {fewest} images of its smallest class, {n} are wanted; expected at most {fewest}.")
        place = torch.arange(len(self), device=self.labels.device) - self.starts[self.labels]
        kept = place < n
        return self.of(self.name, self.images[kept], self.labels[kept], len(self.counts), self.method, self.notes)


def read(path: str | Path, *, classes: int, shape: tuple[int, int, int]) -> CondensedSet:
    """A condensed set from a file; its dtype says how it is meant.

    uint8 images are [0, 1] after /255 and need no constants. Floating ones are in normalised space, unclipped, and their `mean` and
    `std` stand in the metadata: x · std + mean is what `images` then holds.

    Args:
      classes, shape: what the teacher expects; shape is (C, H, W).
    Raises:
      InputError: one sentence for each thing that can be wrong with a file.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    tensors, metadata = _open(path)
    for key in ("images", "labels"):
        if key not in tensors:
            found = ", ".join(sorted(tensors)) or "nothing"
            raise InputError(f"'{path}' has no tensor '{key}' (found {found}); expected {EXPECTED}.")
    images, labels = tensors["images"], tensors["labels"]
    if images.dim() != 4:
        raise InputError(f"the images of '{path}' have shape {list(images.shape)}; expected [N, C, H, W].")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        found = f"{labels.dtype} {list(labels.shape)}".removeprefix("torch.")
        raise InputError(f"the labels of '{path}' are {found}; expected one whole number for each of {len(images)} images.")
    if tuple(images.shape[1:]) != shape:
        raise InputError(f"the images of '{path}' are {list(images.shape[1:])}, the teacher's {list(shape)}; expected a set of that shape.")
    notes: list[str] = []
    unit = _unit(path, images, metadata, notes)
    return CondensedSet.of(str(path), unit, labels.to(torch.int64), classes, metadata.get("method", ""), notes)


def write(path: Path, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, about: Mapping[str, object]) -> None:
    """Write a set in normalised space, unclipped, with the constants that take it back to [0, 1].

    Args:
      images: floating [N, C, H, W]. labels: int64 [N]. mean, std: [C]. about: more metadata, such as method, ipc and seed.
    Raises:
      PlaceError: the place cannot be written.
    """
    text = {**{k: str(v) for k, v in about.items()}, "mean": json.dumps(mean.tolist()), "std": json.dumps(std.tolist())}
    tensors = {"images": images.detach().to("cpu", torch.float32), "labels": labels.detach().to("cpu", torch.int64)}
    try:
        write_atomic(path, tensor_bytes({k: t.contiguous().clone() for k, t in tensors.items()}, text))
    except OSError as e:
        raise PlaceError(f"cannot write '{path}': {e.strerror or e}.") from None


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise InputError(f"the condensed set '{path}' is no file; expected {EXPECTED}.")
    if path.suffix != ".safetensors":
        raise InputError(f"the condensed set '{path}' is no .safetensors file, and pickles are not opened; expected {EXPECTED}.")
    if path.stat().st_size > _LARGEST:
        raise InputError(f"the condensed set '{path}' has {path.stat().st_size >> 20} MiB; expected a few images a class.")
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise InputError(f"'{path}' is no readable safetensors file ({str(error).splitlines()[0][:160]}); expected {EXPECTED}.") from None


def _unit(path: Path, images: Tensor, metadata: Mapping[str, str], notes: list[str]) -> Tensor:
    """Images as float32 for [0, 1]."""
    if images.dtype == torch.uint8:
        notes.append("8-bit images: what the condenser made outside [0, 1] was clipped before they came here")
        return images.to(torch.float32) / 255
    if not images.is_floating_point():
        dtype = str(images.dtype).removeprefix("torch.")
        raise InputError(f"the images of '{path}' are {dtype}; expected uint8, or floating numbers in normalised space.")
    mean, std = (_constants(path, metadata, key, images.shape[1]) for key in ("mean", "std"))
    images = images.to(torch.float32)
    if not bool(torch.isfinite(images).all()):
        raise InputError(f"'{path}' holds images that are not finite; the condensation that wrote it diverged.")
    if images.numel() and float(images.abs().max()) > FARTHEST:
        raise InputError(
            f"the images of '{path}' reach {float(images.abs().max()):.0f}, which no normalised image does; "
            "expected normalised space, or uint8 for 0 … 255."
        )
    if images.numel() and float(images.min()) >= 0 and float(images.max()) <= 1:
        notes.append("all values lie in [0, 1]: floating sets are read as normalised, which these may not be")
    return images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)


def _constants(path: Path, metadata: Mapping[str, str], key: str, channels: int) -> Tensor:
    """`mean` or `std` of the metadata, a JSON list or numbers with commas: [C]."""
    if key not in metadata:
        raise InputError(
            f"'{path}' holds floating images and its metadata has no '{key}'; "
            "expected mean and std of the space they are in, or uint8 images."
        )
    try:
        values = [float(v) for v in metadata[key].strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        values = []
    if len(values) != channels or not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
        kind = "positive number" if key == "std" else "number"
        found = f"'{key}' in the metadata of '{path}' is '{metadata[key][:60]}'"
        raise InputError(f"{found}; expected one {kind} for each of {channels} channels.")
    return torch.tensor(values)
