"""BatchNorm, residual and activation in one call; equality of the results is in test_instrument.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd.nn import Student, globalise, instrument


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, b.abs().max().item()))


def test_report_counts_what_is_fused(small):
    text = " ".join(instrument(small("resnet")).report)
    assert "11 BatchNorm layers" in text and "5 with an activation" in text and "4 with a residual and an activation" in text
    text = " ".join(instrument(small("resnet_linear")).report)
    assert "4 with a residual" in text and "residual and an activation" not in text
    assert "1 with a residual" in " ".join(instrument(small("mobile")).report)
    assert "cannot trace" in " ".join(instrument(small("branchy")).report)
    assert "no BatchNorm2d" in " ".join(instrument(small("plain")).report)


class BatchNormAct2d(nn.BatchNorm2d):
    """The form of timm's layer: modules of its own after normalising."""

    def __init__(self, n):
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("over_ranks", [False, True])
def test_norm_with_a_tail_and_idle_modules_are_fused(over_ranks, settled, images):
    body = [nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Identity(), nn.Conv2d(4, 6, 3, 2), nn.BatchNorm2d(6)]
    tail = [nn.Identity(), nn.Dropout(0.5), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 2)]
    net = settled(nn.Sequential(*body, *tail)).double().eval()
    expected = net(images())
    teacher = instrument(globalise(net) if over_ranks else net, (3, 16, 16))
    assert "2 BatchNorm layers: 2 with an activation" in teacher.report and teacher.head is not None
    for ask in ((), ("bn",)):
        close(teacher(images(), *ask).logits, expected)
    groups = [t(images(), "groups").groups for t in (teacher, Student(net).trace)]
    assert [[g.shape for g in gs] for gs in groups] == [[(4, 4, 14, 14), (4, 6, 6, 6)]] * 2
    for a, b in zip(*groups, strict=True):
        close(a, b)
