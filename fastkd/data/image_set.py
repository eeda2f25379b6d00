"""A data set in memory, and the conversions that all of them share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastkd.errors import ConfigError, InputError

# ITU-R 601 luma in 16-bit integers: equal to what Pillow's `convert("L")` gives, to the last bit.
_LUMA = (19595, 38470, 7471)
IGNORE = 255
"""Dense label of a pixel that counts nowhere: it is neither learned from nor measured."""


@dataclass
class ImageSet:
    """Labelled images, decoded once.

    Attributes:
      name: what the set is called.
      split: "train" or "test".
      images: uint8 [N, H, W, C], C is 1 or 3.
      labels: int64 [N], 0 … classes - 1; -1 where pictures have no labels (`data.open_images`). Dense sets: int64 [N, H, W], a class or
        `IGNORE` for each pixel.
      class_names: one a class in label order, or None.
      mean, std: the set's constants, one value a channel for images in [0, 1], or None where the field has none.
      flip: may an image be mirrored and keep its label?
      pad: zero padding of the usual random crop.
      attribution: author and licence in one line.
      notes: what was converted, left out or found unusual, one sentence each.
    """

    name: str
    split: str
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    class_names: list[str] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = True
    pad: int = 4
    attribution: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[3] not in (1, 3):
            raise ValueError(f"images must be uint8 [N, H, W, 1 or 3], not {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape not in (self.images.shape[:1], self.images.shape[:3]):
            n, h, w, _ = self.images.shape
            raise ValueError(f"labels must be int64 [{n}] or [{n}, {h}, {w}], not {self.labels.dtype} {list(self.labels.shape)}")

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def classes(self) -> int:
        """Number of classes: of the names where there are any, else of the labels."""
        if self.class_names is not None:
            return len(self.class_names)
        return int((self.labels[self.labels != IGNORE] if self.dense else self.labels).max()) + 1

    @property
    def dense(self) -> bool:
        """Whether there is a label for each pixel."""
        return self.labels.dim() == 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image, as networks count."""
        _, h, w, c = self.images.shape
        return c, h, w

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with images and labels on `device`."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def expect(self, classes: int, what: str = "the teacher") -> None:
        """Raises InputError where this set has another number of classes than `what`."""
        if self.classes != classes:
            raise InputError(f"data set '{self.name}' has {self.classes} classes, {what} has {classes}; they must be equal")

    def subset(self, n: int, seed: int = 0) -> ImageSet:
        """`n` images, every class in proportion, in the set's order; the same ones for the same seed.

        Each class gets the whole part of its share; what is left goes to the largest fractions, ties to the lower label. Of a dense
        set any `n` are drawn. `n` of at least the set's size returns the set itself.

        Raises:
          ConfigError: `n` is below 1.
        """
        if n < 1:
            raise ConfigError(f"a subset needs at least 1 image, not {n}")
        if n >= len(self):
            return self
        if self.dense:
            return self._chosen(self._shuffled(seed)[:n].sort().values, seed)
        labels = self.labels.cpu()
        counts = torch.bincount(labels, minlength=self.classes)
        share = counts * n  # of len(self): kept as integers, so that the rule is exact
        take = share // len(self)
        order = torch.argsort(share % len(self), descending=True, stable=True)
        take[order[: n - int(take.sum())]] += 1
        return self._drawn(take, seed)

    def per_class(self, n: int, seed: int = 0) -> ImageSet:
        """`n` images of every class, in the set's order; the same ones for the same seed, and a larger `n` holds the smaller ones' images.

        Raises:
          ConfigError: a class has fewer images, or the set is dense.
        """
        if self.dense:
            raise ConfigError(f"'{self.name}' has labels for pixels, so no image belongs to one class; expected a part of all images")
        counts = torch.bincount(self.labels.cpu(), minlength=self.classes)
        fewest = int(counts.min())
        if not 1 <= n <= fewest:
            raise ConfigError(f"'{self.name}' has {fewest} images of its smallest class; expected a number from 1 to that, not {n}")
        return self._drawn(torch.full_like(counts, n), seed)

    def _drawn(self, take: Tensor, seed: int) -> ImageSet:
        """The first `take` [classes] images of each class in an order drawn by `seed`."""
        labels = self.labels.cpu()
        counts = torch.bincount(labels, minlength=self.classes)
        shuffled = self._shuffled(seed)
        by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]  # classes one after another, each shuffled
        place = torch.arange(len(self)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return self._chosen(by_class[place < torch.repeat_interleave(take, counts)].sort().values, seed)

    def _shuffled(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def _chosen(self, rows: Tensor, seed: int) -> ImageSet:
        how = "drawn" if self.dense else "drawn by class"
        notes = [*self.notes, f"{len(rows)} of {len(self)} images, {how} with seed {seed}"]
        rows = rows.to(self.images.device)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], notes=notes)


def luma(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] RGB → uint8 [N, H, W, 1], equal to Pillow's conversion to gray."""
    out = torch.empty(*images.shape[:3], 1, dtype=torch.uint8, device=images.device)
    for part, to in zip(images.split(4096), out.split(4096), strict=True):
        r, g, b = part.int().unbind(3)
        to[..., 0] = (r * _LUMA[0] + g * _LUMA[1] + b * _LUMA[2] + (1 << 15)) >> 16
    return out


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W, C] → uint8 [N, size, size, C]: Pillow's bilinear filter, antialiased where it shrinks."""
    n, _, _, c = images.shape
    out = np.empty((n, size, size, c), np.uint8)
    for row, to in zip(images.cpu().numpy(), out, strict=True):
        picture = Image.fromarray(row if c == 3 else row[..., 0]).resize((size, size), Image.Resampling.BILINEAR)
        to[...] = np.asarray(picture).reshape(size, size, c)
    return torch.from_numpy(out)


def check_wish(size: int | None, channels: int | None) -> None:
    """Raises ConfigError for a size or a channel count that no set can have."""
    if size is not None and not 1 <= size <= 4096:
        raise ConfigError(f"image size {size} is not usable; expected 1 to 4096 pixels")
    if channels not in (None, 1, 3):
        raise ConfigError(f"images have 1 or 3 channels, not {channels}")


def convert(data: ImageSet, size: int | None = None, channels: int | None = None) -> ImageSet:
    """The set with square images of `size` pixels and with `channels`; what was done is added to `notes`.

    1 → 3 channels repeats the channel; 3 → 1 takes the luma, of the constants too (their deviation is then an approximation).

    Raises:
      ConfigError: a size outside 1 … 4096, or channels other than 1 and 3.
      InputError: the result would not fit in memory.
    """
    check_wish(size, channels)
    images, mean, std, pad, notes = data.images, data.mean, data.std, data.pad, list(data.notes)
    n, h, w, c = images.shape
    if channels is not None and channels != c:
        if channels == 3:
            images = images.expand(n, h, w, 3).contiguous()
            mean, std = (mean * 3 if mean else None), (std * 3 if std else None)
            notes.append("gray images were repeated to 3 channels")
        else:
            images = luma(images)
            weights = [v / (1 << 16) for v in _LUMA]
            mean = (round(math.fsum(a * b for a, b in zip(weights, mean, strict=True)), 4),) if mean else None
            std = (round(math.fsum(a * b for a, b in zip(weights, std, strict=True)), 4),) if std else None
            notes.append("colour images were turned into gray (luma), mean and std with them")
    if size is not None and (h, w) != (size, size):
        check_memory(n, size, images.shape[3], data.name)
        images = resize(images, size)
        pad = padding(pad, h, size)
        notes.append(f"images of {h} x {w} were resized to {size} x {size} (bilinear)")
    return dataclasses.replace(data, images=images, mean=mean, std=std, pad=pad, notes=notes)


def padding(pad: int, of: int, size: int) -> int:
    """Pixels by which a crop of `size` is padded where one of `of` pixels is padded by `pad`: at least 1, unless there is none."""
    return max(1, round(pad * size / of)) if pad else 0


def check_memory(n: int, size: int, channels: int, name: str, limit: int = 8 << 30) -> None:
    """Raises InputError where `n` images would take more than `limit` bytes."""
    need = n * size * size * channels
    if need > limit:
        raise InputError(
            f"'{name}': {n} images of {size} x {size} would take {need / 2**30:.1f} GiB, data sets are held in memory up to "
            f"{limit >> 30} GiB; use a smaller size or fewer images"
        )
