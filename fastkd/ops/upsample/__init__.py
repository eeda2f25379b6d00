"""Low-resolution generation: what stands behind or before a nearest doubling, computed without or before doubling."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import choose
from . import reference as ref
from . import registered as _registered


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """3x3 convolution of the image doubled by nearest neighbours, without ever making that image.

      1. w4 = 4x4 fold of the 3x3 kernel            # rows (w2, w1 + w2, w0 + w1, w0), columns alike
      2. y  = conv_transpose2d(x, w4, bias, stride 2, padding 1)
         == conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)

    Exact in real arithmetic; 2.25 times fewer multiplications in forward and in both gradients.

    Bytes:  reads x, writes y; the upsampled image (4x) is neither written nor kept for backward.
    Saves:  x and w4.

    Args:
      x:      [N, Cin, H, W], any layout. channels_last is kept; on a CPU the result has it in any case.
      weight: [Cout, Cin, 3, 3]; folded in at least fp32 and rounded once.
      bias:   [Cout] or None.
    Returns:
      [N, Cout, 2H, 2W]. Follows autocast as a convolution does.
    Gradients: x, weight and bias, any order, in every backend ("fold" is stock torch; "reference" is step 2's last line).
    Raises:
      ValueError: another kernel size, grouped weights, or shapes that do not fit.
    """
    if x.dim() != 4 or weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3) or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"expected x [N, Cin, H, W] and weight [Cout, Cin, 3, 3] without groups, found {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if choose("upsample_conv2d", x) == "reference":
        return ref.upsample_conv2d_ref(x, weight, bias)
    return ref.upsample_conv2d_fold(x, weight, bias)


def fold_stem(weight: Tensor) -> Tensor:
    """The 4x4 kernel that does to an image what a 7x7 stem with stride 2 and padding 3 does to the image doubled.

      w4 = 4x4 fold of the 7x7 kernel               # rows (w0, w1 + w2, w3 + w4, w5 + w6), columns alike

    conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, stride=2, padding=3) == conv2d(pad(x, (2, 1, 2, 1)), w4).

    Args:
      weight: [Cout, Cin, 7, 7]; the sums run in at least fp32 and are rounded once.
    Returns:
      [Cout, Cin, 4, 4].
    Gradients: weight, any order.
    Raises:
      ValueError: another kernel size.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (7, 7):
        raise ValueError(f"a stem that can be folded has a kernel [Cout, Cin, 7, 7], found {tuple(weight.shape)}")
    return ref.fold_stem(weight)


def upsampled_stem_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 2, padding: int = 3, dilation: int = 1, groups: int = 1
) -> Tensor:
    """A network's strided 7x7 stem on the image doubled by nearest neighbours, computed on the image itself.

      1. w4 = fold_stem(weight)
      2. y  = conv2d(pad(x, 2 before and 1 behind, zeros), w4, bias)
         == conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, stride=2, padding=3)

    Exact in real arithmetic; 49 taps become 16 and the doubled image disappears. Two conditions are the caller's: normalise x
    *before* this call, for zeros of the padding are zeros of the normalised image here too; and crop or shift in pixels of x, because
    an odd offset in the doubled image has no counterpart.

    Bytes:  reads x, writes y (and a padded x between them).
    Saves:  the padded x and w4.

    Args:
      x:      [N, Cin, H, W], normalised, any layout (channels_last is kept).
      weight: [Cout, Cin, 7, 7] of the stem. bias: [Cout] or None.
      stride, padding, dilation, groups: the stem's own, to be checked.
    Returns:
      [N, Cout, H, W]. Follows autocast as a convolution does.
    Gradients: x, weight and bias, any order, in every backend.
    Raises:
      ValueError: a stem of another form.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"expected x [N, Cin, H, W] and weight [Cout, Cin, 7, 7], found {tuple(x.shape)} and {tuple(weight.shape)}")
    form = [_both(tuple(weight.shape[2:])), *(_both(v) for v in (stride, padding, dilation)), groups]
    if form != [7, 2, 3, 1, 1]:
        raise ValueError(
            "only a stem of kernel 7, stride 2, padding 3, dilation 1 and groups 1 can be folded; found kernel {}, stride {}, padding {}, "
            "dilation {} and groups {}: double the image and convolve".format(*form)
        )
    if choose("upsampled_stem_conv2d", x) == "reference":
        return ref.upsampled_stem_conv2d_ref(x, weight, bias)
    return ref.upsampled_stem_conv2d_fold(x, weight, bias)


def _both(v: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """(3, 3) as 3."""
    return v[0] if isinstance(v, tuple) and len(set(v)) == 1 else v


def upsample_affine_tanh(x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """tanh(scale x + bias), doubled by nearest neighbours: each value is computed once and written four times.

      y = interpolate(tanh(scale x + bias), scale_factor=2, mode="nearest")

    A convenience on GPUs, where torch.compile makes the same single pass of it; on CPUs it is ahead, because the compiler computes
    every value four times.

    Bytes:  forward reads x, writes y (4x); backward reads gy (4x) and a quarter of y, writes dx.
    Saves:  y (the result, no copy).

    Args:
      x:    [N, C, H, W] fp32, fp64, bf16 or fp16; contiguous and channels_last are read in place, others are copied first.
      scale, bias: [C] constants that get no gradient, or None (ones, zeros).
    Returns:
      [N, C, 2H, 2W] in dtype and layout of x.
    Gradients: x; first order in the native backends, any order in `reference`.
    Raises:
      ValueError: shapes that do not fit, or a constant that requires a gradient.
    """
    return _upsample_affine(x, scale, bias, "tanh")


def upsample_affine_sigmoid(x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """sigmoid(scale x + bias), doubled by nearest neighbours; in all else as `upsample_affine_tanh`."""
    return _upsample_affine(x, scale, bias, "sigmoid")


def _upsample_affine(x: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [N, C, H, W], found {x.dtype} of shape {tuple(x.shape)}")
    for name, v in (("scale", scale), ("bias", bias)):
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != x.shape[1]:
            raise ValueError(f"{name} must be [{x.shape[1]}], one value per channel of x; found {tuple(v.shape)}")
        if v.device != x.device:
            raise ValueError(f"{name} is on {v.device} and x on {x.device}; expected one device")
        if v.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which this op does not compute; pass {name}.detach()")
    if choose(f"upsample_affine_{act}", x) == "reference":
        return ref.upsample_affine_act_ref(x, scale, bias, act)
    return _registered.forward(x, scale, bias, act)  # type: ignore[no-any-return]
