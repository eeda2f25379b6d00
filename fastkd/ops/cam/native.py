"""Class activation maps in C++ and CUDA: what the compiled part gets, and what is allocated for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._native import DTYPE, NCHW, NHWC, blank, check_range, dense

NORM = {"none": 0, "minmax": 1, "max": 2}


def cells_first(like: Tensor) -> bool:
    """Whether the cells of a map lie side by side (NCHW), rather than the channels of a cell. `like` is dense."""
    return like.is_contiguous() and like.shape[2] * like.shape[3] > 1


def _sizes(features: Tensor, weight: Tensor, size: Sequence[int], nchw: bool) -> tuple[list[int], int, int, int]:
    """batch, channels, h, w, classes, height, width; then dtype of features and of weight, and the layout."""
    sizes = [*features.shape, weight.shape[0], *size]
    return sizes, DTYPE[features.dtype], DTYPE[weight.dtype], NCHW if nchw else NHWC


def cam_fwd(
    features: Tensor, weight: Tensor, labels: Tensor, relu: bool, norm: str, size: Sequence[int], renorm: bool
) -> tuple[Tensor, Tensor]:
    """(map [B, *size], slope [B, h, w])."""
    features, weight, labels = dense(features), weight.contiguous(), labels.contiguous()
    check_range("label", labels, weight.shape[0])
    wide = torch.promote_types(features.dtype, torch.float32)
    batch, _, h, w = features.shape
    out = torch.empty((batch, *(size or (h, w))), dtype=wide, device=features.device)
    slope = torch.empty((batch, h, w), dtype=wide, device=features.device)
    sizes = _sizes(features, weight, out.shape[1:], cells_first(features))
    options = relu, NORM[norm], bool(size), bool(size) and renorm
    _native.launch("cam_fwd", (features, weight, labels, out, slope), *sizes, *options, work=features)
    return out, slope


def cam_bwd(
    grad: Tensor, features: Tensor, weight: Tensor, labels: Tensor, slope: Tensor, resized: bool, want_features: bool
) -> tuple[Tensor, Tensor]:
    """(d features in their layout, or an empty tensor; d raw map [B, h, w])."""
    grad, slope = grad.to(slope.dtype).contiguous(), slope.contiguous()
    weight, labels = weight.contiguous(), labels.contiguous()
    check_range("label", labels, weight.shape[0])
    dfeatures = blank(features) if want_features else None
    draw = torch.empty_like(slope)
    sizes = _sizes(features, weight, grad.shape[1:], dfeatures is None or cells_first(dfeatures))
    _native.launch("cam_bwd", (grad, weight, labels, slope, dfeatures, draw), *sizes, resized, work=features)
    return features.new_empty(0) if dfeatures is None else dfeatures, draw
