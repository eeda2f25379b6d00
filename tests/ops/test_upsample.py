"""upsample_conv2d: the identity holds to rounding, in values and in every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd import ops
from fastkd.ops.upsample.reference import fold_kernel, upsample_conv2d_fold, upsample_conv2d_ref

from .compare import close


def _truth(x, w, b):
    """By repeat_interleave instead of interpolate."""
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(doubled, w, b, padding=1)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cin", "cout", "h", "w"), [(1, 1, 1, 1), (3, 5, 1, 3), (8, 3, 7, 6), (5, 1, 8, 8), (64, 64, 4, 4)])
def test_upsample_conv2d(cin, cout, h, w, dtype, last, bias):
    torch.manual_seed(0)
    x = torch.randn(2, cin, h, w).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, b = (torch.randn(cout, cin, 3, 3) * 0.2).to(dtype), torch.randn(cout).to(dtype) if bias else None
    results = []
    for kind, f in (("ours", ops.upsample_conv2d), ("eager", upsample_conv2d_ref), ("truth", _truth)):
        inputs = [v.double() if kind == "truth" else v.clone() for v in (x, weight, *((b,) if bias else ()))]
        inputs = [v.requires_grad_() for v in inputs]
        y = f(inputs[0], inputs[1], inputs[2] if bias else None)
        seed = torch.linspace(-1, 1.5, y.numel()).view(y.shape).to(y.dtype)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, seed)))
    for ours, eager, truth in zip(*results, strict=True):
        # a folded tap is one rounded sum of up to four weights: in bf16 that is an error of its own kind
        close(ours, eager, truth, floor=8e-3 if dtype == torch.bfloat16 else None)
    if last and h * w > 1 and cin > 1:
        assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_fold_is_not_the_unflipped_kernel():
    w = torch.arange(9.0).view(1, 1, 3, 3)
    k = fold_kernel(w)[0, 0]
    assert k[0, 0] == w[0, 0, 2, 2] and k[3, 3] == w[0, 0, 0, 0] and k[1, 1] == w[0, 0, 1:, 1:].sum() and k.sum() == 4 * w.sum()


def test_gradients_of_gradients():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(upsample_conv2d_fold, (x, w, None))


def test_frozen_weight_and_frozen_input():
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    assert ops.upsample_conv2d(x.clone().requires_grad_(), w).requires_grad
    assert ops.upsample_conv2d(x, w.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert not ops.upsample_conv2d(x, w.clone().requires_grad_()).requires_grad


def test_transposed_weight():
    torch.manual_seed(0)
    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 3, 4, 4).permute(2, 3, 0, 1)  # [4, 4, 3, 3], not contiguous
    torch.testing.assert_close(ops.upsample_conv2d(x, w), _truth(x, w, None), rtol=1e-4, atol=1e-4)


def test_autocast():
    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.upsample_conv2d(x, w)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), _truth(x, w, None), rtol=0.05, atol=0.2)


def test_reference_on_request():
    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    ops.use("reference")
    try:
        assert torch.equal(ops.upsample_conv2d(x, w), upsample_conv2d_ref(x, w, None))
    finally:
        ops.use("auto")


def test_compile():
    torch._dynamo.reset()
    x, w = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    compiled = torch.compile(ops.upsample_conv2d, fullgraph=True)
    torch.testing.assert_close(compiled(x, w), ops.upsample_conv2d(x, w), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("w", [torch.ones(2, 2, 5, 5), torch.ones(2, 1, 3, 3), torch.ones(2, 2, 3)], ids=lambda w: str(tuple(w.shape)))
def test_refused(w):
    with pytest.raises(ValueError, match="without groups"):
        ops.upsample_conv2d(torch.ones(1, 2, 4, 4), w)
