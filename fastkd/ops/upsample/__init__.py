"""Low-resolution generation: nearest upsampling and the convolution behind it as one transposed convolution."""

from __future__ import annotations

from torch import Tensor

from .._library import choose
from .reference import upsample_conv2d_fold, upsample_conv2d_ref


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """3x3 convolution of the image doubled by nearest neighbours, without ever making that image.

      1. w4 = 4x4 fold of the 3x3 kernel            # rows (w2, w1 + w2, w0 + w1, w0), columns alike
      2. y  = conv_transpose2d(x, w4, bias, stride 2, padding 1)
         == conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)

    Exact in real arithmetic; 2.25 times fewer multiplications in forward and in both gradients.

    Bytes:  reads x, writes y; the upsampled image (4x) is neither written nor kept for backward.
    Saves:  x and w4.

    Args:
      x:      [N, Cin, H, W], any layout (channels_last is kept).
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
        return upsample_conv2d_ref(x, weight, bias)
    return upsample_conv2d_fold(x, weight, bias)
