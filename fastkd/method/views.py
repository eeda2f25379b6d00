"""How a method's images reach a network: gathered, augmented with the run's own draws, normalised."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastkd.memory import Rows
from fastkd.nn import augment
from fastkd.rng import Rng

Augmentation = Literal["none", "crop", "crop_flip", "resized_crop", "roll_flip"]
"""How a batch is changed before a network sees it; see `Method.view`."""
AUGMENTATIONS = typing.get_args(Augmentation)
CROPS = ("none", "crop", "crop_flip")
"""Those that label maps can go through with their images; see `Views.crops`."""


@dataclass(frozen=True)
class Augment:
    """What the images of a data set allow: a horizontal flip, and how many pixels a crop is padded."""

    flip: bool = True
    pad: int = 4


class Views:
    """The door of every network for the images of a `Method`."""

    space: ClassVar[Literal["unit", "normalised"]] = "unit"
    """Where its images live: [0, 1] and seen through `view`, or the teacher's normalised space."""

    aug: str
    shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor
    rng: Rng
    augmentation: Augment

    def view(self, images: Tensor | Rows, kind: str | None = None, name: str = "aug", scale: float = 0.75) -> Tensor:
        """The door of every network: gather (rows of a store), augment, normalise. Normalising comes last: padding is black.

        Args:
          images: [b, C, H, W] in the method's space, or rows of a store.
          kind: none | crop | crop_flip | resized_crop | roll_flip; None: the method's `aug`. In normalised space nothing is done.
          name: stream of the draws.
          scale: smallest share of the area that resized_crop keeps.
        Returns:
          [b, C, H, W] in the teacher's normalised space; differentiable in `images`.
        """
        if self.space == "normalised":
            return images.read() if isinstance(images, Rows) else images
        return self.unit_view(images, self.aug if kind is None else kind, name, scale)

    def unit_view(self, images: Tensor | Rows, kind: str, name: str = "aug", scale: float = 0.75) -> Tensor:
        """`view` of images in [0, 1], also in a method whose own are in normalised space."""
        if kind not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation '{kind}'; expected one of {', '.join(AUGMENTATIONS)}")
        flips = kind.endswith("flip") or kind == "resized_crop"
        if kind in ("none", "crop", "crop_flip"):
            b = images.index if isinstance(images, Rows) else images
            pad = 0 if kind == "none" else self.augmentation.pad
            dy, dx, flip = (self._shift(b, pad, f"{name}.y"), self._shift(b, pad, f"{name}.x"), self._flip(b, flips, f"{name}.flip"))
            if isinstance(images, Rows):
                return images.gather(dy=dy, dx=dx, flip=flip, pad=pad, mean=self.mean, std=self.std)
            return augment.normalise(augment.crop_flip(images, dy, dx, flip, pad) if pad or flips else images, self.mean, self.std)
        x = images.read() if isinstance(images, Rows) else images
        x = self._resized(x, scale, name) if kind == "resized_crop" else self._rolled(x, name)
        return augment.normalise(x, self.mean, self.std)

    def crops(self, images: Tensor, labels: Tensor, index: Tensor, kind: str, name: str = "aug") -> tuple[Tensor, Tensor]:
        """Square crops of stored images and of their label maps, cut out at one place and flipped together.

        Args:
          images: uint8 [N, H, W, C], none smaller than the networks' input. labels: int64 [N, H, W]. index: int64 [b], which rows.
          kind: crop | crop_flip: the place is drawn; none: it is the middle.
          name: stream of the draws.
        Returns:
          [b, C, s, s] in the teacher's normalised space, and int64 [b, s, s].
        """
        if kind not in CROPS:
            raise ValueError(f"label maps have no augmentation '{kind}'; expected one of {', '.join(CROPS)}")
        size, middle = self.shape[1], kind == "none"
        dy, dx = (
            torch.full_like(index, (side - size) // 2) if middle else self.rng.integers(side - size + 1, index, name=f"{name}.{axis}")
            for side, axis in zip(images.shape[1:3], "yx", strict=True)
        )
        flip = self._flip(index, kind == "crop_flip", f"{name}.flip")
        cut, found = (augment.window(x, index, dy, dx, flip, size) for x in (images, labels))
        return augment.normalise(cut.permute(0, 3, 1, 2).to(self.mean.dtype) / 255, self.mean, self.std), found

    def _shift(self, b: Tensor, pad: int, name: str) -> Tensor:
        return self.rng.integers(2 * pad + 1, b, name=name)

    def _flip(self, b: Tensor, allowed: bool, name: str) -> Tensor:
        flip = self.rng.integers(2, b, name=name) == 1
        return flip if allowed and self.augmentation.flip else torch.zeros_like(flip)

    def _resized(self, x: Tensor, scale: float, name: str) -> Tensor:
        """Area U[scale, 1], aspect log-uniform in [3/4, 4/3], place uniform; sides are clamped to the image."""
        h, w = x.shape[-2:]
        u = self.rng.uniform(x, 4, name=name)
        area = h * w * (scale + (1 - scale) * u[:, 0])
        aspect = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
        width, height = torch.sqrt(area * aspect).clamp(max=w), torch.sqrt(area / aspect).clamp(max=h)
        top, left = u[:, 2] * (h - height), u[:, 3] * (w - width)
        return augment.resized_crop(x, top, left, height, width, self._flip(x, True, f"{name}.flip"))

    def _rolled(self, x: Tensor, name: str) -> Tensor:
        """One roll of ± an eighth of the size and one flip for the whole batch, equal on all ranks."""
        h, w = x.shape[-2] // 8, x.shape[-1] // 8
        dy, dx = self.rng.pick(2 * h + 1, name=f"{name}.y") - h, self.rng.pick(2 * w + 1, name=f"{name}.x") - w
        flip = self.rng.pick(2, name=f"{name}.flip") == 1
        return augment.roll_flip(x, dy, dx, flip & self.augmentation.flip)
