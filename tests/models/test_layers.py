"""TensorFlow's padding by brute force, and the doubling convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd.models.layers import SameConv2d, same_conv
from fastkd.nn.generator_layers import UpConv


def by_hand(x: torch.Tensor, w: torch.Tensor, stride: int) -> torch.Tensor:
    """One channel, from the definition: out(i) = sum_k w(k) x(i stride + k - before), before = total // 2."""
    k = w.shape[0]
    out = [-(-s // stride) for s in x.shape]
    before = [max((o - 1) * stride + k - s, 0) // 2 for o, s in zip(out, x.shape, strict=True)]
    y = torch.zeros(*out, dtype=x.dtype)
    for i in range(out[0]):
        for j in range(out[1]):
            for a in range(k):
                for b in range(k):
                    r, c = i * stride + a - before[0], j * stride + b - before[1]
                    if 0 <= r < x.shape[0] and 0 <= c < x.shape[1]:
                        y[i, j] += w[a, b] * x[r, c]
    return y


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (9, 5), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 1), (5, 1), (1, 2)])
def test_same_padding(size, kernel, stride, fp64):
    conv = SameConv2d(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, *size)
    torch.testing.assert_close(conv(x)[0, 0].detach(), by_hand(x[0, 0], conv.weight[0, 0].detach(), stride))


def test_with_stride_1_a_plain_convolution_does_the_same(fp64):
    plain = same_conv(2, 4, 5, 1)
    same = SameConv2d(2, 4, 5, bias=False)
    same.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 9, 6)
    assert type(plain) is torch.nn.Conv2d
    torch.testing.assert_close(plain(x), same(x))


@pytest.mark.parametrize("bias", [True, False])
def test_upconv_is_nearest_doubling_and_a_convolution(bias, fp64):
    up = UpConv(3, 5, bias)
    x = torch.randn(2, 3, 4, 6)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), up.weight, up.bias, padding=1)
    torch.testing.assert_close(up(x), expected)
    assert sorted(up.state_dict()) == (["bias", "weight"] if bias else ["weight"])
