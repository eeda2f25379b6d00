"""batch_norm_act against torch's own batch_norm and activation: values, gradients, running statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd import ops
from fastkd.errors import ConfigError
from fastkd.ops.bn_act import reference as ref

from .compare import close, layouts

# C in {1, 3, 7, 64, 127, 2048}, HxW in {1, 7x7, 14x14, 15x17, 112x112}, N in {1, 3, 64}: each value occurs, and with it the vector
# body, its tail and the piece boundary of both layouts; 2048 x 112x112 is covered by 3 x 112x112 and 2048 x 7x7.
SHAPES = [(3, 1, 1, 1), (3, 3, 7, 7), (64, 7, 14, 14), (3, 64, 15, 17), (1, 3, 112, 112), (3, 2048, 7, 7), (64, 127, 1, 1)]
SHAPES += [(70, 17, 15, 17)]
LAYOUTS = ["nchw", "nhwc", "sliced", "sliced_nhwc"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTS = ["none", "relu", "relu6", "leaky_relu"]


def skip(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no Triton kernel for float64")


def inputs(shape, dtype, device, layout="nchw"):
    gen = torch.Generator().manual_seed(shape[1])
    c = shape[1]
    mean, std = torch.randn(c, generator=gen).double() * 3, torch.rand(c, generator=gen).double() + 0.5
    x = torch.randn(shape, generator=gen).double() * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = 1 + 0.5 * torch.randn(c, generator=gen).double(), torch.randn(c, generator=gen).double()
    return layouts(x.to(dtype).to(device), layout), weight.to(small).to(device), bias.to(small).to(device)


def published(x, weight, bias, act, running=(None, None), momentum=0.1):
    y = F.batch_norm(x, *running, weight, bias, True, momentum, 1e-5)
    return {"none": lambda v: v, "relu": torch.relu, "relu6": F.relu6, "leaky_relu": lambda v: F.leaky_relu(v, 0.2)}[act](y)


def away_from_kinks(x, weight, bias, act):
    """Where rounding does not choose the side of a kink."""
    pre = published(x.double(), weight.double(), bias.double(), "none")
    return torch.ones_like(pre, dtype=torch.bool) if act == "none" else (pre.abs() > 0.05) & ((pre - 6).abs() > 0.1)


def results(fn, x, weight, bias, gy):
    values = [v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in (x, weight, bias)]
    y = fn(*values)
    return [y.detach(), *torch.autograd.grad(y, values, gy.to(y.dtype))]


def check(shape, dtype, device, layout, act):
    x, weight, bias = inputs(shape, dtype, device, layout)
    gy = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype).to(device) * away_from_kinks(x, weight, bias, act)
    truth = results(lambda *v: published(*v, act), x.double(), weight.double(), bias.double(), gy.double())
    eager = results(lambda *v: published(*v, act), x, weight, bias, gy)
    v = x.detach().requires_grad_()  # sliced as it came
    w, b = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    y = ops.batch_norm_act(v, None, None, w, b, act=act, slope=0.2)
    ours = [y.detach(), *torch.autograd.grad(y, (v, w, b), gy.to(dtype))]
    for mine, theirs, exact in zip(ours, eager, truth, strict=True):
        close(mine, theirs, exact, floor=1e-5 if dtype == torch.float32 and shape[0] * shape[2] * shape[3] < 10 else None)
    return ours


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, device, shape, dtype, layout):
    skip(backend, dtype)
    ours = check(shape, dtype, device, layout, "leaky_relu")
    if layout in ("nchw", "nhwc"):
        kept = torch.contiguous_format if layout == "nchw" else torch.channels_last
        assert all(v.is_contiguous(memory_format=kept) for v in ours[:2])


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(backend, device, dtype, layout, act):
    check((5, 33, 9, 4), dtype, device, layout, act)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 9), (2, 5, 3, 4, 6)], ids=str)
def test_other_numbers_of_dimensions(backend, device, shape):
    x = torch.randn(shape, device=device)
    if x.dim() == 5:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    y = ops.batch_norm_act(x, act="relu")
    torch.testing.assert_close(y, F.batch_norm(x, None, None, None, None, True).relu(), rtol=1e-4, atol=1e-5)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 0, 3, 3), (2, 5, 0, 3)], ids=str)
def test_empty(backend, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = torch.ones(2, shape[1], device=device, requires_grad=True).unbind()
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    y = ops.batch_norm_act(x, mean, var, weight, bias, act="relu")
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == grads[0].shape == x.shape and not grads[1].any() and not grads[2].any()
    assert not mean.any() and (var == 1).all()


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_are_those_of_torch(backend, device, dtype, momentum):
    theirs = nn.BatchNorm2d(6, momentum=momentum, device=device)
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
    for step in range(1, 4):
        x = (torch.randn(4, 6, 5, 3, device=device) * step + step).to(dtype)
        theirs(x)
        by = torch.tensor(1 / step, device=device) if momentum is None else momentum
        ops.batch_norm_act(x, mean, var, theirs.weight, theirs.bias, momentum=by)
        torch.testing.assert_close(mean, theirs.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, theirs.running_var, rtol=2e-6, atol=1e-6)  # unbiased


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_gradcheck(backend, device, memory, act):
    skip(backend, torch.float64)
    torch.manual_seed(1)
    x = torch.randn(3, 5, 2, 3, dtype=torch.float64, device=device).contiguous(memory_format=memory).requires_grad_()
    weight, bias = torch.randn(2, 5, dtype=torch.float64, device=device).requires_grad_().unbind()
    assert torch.autograd.gradcheck(lambda *v: ops.batch_norm_act(v[0], None, None, v[1], v[2], act=act, slope=0.3), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda v: ops.batch_norm_act(v, act=act, slope=-0.5), x)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_partial_gradients(backend, device, wanted):
    x, weight, bias = inputs((4, 5, 3, 3), torch.float32, device)
    for i in wanted:
        (x, weight, bias)[i].requires_grad_()
    ops.batch_norm_act(x, None, None, weight, bias, act="relu").square().sum().backward()
    v = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    published(*v, "relu").square().sum().backward()
    for i, (mine, theirs) in enumerate(zip((x, weight, bias), v, strict=True)):
        assert (mine.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_second_order(backend, device):
    x = torch.randn(4, 5, 3, 3, device=device, requires_grad=True)
    weight = torch.ones(5, device=device, requires_grad=True)
    y = ops.batch_norm_act(x, None, None, weight, act="leaky_relu")
    (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    if backend == "reference":
        (h,) = torch.autograd.grad(g.square().sum(), x)
        assert h.abs().sum() > 0
    else:
        with pytest.raises(ConfigError, match="second order"):
            torch.autograd.grad(g.square().sum(), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_order_is_refused_in_every_layout(cpp, layout):
    """With a constant gradient of y, only the saved x leads back to the input; a copy of it must not lose the way."""
    x = inputs((4, 5, 3, 3), torch.float32, "cpu", layout)[0].requires_grad_()
    (g,) = torch.autograd.grad(ops.batch_norm_act(x), x, torch.randn(x.shape), create_graph=True)
    with pytest.raises(ConfigError, match="second order"):
        torch.autograd.grad(g.square().sum(), x)


def test_no_grad_and_inference_mode(backend, device):
    x, weight, bias = inputs((4, 5, 3, 3), torch.float32, device)
    weight.requires_grad_()
    expected = ops.batch_norm_act(x, None, None, weight, bias, act="relu").detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
            y = ops.batch_norm_act(x, mean, var, weight, bias, act="relu")
            assert not y.requires_grad and torch.equal(y, expected) and mean.any()


def test_autocast(backend, device):
    x, weight, bias = inputs((4, 5, 3, 3), torch.bfloat16, device)
    mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.batch_norm_act(x, mean, var, weight, bias)
    assert y.dtype == torch.bfloat16 and mean.dtype == torch.float32
    torch.testing.assert_close(y.float(), published(x.float(), weight, bias, "none"), rtol=1e-2, atol=1e-2)


def test_half_parameters(backend, device):
    x, weight, bias = inputs((4, 5, 3, 3), torch.bfloat16, device)
    weight, bias = weight.bfloat16().requires_grad_(), bias.bfloat16().requires_grad_()
    y = ops.batch_norm_act(x, None, None, weight, bias, act="relu")
    grads = torch.autograd.grad(y.float().sum(), (weight, bias))
    assert y.dtype == grads[0].dtype == grads[1].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("act", ACTS)
def test_not_finite_reaches_the_results(backend, device, act, layout):
    """A NaN or an infinity ruins its channel, as in torch, and no other."""
    x = layouts(torch.randn(2, 17, 5, 5, device=device), layout)
    x[0, 3, 2, 2], x[1, 16, 4, 4], x[0, 5, 0, 0] = float("nan"), float("inf"), float("nan")
    x.requires_grad_()
    mean, var = torch.zeros(17, device=device), torch.ones(17, device=device)
    y = ops.batch_norm_act(x, mean, var, act=act)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape, device=device))
    bad = torch.zeros(17, dtype=torch.bool, device=device)
    bad[[3, 5, 16]] = True
    for v in (y, dx):
        assert torch.equal(v.isfinite().all(0).all(1).all(1), ~bad)
    assert torch.equal(~mean.isfinite(), bad) and torch.equal(~var.isfinite(), bad)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_mean(backend, device, layout):
    """mean/std = 1000: the shift is a value of the channel, so the variance does not cancel, whatever the running mean is."""
    gen = torch.Generator().manual_seed(0)
    x = layouts((torch.randn(16, 3, 32, 32, generator=gen) + 1000).to(device), layout)
    mean, var = torch.zeros(3, device=device), torch.zeros(3, device=device)
    y = ops.batch_norm_act(x, mean, var, momentum=1.0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(y.double(), published(x.double(), None, None, "none"), rtol=1e-3, atol=1e-3)


def test_constant_channel(backend, device):
    x = torch.full((3, 4, 5, 5), 2.5, device=device, requires_grad=True)
    y = ops.batch_norm_act(x, act="leaky_relu")
    assert not y.any() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_deterministic(backend, device):
    x, weight, bias = inputs((64, 19, 15, 17), torch.float32, device)
    runs = [results(lambda *v: ops.batch_norm_act(v[0], None, None, *v[1:], act="relu"), x, weight, bias, x) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bits_do_not_depend_on_threads_or_instruction_set(cpp, layout):
    from fastkd import _C

    x, weight, bias = inputs((40, 37, 15, 17), torch.float32, "cpu", layout)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        v, seen = x.to(dtype), []
        threads, best = torch.get_num_threads(), _C.isas()[-1]
        try:
            for count in (1, 2, 3):
                for isa in _C.isas():
                    torch.set_num_threads(count)
                    _C.set_isa(isa)
                    seen.append(results(lambda *a: ops.batch_norm_act(a[0], None, None, *a[1:], act="leaky_relu"), v, weight, bias, v))
        finally:
            torch.set_num_threads(threads)
            _C.set_isa(best)
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4)}, "weight must be .5., one value per channel of x; found .4."),
        ({"running_var": torch.ones(5, 1)}, "running_var must be"),
        ({"bias": torch.ones(5, device="meta")}, "expected one device"),
        ({"act": "gelu"}, "unknown activation 'gelu'; expected one of none, relu"),
        ({"x": torch.ones(2, 5, 3, 3).int()}, "floating point"),
        ({"x": torch.ones(5)}, "floating point"),
        ({"x": torch.ones(1, 5, 1, 1)}, "Expected more than 1 value per channel when training"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ops.batch_norm_act(**{"x": torch.ones(2, 5, 3, 3), **change})


def test_opcheck(cpp):
    weight, bias, shift = torch.randn(3, 5)
    for memory in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 5, 3, 4).contiguous(memory_format=memory)
        sums, f = ops.bn_sums(x, shift), torch.ops.fastkd
        y, stats = f.bn_act_fwd(x, sums, shift, weight, bias, 24, 1e-5, "relu", 0.0)
        torch.library.opcheck(f.bn_act_fwd.default, (x, sums, shift, weight, None, 24, 1e-5, "leaky_relu", 0.1))
        torch.library.opcheck(f.bn_act_bwd_sums.default, (y, x, stats, bias, "relu", 0.0))
        torch.library.opcheck(f.bn_act_bwd.default, (y, x, stats, None, sums, 24, "relu6", 0.0))
    x = torch.randn(2, 5, 4, 4)[:, :, 1:, 1:]
    torch.library.opcheck(f.bn_act_fwd.default, (x, ops.bn_sums(x, shift), shift, None, bias, 18, 1e-5, "none", 0.0))


def test_passes_equal_their_references(backend, device):
    """The registered passes one by one: between them, sums may have come from other ranks."""
    x, weight, bias = inputs((4, 6, 3, 5), torch.float32, device)
    shift, gy = torch.randn(6, device=device), torch.randn(x.shape, device=device)
    sums, f = ops.bn_sums(x, shift) * 3, torch.ops.fastkd  # as if three ranks held this batch
    args = (x, sums, shift, weight, bias, 180, 1e-5, "relu6", 0.0)
    y, stats = f.bn_act_fwd(*args)
    expected, expected_stats = ref.bn_act_fwd_ref(*args)
    torch.testing.assert_close((y, stats), (expected, expected_stats), rtol=1e-5, atol=1e-5)
    gsums = f.bn_act_bwd_sums(gy, x, stats, bias, "relu6", 0.0)
    torch.testing.assert_close(gsums, ref.bn_act_bwd_sums_ref(gy, x, stats, bias, "relu6", 0.0), rtol=1e-4, atol=1e-4)
    dx = f.bn_act_bwd(gy, x, stats, bias, 3 * gsums, 180, "relu6", 0.0)
    torch.testing.assert_close(dx, ref.bn_act_bwd_ref(gy, x, stats, bias, 3 * gsums, 180, "relu6", 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(cpp, dynamic):
    torch._dynamo.reset()
    weight, bias = torch.randn(2, 6)
    means = [torch.zeros(6) for _ in range(2)]
    variances = [torch.ones(6) for _ in range(2)]

    def f(x, mean, var):
        return ops.batch_norm_act(x, mean, var, weight, bias, act="leaky_relu").square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for n in (3, 4) if dynamic else (3,):
        x = torch.randn(n, 6, 5, 5, requires_grad=True)
        expected, got = f(x, means[0], variances[0]), compiled(x, means[1], variances[1])
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])
    torch.testing.assert_close(means[0], means[1])
    torch.testing.assert_close(variances[0], variances[1])


@pytest.mark.large
def test_more_than_2_31_elements(cpp):
    x = torch.zeros((1, 2, 2**15, 2**15 + 1), dtype=torch.bfloat16)
    x[0, 1, -1, -1], x[0, 1, 0, 0] = 1, -1
    y = ops.batch_norm_act(x, eps=1e-12, act="relu")
    assert y[0, 1, -1, -1] > 1000 and not y[0, 0].any() and y[0, 1, 0, 0] == 0
