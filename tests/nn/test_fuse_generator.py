"""A fused generator is the same generator: images, gradients, buffers, names, and everything that is done to it later."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastkd import models, ops, ranks
from fastkd.errors import ConfigError
from fastkd.nn import copy_, evaluating, fuse_generator, globalise
from fastkd.nn.generator_layers import ActivatedBatchNorm2d, GlobalActivatedBatchNorm2d, UpConv, UpsampleAct
from tests import small

PLAIN = ["g_fast", "g_large", "g_dafl", "g_pre", "g_mem", "g_dfad_a", "g_zskt", "g_deep", "g_dfad_b", "g_dfq"]
SHAPE = (3, 16, 32)


def published():
    """As generators are written elsewhere: Upsample, Conv2d, BatchNorm2d, activation; with a head that doubles."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(5, 8 * 12), nn.Unflatten(1, (8, 3, 4)), nn.BatchNorm2d(8)),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, 0.8), nn.LeakyReLU(0.2, inplace=True)),
        *(nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(6, 4, 3, padding="same"), nn.Identity(), nn.BatchNorm2d(4, momentum=None)),
        *(nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(), nn.Upsample(scale_factor=(2, 2)), nn.BatchNorm2d(3, affine=False)),
    )


def make(name):
    torch.manual_seed(0)
    if name == "published":
        return published(), torch.randn(6, 5)
    if name in ("g_nl", "g_nl_deep"):
        g = models.generator(name, 12, SHAPE, embeddings=torch.randn(3, 7), batch=6)
        return g, torch.arange(6) % 3
    g = models.generator(name, 7, SHAPE)
    return g, torch.randn(6, *g.latent)


def train(net, z, steps=2, world=1):
    """Images, gradients and buffers of some training steps, and images of an evaluation."""
    out = {}
    for step in range(steps):
        torch.manual_seed(step)
        z = (z + step if z.is_floating_point() else z).detach()
        z = z.requires_grad_() if z.is_floating_point() else z
        x = net(z)
        weight = torch.linspace(-1, 2, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
        inputs = [*net.parameters(), *([z] if z.requires_grad else [])]
        grads = torch.autograd.grad(((x + 0.3).square() * weight).mean() / world, inputs)
        out |= {f"x{step}": x.detach(), **{f"g{step}.{i}": g for i, g in enumerate(grads)}}
    with evaluating(net), torch.no_grad():
        out["eval"] = net(z)
    return {**out, **{k: v.clone() for k, v in net.named_buffers()}}


def equal(a, b, rtol=1e-7, atol=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        scale = max(1.0, float(b[name].abs().max())) if b[name].numel() else 1.0
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol * scale, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", [*PLAIN, "g_nl", "g_nl_deep", "published"])
def test_equal_to_the_unfused_generator(name, fp64):
    plain, z = make(name)
    net = copy.deepcopy(plain)
    parameters, modules = list(net.parameters()), [m for m in net.modules() if list(m.parameters(recurse=False))]
    assert fuse_generator(net) is net
    assert list(net.state_dict()) == list(plain.state_dict())
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))  # an optimiser made before goes on working
    assert all(m in list(net.modules()) for m in modules)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(isinstance(m, ActivatedBatchNorm2d) for m in norms)
    assert not any(isinstance(m, nn.LeakyReLU | nn.Upsample) for m in net.modules()) or name in ("g_deep", "g_nl_deep")
    equal(train(net, z), train(plain, z))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["g_fast", "g_pre", "published"])
def test_fp32_and_layouts(name, last):
    plain, z = make(name)
    plain = plain.to(memory_format=torch.channels_last) if last else plain
    equal(train(fuse_generator(copy.deepcopy(plain)), z), train(plain, z), rtol=2e-3, atol=2e-3)


def test_report():
    net = fuse_generator(published())
    assert net.report == [
        "torch.fx traced the network",
        "2 doublings joined with the convolution behind",
        "1 doubling joined with tanh or sigmoid",
        "2 BatchNorms joined with the activation behind",
        "2 BatchNorms alone",
    ]
    assert [type(m) for m in (net[3], net[4], net[6])] == [nn.Identity, UpConv, nn.Identity] and isinstance(net[14], UpsampleAct)
    assert (net[5].act, net[5].slope, net[5].eps) == ("leaky_relu", 0.2, 0.8) and net[2].act == "none" and net[10].momentum is None
    assert "2 doubling convolutions as before" in fuse_generator(make("g_fast")[0]).report
    again = [type(m) for m in net.modules()]
    assert [type(m) for m in fuse_generator(net).modules()] == again
    assert fuse_generator(nn.Sequential(nn.Linear(2, 2))).report == ["torch.fx traced the network"]


def test_what_must_stay_stays(fp64):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.bn = nn.Upsample(scale_factor=2), nn.LeakyReLU(0.2), nn.BatchNorm2d(4)
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
            self.other, self.other_act = nn.BatchNorm2d(4), nn.ReLU()
            self.linear_up, self.wide = nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=2, dilation=2)
            self.normed = spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
            self.up2, self.up3 = nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2)
            self.twice, self.twice_act = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            x = self.act(self.bn(self.a(self.up(x))))
            x = self.c(self.up(x))  # the same doubling before a convolution without padding
            y = self.other(x)
            x = self.act(self.b(self.other_act(y))) + y  # y has another reader
            x = self.wide(self.linear_up(x)) + self.normed(self.up2(x))
            x = self.twice_act(self.twice(x)) + self.twice(x)
            return self.normed(self.up3(x)) if self.training else self.up3(x)

    plain = Net()
    net = fuse_generator(copy.deepcopy(plain))
    kept = {name: type(m) for name, m in plain.named_children() if not isinstance(m, nn.BatchNorm2d)}
    assert {name: type(m) for name, m in net.named_children() if name in kept} == kept | {"normed": type(net.normed)}
    assert all(net.get_submodule(n).act == "none" for n in ("bn", "other", "twice"))
    text = "\n".join(net.report)
    assert "3 BatchNorms alone" in text
    assert all(f"'{up}' stays: no plain 3x3 convolution alone reads it" in text for up in ("up", "up2", "up3"))
    x = torch.randn(2, 3, 4, 4)
    equal(train(net, x), train(plain, x))


def test_a_shared_doubling_and_a_shared_activation_are_joined_everywhere_or_nowhere(fp64):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act = nn.Upsample(scale_factor=2), nn.LeakyReLU(0.1)
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = self.act(norm(conv(self.up(x))))
            return x

    plain = Net()
    net = fuse_generator(copy.deepcopy(plain))
    assert isinstance(net.up, nn.Identity) and isinstance(net.act, nn.Identity) and all(m.act == "leaky_relu" for m in net.norms)
    x = torch.randn(3, 3, 2, 2)
    equal(train(net, x), train(plain, x))


def test_a_shared_activation_is_not_taken_from_a_module_that_is_not_looked_into(fp64):
    act = nn.LeakyReLU(0.1)
    plain = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3), act), nn.BatchNorm2d(3), act)
    net = fuse_generator(copy.deepcopy(plain))
    assert type(net[0][1]) is nn.LeakyReLU and net[1].act == "none"
    x = torch.randn(3, 3, 5, 5)
    equal(train(net, x), train(plain, x))


def test_what_code_that_cannot_be_traced_may_call_stays(fp64):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.acts = nn.Upsample(scale_factor=2), nn.ModuleList([nn.LeakyReLU(0.1)])
            self.body = nn.Sequential(self.up, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), self.acts[0])

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return self.body(self.up(self.acts[0](x)))

    plain = Net()
    net = fuse_generator(copy.deepcopy(plain))
    assert type(net.up) is nn.Upsample and type(net.acts[0]) is nn.LeakyReLU
    x = torch.randn(2, 3, 4, 4)
    equal(train(net, x), train(plain, x))


def test_statistics_that_are_switched_off_do_not_move(fp64):
    plain = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    plain[1].track_running_stats = False  # the buffers stay, and evaluation reads them
    x = torch.randn(3, 3, 5, 5)
    equal(train(fuse_generator(copy.deepcopy(plain)), x), train(plain, x))


def test_a_hook_on_a_part_sees_what_the_part_returned():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.act = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), nn.ReLU()

        def forward(self, x):
            return self.act(self.block(x))

    net, seen = Net(), []
    net.block.register_forward_hook(lambda m, inputs, y: seen.append(y))
    fuse_generator(net)
    assert not seen and net.block[1].act == "none"
    net(torch.randn(2, 3, 5, 5))
    assert seen[0].min() < 0


def test_hooks_and_subclasses_stay():
    class Mine(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    net = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1), Mine(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    seen = []
    net[0].register_forward_hook(lambda m, inputs, y: seen.append(y.shape))
    net[5].register_forward_hook(lambda m, inputs, y: seen.append(y.min() >= 0))
    fuse_generator(net)
    assert "'0' stays: it has hooks" in net.report and "'2' stays: it is a Mine, not a plain BatchNorm2d" in net.report
    net(torch.randn(2, 3, 4, 4))
    assert seen == [(2, 3, 8, 8), True]


def test_parts_of_a_network_that_cannot_be_traced(fp64):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Linear(5, 12), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Sigmoid())

        def forward(self, z):
            x = self.first(z)
            if x.sum() > 1e9:
                return x
            return self.body(x.view(-1, 3, 2, 2))

    plain = Net()
    net = fuse_generator(copy.deepcopy(plain))
    assert net.report[0].startswith("torch.fx cannot trace the network (TraceError") and net.report[0].endswith("looked at one by one")
    assert "1 BatchNorm joined with the activation behind" in net.report and "1 doubling joined with tanh or sigmoid" in net.report
    z = torch.randn(4, 5)
    equal(train(net, z), train(plain, z))


@pytest.mark.parametrize("name", ["g_fast", "g_pre"])
def test_what_engines_do_to_a_generator(name, fp64):
    plain, z = make(name)
    net = fuse_generator(copy.deepcopy(plain))
    paths = [[name for names in (g.named_parameters(), g.named_buffers()) for name, _ in names] for g in (net, plain)]
    assert paths[0] == paths[1]
    twin = copy.deepcopy(net)  # its own parameters, the same images
    equal(train(twin, z), train(net, z))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in net.parameters()}
    where = [p.data_ptr() for p in net.parameters()]
    copy_(net, plain)
    copy_(plain, net)
    for g in (net, plain):
        torch.manual_seed(3)
        g.reinit()
        nn.init.normal_(g.l0.weight, 0, 0.02)
    assert where == [p.data_ptr() for p in net.parameters()] and net.latent == plain.latent
    torch.manual_seed(4)
    net.l0.weight.data.copy_(plain.l0.weight)
    equal(train(net, z), train(plain, z))
    plain.load_state_dict(net.state_dict())
    if name == "g_fast":  # torch's parametrizations do not pickle
        again = pickle.loads(pickle.dumps(net))
        equal(train(again, z), train(net, z))


def test_autocast_in_bf16():
    plain, z = make("g_fast")
    plain = plain.to(memory_format=torch.channels_last)
    net = fuse_generator(copy.deepcopy(plain))
    found = []
    for g in (net, plain):
        with torch.autocast("cpu", torch.bfloat16):
            x = g(z)
        found.append((x.detach().float(), torch.autograd.grad(x.float().square().sum(), g.l0.weight)[0]))
    assert net.bn0.running_mean.dtype == torch.float32
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.05, atol=0.03)
    assert torch.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0) > 0.99


def test_compile():
    torch._dynamo.reset()
    net, z = make("g_fast")
    fuse_generator(net)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, dynamic=False)
    for _ in range(2):
        x, y = net(z), compiled(z)
        torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4)
        grads = [torch.autograd.grad(v.square().sum(), g.l0.weight)[0] for v, g in ((x, net), (y, twin))]
        torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()), rtol=1e-4, atol=1e-4)


def test_second_order_by_the_reference():
    net, z = make("g_fast")
    fuse_generator(net)
    for name, refused in (("auto", ops.table()[0][2] == "cpp"), ("reference", False)):
        ops.use(name)
        try:
            (g,) = torch.autograd.grad(net(z).square().sum(), net.bn0.weight, create_graph=True)
            if refused:
                with pytest.raises(ConfigError, match="second order"):
                    g.sum().backward()
            else:
                g.sum().backward()
        finally:
            ops.use("auto")


# Over ranks ----------------------------------------------------------------------------------------------------------------------

FORMS = ("fused_then_global", "global_then_fused", "local")


def form(which):
    torch.set_default_dtype(torch.float64)
    net, z = make("published")
    net = net if which != "global_then_fused" else globalise(net)
    net = fuse_generator(net)
    return (globalise(net) if which == "fused_then_global" else net), z


def of_a_rank(rank, world, file, result):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    found = {}
    for which in FORMS:
        net, z = form(which)
        kept = GlobalActivatedBatchNorm2d if which != "local" else ActivatedBatchNorm2d
        assert all(type(m) is kept for m in net.modules() if isinstance(m, nn.BatchNorm2d))
        out = train(net, z[rank::world], world=world)
        last = max(int(k.split(".")[1]) for k in out if k.startswith("g0."))
        found[which] = {k: ranks.total(v) if k.startswith("g") and not k.endswith(f".{last}") else v for k, v in out.items()}
    torch.save(found, f"{result}.{rank}")
    small.end_of_rank()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(of_a_rank, (2, str(folder / "meet"), str(folder / "out")), nprocs=2)
    return [torch.load(folder / f"out.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("which", FORMS)
def test_two_ranks_equal_one(which, two_ranks, fp64):
    net, z = make("published")
    whole = train(net, z)
    last = max(int(k.split(".")[1]) for k in whole if k.startswith("g0."))
    same = []
    for rank, found in enumerate(two_ranks):
        for name, mine in found[which].items():
            rows = name[0] == "x" or name == "eval" or name.endswith(f".{last}")
            theirs = whole[name][rank::2] if rows else whole[name]
            same.append(torch.allclose(mine, theirs, rtol=1e-9, atol=1e-10))
            if which != "local":
                assert same[-1], f"{name}: off by {float((mine - theirs).abs().max())}"
    assert all(same) == (which != "local")  # without globalise each rank normalises its own rows
