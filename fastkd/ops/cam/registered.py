"""`fastkd::class_activation_map_*`: the weighted sum over channels and its adjoint, and the finishing of the small map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._library import choose, define
from . import native
from .reference import EPS, finish_map, raw_map_ref


def _fwd(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if choose("class_activation_map", features) == "reference":
        return raw_map_ref(features, weight, labels).contiguous()
    return native.cam(features, weight, labels, None)


def _bwd(grad: Tensor, features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`features` lends its shape, dtype and layout only."""
    if choose("class_activation_map", features) == "reference":
        wide = torch.promote_types(features.dtype, torch.float32)
        out = weight[labels].to(wide)[:, :, None, None] * grad[:, None].to(wide)
        return _native.dense(out.to(features.dtype), features)
    return native.cam(features, weight, labels, grad)


def _map_like(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    batch, _, h, w = features.shape
    return torch.empty((batch, h, w), dtype=torch.promote_types(features.dtype, torch.float32), device=features.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    features, weight, labels = ctx.saved_tensors
    dfeatures = dweight = None
    if ctx.needs_input_grad[0]:
        dfeatures = torch.ops.fastkd.class_activation_map_bwd(grad, features, weight, labels)
    if ctx.needs_input_grad[1]:
        rows = torch.einsum("bhw,bkhw->bk", grad, features.to(grad.dtype))
        dweight = torch.zeros_like(weight, dtype=grad.dtype).index_add(0, labels, rows).to(weight.dtype)
    return dfeatures, dweight, None


define(
    "class_activation_map_fwd(Tensor features, Tensor weight, Tensor labels) -> Tensor",
    _fwd,
    _map_like,
    backward=_backward,
    save=_save,
)
define(
    "class_activation_map_bwd(Tensor grad, Tensor features, Tensor weight, Tensor labels) -> Tensor",
    _bwd,
    lambda grad, features, weight, labels: _native.blank(features),
)


def _finish(raw: Tensor, relu: bool, norm: str, size: list[int]) -> Tensor:
    if choose("class_activation_map", raw) == "reference":
        return finish_map(raw, relu, norm, False, (size[0], size[1]) if size else None, False).clone()
    return native.cam_finish(raw, relu, norm, size)


def _finish_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    raw, ctx.relu, ctx.norm, ctx.size = inputs
    ctx.save_for_backward(raw)


def _resize_matrix(like: Tensor, n: int, m: int) -> Tensor:
    """[m, n]: bilinear resize of n values to m as a matrix (align_corners=False)."""
    at = ((torch.arange(m, dtype=like.dtype, device=like.device) + 0.5) * (n / m) - 0.5).clamp_min(0)[:, None]
    left, source = at.floor().clamp(max=n - 1), torch.arange(n, device=like.device)
    part = at - left
    return (source == left) * (1 - part) + (source == (left + 1).clamp(max=n - 1)) * part


def _finish_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """Min and max are constants here; a map that is all one value, or has no positive one under "max", has gradient 0."""
    (raw,) = ctx.saved_tensors
    if ctx.size:
        down, across = (_resize_matrix(raw, n, m) for n, m in zip(raw.shape[1:], ctx.size, strict=True))
        grad = down.t() @ grad @ across
    if ctx.norm != "none":
        m = raw.relu() if ctx.relu else raw
        high = m.amax((1, 2), keepdim=True)
        if ctx.norm == "max":
            grad = torch.where(high <= 0, 0.0, grad / (high + EPS))
        else:
            low = m.amin((1, 2), keepdim=True)
            grad = torch.where(high == low, 0.0, grad / (high - low + EPS))
    return torch.where(raw <= 0, 0.0, grad) if ctx.relu else grad, None, None, None


define(
    "class_activation_map_finish(Tensor raw, bool relu, str norm, SymInt[] size) -> Tensor",
    _finish,
    lambda raw, relu, norm, size: raw.new_empty((raw.shape[0], *(size or raw.shape[1:]))),
    backward=_finish_backward,
    save=_finish_save,
)
