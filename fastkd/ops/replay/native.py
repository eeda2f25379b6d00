"""The gather from an image store in C++ and CUDA: what the compiled part gets, and what is allocated for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native


def replay_gather(
    images: Tensor,
    index: Tensor,
    dy: Tensor | None,
    dx: Tensor | None,
    flip: Tensor | None,
    pad: int,
    lut: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B, C, H, W] channels_last; `lut` [C, 256] in `dtype` for uint8 stores, else mean and std [C]."""
    images, index = images.contiguous(), index.contiguous()
    _native.check_range("row", index, images.shape[0])
    stored, height, width, channels = images.shape
    if channels > 4096:
        raise ValueError(f"a store with {channels} channels; at most 4096 are expected")
    if stored == 0 and index.numel():
        raise ValueError("the store is empty")
    out = torch.empty((index.shape[0], height, width, channels), dtype=dtype, device=images.device)
    wide = torch.promote_types(dtype, torch.float32)
    rows = [None if v is None else v.contiguous() for v in (dy, dx, flip)]
    tables = [None if v is None else v.contiguous() for v in (lut, *(None if v is None else v.to(wide) for v in (mean, std)))]
    sizes = [index.shape[0], stored, height, width, channels, pad]
    kinds = _native.DTYPE[images.dtype], _native.DTYPE[dtype]
    _native.launch("replay_gather", (images, index, *rows, *tables, out), sizes, *kinds, work=out)
    return out.permute(0, 3, 1, 2)
