"""`fastkd::class_activation_map_*`: backends behind one name, shapes, and first-order gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._library import define, kernels_for
from . import reference as ref

_kernels = functools.partial(kernels_for, str(__package__), "class_activation_map")


def _fwd(
    features: Tensor, weight: Tensor, labels: Tensor, relu: bool, norm: str, size: Sequence[int], renorm: bool
) -> tuple[Tensor, Tensor]:
    """The map [B, *size] (empty size: [B, h, w]), and the slope that backward needs; see `reference.slope_ref`."""
    kernels = _kernels(features)
    if kernels is None:
        target = (size[0], size[1]) if size else None
        raw = ref.raw_map_ref(features, weight, labels)
        out = ref.finish_map(raw, relu, norm, False, target, renorm)
        return out.contiguous(), ref.slope_ref(raw, relu, norm, target, renorm).contiguous()
    result: tuple[Tensor, Tensor] = kernels.cam_fwd(features, weight, labels, relu, norm, size, renorm)
    return result


def _bwd(
    grad: Tensor, features: Tensor, weight: Tensor, labels: Tensor, slope: Tensor, resized: bool, want_features: bool
) -> tuple[Tensor, Tensor]:
    """(d features, or an empty tensor where they are not wanted; d raw map). `features` lends its shape, dtype and layout only."""
    kernels = _kernels(features)
    if kernels is None:
        dfeatures, draw = ref.class_activation_map_bwd_ref(grad, features, weight, labels, slope, resized)
        return _native.dense(dfeatures, features) if want_features else features.new_empty(0), draw
    result: tuple[Tensor, Tensor] = kernels.cam_bwd(grad, features, weight, labels, slope, resized, want_features)
    return result


def _fwd_fake(
    features: Tensor, weight: Tensor, labels: Tensor, relu: bool, norm: str, size: Sequence[int], renorm: bool
) -> tuple[Tensor, Tensor]:
    batch, _, h, w = features.shape
    out = torch.empty((batch, *(size or (h, w))), dtype=torch.promote_types(features.dtype, torch.float32), device=features.device)
    return out, out.new_empty((batch, h, w))


def _bwd_fake(
    grad: Tensor, features: Tensor, weight: Tensor, labels: Tensor, slope: Tensor, resized: bool, want_features: bool
) -> tuple[Tensor, Tensor]:
    return _native.blank(features) if want_features else features.new_empty(0), torch.empty_like(slope)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, weight, labels, _, _, size, _ = inputs
    ctx.resized = len(size) > 0
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(features, weight, labels, output[1])


def _backward(ctx: Any, grad: Tensor | None, _slope: None) -> tuple[Tensor | None, ...]:
    features, weight, labels, slope = ctx.saved_tensors
    want_features, want_weight = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 7
    dfeatures, draw = backward(grad, features, weight, labels, slope, ctx.resized, want_features)
    dweight = ref.weight_grad_ref(draw, features, weight, labels) if want_weight else None
    return dfeatures if want_features else None, dweight, None, None, None, None, None


forward = define(
    "class_activation_map_fwd(Tensor features, Tensor weight, Tensor labels, bool relu, str norm, SymInt[] size, bool renorm)"
    " -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    backward=_backward,
    save=_save,
)
backward = define(
    "class_activation_map_bwd(Tensor grad, Tensor features, Tensor weight, Tensor labels, Tensor slope, bool resized,"
    " bool want_features) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
