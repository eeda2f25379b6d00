"""bn_match_loss against a definition that shares no line with it: all layers at once, both distances, with and without an average."""

from __future__ import annotations

import pytest
import torch

from fastkd import ops
from fastkd.nn import BnEma
from fastkd.ops import _native
from fastkd.ops.bn_match.reference import bn_match_loss_ref

from .compare import close

WIDTHS = [3, 0, 1, 16, 17, 64, 127, 0, 300]  # empty layers, less than a vector, exactly one, tails
OFFSETS = tuple(sum(WIDTHS[:i]) for i in range(len(WIDTHS) + 1))
C = OFFSETS[-1]
KINDS = ["l2", "gauss_kl"]
BLENDS = ["plain", "average", "first_call", "later_call"]


def _inputs(dtype, device, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def made():
        mean, var = torch.randn(C, generator=gen, dtype=torch.float64), torch.rand(C, generator=gen, dtype=torch.float64) + 0.3
        return torch.stack([mean, var]).to(device, dtype)

    return made(), made(), made()


def _how(blend, average, device):
    if blend == "plain":
        return {}
    calls = {"average": None, "first_call": 0, "later_call": 3}[blend]
    return {
        "average": average,
        "momentum": 0.9,
        "calls": None if calls is None else torch.tensor(calls, device=device),
    }


def _truth(stats, target, kind, first, blend, average):
    """fp64, with torch's distributions and its list of norms."""
    stats, target, average = stats.double(), target.double(), average.double()
    if blend in ("average", "later_call"):
        stats = torch.lerp(stats, average, 0.9)
    total = stats.new_zeros(())
    for i, (s, t) in enumerate(zip(stats.split(WIDTHS, 1), target.split(WIDTHS, 1), strict=True)):
        if kind == "l2":
            term = sum(torch.nn.functional.pairwise_distance(a, b, eps=0.0) for a, b in zip(s, t)) if s.numel() else 0.0
        else:
            normal = torch.distributions.Normal
            term = torch.distributions.kl_divergence(normal(s[0], s[1].sqrt()), normal(t[0], t[1].sqrt())).sum() if s.numel() else 0.0
        total = total + (first if i == 0 else 1.0) * term
    return total


def _supported(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no Triton kernel for float64")


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_value_and_gradient(backend, device, dtype, kind, blend):
    _supported(backend, dtype)
    stats, target, average = _inputs(dtype, device)
    how = _how(blend, average, device)
    results = []
    for which in ("ours", "eager", "truth"):
        v = (stats.double() if which == "truth" else stats.clone()).requires_grad_()
        if which == "truth":
            loss = _truth(v, target, kind, 10.0, blend, average)
        elif which == "eager":
            loss = bn_match_loss_ref(v, target, OFFSETS, 10.0, kind, **how)
        else:
            loss = ops.bn_match_loss(v, target, OFFSETS, first=10.0, kind=kind, **how)
        results.append((loss.detach(), torch.autograd.grad(loss, v, torch.full_like(loss, -1.7))[0]))  # not the last operation
    for ours, eager, truth in zip(*results, strict=True):
        close(ours, eager, truth)


def test_by_hand(backend, device):
    stats = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 4.0]], device=device, requires_grad=True)
    target = torch.tensor([[1.0, 2.0, 2.0], [1.0, 1.0, 1.0]], device=device)
    loss = ops.bn_match_loss(stats, target, (0, 2, 3), first=10.0)
    assert loss.item() == pytest.approx(6.0)
    loss.backward()
    assert stats.grad.tolist() == [[0, 0, 1], [0, 0, 1]]  # a zero norm has gradient zero, not NaN
    first = ops.bn_match_loss(stats + 1, target, (0, 2, 3), first=10.0) - ops.bn_match_loss(stats + 1, target, (0, 2, 3))
    assert first.item() == pytest.approx(9 * 2 * 2**0.5, rel=1e-6)
    one = torch.ones(2, 1, device=device)
    assert ops.bn_match_loss(one + 1, one, (0, 1)).item() == pytest.approx(2.0)  # one layer of one channel


def test_the_gaussian_divergence_is_zero_at_the_target_alone(backend, device):
    target = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.2, 3.0]], device=device)

    def value(mean, var):
        at = (target + torch.tensor([[mean], [0.0]], device=device)) * torch.tensor([[1.0], [var]], device=device)
        at.requires_grad_()
        loss = ops.bn_match_loss(at, target, (0, 2, 3), kind="gauss_kl")
        return loss.item(), torch.autograd.grad(loss, at)[0].abs().max().item()

    assert value(0.0, 1.0) == pytest.approx((0.0, 0.0), abs=1e-6)
    for mean, var in ((0.1, 1.0), (-0.1, 1.0), (0.0, 1.2), (0.0, 0.8), (0.3, 0.5)):
        found, slope = value(mean, var)
        assert found > 1e-3 and slope > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_no_layers(backend, device, kind):
    for offsets in ((0,), (0, 0, 0)):
        stats = torch.zeros(2, 0, device=device, requires_grad=True)
        loss = ops.bn_match_loss(stats, torch.zeros(2, 0, device=device), offsets, kind=kind)
        assert loss == 0 and torch.autograd.grad(loss, stats)[0].shape == (2, 0)


def test_constant_channels_stay_finite(backend, device):
    stats = torch.zeros(2, 20, device=device, requires_grad=True)
    target = torch.ones(2, 20, device=device)
    loss = ops.bn_match_loss(stats, target, (0, 20), kind="gauss_kl")
    (g,) = torch.autograd.grad(loss, stats)
    assert loss.isfinite() and g[0].tolist() == [-1.0] * 20 and not g[1].any()  # below the least variance: no slope
    assert ops.bn_match_loss(stats, target * 0, (0, 20), kind="gauss_kl").isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_reaches_the_loss(backend, device, kind, bad):
    stats, target, _ = _inputs(torch.float32, device)
    stats[1, 40] = bad
    ours, theirs = stats.clone().requires_grad_(), stats.clone().requires_grad_()
    loss, expected = ops.bn_match_loss(ours, target, OFFSETS, kind=kind), bn_match_loss_ref(theirs, target, OFFSETS, 1.0, kind)
    assert not loss.isfinite() and torch.equal(loss.isnan(), expected.isnan())
    a, b = torch.autograd.grad(loss, ours)[0], torch.autograd.grad(expected, theirs)[0]
    assert torch.equal(a.isnan(), b.isnan())
    torch.testing.assert_close(a[0], b[0], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_statistics_are_widened(backend, device, dtype):
    stats, target, average = (v.to(dtype) for v in _inputs(torch.float32, device))
    stats.requires_grad_()
    loss = ops.bn_match_loss(stats, target, OFFSETS, average=average, momentum=0.5)
    wide = stats.detach().float().requires_grad_()
    expected = ops.bn_match_loss(wide, target.float(), OFFSETS, average=average.float(), momentum=0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    (g,), (h,) = torch.autograd.grad(loss, stats), torch.autograd.grad(expected, wide)
    assert g.dtype == dtype
    torch.testing.assert_close(g, h.to(dtype))


def test_strided_inputs(backend, device):
    stats, target, average = _inputs(torch.float32, device)
    turned = [torch.stack([v[0], v[1]], 1).T for v in (stats, target, average)]
    assert not turned[0].is_contiguous()
    expected = ops.bn_match_loss(stats, target, OFFSETS, average=average, momentum=0.3)
    assert torch.equal(ops.bn_match_loss(turned[0], turned[1], OFFSETS, average=turned[2], momentum=0.3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_first_and_second_order(backend, device, kind):
    _supported(backend, torch.float64)
    gen = torch.Generator().manual_seed(2)
    stats, target, average = (torch.rand(3, 2, 5, generator=gen, dtype=torch.float64) + 0.3).to(device)
    stats.requires_grad_()
    for how in ({}, {"average": average, "momentum": 0.6, "calls": torch.tensor(1, device=device)}):

        def loss(v, how=how):
            return ops.bn_match_loss(v, target, (0, 2, 2, 5), first=3.0, kind=kind, **how)

        assert torch.autograd.gradcheck(loss, stats)
        assert torch.autograd.gradgradcheck(loss, stats)


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_where_the_loss_is_not_the_last_operation(backend, device, kind):
    """Its incoming gradient then depends on the statistics itself, and that path is counted once."""
    _supported(backend, torch.float64)
    stats, target = (torch.rand(2, 2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.3).to(device)
    assert torch.autograd.gradgradcheck(
        lambda v: ops.bn_match_loss(v.exp(), target, (0, 2, 5), kind=kind).square(), stats.clone().requires_grad_()
    )


def test_no_gradient_wanted(backend, device):
    stats, target, _ = _inputs(torch.float32, device)
    expected = ops.bn_match_loss(stats, target, OFFSETS)
    stats.requires_grad_()
    assert not expected.requires_grad
    with torch.no_grad():
        assert torch.equal(ops.bn_match_loss(stats, target, OFFSETS), expected)
    with torch.inference_mode():
        assert torch.equal(ops.bn_match_loss(stats, target, OFFSETS), expected)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ops.bn_match_loss(stats, target, OFFSETS), expected)


def test_one_launch_each_way(cpp, monkeypatch):
    seen, launch = [], _native.launch
    monkeypatch.setattr(_native, "launch", lambda kernel, *rest, **kw: seen.append(kernel) or launch(kernel, *rest, **kw))
    stats, target, average = _inputs(torch.float32, "cpu")
    stats.requires_grad_()
    ema = BnEma(C)
    ema.mean_var.copy_(average)
    ops.use("auto")
    ema.loss(stats, target, OFFSETS, first=2.0).backward()
    assert seen == ["bn_loss_fwd", "bn_loss_bwd"]


def test_bits_do_not_depend_on_threads_or_instruction_set(cpp):
    from fastkd import _C

    gen = torch.Generator().manual_seed(4)
    stats, target, average = torch.rand(3, 2, 40_000, generator=gen)  # enough for more than one thread
    stats.requires_grad_()
    threads, best, seen = torch.get_num_threads(), _C.isas()[-1], []
    try:
        for kind in KINDS:
            for count in (1, 2, 3):
                for isa in _C.isas():
                    torch.set_num_threads(count)
                    _C.set_isa(isa)
                    loss = ops.bn_match_loss(stats, target, (0, 39, 20_000, 39_991, 40_000), kind=kind, average=average, momentum=0.9)
                    seen.append((kind, loss.detach(), *torch.autograd.grad(loss, stats)))
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(best)
    for kind in KINDS:
        same = [s[1:] for s in seen if s[0] == kind]
        assert all(torch.equal(a, b) for other in same[1:] for a, b in zip(same[0], other, strict=True))


def test_opcheck(cpp):
    stats, target, average = _inputs(torch.float32, "cpu")
    grad = torch.tensor(0.7)
    stats.requires_grad_()
    for kind, momentum, extra in (("l2", 0.0, (None, None)), ("gauss_kl", 0.9, (average, torch.tensor(2)))):
        plain = (list(OFFSETS), momentum, 10.0, kind)
        torch.library.opcheck(torch.ops.fastkd.bn_match_loss_fwd.default, (stats, target, *extra, *plain))
        torch.library.opcheck(torch.ops.fastkd.bn_match_loss_bwd.default, (grad, stats, target, *extra, *plain))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(cpp, dynamic):
    torch._dynamo.reset()
    stats, target, average = _inputs(torch.float32, "cpu")
    ema = BnEma(C)
    ema.mean_var.copy_(average)
    ema.calls.fill_(1)

    def f(v):
        return ops.bn_match_loss(v, target, OFFSETS, first=10.0) + ema.loss(v * 2, target, OFFSETS, kind="gauss_kl")

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    stats.requires_grad_()
    expected, got = f(stats), compiled(stats)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, stats)[0], torch.autograd.grad(expected, stats)[0])


def test_refused():
    stats, target = torch.ones(2, 3), torch.ones(2, 3)
    for bad, message in (((0, 2), "offsets"), ((1, 3), "offsets"), ((0, 4, 3), "offsets"), ((), "offsets")):
        with pytest.raises(ValueError, match=message):
            ops.bn_match_loss(stats, target, bad)
    for how, message in (
        ({"kind": "l1"}, "unknown kind"),
        ({"momentum": 0.9}, "none was given"),
        ({"calls": torch.tensor(1)}, "none was given"),
        ({"average": torch.ones(2, 4), "momentum": 0.9}, r"average must be \[2, 3\]"),
        ({"average": target, "momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ({"average": torch.ones(2, 3, requires_grad=True)}, "average requires a gradient"),
        ({"average": torch.ones(2, 3, device="meta")}, "expected one device"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.bn_match_loss(stats, target, (0, 3), **how)
    with pytest.raises(ValueError, match="target requires a gradient"):
        ops.bn_match_loss(stats, target.clone().requires_grad_(), (0, 3))
    with pytest.raises(ValueError, match=r"must both be \[2, C\]"):
        ops.bn_match_loss(stats[0], target[0], (0, 3))
