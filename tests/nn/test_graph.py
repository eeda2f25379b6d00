"""Where the feature, the map, the head and the stages of a network are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd.nn import instrument

RESNETS = ("resnet", "resnet_early", "resnet_linear", "branchy")
ALL = (*RESNETS, "wide", "wide2", "tall", "chain", "mobile", "window", "shared", "squeeze", "functional")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", ALL)
def test_feature_map_and_moments(name, small, hooked, images):
    net, x = small(name), images()
    out, plain = instrument(net)(x, "moments"), hooked(net)
    plain(x)
    close(out.moments, torch.cat([v.mean((2, 3)) for v in plain.inputs], 1))
    seen = {}
    linear = [m for m in plain.net.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))][-1]
    linear.register_forward_hook(lambda m, i, o: seen.update(feature=i[0]))
    plain(x)
    expected = seen["feature"].mean((2, 3)) if name == "squeeze" else seen["feature"].flatten(1)
    close(out.feature, expected)
    assert out.map.dim() == 4
    if name != "window":
        close(out.map.mean((2, 3)), out.feature)
    else:
        assert out.map.shape == (4, 6, 8, 8) and out.feature.shape == (4, 24)


@pytest.mark.parametrize("name", ALL)
def test_head_is_given_only_where_it_is_exact(name, small, images):
    net, x = small(name), images()
    for teacher in (instrument(net, (3, 16, 16)), instrument(net)):
        t = teacher(x)
        if name in ("window", "squeeze"):
            assert teacher.head is None and teacher.head_reason.count("\n") == 0 and len(teacher.head_reason) > 20
            continue
        weight, bias = teacher.head
        assert teacher.head_reason == "" and weight.shape == (5, t.map.shape[1]) and not weight.requires_grad
        logits = t.map.mean((2, 3)) @ weight.T + (0 if bias is None else bias)
        close(logits, t.logits)
        assert (bias is None) == (name == "tall")


def test_head_that_looks_right_and_is_not(small):
    class Scaled(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) * 2

    class Sneaky(Scaled):
        def forward(self, x):
            return self.net(x) + (1 if x.shape[2] > 1 else 0)  # cannot be traced: only the numbers tell

    assert instrument(Scaled(small("resnet"))).head is None
    teacher = instrument(Sneaky(small("resnet")))
    assert "shape=" in teacher.head_reason and teacher.head is None
    teacher = instrument(Sneaky(small("resnet")), (3, 16, 16))
    assert teacher.head is None and "not the last linear layer" in teacher.head_reason


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet", [(6, 16), (6, 16), (10, 8), (12, 4)]),
        ("wide", [(4, 16), (4, 16), (8, 8), (12, 4)]),
        ("wide2", [(4, 16), (8, 16), (16, 8), (24, 4)]),
        ("tall", [(6, 4), (10, 2)]),
        ("chain", [(6, 16), (8, 8), (9, 4)]),
        ("mobile", [(6, 8), (6, 8), (11, 4)]),
        ("branchy", [(6, 16), (10, 8), (12, 4)]),
    ],
)
def test_groups(name, sizes, small, images):
    groups = instrument(small(name))(images(), "groups").groups
    assert [(g.shape[1], g.shape[2]) for g in groups] == sizes


def test_groups_of_pre_activation_networks_are_the_sums(small, images):
    net, x = small("wide"), images()
    net.eval()
    groups = instrument(net)(x, "groups").groups
    stem = net.conv1(x)
    first = net.blocks[0](stem)
    third = net.blocks[3](net.blocks[2](net.blocks[1](first)))
    for mine, theirs in ((groups[0], stem), (groups[1], first), (groups[3], third)):
        close(mine, theirs)


def test_groups_of_post_activation_networks_are_stage_outputs(small, images):
    net, x = small("resnet").eval(), images()
    groups = instrument(net)(x, "groups").groups
    y = torch.relu(net.bn1(net.conv1(x)))
    close(groups[0], y)
    close(groups[1], net.layers[0](y))
    close(groups[-1], net.layers(y))
