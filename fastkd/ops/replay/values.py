"""What the kernels of the gather get beside addresses: how stored values become results, and where samples of a resized image lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import shades, taps, tiny


@dataclass(frozen=True)
class Values:
    """Small tables on the device of the store.

    A byte that is not blended with others goes through `lut` [C, 256], in the result's type: the bits are the definition's. Other
    values are blended and normalised in the kernel, in `wide`; bytes become floats by `lut` [256] there.

    Attributes:
      blended: the result is resized bilinearly.
      lut: see above, or None for a floating store. mean, std: [C] wide.
      y, wy, x, wx: [out] int64 lower sample and wide weight of the next one, of rows and columns; None where nothing is resized.
    """

    blended: bool
    wide: torch.dtype
    lut: Tensor | None
    mean: Tensor
    std: Tensor
    y: Tensor | None = None
    wy: Tensor | None = None
    x: Tensor | None = None
    wx: Tensor | None = None


def values(
    images: Tensor, mean: Tensor | None, std: Tensor | None, size: list[int] | None, mode: str, dtype: torch.dtype
) -> Values:
    """The tables of one call."""
    wide = torch.promote_types(dtype, torch.float32)
    blended, bytes_ = size is not None and mode == "bilinear", images.dtype == torch.uint8
    axes: list[Tensor] = []
    for stored, out in zip(images.shape[1:3], size or (), strict=False):
        axes += taps(stored, out, mode, wide, images.device)
    own = tuple(tiny(v, wide, fill, images).contiguous() for v, fill in ((mean, 0.0), (std, 1.0)))
    if bytes_ and not blended:
        return Values(blended, wide, shades(images, mean, std, dtype), *own, *axes)
    lut = torch.arange(256, dtype=wide, device=images.device) / 255 if bytes_ else None
    return Values(blended, wide, lut, *own, *axes)
