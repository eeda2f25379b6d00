"""Class activation maps in C++: what the compiled part gets, and what is allocated for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._native import NCHW, NHWC, blank, check_range, dense, vector

_NORM = {"none": 0, "minmax": 1, "max": 2}


def cam(features: Tensor, weight: Tensor, labels: Tensor, grad: Tensor | None) -> Tensor:
    """The raw map [B, h, w]; with `grad` (of that map) the gradient of `features` [B, K, h, w], of which only the layout is read."""
    wide = torch.promote_types(features.dtype, torch.float32)
    if features.device.type != "cpu":
        raise RuntimeError(f"the C++ class activation map runs on the CPU, features are on {features.device}")
    if grad is None:
        features = dense(features)
        given, out = features, torch.empty((features.shape[0], *features.shape[2:]), dtype=wide, device=features.device)
        pair = (given, out)
    else:
        out, grad = blank(features), grad.to(wide).contiguous()
        pair = (out, grad)
    weight, labels = vector(weight, wide), labels.contiguous()
    check_range("label", labels, weight.shape[0])
    batch, channels, h, w = features.shape
    like = pair[0]
    layout = NCHW if like.is_contiguous() and h * w > 1 else NHWC
    sizes = (batch, channels, h * w, weight.shape[0], _native.DTYPE[features.dtype], layout)
    kernel = "cam_fwd" if grad is None else "cam_bwd"
    _native.launch(kernel, (pair[0], weight, labels, pair[1]), *sizes, work=features)
    return out


def cam_finish(raw: Tensor, relu: bool, norm: str, size: list[int]) -> Tensor:
    """relu, scaling and bilinear resize of raw maps [B, h, w]; an empty `size` leaves the size."""
    if raw.device.type != "cpu":
        raise RuntimeError(f"the C++ class activation map runs on the CPU, the map is on {raw.device}")
    raw = raw.contiguous()
    batch, h, w = raw.shape
    height, width = size or (h, w)
    rows = torch.empty((batch, h, width), dtype=raw.dtype, device=raw.device)
    out = torch.empty((batch, height, width), dtype=raw.dtype, device=raw.device) if size else None
    sizes = (batch, h, w, height, width, _native.DTYPE[raw.dtype], relu, _NORM[norm])
    _native.launch("cam_finish", (raw, rows, out), *sizes, work=rows if out is None else out)
    return rows if out is None else out
