"""Reading a batch out of an image store: gather, crop, flip, resize and normalise in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import choose
from . import registered as _registered
from .reference import replay_gather_ref

MODES = ("bilinear", "nearest")


def replay_gather(
    images: Tensor,
    index: Tensor,
    *,
    dy: Tensor | None = None,
    dx: Tensor | None = None,
    flip: Tensor | None = None,
    pad: int = 0,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    memory_format: torch.memory_format = torch.channels_last,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of an image store as a network's input: cropped, flipped, resized, normalised, in the layout and type of choice.

      1. s[i, j]   = image[i + dy - pad, (W - 1 - j if flip else j) + dx - pad], black (0) outside the image
      2. s         = s / 255                           uint8 stores
      3. s         = s resized                         where size is given; pixel i samples (i + 1/2) H/size[0] - 1/2, as
                                                       F.interpolate(align_corners=False, antialias=False); nearest takes ⌊i H/size[0]⌋
      4. out[c]    = (s[c] - mean[c]) / std[c]         where mean or std is given

    Bytes:  reads B·H·W·C of the store, writes the batch once.
    Saves:  nothing: the store is data and gets no gradient.

    Args:
      images: [N, H, W, C] uint8 (0..255), fp16 or fp32. Rows may lie apart (a slice of rows is read in place); pixels of a row that
              are not contiguous are refused, because a copy of the whole store in every call is nobody's intention.
      index:  [B] int64 in 0..N-1, repeats allowed.
      dy, dx: [B] int64 in 0..2·pad (pad keeps the image where it is), or None for the middle.
      flip:   [B] bool, True mirrors left and right; or None.
      pad:    how many pixels the crop may move.
      mean, std: [C] on the device of `images`, or None for 0 and 1.
      dtype:  of the result; None is torch's default dtype.
    Returns:
      [B, C, H, W] with channels_last strides. All backends give the same bits for uint8 stores.
    Raises:
      ValueError: shapes or dtypes that do not fit. IndexError: a row outside the store (on the CPU).
    """
    if images.dim() != 4 or images.dtype not in (torch.uint8, torch.float16, torch.float32) or images.requires_grad:
        raise ValueError(
            f"images must be a store [N, H, W, C] of uint8, float16 or float32 without gradient, found {images.dtype} "
            f"of shape {tuple(images.shape)}"
        )
    if not images[:1].is_contiguous():
        raise ValueError(f"the pixels of an image must be contiguous [H, W, C], found strides {images.stride()}; pass images.contiguous()")
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [B], found {index.dtype} of shape {tuple(index.shape)}")
    for name, v, kind in (("dy", dy, torch.int64), ("dx", dx, torch.int64), ("flip", flip, torch.bool)):
        if v is not None and (v.shape != index.shape or v.dtype != kind):
            raise ValueError(f"{name} must be {kind} [{index.shape[0]}], found {v.dtype} of shape {tuple(v.shape)}")
    for name, v in (("mean", mean), ("std", std)):
        if v is not None and v.shape != images.shape[3:]:
            raise ValueError(f"{name} must be [{images.shape[3]}], one value per channel, found {tuple(v.shape)}")
    if pad < 0:
        raise ValueError(f"pad must be 0 or more, found {pad}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width) of at least 1, found {size}")
    if mode not in MODES:
        raise ValueError(f"unknown mode '{mode}'; expected one of {', '.join(MODES)}")
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(f"memory_format must be torch.channels_last or torch.contiguous_format, found {memory_format}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, found {dtype}")
    last = memory_format == torch.channels_last
    if choose("replay_gather", images) == "reference":
        return replay_gather_ref(images, index, dy, dx, flip, pad, mean, std, size, mode, last, dtype)
    return _registered.gather(images, index, dy, dx, flip, pad, mean, std, size, mode, last, dtype)  # type: ignore[no-any-return]
