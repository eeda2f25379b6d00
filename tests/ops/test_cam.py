"""class_activation_map against the product-and-sum definition, its identities, and the contract of an op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd import ops
from fastkd.errors import ConfigError
from fastkd.ops import _native
from fastkd.ops.cam.reference import class_activation_map_ref

from .compare import close, layouts

# C in {1, 3, 7, 64, 127, 2048}, h x w in {1, 4x4, 7x7, 15x17, 112x112}, N in {1, 2, 3}: maps below one vector, in registers, with a
# last vector moved back, and larger than the registers; channels below and beyond a vector and a group of four.
SHAPES = [(3, 7, 4, 5), (2, 64, 7, 7), (3, 127, 1, 1), (2, 1, 3, 17), (1, 3, 112, 112), (2, 2048, 2, 2), (2, 130, 4, 4), (1, 66, 15, 17)]
SHAPES += [(2, 33, 8, 8), (1, 5, 5, 10)]
OPTIONS = [
    {},
    {"relu": True},
    {"norm": "minmax"},
    {"relu": True, "norm": "max"},
    {"relu": True, "size": (9, 33)},
    {"norm": "minmax", "size": (2, 3)},
    {"relu": True, "norm": "minmax", "size": (40, 35), "renorm": True},
    {"norm": "max", "size": (7, 20), "renorm": True},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _name(options):
    if not isinstance(options, dict):
        return str(options)
    return "-".join(f"{k}={v}" if not isinstance(v, bool) else k for k, v in options.items()) or "raw"


def _scaled(m, norm):
    low, high = m.detach().min(), m.detach().max()
    if norm == "minmax":
        return (m - low) / (high - low + 1e-8) if high > low else m * 0
    if norm == "max":
        return m / (high + 1e-8) if high > 0 else m * 0
    return m


def _truth(features, weight, labels, relu=False, norm="none", size=None, renorm=False):
    """fp64: product, sum over channels, then each step as the formula says, on one image after the other; min and max constant."""
    maps = (features.double() * weight.double()[labels][:, :, None, None]).sum(1)
    out = []
    for m in maps:
        m = _scaled(m.clamp_min(0) if relu else m, norm)
        if size:
            m = F.interpolate(m[None, None], size=size, mode="bilinear")[0, 0]
            m = _scaled(m, norm) if renorm else m
        out.append(m)
    return torch.stack(out)


def _inputs(shape, dtype, device, layout="nchw", classes=6):
    gen = torch.Generator().manual_seed(3)
    features = layouts(torch.randn(shape, generator=gen).to(dtype).to(device), layout)
    weight = torch.randn(classes, shape[1], generator=gen).to(dtype).to(device)
    labels = torch.randint(0, classes, shape[:1], generator=gen).to(device)
    return features, weight, labels


def _definition(f, w, y, relu=False, norm="none", size=None, renorm=False):
    return class_activation_map_ref(f, w, y, relu, norm, False, size, renorm)


def _runs(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no Triton kernel for float64")


def _ones(batch, device):
    """A head of ones for four channels, and label 0 for everybody."""
    return torch.ones(2, 4, device=device), torch.zeros(batch, dtype=torch.int64, device=device)


# Every other set of options with each shape (neighbours in SHAPES take the other half), slices in fp32 only: dense copies are made
# before a kernel sees them.
@pytest.mark.parametrize(("shape", "options"), [(s, o) for i, s in enumerate(SHAPES) for o in OPTIONS[i % 2 :: 2]], ids=_name)
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "sliced"), *((d, lay) for d in DTYPES for lay in ("nchw", "nhwc"))], ids=str)
def test_class_activation_map(backend, device, shape, dtype, layout, options):
    _runs(backend, dtype)
    features, weight, labels = _inputs(shape, dtype, device, layout)
    results = []
    for kind in ("ours", "eager", "truth"):
        f = (features.double() if kind == "truth" else features.detach().clone() if kind == "eager" else features.detach()).requires_grad_()
        w = (weight.double() if kind == "truth" else weight.clone()).requires_grad_()
        m = {"ours": ops.class_activation_map, "eager": _definition, "truth": _truth}[kind](f, w, labels, **options)
        seed = torch.linspace(-1, 2, m.numel(), device=device).view_as(m).to(m.dtype)
        results.append((m.detach(), *torch.autograd.grad(m, [f, w], seed)))
    for ours, eager, truth in zip(*results, strict=True):
        close(ours, eager, truth)
    if layout != "sliced" and backend != "reference":
        fmt = torch.contiguous_format if layout == "nchw" else torch.channels_last
        assert results[0][1].is_contiguous(memory_format=fmt)


# CUDA: weights in two pieces, and images that are cut, also after a resize; then what shared memory does not hold: stretched rows and
# sums of pixels, a single row of these, a map.
LARGE = [((2, 2200, 3, 3), None), ((1, 2200, 3, 3), (12, 20)), ((2, 2, 40, 3), (50, 400)), ((1, 3, 2, 4), (5, 3200))]
LARGE += [((1, 16, 33, 40), (9, 44))]


@pytest.mark.parametrize(("shape", "size"), LARGE, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large(backend, device, shape, size, layout, dtype):
    f, w, y = _inputs(shape, dtype, device, layout)
    results = []
    for kind in (ops.class_activation_map, _definition, _truth):
        x = (f.double() if kind is _truth else f.clone()).requires_grad_()
        m = kind(x, w.double() if kind is _truth else w, y, relu=True, norm="minmax", size=size, renorm=size is not None)
        seed = torch.linspace(-1, 2, m.numel(), device=device).view_as(m).to(m.dtype)
        results.append((m.detach(), *torch.autograd.grad(m, [x], seed)))
    for ours, eager, truth in zip(*results, strict=True):
        close(ours, eager, truth)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["features", "weight"])
def test_partial_gradients(backend, device, wanted):
    f, w, y = _inputs((3, 18, 5, 4), torch.float32, device)
    options = {"relu": True, "norm": "minmax", "size": (8, 9)}
    seed = torch.linspace(-1, 2, 3 * 72, device=device).view(3, 8, 9)
    both = torch.autograd.grad(ops.class_activation_map(f.requires_grad_(), w.requires_grad_(), y, **options), [f, w], seed)
    f, w = f.detach().requires_grad_(wanted[0]), w.detach().requires_grad_(wanted[1])
    m = ops.class_activation_map(f, w, y, **options)
    (g,) = torch.autograd.grad(m, [f if wanted[0] else w], seed)
    assert torch.equal(g, both[0] if wanted[0] else both[1])
    assert not ops.class_activation_map(f.detach(), w.detach(), y, **options).requires_grad


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weight_of_another_dtype(backend, device, given):
    """A head in half precision beside wide features, and the other way round: rows are converted, not the matrix."""
    for dtype in (torch.float32, torch.bfloat16):
        f, w, y = _inputs((3, 18, 5, 4), dtype, device)
        w = w.to(given)
        expected = _truth(f, w, y, relu=True)
        torch.testing.assert_close(ops.class_activation_map(f, w, y, relu=True).double(), expected, rtol=1e-4, atol=1e-4)


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
    dtype = torch.float32 if backend == "triton" else torch.float64
    f = torch.randn(2, 5, 3, 4, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(3, 5, dtype=dtype, device=device)
    labels = torch.tensor([2, 0], device=device)
    m = ops.class_activation_map(f, w, labels, norm="minmax", norm_grad=norm_grad)
    assert torch.allclose(m.amax((1, 2)), torch.ones_like(m[:, 0, 0]), atol=1e-6) and not m.amin((1, 2)).any()
    (g,) = torch.autograd.grad(m.amax((1, 2)).sum(), f)
    if norm_grad:  # the maximum is 1 whatever the features are
        assert g.abs().max() < 1e-5
        if dtype == torch.float64:
            assert torch.autograd.gradcheck(  # on a GPU torch adds up the gradient of a resize in any order
                lambda v: ops.class_activation_map(v, w, labels, relu=True, norm="minmax", norm_grad=True, size=(5, 7), renorm=True),
                f,
                nondet_tol=1e-10 if device == "cuda" else 0.0,
            )
    else:
        assert g.abs().max() > 1e-2


@pytest.mark.parametrize("size", [None, (6, 6), (2, 20)], ids=str)
@pytest.mark.parametrize("norm", ["minmax", "max"])
def test_constant_map_is_zero_with_gradient_zero(backend, device, norm, size):
    f = torch.zeros(2, 4, 3, 3, device=device)
    f[1] = -0.5  # a constant that is not zero
    f.requires_grad_()
    m = ops.class_activation_map(f, *_ones(2, device), norm=norm, size=size, renorm=True)
    (g,) = torch.autograd.grad(m.sum(), f)
    assert not m.any() and not g.any()


def test_all_negative_map_after_relu_is_zero(backend, device):
    f = (-torch.rand(2, 4, 3, 3, device=device) - 0.1).requires_grad_()
    for norm in ("none", "minmax", "max"):
        m = ops.class_activation_map(f, *_ones(2, device), relu=True, norm=norm)
        assert not m.any() and not torch.autograd.grad(m.sum(), f)[0].any()


@pytest.mark.parametrize("renorm", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("norm", ["none", "minmax", "max"])
@pytest.mark.parametrize("at", [(0, 0), (2, 2)], ids=["first", "last"])
def test_nan_is_not_hidden(backend, device, norm, renorm, at):
    f = torch.rand(2, 4, 3, 3, device=device)
    f[1, 2, at[0], at[1]] = float("nan")
    m = ops.class_activation_map(f, *_ones(2, device), relu=True, norm=norm, size=(6, 20), renorm=renorm)
    assert m[1].isnan().any() and m[0].isfinite().all()
    if norm != "none":
        assert m[1].isnan().all()


def test_infinity_is_as_the_definition_has_it(backend, device):
    f = torch.rand(3, 4, 3, 3, device=device)
    f[0, 1, 1, 1], f[1, :, :, :], f[2, 0, 0, 1] = float("inf"), float("inf"), -float("inf")
    w, y = _ones(3, device)
    for norm in ("minmax", "max"):
        torch.testing.assert_close(ops.class_activation_map(f, w, y, norm=norm), _definition(f, w, y, norm=norm), equal_nan=True)


def test_renorm_reaches_one_again(backend, device):
    torch.manual_seed(0)
    f, w, y = torch.randn(3, 4, 3, 3, device=device), torch.randn(2, 4, device=device), torch.tensor([0, 1, 1], device=device)
    for size in ((2, 2), (2, 40)):
        once = ops.class_activation_map(f, w, y, norm="minmax", size=size)
        twice = ops.class_activation_map(f, w, y, norm="minmax", size=size, renorm=True)
        assert once.amax() < 1 and torch.allclose(twice.amax((1, 2)), torch.ones(3, device=device), atol=1e-6)
        assert twice.amax() <= 1 and not twice.amin((1, 2)).any()


def test_size_of_the_map_is_no_resize(backend, device):
    f, w, y = _inputs((2, 6, 3, 4), torch.float32, device)
    for renorm in (False, True):
        got = ops.class_activation_map(f, w, y, norm="minmax", size=(3, 4), renorm=renorm)
        torch.testing.assert_close(got, ops.class_activation_map(f, w, y, norm="minmax"))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3)], ids=str)
def test_empty(backend, device, shape):
    f = torch.randn(shape, device=device, requires_grad=True)
    w = torch.ones(2, shape[1], device=device)
    y = torch.zeros(shape[0], dtype=torch.int64, device=device)
    m = ops.class_activation_map(f, w, y, relu=True, norm="minmax", size=(5, 6))
    assert m.shape == (shape[0], 5, 6) and not m.any()
    assert torch.autograd.grad(m.sum(), f)[0].shape == f.shape
    out, slope = torch.ops.fastkd.class_activation_map_fwd(f.detach(), w, y, True, "minmax", [5, 6], True)
    assert out.shape == (shape[0], 5, 6) and slope.shape == (shape[0], 3, 3) and not out.any()


@pytest.mark.parametrize("options", [o for o in OPTIONS if "norm" not in o], ids=_name)
def test_gradcheck(backend, device, options):
    _runs(backend, torch.float64)
    f, w, y = _inputs((2, 5, 3, 4), torch.float64, device)
    assert torch.autograd.gradcheck(lambda a, b: ops.class_activation_map(a, b, y, **options), (f.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("options", [o for o in OPTIONS if "norm" in o], ids=_name)
def test_gradient_with_constant_minimum_and_maximum(backend, device, options):
    """What finite differences cannot show, because they move the extremes: the gradient with these as numbers."""
    _runs(backend, torch.float64)
    f, w, y = _inputs((2, 5, 3, 4), torch.float64, device)
    f.requires_grad_(), w.requires_grad_()
    results = []
    for m in (ops.class_activation_map(f, w, y, **options), _truth(f, w, y, **options)):
        results.append(torch.autograd.grad(m, [f, w], torch.linspace(-1, 2, m.numel(), device=device).view_as(m).double()))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_second_order(backend, device):
    f = torch.randn(2, 5, 3, 4, device=device, requires_grad=True)
    w = torch.randn(3, 5, device=device, requires_grad=True)
    y = torch.tensor([2, 0], device=device)
    (g,) = torch.autograd.grad(ops.class_activation_map(f, w, y).square().sum(), f, create_graph=True)
    if backend != "reference":
        with pytest.raises(ConfigError, match="second order"):
            torch.autograd.grad(g.sum(), w)
    else:
        assert torch.autograd.grad(g.sum(), w)[0].abs().sum() > 0


def test_refused(backend, device):
    f, w = torch.randn(2, 5, 3, 4, device=device), torch.randn(3, 5, device=device)
    y = torch.zeros(2, dtype=torch.int64, device=device)
    changes = ({"features": f[0]}, {"features": f.long()}, {"weight": w[:, :4]}, {"weight": w[:0]}, {"weight": w.long()})
    for change in (*changes, {"labels": y.int()}, {"labels": y[:1]}, {"norm": "l2"}, {"size": (0, 3)}):
        message = next(iter(change))
        with pytest.raises(ValueError, match=message):
            ops.class_activation_map(**{"features": f, "weight": w, "labels": y, **change})


@pytest.mark.parametrize("bad", [3, -1])
def test_label_out_of_range(backend, device, bad):
    f, w = torch.randn(2, 5, 3, 4, device=device), torch.randn(3, 5, device=device)
    y = torch.tensor([0, bad], device=device)
    if device == "cpu":
        with pytest.raises(IndexError):
            ops.class_activation_map(f, w, y)
    else:
        torch.testing.assert_close(ops.class_activation_map(f, w, y), ops.class_activation_map(f, w, y.clamp(0, 2)))


def test_autocast(backend, device):
    """The map is fp32 whatever the region says; half features are read as they are."""
    f, w, y = _inputs((2, 8, 4, 4), torch.bfloat16, device)
    f.requires_grad_(), w.requires_grad_()
    seed = torch.linspace(-1, 2, 32, device=device).view(2, 4, 4)

    outside = ops.class_activation_map(f, w, y, norm="minmax")
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = ops.class_activation_map(f, w, y, norm="minmax")
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    for a, b in zip(torch.autograd.grad(inside, [f, w], seed), torch.autograd.grad(outside, [f, w], seed), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, device, mode):
    f, w, y = _inputs((2, 8, 4, 4), torch.float32, device)
    f.requires_grad_(), w.requires_grad_()
    options = {"relu": True, "norm": "minmax", "size": (9, 9), "renorm": True}
    expected = ops.class_activation_map(f, w, y, **options).detach()
    with mode():
        got = ops.class_activation_map(f, w, y, **options)
    assert not got.requires_grad and torch.equal(got, expected)


@pytest.mark.parametrize("resized", [False, True], ids=["cells", "pixels"])
def test_opcheck(cpp, resized):
    for layout in ("nchw", "nhwc"):
        f, w, y = _inputs((2, 5, 3, 4), torch.float32, "cpu", layout)
        size = [5, 6] if resized else []
        arguments = (f.requires_grad_(), w.requires_grad_(), y, True, "minmax", size, resized)
        torch.library.opcheck(torch.ops.fastkd.class_activation_map_fwd.default, arguments)
        f, w = f.detach(), w.detach()
        grad, slope = torch.randn(2, *(size or (3, 4))), torch.rand(2, 3, 4)
        for wanted in (True, False):
            torch.library.opcheck(torch.ops.fastkd.class_activation_map_bwd.default, (grad, f, w, y, slope, resized, wanted))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(backend, device, dynamic, layout):
    torch._dynamo.reset()

    def call(f, w, y):
        m = ops.class_activation_map(f, w, y, relu=True, norm="minmax", size=(2 * f.shape[2], 7), renorm=True)
        return m.square().sum() + ops.class_activation_map(f, w, y, norm="max", norm_grad=True).sum()

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for batch, h in ((2, 3), (3, 5)) if dynamic else ((2, 3),):
        f, w, y = _inputs((batch, 6, h, 4), torch.float32, device, layout)
        f.requires_grad_(), w.requires_grad_()
        got, expected = compiled(f, w, y), call(f, w, y)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, [f, w]), torch.autograd.grad(expected, [f, w]), strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


def test_same_bits_twice(backend, device):
    f, w, y = _inputs((5, 65, 9, 7), torch.float32, device)
    f.requires_grad_()
    both = []
    for _ in range(2):
        m = ops.class_activation_map(f, w, y, relu=True, norm="minmax", size=(33, 20), renorm=True)
        both.append((m, torch.autograd.grad(m.square().sum(), f)[0]))
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_instruction_set_and_number_of_threads(cpp, dtype):
    lib, before = _native._load()[0], torch.get_num_threads()
    for layout in ("nchw", "nhwc"):
        f, w, y = _inputs((9, 131, 7, 8), dtype, "cpu", layout)  # enough for more than one thread
        f.requires_grad_()
        found = []
        try:
            for isa in lib.isas():
                for threads in (1, 3):
                    lib.set_isa(isa)
                    torch.set_num_threads(threads)
                    m = ops.class_activation_map(f, w, y, relu=True, norm="minmax", size=(19, 37), renorm=True)
                    found.append((m, torch.autograd.grad(m.square().sum(), f)[0]))
        finally:
            lib.set_isa(lib.isas()[-1])
            torch.set_num_threads(before)
        for m, g in found[1:]:
            assert torch.equal(m, found[0][0]) and torch.equal(g, found[0][1])


@pytest.mark.large
def test_more_than_2_31_elements(cpp):
    """The last image lies beyond 2^31 elements, in both layouts."""
    for memory in (torch.contiguous_format, torch.channels_last):
        f = torch.ones((3, 2**10, 2**10, 2**10 + 1), dtype=torch.bfloat16).contiguous(memory_format=memory)
        f[-1, -1, -1, -1] = 3
        w = torch.ones(1, 2**10)
        m = ops.class_activation_map(f.requires_grad_(), w, torch.zeros(3, dtype=torch.int64))
        assert (m[:2] == 2**10).all() and m[-1, -1, -1] == 2**10 + 2
        (g,) = torch.autograd.grad(m[-1, -1, -1], f)
        assert g[-1, :, -1, -1].eq(1).all() and not g[:2].any()
        del f, m, g
