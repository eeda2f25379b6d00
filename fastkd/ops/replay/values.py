"""What the kernels of the gather get beside addresses: how stored values become results, and where samples of a resized image lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import shades, taps, tiny


@dataclass(frozen=True)
class Values:
    """Small tables on the device of the store.

    Bytes become numbers by a table, so that the bits are the definition's. On a CPU, what is not blended with others is looked up whole;
    everything else is blended and normalised in the kernel, in `wide`: on a GPU a table that each call made would be several launches,
    longer than the gather of a small batch.

    Attributes:
      blended: the result is resized bilinearly.
      lut: [256] wide, a byte as a float; whole: [C, 256] in the result's type, its result. None for a floating store.
      mean, std: [C] wide; None, but where whole, if nothing is taken off, or divided by.
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
    images: Tensor, mean: Tensor | None, std: Tensor | None, size: list[int] | None, mode: str, dtype: torch.dtype, whole: bool
) -> Values:
    """The tables of one call. `whole`: the kernel is given all there can be, results of bytes among it."""
    wide = torch.promote_types(dtype, torch.float32)
    blended, bytes_ = size is not None and mode == "bilinear", images.dtype == torch.uint8
    axes: list[Tensor] = []
    for stored, out in zip(images.shape[1:3], size or (), strict=False):
        axes += taps(stored, out, mode, wide, images.device)
    own = [None if v is None else v.to(wide).contiguous() for v in (mean, std)]
    if whole:
        own = [tiny(v, wide, fill, images) for v, fill in zip(own, (0.0, 1.0), strict=True)]
    if whole and bytes_ and not blended:
        return Values(blended, wide, shades(images, mean, std, dtype), *own, *axes)
    return Values(blended, wide, floats(images.device, wide) if bytes_ else None, *own, *axes)


_FLOATS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def floats(device: torch.device, wide: torch.dtype) -> Tensor:
    """[256]: each byte divided by 255. Made once a device, but not while a CUDA graph is captured, whose memory it would be."""
    if (device, wide) in _FLOATS:
        return _FLOATS[device, wide]
    made = torch.arange(256, dtype=wide, device=device) / 255
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return made
        torch.cuda.current_stream(device).synchronize()  # other streams may read it next
    return _FLOATS.setdefault((device, wide), made)
