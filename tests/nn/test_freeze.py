"""Contexts give back exactly what they found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd.nn import evaluating, frozen


def network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    net.train()
    net[1][0].eval()
    return net


def state(net):
    return [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]


@pytest.mark.parametrize("context", [frozen, evaluating])
def test_state_comes_back_also_after_an_exception(context):
    a, b = network(), network().eval()
    before = state(a), state(b)
    with context(a, b):
        assert not any(p.requires_grad for net in (a, b) for p in net.parameters())
        with context(a), context(b, a):
            pass
        assert not any(p.requires_grad for p in a.parameters())
        assert any(m.training for m in a.modules()) is (context is frozen)
    assert (state(a), state(b)) == before
    with pytest.raises(RuntimeError, match="stop"), context(a, b):
        raise RuntimeError("stop")
    assert (state(a), state(b)) == before


def test_gradient_passes_to_the_input_and_not_to_the_weights():
    net, x = network(), torch.randn(5, 3, requires_grad=True)
    buffers = [b.clone() for b in net.buffers()]
    with evaluating(net):
        y = net(x).sum()
    y.backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))


def test_one_network_given_twice():
    net = network()
    before = state(net)
    with frozen(net, net), evaluating(net, net[1]):
        assert not net.training
    assert state(net) == before
