"""`fastkd::replay_gather`: backends behind one name. The store is data, so there is no gradient."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _native
from .._library import define, kernels_for
from .reference import replay_gather_ref
from .values import values


def _gather(
    images: Tensor,
    index: Tensor,
    dy: Tensor | None,
    dx: Tensor | None,
    flip: Tensor | None,
    pad: int,
    mean: Tensor | None,
    std: Tensor | None,
    size: list[int] | None,
    mode: str,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    found = kernels_for(str(__package__), "replay_gather", images)
    if found is None or dtype not in _native.DTYPE:
        two = None if size is None else (size[0], size[1])
        return replay_gather_ref(images, index, dy, dx, flip, pad, mean, std, two, mode, channels_last, dtype)
    out = _like(images, index, dy, dx, flip, pad, mean, std, size, mode, channels_last, dtype)
    given = values(images, mean, std, size, mode, dtype, tables=found.looks_up(images))
    found.replay_gather(images, index, (dy, dx, flip), pad, given, out, channels_last)
    return out


def _like(
    images: Tensor, index: Tensor, dy: Any, dx: Any, flip: Any, pad: int, mean: Any, std: Any, size: Any, mode: str,
    channels_last: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _, height, width, channels = images.shape
    height, width = (height, width) if size is None else size
    if channels_last:
        return torch.empty((index.shape[0], height, width, channels), dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    return torch.empty((index.shape[0], channels, height, width), dtype=dtype, device=images.device)


def _no_gradient(ctx: Any, grad: Tensor) -> NoReturn:
    raise ValueError("replay_gather computes no gradient; pass a store, mean and std that do not require one")


gather = define(
    "replay_gather(Tensor images, Tensor index, Tensor? dy, Tensor? dx, Tensor? flip, SymInt pad, Tensor? mean, Tensor? std,"
    " SymInt[]? size, str mode, bool channels_last, ScalarType dtype) -> Tensor",
    _gather,
    _like,
    backward=_no_gradient,
)
