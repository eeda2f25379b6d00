"""Copies stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd.nn import copy_


def network(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2).half())
    net[1](torch.randn(2, 4, 3, 3))
    return net


def test_values_move_and_addresses_stay():
    to, source = network(0), network(1)
    source[1](torch.randn(2, 4, 3, 3))
    at = [t.data_ptr() for t in [*to.parameters(), *to.buffers()]]
    copy_(to, source)
    assert [t.data_ptr() for t in [*to.parameters(), *to.buffers()]] == at
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in to.state_dict().items())
    assert int(to[1].num_batches_tracked) == 2 and all(p.requires_grad and p.is_leaf for p in to.parameters())
    with torch.no_grad():
        source[0].weight.zero_()
    assert to[0].weight.abs().sum() > 0


def test_other_forms_are_refused():
    with pytest.raises(ValueError, match=r"'2\.weight' is missing in the source"):
        copy_(network(0), network(0)[:2])
    with pytest.raises(ValueError, match=r"'0\.weight' is \(4, 1, 3, 3\), expected \(4, 3, 3, 3\)"):
        copy_(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(1, 4, 3)))
