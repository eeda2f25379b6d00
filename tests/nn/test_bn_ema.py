"""The momentum rule of the BN loss: plain in the first call, a tenth of the gradient later."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.nn import BnEma
from fastkd.ops import bn_match_loss


@pytest.fixture(autouse=True)
def _double(fp64):
    pass


def stats(seed=0, c=7):
    return torch.rand(2, c, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_first_call_is_plain():
    ema, bn = BnEma(7), stats()
    mixed = ema.mix(bn)
    assert torch.equal(mixed, bn)
    (g,) = torch.autograd.grad((mixed * 3).sum(), bn)
    assert torch.equal(g, torch.full_like(g, 3))
    ema.mix(bn * 2)  # more steps of one call: only the last one is remembered
    ema.update()
    assert torch.equal(ema.mean_var, (bn * 2).detach()) and int(ema.calls) == 1


def test_later_calls_mix_and_scale_the_gradient_by_a_tenth():
    ema, a, b = BnEma(7, momentum=0.9), stats(1), stats(2)
    ema.mix(a)
    ema.update()
    mixed = ema.mix(b)
    torch.testing.assert_close(mixed, 0.1 * b + 0.9 * a)
    (g,) = torch.autograd.grad(mixed.sum(), b)
    assert torch.equal(g, torch.full_like(g, 1 - 0.9)) and not ema.mean_var.requires_grad
    ema.update()
    torch.testing.assert_close(ema.mean_var, (0.9 * a + 0.1 * b).detach())
    ema.mix(a)
    ema.update()
    torch.testing.assert_close(ema.mean_var, (0.9 * (0.9 * a + 0.1 * b) + 0.1 * a).detach())
    assert int(ema.calls) == 3


def test_average_equal_to_the_batch_gives_the_plain_value_and_a_tenth_of_the_gradient():
    ema, bn, target = BnEma(7), stats(3), stats(4).detach()
    ema.mix(bn)
    ema.update()
    split = (0, 3, 7)
    plain, mixed = bn_match_loss(bn, target, split), bn_match_loss(ema.mix(bn), target, split)
    torch.testing.assert_close(plain, mixed, rtol=1e-12, atol=0)
    (g,), (h,) = torch.autograd.grad(plain, bn), torch.autograd.grad(mixed, bn)
    torch.testing.assert_close(h, (1 - 0.9) * g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["l2", "gauss_kl"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_loss_is_that_of_the_mixed_statistics(kind, momentum):
    """Over calls and updates, with what each remembers."""
    one, two, target, split = BnEma(7, momentum), BnEma(7, momentum), stats(9).detach(), (0, 3, 7)
    for seed in range(6):
        a, b = stats(seed), stats(seed)
        mixed, at_once = bn_match_loss(one.mix(a), target, split, first=2.0, kind=kind), two.loss(b, target, split, first=2.0, kind=kind)
        torch.testing.assert_close(at_once, mixed, rtol=1e-12, atol=0)
        (g,), (h,) = torch.autograd.grad(mixed, a), torch.autograd.grad(at_once, b)
        torch.testing.assert_close(h, g, rtol=1e-11, atol=1e-14)
        if seed % 2:
            one.update()
            two.update()
        assert all(torch.equal(u, v) for u, v in zip(one.buffers(), two.buffers(), strict=True))


def test_momentum_zero_is_the_plain_loss_always():
    ema = BnEma(7, momentum=0.0)
    for seed in range(3):
        bn = stats(seed)
        assert torch.equal(ema.mix(bn), bn)
        ema.update()
        assert torch.equal(ema.last, bn.detach()) and torch.equal(ema.mean_var, bn.detach())
    with pytest.raises(ValueError, match="momentum is 1"):
        BnEma(7, momentum=1)


def test_state_is_tensors_in_place():
    ema = BnEma(7)
    at = {k: v.data_ptr() for k, v in ema.named_buffers()}
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        for seed in range(2):
            ema.mix(stats(seed))
            ema.update()
    assert {k: v.data_ptr() for k, v in ema.named_buffers()} == at == {k: at[k] for k in ("mean_var", "last", "calls")}
    assert not [op for op in seen if "_local_scalar_dense" in op or "nonzero" in op]
    twin = BnEma(7)
    twin.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert torch.equal(twin.mix(stats(5)), ema.mix(stats(5)))
    assert twin.mean_var.dtype == torch.float64 and twin.calls.dtype == torch.int64
