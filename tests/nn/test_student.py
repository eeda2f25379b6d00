"""A student is its network: same modules, modes and keys; `trace` only reads more from the same forward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.errors import ConfigError, InputError
from fastkd.nn import Student, copy_, globalise, instrument

ALL = ("resnet", "resnet_early", "wide", "wide2", "tall", "chain", "mobile", "window", "squeeze", "branchy", "functional")


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ALL)
def test_trace_is_the_forward(name, mode, small, images):
    net = small(name)
    twin, student, x = copy.deepcopy(net).train(mode), Student(net).train(mode), images()
    torch.manual_seed(1)
    t = student.trace(x, "groups")
    torch.manual_seed(1)
    expected = twin(x)
    assert torch.equal(t.logits, expected) and t.feature.dim() == 2 and t.map.dim() == 4 and t.groups
    for k, v in twin.state_dict().items():  # running statistics moved once, or not at all
        assert torch.equal(v, net.state_dict()[k]), k
    grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((t.logits, net), (expected, twin))]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_modes_reach_the_network_after_construction(name, small, images):
    net, x = small(name).train(), images()
    student = Student(net)
    assert net.training and all(m.training for m in net.modules())
    student.eval()
    quiet = net.state_dict()["bn1.running_mean"].clone() if hasattr(net, "bn1") else None
    a, b = student.trace(x).logits, student.trace(x).logits
    assert torch.equal(a, b) and torch.equal(a, net(x))
    net.train()  # on the network itself
    student.trace(x)
    if quiet is not None:
        assert not torch.equal(net.bn1.running_mean, quiet)


@pytest.mark.parametrize("name", ALL)
def test_same_parts_as_a_teacher(name, small, images):
    net, x = small(name).eval(), images()
    teacher, student = instrument(net), Student(net)
    asks = ("groups",) if name in ("branchy", "functional") else ("groups", "bn", "moments")
    a, b = teacher(x, *asks), student.trace(x, *asks)
    torch.testing.assert_close(a.feature, b.feature)
    torch.testing.assert_close(a.map, b.map)
    if name != "functional":  # a teacher's graph knows the stem, a student's notes do not
        assert len(a.groups) == len(b.groups)
        for g, h in zip(a.groups, b.groups, strict=True):
            torch.testing.assert_close(g, h)
    if "bn" in asks:
        torch.testing.assert_close(a.bn, b.bn)
        torch.testing.assert_close(a.moments, b.moments)
        torch.testing.assert_close(teacher.target, student.target)
        assert teacher.split == student.split


@pytest.mark.parametrize("name", ALL)
def test_keys_parameters_and_copies(name, small, images):
    net = small(name)
    keys = list(net.state_dict())
    student = Student(net)
    student.trace(images(), "groups")
    assert student.net is net and list(net.state_dict()) == keys
    assert list(student.state_dict()) == [f"net.{k}" for k in keys]
    assert [id(p) for p in student.parameters()] == [id(p) for p in net.parameters()]
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    twin.eval(), student.eval()
    assert torch.equal(twin.trace(images()).logits, twin.net(images())) and torch.equal(student.trace(images()).logits, net(images()))
    assert not torch.equal(twin.trace(images()).logits, student.trace(images()).logits)
    copy_(twin, student)
    assert torch.equal(twin.trace(images()).logits, student.trace(images()).logits)


WIDTHS = {"resnet": 12, "wide2": 24, "tall": 10, "mobile": 11, "window": 24, "squeeze": 6, "branchy": 12}


@pytest.mark.parametrize(("name", "d"), WIDTHS.items())
def test_feature_dim_without_running_and_with_a_shape(name, d, small, images):
    assert Student(small(name)).feature_dim == d
    net = small(name).train()
    student = Student(net, (3, 16, 16))
    assert student.feature_dim == d == student.trace(images()).feature.shape[1] and student.classes == 5
    assert all(m.training for m in net.modules()) and all(p.requires_grad for p in net.parameters())


def test_probe_leaves_no_trace(small):
    net = small("resnet").train()
    net.bn1.eval()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    Student(net, (3, 16, 16))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and torch.equal(random, torch.get_rng_state())
    assert not net.bn1.training and net.layers.training
    with pytest.raises(InputError, match=r"student does not take images of shape \(1, 16, 16\)"):
        Student(net, (1, 16, 16))


def test_second_order(small, images):
    net, x = small("chain").eval(), images(2)
    student = Student(net)
    w = net[0].weight

    def inner(weight):
        out = torch.func.functional_call(student, {"net.0.weight": weight}, (x,))
        return out.square().sum()

    (g,) = torch.autograd.grad(student.trace(x, "bn").logits.square().sum(), w, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), w)
    step = 1e-5 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype)
    sides = [(w + sign * step).detach().requires_grad_() for sign in (1, -1)]
    norms = [torch.autograd.grad(inner(v), v)[0].square().sum() for v in sides]
    torch.testing.assert_close((gg * step).sum() * 2, norms[0] - norms[1], rtol=1e-5, atol=1e-12)


def test_a_forward_that_depends_on_the_mode_is_not_frozen(small, images):
    student, x = Student(small("functional")), images()
    assert "train and eval" in student.report[0]
    student.train()
    f = student.trace(x).feature
    assert (f == 0).any() and not torch.equal(f, student.trace(x).feature)
    student.eval()
    t = student.trace(x)
    assert torch.equal(t.feature, t.map.mean((2, 3)))
    with pytest.raises(ConfigError, match="BN statistics of the student"):
        student.trace(x, "bn")


def test_constants_of_the_network_itself_are_live(images):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(3, 5).double(), nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1) * self.scale)

    student, x = Student(Scaled()), images()
    assert "outside" in student.report[0]
    a = student.trace(x)
    assert a.feature.shape == (4, 3) and torch.equal(a.map, x)
    out = torch.func.functional_call(student, {"net.scale": torch.zeros(3, dtype=torch.float64)}, (x,))
    assert torch.equal(out, student.net.fc.bias.expand(4, 5))
    with pytest.raises(ConfigError, match="unknown part"):
        student.trace(x, "features")


def test_globalise_afterwards(small, images):
    net, x = small("resnet").train(), images()
    twin = copy.deepcopy(net)
    student = Student(net)
    globalise(student)
    assert torch.equal(student.trace(x).logits, twin(x)) and torch.equal(net.bn1.running_var, twin.bn1.running_var)
    assert torch.equal(Student(net).trace(x, "groups").logits, twin(x))


def test_statistics_are_differentiable(small, images):
    student, x = Student(small("resnet").train()), images().requires_grad_()
    t = student.trace(x, "bn")
    want = x.mean((0, 2, 3))
    (g,) = torch.autograd.grad(t.bn.sum() + want.sum(), x)
    assert g.abs().max() > 0 and t.bn.shape == student.target.shape
