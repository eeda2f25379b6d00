"""What the kernels of the gather get beside addresses: how stored values become results, and where samples of a resized image lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import shades, taps, tiny


@dataclass(frozen=True)
class Values:
    """Small tables on the device of the store.

    The bits are the definition's. On a CPU bytes become numbers by a table: what is not blended with others is looked up whole. On a GPU,
    where a table that each call made would be several launches, longer than the gather of a small batch, kernels do the arithmetic.

    Attributes:
      blended: the result is resized bilinearly.
      lut: on a CPU, of bytes: [256] wide, each as a float, or, not blended, [C, 256] in the result's type, its result. Otherwise None.
      mean, std: [C] wide; on a GPU None if nothing is taken off, or divided by.
      y, wy, x, wx: [out] int64 lower sample and wide weight of the next one, of rows and columns; None where nothing is resized.
    """

    blended: bool
    wide: torch.dtype
    lut: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    y: Tensor | None = None
    wy: Tensor | None = None
    x: Tensor | None = None
    wx: Tensor | None = None


def values(
    images: Tensor, mean: Tensor | None, std: Tensor | None, size: list[int] | None, mode: str, dtype: torch.dtype, tables: bool
) -> Values:
    """What one call gives its kernel. `tables`: of a CPU's, which look bytes up and are given a mean and a std always."""
    wide = torch.promote_types(dtype, torch.float32)
    blended, bytes_ = size is not None and mode == "bilinear", images.dtype == torch.uint8
    axes: list[Tensor] = []
    for stored, out in zip(images.shape[1:3], size or (), strict=False):
        axes += taps(stored, out, mode, wide, images.device)
    own = [None if v is None else v.to(wide).contiguous() for v in (mean, std)]
    if not tables:
        return Values(blended, wide, None, *own, *axes)
    own = [tiny(v, wide, fill, images) for v, fill in zip(own, (0.0, 1.0), strict=True)]
    if bytes_ and not blended:
        return Values(blended, wide, shades(images, mean, std, dtype), *own, *axes)
    return Values(blended, wide, torch.arange(256, dtype=wide, device=images.device) / 255 if bytes_ else None, *own, *axes)
