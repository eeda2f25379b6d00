"""`fastkd::replay_gather`: backends behind one name. The store is data, so there is no gradient."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _native
from .._library import choose, define
from . import native
from .reference import replay_gather_ref, shades, tiny


def _gather(
    images: Tensor,
    index: Tensor,
    dy: Tensor | None,
    dx: Tensor | None,
    flip: Tensor | None,
    pad: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if choose("replay_gather", images) == "reference" or dtype not in _native.DTYPE:
        return replay_gather_ref(images, index, dy, dx, flip, pad, mean, std, dtype)
    if images.dtype == torch.uint8:
        lut = shades(images, mean, std, dtype)
        return native.replay_gather(images, index, dy, dx, flip, pad, lut, None, None, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = tiny(mean, wide, 0.0, images), tiny(std, wide, 1.0, images)
    return native.replay_gather(images, index, dy, dx, flip, pad, None, mean, std, dtype)


def _like(
    images: Tensor, index: Tensor, dy: Any, dx: Any, flip: Any, pad: int, mean: Any, std: Any, dtype: torch.dtype
) -> Tensor:
    _, height, width, channels = images.shape
    return torch.empty((index.shape[0], height, width, channels), dtype=dtype, device=images.device).permute(0, 3, 1, 2)


def _no_gradient(ctx: Any, grad: Tensor) -> NoReturn:
    raise ValueError("replay_gather computes no gradient; pass a store, mean and std that do not require one")


define(
    "replay_gather(Tensor images, Tensor index, Tensor? dy, Tensor? dx, Tensor? flip, int pad, Tensor? mean, Tensor? std,"
    " ScalarType dtype) -> Tensor",
    _gather,
    _like,
    backward=_no_gradient,
)
