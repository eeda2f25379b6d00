"""The frozen BatchNorm: every kind of it, every dtype and layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd.errors import InputError
from fastkd.nn import instrument


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, b.abs().max().item()))


def test_bn_without_running_statistics_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"'1'.*running statistics"):
        instrument(net)


class Special(nn.BatchNorm2d):
    def forward(self, x):
        return torch.tanh(super().forward(x)) * 3


def test_subclass_with_its_own_forward_is_kept(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Special(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double().eval()
    seen = []
    net[1].register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    expected = net(images())
    teacher = instrument(net)
    out = teacher(images(), "bn")
    close(out.logits, expected)
    close(out.bn[1], seen[0].var((0, 2, 3), unbiased=False))


def test_sync_batchnorm_and_optional_arguments(images):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Linear(4, 2)

        def forward(self, x, return_feature=False):
            f = torch.relu(self.bn(self.conv(x))).mean((2, 3))
            return (self.fc(f), f) if return_feature else self.fc(f)

    teacher = instrument(Optional().double())
    assert "1 with an activation" in " ".join(teacher.report)
    assert teacher(images(), "bn").bn.shape == (2, 4)


def test_half_precision_network_keeps_its_statistics(small, images):
    net = small("resnet", dtype=torch.float32)
    teacher = instrument(net)
    target = teacher.target.clone()
    teacher.to(torch.bfloat16)
    out = teacher(images(dtype=torch.bfloat16), "bn")
    assert teacher.target.dtype == torch.float32 == out.bn.dtype and torch.equal(teacher.target, target)
    exact = instrument(net)(images(dtype=torch.float32), "bn")
    assert (out.bn - exact.bn).abs().max() < 0.05 * exact.bn.abs().max()
    assert teacher.double().target.dtype == torch.float64


def test_channels_last_stays(small, images):
    teacher = instrument(small("resnet")).to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    for ask in ((), ("bn",)):
        assert teacher(x, *ask).map.is_contiguous(memory_format=torch.channels_last)
    close(teacher(x, "bn").bn, instrument(small("resnet"))(images(), "bn").bn)
