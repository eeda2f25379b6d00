"""Small networks of every form that `fastkd.nn` reads, and the plain hook-based statistics they are compared with."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def conv(i, o, stride=1, k=3, groups=1):
    return nn.Conv2d(i, o, k, stride, k // 2, bias=False, groups=groups)


class PostAct(nn.Module):
    """Basic block with a projection; `late`: the shortcut is computed after the second BatchNorm; `act`: None leaves the sum as it is."""

    def __init__(self, i, o, stride=1, late=True, act=True):
        super().__init__()
        self.c1, self.b1, self.c2, self.b2 = conv(i, o, stride), nn.BatchNorm2d(o), conv(o, o), nn.BatchNorm2d(o)
        self.short = nn.Sequential(conv(i, o, stride, 1), nn.BatchNorm2d(o)) if stride > 1 or i != o else nn.Sequential()
        self.late, self.act = late, act

    def forward(self, x):
        early = None if self.late else self.short(x)
        y = self.b2(self.c2(F.relu(self.b1(self.c1(x)))))
        if self.late:
            y += self.short(x)
        else:
            y = early + y
        return F.relu(y) if self.act else y


class PreAct(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.b1, self.c1, self.b2, self.c2 = nn.BatchNorm2d(i), conv(i, o, stride), nn.BatchNorm2d(o), conv(o, o)
        self.relu = nn.ReLU(inplace=True)
        self.short = conv(i, o, stride, 1) if i != o else None

    def forward(self, x):
        u = self.relu(self.b1(x))
        y = self.c2(self.relu(self.b2(self.c1(u))))
        return y + (x if self.short is None else self.short(u))


class ResNet(nn.Module):
    def __init__(self, c=3, **kw):
        super().__init__()
        self.conv1, self.bn1 = conv(c, 6), nn.BatchNorm2d(6)
        self.layers = nn.Sequential(PostAct(6, 6, **kw), PostAct(6, 10, 2, **kw), PostAct(10, 10, **kw), PostAct(10, 12, 2, **kw))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.pool(self.layers(F.relu(self.bn1(self.conv1(x))))).flatten(1))


class Wide(nn.Module):
    """Pre-activation: no BatchNorm after the stem, one before the pooling, which is a function with a fixed window."""

    def __init__(self, c=3, k=1):
        super().__init__()
        self.conv1 = conv(c, 4)
        self.blocks = nn.Sequential(PreAct(4, 4 * k), PreAct(4 * k, 8 * k, 2), PreAct(8 * k, 8 * k), PreAct(8 * k, 12 * k, 2))
        self.bn, self.fc = nn.BatchNorm2d(12 * k), nn.Linear(12 * k, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))


class Tall(nn.Module):
    """Two stages behind an ImageNet stem, bottlenecks with the stride in the middle, a mean instead of a pooling module."""

    def __init__(self, c=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(c, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.a1, self.n1 = conv(6, 4, 1, 1), nn.BatchNorm2d(4)
        self.a2, self.n2 = conv(4, 4, 2), nn.BatchNorm2d(4)
        self.a3, self.n3 = conv(4, 10, 1, 1), nn.BatchNorm2d(10)
        self.down = nn.Sequential(conv(6, 10, 2, 1), nn.BatchNorm2d(10))
        self.fc = nn.Linear(10, 5, bias=False)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.n2(self.a2(F.relu(self.n1(self.a1(x))))))
        x = torch.relu(torch.add(self.n3(self.a3(y)), self.down(x)))
        return self.fc(x.mean((-1, -2)))


def chain(c=3):
    return nn.Sequential(
        *(nn.Conv2d(c, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False), nn.LeakyReLU(0.2), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 9, 3, padding=1), nn.BatchNorm2d(9), nn.Sigmoid()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(9, 5)),
    )


class Mobile(nn.Module):
    """ReLU6, linear bottleneck with a sum and no activation, a 1x1 convolution on the pooled map as head."""

    def __init__(self, c=3):
        super().__init__()
        self.stem = nn.Sequential(conv(c, 6, 2), nn.BatchNorm2d(6), nn.ReLU6(inplace=True))
        self.up = nn.Sequential(conv(6, 12, 1, 1), nn.BatchNorm2d(12), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(conv(12, 12, groups=12), nn.BatchNorm2d(12), nn.ReLU6(inplace=True))
        self.down = nn.Sequential(conv(12, 6, 1, 1), nn.BatchNorm2d(6))
        self.end = nn.Sequential(conv(6, 11, 2, 1), nn.BatchNorm2d(11))
        self.pool, self.drop, self.head = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.3), nn.Conv2d(11, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(self.depth(self.up(x)))
        x = F.relu6(self.end(x))
        return self.head(self.drop(self.pool(x))).squeeze(3).squeeze(2)


class Window(nn.Module):
    """A pooling that leaves a 2x2 grid: the head is no class activation map."""

    def __init__(self, c=3):
        super().__init__()
        self.body = nn.Sequential(conv(c, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(4))
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


class Branchy(ResNet):
    """Control flow on values' shapes: torch.fx cannot trace it."""

    def forward(self, x):
        if x.shape[2] > 1:
            x = x * 1
        return super().forward(x)


class Shared(nn.Module):
    """One BatchNorm called twice."""

    def __init__(self, c=3):
        super().__init__()
        self.first, self.second, self.bn = conv(c, 6), conv(6, 6), nn.BatchNorm2d(6)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.first(x)))
        return self.fc(self.pool(self.bn(self.second(x))).flatten(1))


class Squeeze(nn.Module):
    """Class maps, averaged."""

    def __init__(self, c=3):
        super().__init__()
        self.body = nn.Sequential(conv(c, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 5, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.pool(self.body(x)).flatten(1)


class Functional(ResNet):
    """Dropout as a function of the mode."""

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.dropout(self.pool(x).flatten(1), 0.5, self.training))


NETS = {
    "resnet": ResNet,
    "resnet_early": lambda c: ResNet(c, late=False),
    "resnet_linear": lambda c: ResNet(c, act=False),
    "wide": Wide,
    "wide2": lambda c: Wide(c, 2),
    "tall": Tall,
    "chain": chain,
    "mobile": Mobile,
    "window": Window,
    "branchy": Branchy,
    "shared": Shared,
    "squeeze": Squeeze,
    "functional": Functional,
    "plain": lambda c: nn.Sequential(nn.Flatten(), nn.Linear(c * 256, 7), nn.ReLU(), nn.Linear(7, 5)),
}


def settle(net):
    """Running statistics and affine parameters that are not the trivial ones."""
    g = torch.Generator().manual_seed(3)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            for t, lo, hi in ((m.running_mean, -0.4, 0.4), (m.running_var, 0.3, 1.5), (m.weight, 0.4, 1.4), (m.bias, -0.3, 0.3)):
                if t is not None:
                    t.data.copy_(torch.rand(t.shape, generator=g) * (hi - lo) + lo)
    return net


@pytest.fixture
def small():
    """(name, channels, dtype) → a small network in train mode."""

    def make(name, channels=3, dtype=torch.float64):
        torch.manual_seed(0)
        return settle(NETS[name](channels)).to(dtype)

    return make


@pytest.fixture
def settled():
    return settle


class Hooked:
    """The plain way: forward hooks on BatchNorm2d, statistics from the inputs they saw."""

    def __init__(self, net):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.norms = [m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)]
        self.seen, self.inputs = [], []
        for m in self.norms:
            m.register_forward_hook(self._see)

    def _see(self, module, inputs, _):
        self.seen.append(module)
        self.inputs.append(inputs[0])

    def __call__(self, x):
        self.seen, self.inputs = [], []
        logits = self.net(x)
        if not self.inputs:
            return logits, x.new_zeros(2, 0)
        bn = [torch.stack([v.mean((0, 2, 3)), v.var((0, 2, 3), unbiased=False)]) for v in self.inputs]
        return logits, torch.cat(bn, 1)

    def target(self):
        return torch.cat([torch.stack([m.running_mean, m.running_var]) for m in self.seen], 1)


@pytest.fixture
def hooked():
    return Hooked


@pytest.fixture
def images():
    """(rows, channels, dtype, size) → fixed random images."""

    def make(rows=4, channels=3, dtype=torch.float64, size=16):
        return torch.randn((rows, channels, size, size), generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)

    return make
