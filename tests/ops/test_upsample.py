"""The upsampling ops: the identities hold to rounding, in values and in every gradient; the doubled activation in every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd import ops
from fastkd.errors import ConfigError
from fastkd.ops.upsample import reference
from fastkd.ops.upsample.reference import (
    fold_kernel,
    upsample_conv2d_fold,
    upsample_conv2d_ref,
    upsampled_stem_conv2d_fold,
    upsampled_stem_conv2d_ref,
)

from .compare import close, layouts

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


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


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])],
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("fold", "size"), [(fold_kernel, 3), (ops.fold_stem, 7)], ids=["kernel", "stem"])
@pytest.mark.parametrize("cin", [6, 1])
def test_a_fold_is_a_pooling(monkeypatch, device, memory, fold, size, cin):
    seed, found = None, []
    for pooled in (False, True):
        monkeypatch.setattr(reference, "_pooled", lambda weight, pooled=pooled: pooled)
        weight = torch.randn(5, cin, size, size, generator=torch.Generator().manual_seed(1))
        weight = weight.to(device, memory_format=memory).requires_grad_()  # `contiguous` leaves one channel as it is
        folded = fold(weight)
        seed = torch.randn(folded.shape, device=device) if seed is None else seed
        found.append((folded, *torch.autograd.grad(folded, weight, seed)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


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


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", ["upsample_conv2d", "upsampled_stem_conv2d"])
def test_compile(op, dynamic):
    torch._dynamo.reset()
    f, w = getattr(ops, op), torch.randn(3, 4, *((3, 3) if op == "upsample_conv2d" else (7, 7)))
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for n in (2, 3) if dynamic else (2,):
        x = torch.randn(n, 4, 5, 6, requires_grad=True)
        expected, got = f(x, w), compiled(x, w)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        gy = torch.randn_like(expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, gy)[0] for y in (got, expected)), rtol=1e-4, atol=1e-4)


def test_an_empty_batch():
    for op, k in (("upsample_conv2d", 3), ("upsampled_stem_conv2d", 7)):
        x, w = torch.randn(0, 4, 5, 5, requires_grad=True), torch.randn(3, 4, k, k, requires_grad=True)
        y = getattr(ops, op)(x, w)
        grads = torch.autograd.grad(y.sum(), (x, w))
        assert y.shape == (0, 3, *((10, 10) if k == 3 else (5, 5))) and grads[0].shape == x.shape and not grads[1].any()


@pytest.mark.large
def test_upsample_conv2d_of_more_than_2_31_elements():
    x = torch.ones((1, 1, 2**15, 2**14 + 1), dtype=torch.bfloat16)  # the result has four times as many
    y = ops.upsample_conv2d(x, torch.ones(1, 1, 3, 3, dtype=torch.bfloat16))
    assert y.numel() > 2**31 and y[0, 0, -2, -2] == 9 and y[0, 0, -1, -1] == 4


@pytest.mark.parametrize("w", [torch.ones(2, 2, 5, 5), torch.ones(2, 1, 3, 3), torch.ones(2, 2, 3)], ids=lambda w: str(tuple(w.shape)))
def test_refused(w):
    with pytest.raises(ValueError, match="without groups"):
        ops.upsample_conv2d(torch.ones(1, 2, 4, 4), w)


# upsampled_stem_conv2d -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cin", "cout", "h", "w"), [(1, 1, 1, 1), (3, 5, 1, 3), (3, 16, 15, 17), (3, 8, 14, 14)])
def test_folded_stem(cin, cout, h, w, dtype, last, bias):
    torch.manual_seed(0)
    x = torch.randn(2, cin, h, w).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, b = (torch.randn(cout, cin, 7, 7) * 0.1).to(dtype), torch.randn(cout).to(dtype) if bias else None

    def truth(x, w, b):
        return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), w, b, stride=2, padding=3)

    found = []
    for kind, f in (("ours", ops.upsampled_stem_conv2d), ("eager", upsampled_stem_conv2d_ref), ("truth", truth)):
        inputs = [v.double() if kind == "truth" else v.clone() for v in (x, weight, *((b,) if bias else ()))]
        inputs = [v.requires_grad_() for v in inputs]
        y = f(inputs[0], inputs[1], inputs[2] if bias else None)
        seed = torch.linspace(-1, 1.5, y.numel()).view(y.shape).to(y.dtype)
        found.append((y.detach(), *torch.autograd.grad(y, inputs, seed)))
    assert found[0][0].shape == (2, cout, h, w)
    for ours, eager, exact in zip(*found, strict=True):
        close(ours, eager, exact, floor=8e-3 if dtype == torch.bfloat16 else None)
    if last and h * w > 1 and cin > 1:
        assert found[0][0].is_contiguous(memory_format=torch.channels_last)


def test_folded_stem_sums_the_taps_that_read_one_pixel():
    w = torch.arange(49.0).view(1, 1, 7, 7)
    k = ops.fold_stem(w)[0, 0]
    assert k.shape == (4, 4) and k.sum() == w.sum() and k[0, 0] == w[0, 0, 0, 0] and k[3, 3] == w[0, 0, 5:, 5:].sum()
    assert ops.fold_stem(w.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"kernel \[Cout, Cin, 7, 7\], found \(1, 1, 3, 3\)"):
        ops.fold_stem(torch.ones(1, 1, 3, 3))


def test_folded_stem_to_second_order_and_by_backend():
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(upsampled_stem_conv2d_fold, (x, w, None))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.upsampled_stem_conv2d(x.float(), w.float()).dtype == torch.bfloat16
    ops.use("reference")
    try:
        assert torch.equal(ops.upsampled_stem_conv2d(x, w), upsampled_stem_conv2d_ref(x, w, None))
    finally:
        ops.use("auto")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": torch.ones(2, 3, 3, 3)}, "found kernel 3, stride 2"),
        ({"weight": torch.ones(2, 3, 7, 5)}, r"found kernel \(7, 5\)"),
        ({"stride": 1}, "stride 1"),
        ({"padding": (3, 2)}, r"padding \(3, 2\)"),
        ({"dilation": (2, 2)}, "dilation 2"),
        ({"groups": 3}, "groups 3"),
        ({"weight": torch.ones(2, 1, 7, 7)}, "expected x"),
    ],
)
def test_another_stem_is_refused(change, said):
    arguments = {"x": torch.ones(1, 3, 4, 4), "weight": torch.ones(2, 3, 7, 7), "stride": (2, 2), "padding": (3, 3), **change}
    with pytest.raises(ValueError, match=said):
        ops.upsampled_stem_conv2d(**arguments)


# upsample_affine_tanh, upsample_affine_sigmoid -----------------------------------------------------------------------------------

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 3, 1, 1), (2, 7, 4, 33), (1, 64, 6, 1), (2, 3, 1, 40)]
AFFINE = {"tanh": ops.upsample_affine_tanh, "sigmoid": ops.upsample_affine_sigmoid}


def _affine(shape, dtype, device, layout="nchw"):
    gen = torch.Generator().manual_seed(shape[1])
    x = layouts((torch.randn(shape, generator=gen) * 3).to(dtype).to(device), layout)
    scale, bias = (torch.randn(shape[1], generator=gen, dtype=torch.float64) for _ in range(2))
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return x, scale.to(small).to(device), bias.to(small).to(device)


def _as_published(x, scale, bias, act):
    doubled = F.interpolate(x, scale_factor=2, mode="nearest")
    return getattr(torch, act)(doubled * scale.to(x.dtype).view(-1, 1, 1) + bias.to(x.dtype).view(-1, 1, 1))


@pytest.mark.parametrize("act", AFFINE)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "sliced_nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upsample_affine(backend, device, shape, dtype, layout, act):
    if backend == "cuda" or (backend == "triton" and dtype == torch.float64):
        pytest.skip(f"no {backend} kernel for {dtype}")
    x, scale, bias = _affine(shape, dtype, device, layout)
    gy = torch.randn((*shape[:2], 2 * shape[2], 2 * shape[3]), generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    found = []
    for v, f in ((x, AFFINE[act]), (x, lambda *a: _as_published(*a, act)), (x.double(), lambda *a: _as_published(*a, act))):
        v = v.detach().requires_grad_() if f is AFFINE[act] else v.detach().clone().requires_grad_()
        y = f(v, scale, bias)
        found.append((y.detach(), *torch.autograd.grad(y, v, gy.to(y.dtype))))
    for ours, eager, truth in zip(*found, strict=True):
        close(ours, eager, truth, floor={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype))
    several = min(shape[1], shape[2] * shape[3]) > 1  # else both layouts are one
    if backend != "reference" and layout in ("nchw", "nhwc") and several:  # torch's interpolate chooses by size
        kept = torch.contiguous_format if layout == "nchw" else torch.channels_last
        assert all(v.is_contiguous(memory_format=kept) for v in found[0])


@pytest.mark.parametrize("act", AFFINE)
def test_upsample_affine_without_constants(backend, device, act):
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    y = AFFINE[act](x)
    expected = _as_published(x, torch.ones(3, device=device), torch.zeros(3, device=device), act)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    gy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(v, x, gy)[0] for v in (y, expected)), rtol=1e-5, atol=1e-6)
    only = AFFINE[act](x, None, torch.ones(3, device=device))
    torch.testing.assert_close(only, AFFINE[act](x + 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act", AFFINE)
def test_upsample_affine_at_the_ends(backend, device, act):
    """Infinity saturates, NaN stays NaN, and small arguments keep their digits (tanh(x) is x there)."""
    ends = [float("inf"), -float("inf"), float("nan"), 1e4, -1e4, 90.0, -90.0, 0.0, 1e-7, -1e-5, 0.3, -0.26, 9.0, 0.125, 2.0, -3.0, 1e-3]
    x = torch.tensor(ends, device=device).view(1, 1, 1, -1)
    y = AFFINE[act](x)
    truth = getattr(torch, act)(x.double()).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(y.double(), truth, rtol=6e-7, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("act", AFFINE)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_upsample_affine_gradcheck(backend, device, memory, act):
    if backend == "triton":
        pytest.skip("no Triton kernel for float64")
    x, scale, bias = _affine((2, 3, 2, 3), torch.float64, device)
    x = x.contiguous(memory_format=memory).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: AFFINE[act](v, scale, bias), x)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)], ids=str)
def test_upsample_affine_empty(backend, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    if backend == "reference" and 0 in shape[1:]:
        pytest.skip("torch's interpolate takes no empty image")
    y = ops.upsample_affine_tanh(x)
    assert y.shape == (*shape[:2], 2 * shape[2], 2 * shape[3]) and torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_upsample_affine_second_order(backend, device):
    x = torch.randn(1, 2, 3, 3, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(ops.upsample_affine_tanh(x).square().sum(), x, create_graph=True)
    if backend in ("reference", "cuda"):
        if backend == "reference":
            assert torch.autograd.grad(g.sum(), x)[0].abs().sum() > 0
        return
    with pytest.raises(ConfigError, match="second order"):
        torch.autograd.grad(g.sum(), x)


def test_upsample_affine_modes(backend, device):
    x, scale, bias = _affine((2, 3, 4, 4), torch.float32, device)
    expected = ops.upsample_affine_sigmoid(x, scale, bias)
    with torch.no_grad():
        assert not ops.upsample_affine_sigmoid(x.clone().requires_grad_(), scale, bias).requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.upsample_affine_sigmoid(x, scale, bias), expected)
    with torch.autocast(device, torch.bfloat16):
        assert ops.upsample_affine_sigmoid(x, scale, bias).dtype == torch.float32
        assert ops.upsample_affine_sigmoid(x.bfloat16(), scale, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_upsample_affine_bits(cpp, layout):
    """They do not depend on the number of threads or on the instruction set."""
    from fastkd import _C

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, scale, bias = _affine((8, 3, 41, 37), dtype, "cpu", layout)
        x.requires_grad_()
        seen, threads, best = [], torch.get_num_threads(), _C.isas()[-1]
        try:
            for count in (1, 2, 3):
                for isa in _C.isas():
                    torch.set_num_threads(count)
                    _C.set_isa(isa)
                    for f in AFFINE.values():
                        y = f(x, scale, bias)
                        seen.append((y.detach(), torch.autograd.grad(y, x, y.detach())[0]))
        finally:
            torch.set_num_threads(threads)
            _C.set_isa(best)
        for i, other in enumerate(seen[2:]):
            assert all(torch.equal(a, b) for a, b in zip(seen[i % 2], other, strict=True))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((torch.ones(2, 3, 4),), "x must be floating point .N, C, H, W., found torch.float32 of shape"),
        ((torch.ones(2, 3, 4, 4).int(),), "found torch.int32"),
        ((torch.ones(2, 3, 4, 4), torch.ones(4)), "scale must be .3."),
        ((torch.ones(2, 3, 4, 4), None, torch.ones(3, device="meta")), "bias is on meta and x on cpu"),
        ((torch.ones(2, 3, 4, 4), torch.ones(3, requires_grad=True)), "scale requires a gradient"),
    ],
)
def test_upsample_affine_refused(args, said):
    with pytest.raises(ValueError, match=said):
        ops.upsample_affine_tanh(*args)


def test_upsample_affine_opcheck(cpp):
    f, scale = torch.ops.fastkd, torch.randn(3)
    for memory in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 2, 4).contiguous(memory_format=memory).requires_grad_()
        torch.library.opcheck(f.upsample_act_fwd.default, (x, scale, None, "tanh"))
        y = ops.upsample_affine_sigmoid(x).detach()
        torch.library.opcheck(f.upsample_act_bwd.default, (torch.randn_like(y), y, None, "sigmoid"))
    x = torch.randn(2, 3, 1, 1).expand(2, 3, 2, 2)[:, :, :1, :1].requires_grad_()
    torch.library.opcheck(f.upsample_act_fwd.default, (x, scale, scale, "sigmoid"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_upsample_affine_compile(cpp, dynamic):
    torch._dynamo.reset()
    scale, bias = torch.randn(2, 3)

    def f(x):
        return ops.upsample_affine_tanh(x, scale, bias).square().sum() + ops.upsample_affine_sigmoid(x).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for n in (2, 3) if dynamic else (2,):
        x = torch.randn(n, 3, 4, 5, requires_grad=True)
        expected, got = f(x), compiled(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])


@pytest.mark.large
def test_upsample_affine_of_more_than_2_31_elements(cpp):
    x = torch.zeros((1, 1, 2**15, 2**14 + 1), dtype=torch.bfloat16)
    x[0, 0, -1, -1] = 20
    y = ops.upsample_affine_tanh(x)
    assert y.numel() > 2**31 and y[0, 0, -1, -1] == y[0, 0, -2, -2] == 1 and y[0, 0, -3:, -3:].sum() == 4
