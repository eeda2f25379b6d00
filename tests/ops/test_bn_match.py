"""bn_sums, frozen_bn_act_stats, moments and bn_stats against independent definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd import ops
from fastkd.errors import ConfigError
from fastkd.ops.bn_match.reference import bn_sums_ref, frozen_bn_act_stats_ref

from .compare import close, layouts

# C in {1, 3, 7, 64, 127, 2048}, HxW in {1, 7x7, 14x14, 15x17, 112x112}, N in {0, 1, 3, 64}: each value occurs, and with it the
# vector body, its tail and the piece boundary of both layouts; 2048 x 112x112 is covered by 3 x 112x112 and 2048 x 7x7.
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 7), (64, 7, 14, 14), (3, 64, 15, 17), (1, 3, 112, 112), (3, 2048, 7, 7), (64, 127, 1, 1)]
SHAPES += [(70, 17, 15, 17)]
LAYOUTS = ["nchw", "nhwc", "sliced", "sliced_nhwc"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTS = ["none", "relu", "relu6", "leaky_relu"]


def _inputs(shape, dtype, device, layout="nchw", seed=0):
    gen = torch.Generator().manual_seed(seed)
    c = shape[1]
    mean, std = torch.randn(c, generator=gen).double() * 3, torch.rand(c, generator=gen).double() + 0.5
    x = torch.randn(shape, generator=gen).double() * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    scale, bias = torch.randn(c, generator=gen).double(), torch.randn(c, generator=gen).double()
    shift = mean + 0.3 * std
    x = layouts(x.to(dtype).to(device), layout)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return x, *(v.to(small).to(device) for v in (scale, bias, shift))


def _truth(x, scale, bias, shift, residual, act):
    """fp64, through torch's own batch_norm and activations: shares no line with the reference."""
    x = x.double()
    mean, var = torch.zeros_like(scale).double(), torch.ones_like(scale).double()
    y = torch.batch_norm(x, scale.double(), bias.double(), mean, var, False, 0.0, 0.0, torch.backends.cudnn.enabled)
    y = y if residual is None else y + residual.double()
    y = {"none": lambda v: v, "relu": torch.relu, "relu6": F.relu6, "leaky_relu": lambda v: F.leaky_relu(v, 0.2)}[act](y)
    k = shift.double().view(-1, *([1] * (x.dim() - 2)))
    dims = [d for d in range(x.dim()) if d != 1]
    return y, torch.stack([(x - k).sum(dims), ((x - k) ** 2).sum(dims)])


def _away_from_kinks(x, scale, bias, residual, act):
    """Moves inputs whose preactivation is near a kink, where rounding may choose either side."""
    pre = x.double() * scale.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    pre = pre if residual is None else pre + residual.double()
    near = (pre.abs() < 0.05) | ((pre - 6).abs() < 0.1)
    return near if act != "none" else torch.zeros_like(near)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn_sums(backend, device, shape, dtype, layout):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no Triton kernel for float64")
    x, _, _, shift = _inputs(shape, dtype, device, layout)
    truth_x = x.double().requires_grad_()
    d = truth_x - shift.double().view(-1, 1, 1)
    truth = torch.stack([d.sum((0, 2, 3)), (d * d).sum((0, 2, 3))])
    eager_x, ours_x = x.detach().clone().requires_grad_(), x.detach().requires_grad_()
    eager, ours = bn_sums_ref(eager_x, shift), ops.bn_sums(ours_x, shift)
    close(ours, eager, truth)
    weight = torch.linspace(-1, 2, 2 * shape[1], device=device).view(2, -1)
    grads = [torch.autograd.grad(s, v, weight.to(s.dtype))[0] for s, v in ((ours, ours_x), (eager, eager_x), (truth, truth_x))]
    close(*grads)
    if layout in ("nchw", "nhwc"):
        assert grads[0].is_contiguous(memory_format=torch.contiguous_format if layout == "nchw" else torch.channels_last)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 7, 7), (2, 64, 15, 17), (64, 127, 1, 1), (20, 33, 4, 4)], ids=str)
def test_frozen_bn_act_stats(backend, device, shape, dtype, layout, act, residual):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no Triton kernel for float64")
    x, scale, bias, shift = _inputs(shape, dtype, device, layout)
    res = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype).to(device) if residual else None
    keep = ~_away_from_kinks(x, scale, bias, res, act)
    weight_y = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype).to(device) * keep  # not ones: not the last layer
    weight_s = torch.linspace(-0.1, 0.2, 2 * shape[1], device=device, dtype=torch.float64).view(2, -1)
    results = []
    for kind in ("ours", "eager", "truth"):
        v = (x.double() if kind == "truth" else x.detach().clone() if kind == "eager" else x.detach()).requires_grad_()
        r = None if res is None else (res.double() if kind == "truth" else res.clone()).requires_grad_()
        if kind == "truth":
            y, sums = _truth(v, scale, bias, shift, r, act)
        elif kind == "eager":
            y, sums = frozen_bn_act_stats_ref(v, scale, bias, shift, r, act, 0.2)
        else:
            y, sums = ops.frozen_bn_act_stats(v, scale, bias, shift, residual=r, act=act, slope=0.2)
        inputs = [v] if r is None else [v, r]
        grads = torch.autograd.grad([y, sums], inputs, [weight_y.to(y.dtype), weight_s.to(sums.dtype)])
        results.append((y.detach(), sums.detach(), *grads))
    for ours, eager, truth in zip(*results, strict=True):
        close(ours, eager, truth)
    if layout != "sliced":
        fmt = torch.contiguous_format if layout == "nchw" else torch.channels_last
        assert results[0][0].is_contiguous(memory_format=fmt) and results[0][2].is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 0, 3, 3), (2, 5, 0, 3)], ids=str)
def test_empty(backend, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    vec = torch.ones(shape[1], device=device)
    y, sums = ops.frozen_bn_act_stats(x, vec, vec, vec, act="relu")
    assert y.shape == x.shape and sums.shape == (2, shape[1]) and not sums.any()
    (dx,) = torch.autograd.grad([y.sum() + sums.sum() + ops.bn_sums(x, vec).sum()], x)
    assert dx.shape == x.shape
    with pytest.raises(ValueError, match="empty batch"):
        ops.bn_stats(x)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 9), (2, 5, 3, 4, 6)], ids=str)
def test_other_ranks(backend, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    if x.dim() == 5:
        x = x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    scale, bias, shift = torch.randn(3, 5, device=device)
    y, sums = ops.frozen_bn_act_stats(x, scale, bias, shift, act="leaky_relu", slope=0.2)
    truth, truth_sums = _truth(x, scale, bias, shift, None, "leaky_relu")
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.double(), truth_sums, rtol=1e-5, atol=1e-4)
    assert y.stride() == x.stride()


def test_gradcheck(backend, device):
    if backend == "triton":
        pytest.skip("no Triton kernel for float64")
    torch.manual_seed(1)
    x = torch.randn(3, 5, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    r = torch.randn_like(x, requires_grad=True)
    scale, bias, shift = torch.randn(3, 5, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda v: ops.bn_sums(v, shift), x)
    for act in ACTS:
        for memory in (torch.contiguous_format, torch.channels_last):
            v = x.detach().contiguous(memory_format=memory).requires_grad_()

            def frozen(a, b, act=act):
                return ops.frozen_bn_act_stats(a, scale, bias, shift, residual=b, act=act)

            assert torch.autograd.gradcheck(frozen, (v, r))
    assert torch.autograd.gradcheck(lambda v: ops.moments(ops.bn_sums(v, shift), v.numel() // 5, shift), x)


@pytest.mark.parametrize("wanted", ["x", "residual"])
def test_partial_gradients(backend, device, wanted):
    x, r = torch.randn(2, 4, 5, 3, 3, device=device)
    scale, bias, shift = torch.randn(3, 5, device=device)
    (x if wanted == "x" else r).requires_grad_()
    y, sums = ops.frozen_bn_act_stats(x, scale, bias, shift, residual=r, act="relu")
    y.sum().backward()
    mask = (y > 0).float()
    assert (x.grad is None) == (wanted == "residual") and (r.grad is None) == (wanted == "x")
    torch.testing.assert_close(x.grad if wanted == "x" else r.grad, mask * scale.view(-1, 1, 1) if wanted == "x" else mask)


def test_one_result_unused(backend, device):
    x = torch.randn(4, 5, 3, 3, device=device, requires_grad=True)
    scale, bias, shift = torch.randn(3, 5, device=device)
    y, sums = ops.frozen_bn_act_stats(x, scale, bias, shift, act="relu")
    (from_y,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (from_sums,) = torch.autograd.grad(sums.sum(), x, retain_graph=True)
    (both,) = torch.autograd.grad(y.sum() + sums.sum(), x)
    torch.testing.assert_close(both, from_y + from_sums)
    torch.testing.assert_close(from_sums, 1 + 2 * (x.detach() - shift.view(-1, 1, 1)))


def test_second_order(backend, device):
    x = torch.randn(4, 5, 3, 3, device=device, requires_grad=True)
    shift = torch.zeros(5, device=device)
    y, sums = ops.frozen_bn_act_stats(x, shift + 1, shift, shift, act="relu")
    (g,) = torch.autograd.grad(y.square().sum() + sums.square().sum(), x, create_graph=True)
    if backend == "reference":
        (h,) = torch.autograd.grad(g.sum(), x)
        assert h.abs().sum() > 0
    else:
        with pytest.raises(ConfigError, match="second order"):
            torch.autograd.grad(g.sum(), x)


def test_no_grad_and_inference_mode(backend, device):
    x, vec = torch.randn(4, 5, 3, 3, device=device, requires_grad=True), torch.ones(5, device=device)
    expected = ops.frozen_bn_act_stats(x, vec, vec, vec, act="relu")[0].detach()
    with torch.no_grad():
        out = ops.frozen_bn_act_stats(x, vec, vec, vec, act="relu")[0]
        assert not out.requires_grad and torch.equal(out, expected)
    with torch.inference_mode():
        assert torch.equal(ops.frozen_bn_act_stats(x, vec, vec, vec, act="relu")[0], expected)


def test_autocast_keeps_statistics_wide(backend, device):
    x, vec = torch.randn(4, 5, 3, 3, device=device).bfloat16(), torch.ones(5, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, sums = ops.frozen_bn_act_stats(x, vec, vec, vec)
    assert y.dtype == torch.bfloat16 and sums.dtype == torch.float32


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("act", ACTS)
def test_not_finite_reaches_the_results(backend, device, act, layout):
    """NaN and infinity pass where torch passes them, and nowhere else."""
    x = layouts(torch.randn(2, 17, 5, 5, device=device), layout)
    x[0, 3, 2, 2], x[1, 16, 4, 4], x[1, 2, 0, 0] = float("nan"), float("inf"), float("nan")
    x.requires_grad_()
    one, zero = torch.ones(17, device=device), torch.zeros(17, device=device)
    y, sums = ops.frozen_bn_act_stats(x, one, zero, zero, act=act)
    v = x.detach().requires_grad_()
    expected, expected_sums = frozen_bn_act_stats_ref(v, one, zero, zero, None, act, 0.01)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(sums.isnan(), expected_sums.isnan())
    weight = torch.randn(y.shape, device=device)
    ours, theirs = torch.autograd.grad(y, x, weight)[0], torch.autograd.grad(expected, v, weight)[0]
    looked_at = ~x.isnan() if act == "relu6" else torch.ones_like(x, dtype=torch.bool)  # torch's relu6 itself goes both ways at NaN
    torch.testing.assert_close(ours[looked_at], theirs[looked_at], equal_nan=True)


def test_lazy_negation_is_resolved(backend, device):
    x, shift = (torch._neg_view(torch.randn(s, device=device)) for s in ((3, 4, 5, 5), (4,)))
    torch.testing.assert_close(ops.bn_sums(x, shift), bn_sums_ref(x.resolve_neg(), shift.resolve_neg()), rtol=1e-5, atol=1e-4)


def test_large_mean(backend, device):
    """mean/std = 1000: shifted sums keep the variance where E[x^2] - E[x]^2 has lost it."""
    x = torch.randn(16, 3, 32, 32, device=device, generator=torch.Generator(device).manual_seed(0)) + 1000
    shift = torch.full((3,), 1000.5, device=device)
    stats = ops.bn_stats(x, shift)
    torch.testing.assert_close(stats[1].double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(ops.bn_stats(x)[1], stats[1], rtol=1e-4, atol=0.0)


def test_deterministic(backend, device):
    x, shift = torch.randn(64, 19, 15, 17, device=device), torch.zeros(19, device=device)
    assert torch.equal(ops.bn_sums(x, shift), ops.bn_sums(x, shift))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bits_do_not_depend_on_threads_or_instruction_set(cpp, layout):
    from fastkd import _C

    x, scale, bias, shift = _inputs((40, 37, 15, 17), torch.float32, "cpu", layout)
    for dtype in DTYPES:
        v = x.to(dtype).requires_grad_()
        seen = []
        threads, best = torch.get_num_threads(), _C.isas()[-1]
        try:
            for count in (1, 2, 3):
                for isa in _C.isas():
                    torch.set_num_threads(count)
                    _C.set_isa(isa)
                    y, sums = ops.frozen_bn_act_stats(v, scale, bias, shift, act="relu6")
                    seen.append((y, sums, *torch.autograd.grad([y.float().square().sum() + sums.sum()], v)))
        finally:
            torch.set_num_threads(threads)
            _C.set_isa(best)
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_constants_get_no_gradient(backend, device):
    x, vec = torch.randn(2, 5, 3, 3, device=device), torch.ones(5, device=device)
    for bad in range(3):
        args = [vec.clone() for _ in range(3)]
        args[bad].requires_grad_()
        with pytest.raises(ValueError, match="requires a gradient"):
            ops.frozen_bn_act_stats(x, *args)
        with torch.no_grad():
            ops.frozen_bn_act_stats(x, *args)
    with pytest.raises(ValueError, match="requires a gradient"):
        ops.bn_sums(x, vec.clone().requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(4)}, "one value per channel"),
        ({"act": "gelu"}, "unknown activation"),
        ({"residual": torch.ones(2, 5, 1, 1)}, "residual must have shape"),
        ({"residual": torch.ones(2, 5, 3, 3).double()}, "residual must have shape"),
        ({"x": torch.ones(2, 5, 3, 3).int()}, "floating point"),
        ({"x": torch.ones(5)}, "floating point"),
    ],
)
def test_refused(change, message):
    args = {"x": torch.ones(2, 5, 3, 3), "scale": torch.ones(5), "bias": torch.ones(5), "shift": torch.ones(5), **change}
    with pytest.raises(ValueError, match=message):
        ops.frozen_bn_act_stats(**args)


def test_opcheck(cpp):
    vec = torch.randn(3, 5)
    for memory in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 5, 3, 4).contiguous(memory_format=memory).requires_grad_()
        torch.library.opcheck(torch.ops.fastkd.bn_sums_fwd.default, (x, vec[0]))
        torch.library.opcheck(torch.ops.fastkd.bn_sums_bwd.default, (torch.randn(2, 5), x.detach(), vec[0]))
        r = torch.randn_like(x, requires_grad=True)
        torch.library.opcheck(torch.ops.fastkd.frozen_bn_act_stats_fwd.default, (x, *vec, r, "relu", 0.01))
    x = torch.randn(2, 5, 4, 4)[:, :, 1:, 1:].requires_grad_()
    torch.library.opcheck(torch.ops.fastkd.frozen_bn_act_stats_fwd.default, (x, *vec, None, "leaky_relu", 0.1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(cpp, dynamic):
    torch._dynamo.reset()
    scale, bias, shift = torch.randn(3, 6)
    def f(x):
        y, sums = ops.frozen_bn_act_stats(x, scale, bias, shift, act="relu")
        stats = ops.moments(sums, x.numel() // x.shape[1], shift)
        return y.sum() + stats.square().sum() + ops.bn_stats(x).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for n in (3, 4) if dynamic else (3,):
        x = torch.randn(n, 6, 5, 5, requires_grad=True)
        expected, got = f(x), compiled(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])


def test_moments():
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    shift = torch.randn(4, dtype=torch.float64)
    parts = sum(bn_sums_ref(part, shift) for part in x.split([2, 3]))  # sums add over batches
    stats = ops.moments(parts, 45, shift)
    torch.testing.assert_close(stats[0], x.mean((0, 2, 3)))
    torch.testing.assert_close(stats[1], x.var((0, 2, 3), unbiased=False))
    below = torch.tensor([[1.0], [0.5]], requires_grad=True)  # var = 0.5 - 1 < 0: rounding, so 0 with gradient 0
    out = ops.moments(below, 1, torch.zeros(1))
    out[1].sum().backward()
    assert out[1] == 0 and not below.grad.any()
    with pytest.raises(ValueError, match="count is 0"):
        ops.moments(parts, 0, shift)


def test_one_element_has_variance_zero(backend, device):
    stats = ops.bn_stats(torch.full((1, 3, 1, 1), 2.5, device=device))
    assert stats[0].tolist() == [2.5] * 3 and not stats[1].any()


def test_fp16_is_rounded_as_torch_rounds_it(cpp):
    """Every fp16 value, plus numbers that make sums subnormal, halfway between two values, and too large: each instruction set."""
    from fastkd import _C

    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    best = _C.isas()[-1]
    one, zero = torch.ones(1), torch.zeros(1)
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            for bias in (0.0, 2.0**-25, 3 * 2.0**-26, -(2.0**-14), 1.0, 16.0, -65504.0, 1e30):
                for x in (every.view(1, 1, 256, 256), every[1:].view(-1, 1, 5, 3)):  # vectors, and rows shorter than one
                    y = ops.frozen_bn_act_stats(x, one, zero + bias, zero)[0]
                    expected = (x.float() + bias).half()
                    assert torch.equal(y.isnan(), expected.isnan()), (isa, bias)
                    assert torch.equal(y.nan_to_num(0.5), expected.nan_to_num(0.5)), (isa, bias)
    finally:
        _C.set_isa(best)


@pytest.mark.large
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_more_than_2_31_elements(cpp, layout):
    x = layouts(torch.ones((1, 2, 2**15, 2**15 + 1), dtype=torch.bfloat16), layout)
    x[0, 1, -1, -1] = 3
    x.requires_grad_()
    one = torch.ones(2)
    sums = ops.bn_sums(x, one)
    assert sums.tolist() == [[0, 2], [0, 4]]
    (dx,) = torch.autograd.grad(sums[1].sum(), x)
    assert dx[0, 1, -1, -1] == 4 and not dx[0, :, :2].any()
    del dx
    y, sums = ops.frozen_bn_act_stats(x, one, -one, one, act="relu")
    assert y[0, 1, -1, -1] == 2 and sums.tolist() == [[0, 2], [0, 4]]
    del y
    (dx,) = torch.autograd.grad(sums[1].sum(), x)
    assert dx[0, 1, -1, -1] == 4 and not dx[0, :, :2].any()
