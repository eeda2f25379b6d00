"""TensorFlow's padding by brute force, the doubling convolution, and layouts that stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.models.layers import SameConv2d, ToMap, same_conv
from fastkd.models.thin_resnet import ShortcutA
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


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (2, 3, 8, 8), (0, 3, 4, 4)])
def test_the_parameter_free_shortcut_is_a_slice_and_zeros_and_keeps_the_layout(shape, layout):
    shortcut = ShortcutA(5)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    wanted = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))
    found, grad = shortcut(x), torch.randn_like(wanted)
    (dx,) = torch.autograd.grad(found, x, grad)
    assert torch.equal(found, wanted) and torch.equal(dx, torch.autograd.grad(wanted, x, grad)[0])
    assert dx.is_contiguous(memory_format=layout)
    if x.numel():
        assert torch.autograd.gradcheck(shortcut, x) and torch.autograd.gradgradcheck(shortcut, x)
        each = torch.func.vmap(torch.func.grad(lambda v: shortcut(v[None]).square().sum()))(x.detach())
        torch.testing.assert_close(each, torch.autograd.grad(shortcut(x).square().sum(), x)[0])
        _, tangent = torch.func.jvp(shortcut, (x.detach(),), (torch.ones_like(x),))
        assert torch.equal(tangent, F.pad(torch.ones_like(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3)))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_rows_become_maps_in_the_layout_that_the_network_was_moved_to(layout):
    net = nn.Sequential(nn.Linear(4, 24), ToMap((6, 2, 2)), nn.Conv2d(6, 2, 1)).to(memory_format=layout)
    x = torch.randn(3, 4)
    y = copy.deepcopy(net).double()[:2](x.double())
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, net[0](x).double().view(3, 6, 2, 2))
    each = torch.func.vmap(lambda v: net[:2](v[None])[0])(x)
    torch.testing.assert_close(each, net[:2](x))
    assert set(net.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"} and not list(net[1].buffers())
