"""class_activation_map against the product-and-sum definition, and its identities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd import ops
from fastkd.errors import ConfigError
from fastkd.ops.cam.reference import class_activation_map_ref

from .compare import close, layouts


def _truth(features, weight, labels, relu, norm, size):
    """fp64: product, sum over channels, then each step as the formula says, on one image after the other; min and max constant."""
    maps = (features.double() * weight.double()[labels][:, :, None, None]).sum(1)
    out = []
    for m in maps:
        m = m.clamp_min(0) if relu else m
        low, high = m.detach().min(), m.detach().max()
        if norm == "minmax":
            m = (m - low) / (high - low + 1e-8) if high > low else m * 0
        elif norm == "max":
            m = m / (high + 1e-8) if high > 0 else m * 0
        if size:
            m = F.interpolate(m[None, None], size=size, mode="bilinear")[0, 0]
        out.append(m)
    return torch.stack(out)


def _ones(batch, device):
    """A head of ones for four channels, and label 0 for everybody."""
    return torch.ones(2, 4, device=device), torch.zeros(batch, dtype=torch.int64, device=device)


@pytest.mark.parametrize("size", [None, (9, 33), (2, 3)], ids=str)
@pytest.mark.parametrize(("norm", "relu"), [("none", False), ("none", True), ("minmax", False), ("max", True)])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 4, 5), (2, 64, 7, 7), (5, 130, 1, 1), (2, 1, 3, 17)], ids=str)
def test_class_activation_map(backend, device, shape, dtype, layout, relu, norm, size):
    gen = torch.Generator().manual_seed(3)
    features = layouts(torch.randn(shape, generator=gen).to(dtype).to(device), layout)
    weight = torch.randn(6, shape[1], generator=gen).to(dtype).to(device)
    labels = torch.randint(0, 6, shape[:1], generator=gen).to(device)
    results = []
    for kind in ("ours", "eager", "truth"):
        f = (features.double() if kind == "truth" else features.detach().clone() if kind == "eager" else features.detach()).requires_grad_()
        w = (weight.double() if kind == "truth" else weight.clone()).requires_grad_()
        if kind == "truth":
            m = _truth(f, w, labels, relu, norm, size)
        elif kind == "eager":
            m = class_activation_map_ref(f, w, labels, relu, norm, False, size, False)
        else:
            m = ops.class_activation_map(f, w, labels, relu=relu, norm=norm, size=size)
        seed = torch.linspace(-1, 2, m.numel(), device=device).view_as(m).to(m.dtype)
        results.append((m.detach(), *torch.autograd.grad(m, [f, w], seed)))
    for ours, eager, truth in zip(*results, strict=True):
        # a 1x1 map is constant: in bf16 inputs a sum of 130 products decides by rounding whether relu cuts it
        close(ours, eager, truth, floor=2e-2 if dtype == torch.bfloat16 else None)


def test_is_grad_cam_of_the_logit(backend, device):
    """Global average pooling and a linear head: d logit / d features, averaged over space, is weight / (h w)."""
    torch.manual_seed(0)
    features, weight, bias = torch.randn(4, 8, 5, 3, device=device), torch.randn(6, 8, device=device), torch.randn(6, device=device)
    labels = torch.tensor([0, 5, 2, 2], device=device)
    features.requires_grad_()
    logits = F.linear(features.mean((2, 3)), weight, bias)
    (g,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), features, retain_graph=True)
    grad_cam = (g.mean((2, 3), keepdim=True) * features).sum(1)
    cam = ops.class_activation_map(features, weight, labels)
    torch.testing.assert_close(cam / 15, grad_cam)
    torch.testing.assert_close(cam.mean((1, 2)) + bias[labels], logits.gather(1, labels[:, None])[:, 0])


@pytest.mark.parametrize("norm_grad", [False, True], ids=["constants", "routed"])
def test_gradient_of_the_norm(backend, device, norm_grad):
    torch.manual_seed(0)
    f = torch.randn(2, 5, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(3, 5, dtype=torch.float64, device=device)
    labels = torch.tensor([2, 0], device=device)
    m = ops.class_activation_map(f, w, labels, norm="minmax", norm_grad=norm_grad)
    assert torch.allclose(m.amax((1, 2)), torch.ones_like(m[:, 0, 0]), atol=1e-6) and not m.amin((1, 2)).any()
    (g,) = torch.autograd.grad(m.amax((1, 2)).sum(), f)
    if norm_grad:  # the maximum is 1 whatever the features are
        assert g.abs().max() < 1e-6
        assert torch.autograd.gradcheck(
            lambda v: ops.class_activation_map(v, w, labels, relu=True, norm="minmax", norm_grad=True, size=(5, 7), renorm=True), f
        )
    else:
        assert g.abs().max() > 1e-2


@pytest.mark.parametrize("norm", ["minmax", "max"])
def test_constant_map_is_zero_with_gradient_zero(backend, device, norm):
    f = torch.zeros(2, 4, 3, 3, device=device, requires_grad=True)
    m = ops.class_activation_map(f, *_ones(2, device), norm=norm, size=(6, 6))
    (g,) = torch.autograd.grad(m.sum(), f)
    assert not m.any() and not g.any()


def test_all_negative_map_after_relu_is_zero(backend, device):
    f = -torch.rand(2, 4, 3, 3, device=device) - 0.1
    for norm in ("none", "minmax", "max"):
        assert not ops.class_activation_map(f, *_ones(2, device), relu=True, norm=norm).any()


@pytest.mark.parametrize("norm", ["none", "minmax", "max"])
def test_nan_is_not_hidden(backend, device, norm):
    f = torch.rand(2, 4, 3, 3, device=device)
    f[1, 2, 2, 2] = float("nan")
    m = ops.class_activation_map(f, *_ones(2, device), relu=True, norm=norm, size=(6, 6))
    assert m[1].isnan().any() and m[0].isfinite().all()
    if norm != "none":
        assert m[1].isnan().all()


def test_renorm_reaches_one_again(backend, device):
    torch.manual_seed(0)
    f, w, y = torch.randn(3, 4, 3, 3, device=device), torch.randn(2, 4, device=device), torch.tensor([0, 1, 1], device=device)
    once = ops.class_activation_map(f, w, y, norm="minmax", size=(2, 2))
    twice = ops.class_activation_map(f, w, y, norm="minmax", size=(2, 2), renorm=True)
    assert once.amax() < 1 and torch.allclose(twice.amax((1, 2)), torch.ones(3, device=device), atol=1e-6)


def test_empty_batch(backend, device):
    f = torch.randn(0, 4, 3, 3, device=device, requires_grad=True)
    m = ops.class_activation_map(f, *_ones(0, device), norm="minmax", size=(5, 6))
    assert m.shape == (0, 5, 6)
    assert torch.autograd.grad(m.sum(), f)[0].shape == f.shape


def test_gradcheck(backend, device):
    torch.manual_seed(0)
    f = torch.randn(2, 5, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.tensor([2, 0], device=device)
    assert torch.autograd.gradcheck(lambda a, b: ops.class_activation_map(a, b, y, relu=True, size=(5, 7)), (f, w))


def test_second_order(backend, device):
    f = torch.randn(2, 5, 3, 4, device=device, requires_grad=True)
    w = torch.randn(3, 5, device=device, requires_grad=True)
    y = torch.tensor([2, 0], device=device)
    (g,) = torch.autograd.grad(ops.class_activation_map(f, w, y).square().sum(), f, create_graph=True)
    if device == "cpu" and backend != "reference":
        with pytest.raises(ConfigError, match="second order"):
            torch.autograd.grad(g.sum(), w)
    else:
        assert torch.autograd.grad(g.sum(), w)[0].abs().sum() > 0


def test_refused(backend, device):
    f, w = torch.randn(2, 5, 3, 4, device=device), torch.randn(3, 5, device=device)
    if device == "cpu":
        for bad in (3, -4):
            with pytest.raises(IndexError):
                ops.class_activation_map(f, w, torch.tensor([0, bad]))
    y = torch.zeros(2, dtype=torch.int64, device=device)
    for change in ({"features": f[0]}, {"weight": w[:, :4]}, {"labels": y.int()}, {"norm": "l2"}):
        message = next(iter(change))
        with pytest.raises(ValueError, match=message):
            ops.class_activation_map(**{"features": f, "weight": w, "labels": y, **change})


def test_opcheck_and_compile(cpp):
    f, w, y = torch.randn(2, 5, 3, 4, requires_grad=True), torch.randn(3, 5, requires_grad=True), torch.tensor([2, 0])
    torch.library.opcheck(torch.ops.fastkd.class_activation_map_fwd.default, (f, w, y))
    raw = torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.fastkd.class_activation_map_finish.default, (raw, True, "minmax", [5, 6]))
    last = f.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.fastkd.class_activation_map_bwd.default, (torch.randn(2, 3, 4), last.detach(), w.detach(), y))
    torch._dynamo.reset()
    call = lambda v: ops.class_activation_map(v, w, y, relu=True, norm="minmax", size=(6, 6)).square().sum()  # noqa: E731
    got, expected = torch.compile(call, fullgraph=True)(last), call(last)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, last)[0], torch.autograd.grad(expected, last)[0])


@pytest.mark.large
def test_more_than_2_31_elements(cpp):
    f = torch.ones((2, 2**10, 2**10, 2**10 + 1), dtype=torch.bfloat16)
    w = torch.ones(1, 2**10)
    m = ops.class_activation_map(f, w, torch.zeros(2, dtype=torch.int64))
    assert (m == 2**10).all()
