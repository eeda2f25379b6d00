"""A teacher computes what its network computes, and reports what plain hooks would have seen."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import models
from fastkd.errors import ConfigError, InputError
from fastkd.nn import Teacher, instrument
from fastkd.ops import bn_match_loss
from tests import small

RESNETS = ("resnet", "resnet_early", "resnet_linear", "branchy")
ALL = (*RESNETS, "wide", "wide2", "tall", "chain", "mobile", "window", "shared", "squeeze", "functional")


def close(a, b, dtype):
    slack = {torch.float64: 1e-10, torch.float32: 3e-4}[dtype]
    torch.testing.assert_close(a, b, rtol=slack, atol=slack * max(1.0, b.abs().max().item()), check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", ALL)
def test_equals_plain_hooks(name, channels, dtype, small, hooked, images):
    net, x = small(name, channels, dtype), images(4, channels, dtype)
    teacher, plain = instrument(net), hooked(net)
    xs = [x.clone().requires_grad_() for _ in range(3)]
    out, quiet = teacher(xs[0], "bn"), teacher(xs[2])
    logits, bn = plain(xs[1])
    close(out.logits, logits, dtype)
    close(quiet.logits, logits, dtype)
    close(out.bn, bn, dtype)
    assert out.bn.dtype == dtype and quiet.bn is None
    close(teacher.target, plain.target(), dtype)
    assert teacher.split[-1] == teacher.target.shape[1] and len(teacher.split) == len(plain.seen) + 1
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    a = (out.logits * weight).sum() + bn_match_loss(out.bn, teacher.target, teacher.split)
    b = (logits * weight).sum() + bn_match_loss(bn, plain.target(), teacher.split)
    close(torch.autograd.grad(a, xs[0])[0], torch.autograd.grad(b, xs[1])[0], dtype)
    (only,) = torch.autograd.grad((quiet.logits * weight).sum(), xs[2])
    close(only, torch.autograd.grad((plain(xs[1])[0] * weight).sum(), xs[1])[0], dtype)


REAL = ("resnet20", "wrn16_1", "vgg11_bn", "mobilenetv2_s1", "cifar_resnet18", "karanchahal_resnet8")
REAL += ("mobilenet_v1_x025", "efficientnet_lite0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", REAL)
def test_networks_of_fastkd_equal_plain_hooks(name, channels, dtype, settled, hooked, images):
    torch.manual_seed(0)
    net = settled(models.build(name, classes=10, channels=channels, input_size=32)).to(dtype)
    teacher, plain = instrument(net, (channels, 32, 32)), hooked(net)
    assert teacher.report[0] == "torch.fx traced the network" and teacher.classes == 10
    xs = [images(2, channels, dtype, 32).requires_grad_() for _ in range(2)]
    out = teacher(xs[0], "bn", "moments")
    logits, bn = plain(xs[1])
    slack = {torch.float64: 1e-9, torch.float32: 2e-3}[dtype]

    def same(a, b):
        assert a.shape == b.shape and (a - b).abs().max() <= slack * b.abs().max()

    same(out.logits, logits)
    same(out.bn, bn)
    same(teacher(xs[0]).logits, logits)
    same(teacher.target, plain.target())
    same(out.moments, torch.cat([v.mean((2, 3)) for v in plain.inputs], 1))
    weight = torch.randn(2, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def loss(y, b):
        return (y * weight).sum() / y.detach().abs().max() + bn_match_loss(b, teacher.target, teacher.split)

    mine, theirs = torch.autograd.grad(loss(out.logits, out.bn), xs[0])[0], torch.autograd.grad(loss(logits, bn), xs[1])[0]
    loose = slack if dtype == torch.float64 else 0.05  # in fp32, rounding turns a ReLU or the choice of a maximum here and there
    assert (mine - theirs).norm() <= loose * theirs.norm()
    if name == "karanchahal_resnet8":
        assert teacher.head is None and "256 features" in teacher.head_reason and "64 channels" in teacher.head_reason
    else:
        w, b = teacher.head
        same(out.map.mean((2, 3)) @ w.T + b, out.logits)


def test_network_without_batchnorm(small, images):
    teacher = instrument(small("plain"))
    out = teacher(images(), "bn", "moments")
    assert teacher.split == (0,) and teacher.target.shape == (2, 0) == out.bn.shape and out.moments.shape == (4, 0)
    assert out.feature.shape == (4, 7) and out.map is None and teacher.head is None and teacher.classes == 5
    assert teacher.target.dtype == torch.float64


def test_network_and_teacher_are_apart(small, images):
    net = small("resnet").train()
    before = copy.deepcopy(net.state_dict())
    teacher = instrument(net)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert type(net.bn1) is nn.BatchNorm2d
    x = images().requires_grad_()
    out = teacher(x, "bn", "moments", "groups")
    (out.logits.sum() + out.bn.sum()).backward()
    assert x.grad is not None and all(p.grad is None for p in [*teacher.parameters(), *net.parameters()])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_teacher_cannot_be_trained(small):
    teacher = instrument(small("resnet"))
    assert teacher.train() is teacher and not any(m.training for m in teacher.modules())
    teacher.requires_grad_(True)
    assert not any(p.requires_grad for p in teacher.parameters())
    nn.ModuleList([teacher]).train()
    assert not any(m.training for m in teacher.modules())


def test_mistakes_have_one_sentence(small, images):
    teacher = instrument(small("resnet"))
    with pytest.raises(ConfigError, match="did you mean 'moments'"):
        teacher(images(), "moment")
    with pytest.raises(InputError, match="empty batch"):
        teacher(images()[:0], "bn")
    with pytest.raises(InputError, match=r"\(5, 16, 16\)"):
        instrument(small("resnet"), (5, 16, 16))
    assert teacher(images()).bn is None  # the collector is closed after a mistake


class Odd(nn.Module):
    """Cannot be traced; its BatchNorms are not in call order, one is never called, one may be called twice."""

    def __init__(self, twice=False):
        super().__init__()
        self.late, self.never, self.early = nn.BatchNorm2d(4), nn.BatchNorm2d(7), nn.BatchNorm2d(3)
        self.conv, self.fc, self.twice = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), twice

    def forward(self, x):
        assert x.shape[0] > 0
        x = self.late(self.conv(self.early(x)))
        if self.twice:
            x = self.late(x)
        return self.fc(x.mean((2, 3)))


def test_untraceable_network_is_put_in_call_order_by_a_shape(images):
    x = images(4, 3, torch.float32)
    teacher = instrument(Odd(), (3, 16, 16))
    assert teacher.split == (0, 3, 7)
    torch.testing.assert_close(teacher(x, "bn").bn[0, :3], x.mean((0, 2, 3)))
    with pytest.raises(InputError, match="not called"):
        instrument(Odd())(x, "bn")
    with pytest.raises(InputError, match="called twice"):
        instrument(Odd(twice=True), (3, 16, 16))(x, "bn")


def test_network_that_returns_no_tensor_is_refused_with_a_shape():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(InputError, match="tuple"):
        instrument(Pair(), (3, 8, 8))


@pytest.mark.parametrize("name", ["resnet", "chain", "branchy"])
def test_bf16_autocast(name, small, images):
    net, x = small(name, dtype=torch.float32), images(8, dtype=torch.float32)
    teacher = instrument(net)
    exact = teacher(x, "bn")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x.requires_grad_()
        out, quiet = teacher(x, "bn", "moments"), teacher(x)
        loss = bn_match_loss(out.bn, teacher.target, teacher.split)
    assert out.logits.dtype == torch.bfloat16 and out.bn.dtype == torch.float32 == out.moments.dtype
    assert quiet.map.dtype == torch.bfloat16
    for mine, theirs in ((out.bn, exact.bn), (out.logits.float(), exact.logits), (quiet.logits.float(), exact.logits)):
        assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max()
    (grad,) = torch.autograd.grad(loss + out.logits.float().sum(), x)
    assert grad.isfinite().all() and grad.abs().max() > 0


def test_copy_of_a_teacher_stands_alone(small, images):
    teacher = instrument(small("resnet"), (3, 16, 16))
    twin = copy.deepcopy(teacher)
    a, b = teacher(images(), "bn", "groups"), twin(images(), "bn", "groups")
    assert torch.equal(a.bn, b.bn) and len(a.groups) == len(b.groups) and torch.equal(twin.head[0], teacher.head[0])
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in teacher.parameters())
    assert twin.collector is not teacher.collector


class Watch(TorchDispatchMode):
    """Every aten op that runs."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
def test_no_host_synchronisation(name, small, images):
    teacher, x = instrument(small(name)), images().requires_grad_()
    with Watch() as watch:
        out = teacher(x, "bn", "moments", "groups")
        torch.autograd.grad(bn_match_loss(out.bn, teacher.target, teacher.split) + out.logits.sum() + out.moments.sum(), x)
    bad = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "item")
    assert watch.ops and not [op for op in watch.ops if any(op.split(".")[1].startswith(b) for b in bad)]


def test_only_what_is_asked_is_computed(small, images):
    teacher = instrument(small("chain"))
    with Watch() as quiet:
        out = teacher(images())
    assert out.bn is None and out.moments is None and out.groups is None
    assert not [op for op in quiet.ops if "sum" in op] and len([op for op in quiet.ops if op.startswith("aten.mean")]) == 1  # the pooling
    assert len([op for op in quiet.ops if "addcmul" in op]) == 3


def test_statistics_on_fake_tensors_do_not_stay(small, images):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = instrument(small("chain"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert real(mode.from_tensor(images()), "bn").bn.shape == (2, 23)
    with torch.inference_mode():
        real(images(), "bn")
    x = images().requires_grad_()
    real(x, "bn").bn.sum().backward()
    assert x.grad is not None


def _statistics_of_a_rank(rank, world, file, net, x, result):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    teacher, mine = instrument(net), x[rank::world].clone().requires_grad_()
    out = teacher(mine, "bn")
    loss = bn_match_loss(out.bn, teacher.target, teacher.split) + out.logits.square().mean()
    (grad,) = torch.autograd.grad(loss / world, mine)
    torch.save({"bn": out.bn.detach(), "grad": grad}, f"{result}.{rank}")
    small.end_of_rank()


def test_two_ranks_equal_one(small, images, tmp_path):
    net, x = small("resnet"), images(6)
    args = (2, str(tmp_path / "meet"), net, x, str(tmp_path / "out"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_statistics_of_a_rank, args, nprocs=2)
    teacher, whole = instrument(net), x.clone().requires_grad_()
    out = teacher(whole, "bn")
    loss = bn_match_loss(out.bn, teacher.target, teacher.split) + out.logits.square().mean()
    (grad,) = torch.autograd.grad(loss, whole)
    for rank in range(2):
        got = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        close(got["bn"], out.bn, torch.float64)
        close(got["grad"], grad[rank::2], torch.float64)


def test_compiles_without_a_break(small, images):
    net, x = small("resnet"), images()
    teacher = instrument(net)
    seen = teacher(x)  # notes the image shape once
    compiled = torch.compile(lambda v: teacher(v).logits, fullgraph=True, backend="aot_eager")
    close(compiled(x), seen.logits, torch.float64)
    full = teacher(x, "bn", "moments", "groups")
    compiled = torch.compile(lambda v: teacher(v, "bn", "moments", "groups"), fullgraph=True, backend="aot_eager")(x)
    close(compiled.bn, full.bn, torch.float64)
    close(compiled.moments, full.moments, torch.float64)
    assert len(compiled.groups) == len(full.groups) and teacher.collector.sums is None
    assert isinstance(teacher, Teacher)
