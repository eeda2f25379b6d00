"""Definition of class activation maps in plain torch: the specification of every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def raw_map_ref(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[B, h, w]: features weighted by the head's row of each label, in at least fp32."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    return torch.einsum("bk,bkhw->bhw", weight[labels].to(dtype), features.to(dtype))


def scale_map(m: Tensor, norm: str, norm_grad: bool) -> Tensor:
    """Each map to [0, 1]; a constant map becomes 0 with gradient 0, NaN stays NaN."""
    if norm == "none" or m.numel() == 0:
        return m
    edge = m if norm_grad else m.detach()
    high = edge.amax((1, 2), keepdim=True)
    if norm == "max":
        return torch.where(high <= 0, 0.0, m / (high.clamp_min(0) + EPS))
    low = edge.amin((1, 2), keepdim=True)
    return torch.where(high == low, 0.0, (m - low) / (high - low + EPS))


def finish_map(
    raw: Tensor, relu: bool, norm: str, norm_grad: bool, size: tuple[int, int] | None, renorm: bool
) -> Tensor:
    m = F.relu(raw) if relu else raw
    m = scale_map(m, norm, norm_grad)
    if size is not None:
        if m.shape[0] == 0:
            return m[:, :1, :1].expand(0, *size)
        m = F.interpolate(m[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        if renorm:
            m = scale_map(m, norm, norm_grad)
    return m


def class_activation_map_ref(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    relu: bool,
    norm: str,
    norm_grad: bool,
    size: tuple[int, int] | None,
    renorm: bool,
) -> Tensor:
    return finish_map(raw_map_ref(features, weight, labels), relu, norm, norm_grad, size, renorm)
