"""Definition of class activation maps in plain torch: the specification of every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def rows_ref(weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, K]: the head's row of each label. A label out of range is refused on the CPU and clamped on a GPU."""
    if labels.is_cuda:
        labels = labels.clamp(0, weight.shape[0] - 1)
    return weight.index_select(0, labels).to(dtype)


def _contract(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """An einsum that a region of mixed precision leaves alone."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.einsum(equation, a, b)


def raw_map_ref(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[B, h, w]: features weighted by the head's row of each label, in at least fp32."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    return _contract("bk,bkhw->bhw", rows_ref(weight, labels, dtype), features.to(dtype))


def weight_grad_ref(draw: Tensor, features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """d weight [C, K] from the gradient of the raw map: a row is the sum over the samples of its class."""
    rows = _contract("bhw,bkhw->bk", draw, features.to(draw.dtype))
    if labels.is_cuda:
        labels = labels.clamp(0, weight.shape[0] - 1)
    return torch.zeros_like(weight, dtype=draw.dtype).index_add(0, labels, rows).to(weight.dtype)


def _range(edge: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """What is subtracted, what is divided by, and whether a map has nothing to show: [B, 1, 1] each."""
    high = edge.amax((1, 2), keepdim=True)
    if norm == "max":
        return torch.zeros_like(high), high.clamp_min(0) + EPS, high <= 0
    low = edge.amin((1, 2), keepdim=True)
    return low, high - low + EPS, high == low


def scale_map(m: Tensor, norm: str, norm_grad: bool) -> Tensor:
    """Each map to [0, 1]; a constant map becomes 0 with gradient 0, NaN stays NaN."""
    if norm == "none" or m.numel() == 0:
        return m
    low, divisor, flat = _range(m if norm_grad else m.detach(), norm)
    return torch.where(flat, 0.0, (m - low) / divisor)


def _rate(m: Tensor, norm: str) -> Tensor:
    """[B, 1, 1]: the derivative of `scale_map`, minimum and maximum constant."""
    if norm == "none" or m.numel() == 0:
        return m.new_ones((m.shape[0], 1, 1))
    _, divisor, flat = _range(m, norm)
    return torch.where(flat, 0.0, 1 / divisor)


def resize_map(m: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, h, w] → [B, *size], bilinear, align_corners=False."""
    if m.shape[0] == 0:
        return m[:, :1, :1].expand(0, *size)
    return F.interpolate(m[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def finish_map(
    raw: Tensor, relu: bool, norm: str, norm_grad: bool, size: tuple[int, int] | None, renorm: bool
) -> Tensor:
    m = scale_map(F.relu(raw) if relu else raw, norm, norm_grad)
    if size is not None:
        m = resize_map(m, size)
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


def slope_ref(raw: Tensor, relu: bool, norm: str, size: tuple[int, int] | None, renorm: bool) -> Tensor:
    """[B, h, w]: what the gradient of the small map is multiplied with, minimum and maximum constant.

    d raw = slope * resizeᵀ(d map): 0 where relu cuts or a map has nothing to show, else the product of the scalings.
    """
    m = F.relu(raw) if relu else raw
    rate = _rate(m, norm)
    if size is not None and renorm:
        rate = rate * _rate(resize_map(scale_map(m, norm, False), size), norm)
    return torch.where(raw <= 0, 0.0, rate) if relu else rate.expand_as(raw).clone()


def class_activation_map_bwd_ref(
    grad: Tensor, features: Tensor, weight: Tensor, labels: Tensor, slope: Tensor, resized: bool
) -> tuple[Tensor, Tensor]:
    """(d features, d raw map [B, h, w]) from the gradient of the map; `features` lends its shape and dtype only."""
    if resized and grad.numel():
        batch, h, w = slope.shape
        grad = torch.ops.aten.upsample_bilinear2d_backward(grad[:, None], grad.shape[1:], [batch, 1, h, w], False)[:, 0]
    draw = torch.where(slope == 0, 0.0, slope * grad) if grad.numel() else torch.zeros_like(slope)
    dfeatures = rows_ref(weight, labels, draw.dtype)[:, :, None, None] * draw[:, None]
    return dfeatures.to(features.dtype), draw
