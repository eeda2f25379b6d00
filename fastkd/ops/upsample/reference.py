"""Definitions of the upsampling ops in plain torch, and the identities that compute them cheaper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(x: Tensor) -> Tensor:
    """Nearest doubling of height and width."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


# upsample_conv2d -----------------------------------------------------------------------------------------------------------------


def upsample_conv2d_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(nearest x2 (x), weight, padding 1), as written."""
    return F.conv2d(upsample(x), weight, bias, padding=1)


def _fold(w: Tensor, dim: int) -> Tensor:
    """Three taps on doubled pixels → four taps of the stride-2 transposed convolution (flip included)."""
    a, b, c = w.unbind(dim)
    return torch.stack([c, b + c, a + b, a], dim)


def _pooled(weight: Tensor) -> bool:
    """Whether sums of neighbouring taps are a pooling: on a GPU one kernel in place of some ten, whose launches took longer than the
    convolution of a small map. A compiler makes one kernel of the sums itself."""
    return weight.device.type != "cpu" and weight.numel() > 0 and not torch.compiler.is_compiling()


def _pool(weight: Tensor, stride: int) -> Tensor:
    """Sums of 2x2 taps, one tap of zeros around. Of a view without batch, which knows no channels_last: there torch's gradient of a
    pooling with padding is wrong on GPUs (pytorch #188344)."""
    return F.avg_pool2d(weight.flatten(0, 1), 2, stride, 1, divisor_override=1).unflatten(0, weight.shape[:2])


def fold_kernel(weight: Tensor) -> Tensor:
    """[Cout, Cin, 3, 3] → [Cin, Cout, 4, 4]; the sums run in at least fp32 and are rounded once."""
    if _pooled(weight):
        return _pool(weight, 1).flip(2, 3).transpose(0, 1)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _fold(_fold(wide, 2), 3).transpose(0, 1).to(weight.dtype)


def upsample_conv2d_fold(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same numbers as `upsample_conv2d_ref`: 16 instead of 36 taps per input pixel, no upsampled image."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # the compiler chooses layouts itself
        # The small map is cheap to rewrite; oneDNN would rewrite the large one, forward and backward.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels_last, in words that vmap knows
    return F.conv_transpose2d(x, fold_kernel(weight), bias, stride=2, padding=1)


# upsampled_stem_conv2d -----------------------------------------------------------------------------------------------------------


def upsampled_stem_conv2d_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(nearest x2 (x), weight, stride 2, padding 3), as written."""
    return F.conv2d(upsample(x), weight, bias, stride=2, padding=3)


def _fold_seven(w: Tensor, dim: int) -> Tensor:
    """Tap r of seven reads small pixel floor((r - 3) / 2): the taps that read the same one are added."""
    t = w.unbind(dim)
    return torch.stack([t[0], t[1] + t[2], t[3] + t[4], t[5] + t[6]], dim)


def fold_stem(weight: Tensor) -> Tensor:
    """[Cout, Cin, 7, 7] → [Cout, Cin, 4, 4]: see the public function."""
    if _pooled(weight):
        return _pool(weight, 2)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _fold_seven(_fold_seven(wide, 2), 3).to(weight.dtype)


def upsampled_stem_conv2d_fold(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same numbers as `upsampled_stem_conv2d_ref`: 16 instead of 49 taps, a quarter of the pixels."""
    return F.conv2d(F.pad(x, (2, 1, 2, 1)), fold_stem(weight), bias)


# upsample_affine_tanh, upsample_affine_sigmoid -----------------------------------------------------------------------------------


def _vector(v: Tensor, x: Tensor) -> Tensor:
    return v.to(torch.promote_types(x.dtype, torch.float32)).view(1, -1, 1, 1)


def upsample_affine_act_ref(x: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    """act(scale x + bias) in at least fp32, rounded to the dtype of x, then doubled."""
    pre = x.to(torch.promote_types(x.dtype, torch.float32))
    pre = pre if scale is None else pre * _vector(scale, x)
    pre = pre if bias is None else pre + _vector(bias, x)
    return upsample((torch.tanh(pre) if act == "tanh" else torch.sigmoid(pre)).to(x.dtype))


def upsample_affine_act_bwd_ref(gy: Tensor, y: Tensor, scale: Tensor | None, act: str) -> Tensor:
    """dx = scale act'(y) (sum of the four gy of a pixel)."""
    wide = torch.promote_types(y.dtype, torch.float32)
    v = y[:, :, ::2, ::2].to(wide)
    n, c, h, w = v.shape
    g = gy.to(wide).reshape(n, c, h, 2, w, 2).sum((3, 5)) * (1 - v * v if act == "tanh" else v * (1 - v))
    return (g if scale is None else g * _vector(scale, y)).to(y.dtype)
