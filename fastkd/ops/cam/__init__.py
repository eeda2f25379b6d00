"""Class activation maps of the last feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import choose
from . import registered
from .reference import class_activation_map_ref, finish_map

NORMS = ("none", "minmax", "max")


def class_activation_map(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    relu: bool = False,
    norm: str = "none",
    norm_grad: bool = False,
    size: tuple[int, int] | None = None,
    renorm: bool = False,
) -> Tensor:
    """Class activation map (Zhou et al., CVPR 2016) of each sample for its label.

      1. M[b] = sum_k weight[labels[b], k] features[b, k]
      2. M    = relu(M)                              if relu
      3. M    = (M - min)/(max - min + 1e-8)         "minmax", per map; a constant map is 0
         M    = M/(max + 1e-8)                       "max", per map; a map without a positive value is 0
      4. M    = bilinear resize to `size`            align_corners=False
      5. step 3 once more                            if renorm, after a resize: what pytorch-grad-cam does

    With a head `linear(mean over h, w)` this is Grad-CAM of the logit up to the factor 1/(h w), without a backward pass.

    Bytes:  reads features once, writes the map and h w numbers an image; backward reads the gradient of the map and writes that
            of the features. One kernel each way; two in backward with Triton, and with CUDA for maps of more than 1024 cells or
            a few large images.
    Saves:  weight, labels, h w numbers an image, and features (their values are read only if weight needs a gradient).

    Args:
      features:  [B, K, h, w] floating point, any layout.
      weight:    [C, K] rows of the classifier head, floating point.
      labels:    [B] int64 in 0..C-1.
      norm_grad: True lets the gradient pass through min and max (ties share it; the scaling is then plain torch); False treats them
        as constants.
      size:      (H, W) of the result, or None for h, w.
    Returns:
      [B, h, w] or [B, *size], at least fp32.
    Gradients: features and weight; first order in the native backends, any order in `reference`.
    Raises:
      ValueError: shapes, dtypes or an unknown norm. IndexError: a label outside 0..C-1 (on the CPU; a GPU takes the nearest row).
    """
    if features.dim() != 4 or not features.is_floating_point():
        raise ValueError(f"features must be floating point [B, K, h, w], found {features.dtype} of shape {tuple(features.shape)}")
    if weight.dim() != 2 or weight.shape[1] != features.shape[1] or weight.shape[0] == 0 or not weight.is_floating_point():
        expected = f"floating point [C, {features.shape[1]}] with at least one row"
        raise ValueError(f"weight must be {expected}, found {weight.dtype} of shape {tuple(weight.shape)}")
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be int64 [{features.shape[0]}], found {labels.dtype} of shape {tuple(labels.shape)}")
    if norm not in NORMS:
        raise ValueError(f"unknown norm '{norm}'; expected one of {', '.join(NORMS)}")
    if size is not None:
        size = (int(size[0]), int(size[1]))
        if min(size) < 1:
            raise ValueError(f"size must be (H, W) of at least 1, found {size}")
    if choose("class_activation_map", features) == "reference" or features.numel() == 0:
        return class_activation_map_ref(features, weight, labels, relu, norm, norm_grad, size, renorm)
    if size == features.shape[2:] and not renorm:
        size = None
    if norm_grad:
        raw, _ = registered.forward(features, weight, labels, False, "none", [], False)
        return finish_map(raw, relu, norm, norm_grad, size, renorm)
    return registered.forward(features, weight, labels, relu, norm, list(size or ()), renorm)[0]  # type: ignore[no-any-return]
