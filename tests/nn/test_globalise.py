"""BatchNorm and Dropout over the global batch: two ranks train the network that one rank trains."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastkd import ranks
from fastkd.errors import ConfigError
from fastkd.nn import globalise
from tests import small


class BatchNormAct2d(nn.BatchNorm2d):
    """The form of timm's layer: modules of its own after normalising."""

    def __init__(self, n):
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def switched_off(norm):
    norm.track_running_stats = False  # the buffers stay
    return norm


def make(kind):
    torch.manual_seed(0)
    nets = {
        "2d": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, affine=False)),
        "1d": nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        "1d_sequence": nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)),
        "3d": nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4)),
        "sync": nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)),
        "cumulative": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)),
        "untracked": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "switched_off": nn.Sequential(nn.Conv2d(3, 4, 3), switched_off(nn.BatchNorm2d(4))),
        "act": nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)),
        "far": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.8)),
        "dropout": nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.4), nn.Dropout(0.3, inplace=True)),
            *(nn.Flatten(), nn.Linear(144, 3), nn.Dropout(0.5)),
        ),
    }
    return nets[kind].double().train()


KINDS = ("2d", "1d", "1d_sequence", "3d", "sync", "cumulative", "untracked", "switched_off", "act", "far", "dropout")


def batch():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def several(net, x, world=1):
    """Outputs, gradients, a second-order gradient and buffers of two training steps and an evaluation."""
    out = {}
    for step in range(2):
        torch.manual_seed(step)
        x = (x + step).detach().requires_grad_()
        y = net(x)
        loss = (y.square() * torch.arange(1.0, y[0].numel() + 1, dtype=y.dtype).view(y.shape[1:])).mean() / world
        grads = torch.autograd.grad(loss, [x, *net.parameters()], create_graph=True)
        norm = ranks.total(grads[1].clone()).square().sum() / world  # of the first weight's global gradient
        second = torch.autograd.grad(norm, [x, *net.parameters()], allow_unused=True)
        out.update({f"y{step}": y.detach(), f"gx{step}": grads[0].detach(), f"ggx{step}": second[0]})
        for i, (g, h) in enumerate(zip(grads[1:], second[1:], strict=True)):
            out[f"g{step}.{i}"] = ranks.total(g.detach())
            out[f"gg{step}.{i}"] = ranks.total(h) if h is not None else torch.zeros(())
    net.eval()
    with torch.no_grad():
        out["eval"] = net(x)
    return {**out, **{f"b.{k}": v.detach().clone() for k, v in net.named_buffers()}}


def of_a_rank(rank, world, file, result):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    found = {kind: several(globalise(make(kind)), batch()[rank::world], world) for kind in KINDS}
    torch.save(found, f"{result}.{rank}")
    small.end_of_rank()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(of_a_rank, (2, str(folder / "meet"), str(folder / "out")), nprocs=2)
    return [torch.load(folder / f"out.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(kind, two_ranks):
    net = make(kind)
    if kind == "sync":  # torch's own refuses the CPU
        net[1] = nn.BatchNorm2d(4).double()
    whole = several(net, batch())
    for rank, found in enumerate(two_ranks):
        assert set(found[kind]) == set(whole)
        for name, mine in found[kind].items():
            rows = name[0] == "y" or name.startswith(("gx", "ggx")) or name == "eval"
            theirs = whole[name][rank::2] if rows and whole[name].dim() else whole[name]
            if kind == "untracked" and name == "eval":
                theirs = whole[name][rank::2]
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{kind} {name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_is_bit_equal(kind):
    plain, other = make(kind), globalise(make(kind))
    if kind == "sync":
        plain[1] = nn.BatchNorm2d(4).double()
    a, b = several(plain, batch()), several(other, batch())
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_objects_keys_and_copies_stay():
    net = make("2d")
    modules, keys = list(net.modules()), list(net.state_dict())
    assert globalise(net) is net and globalise(net) is net
    assert [id(m) for m in net.modules()] == [id(m) for m in modules] and list(net.state_dict()) == keys
    assert isinstance(net[1], nn.BatchNorm2d) and type(net[1]) is not nn.BatchNorm2d
    x = batch()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin.eval()(x), net.eval()(x))


def test_what_cannot_be_carried_over_is_refused():
    class Mine(nn.BatchNorm2d):
        def forward(self, x):
            return x

    class Named(nn.BatchNorm2d):
        """Only a name: its forward is the plain one."""

    with pytest.raises(ConfigError, match="'0' is a Mine"):
        globalise(nn.Sequential(Mine(3)))
    with pytest.raises(ConfigError, match="'0' is a AlphaDropout"):
        globalise(nn.Sequential(nn.AlphaDropout(0.1)))
    assert isinstance(globalise(Named(3)), Named)


def test_import_of_the_file_does_not_hide_the_function():
    import fastkd.nn
    from fastkd.nn.globalise import GlobalBatchNorm2d
    from fastkd.nn.instrument import Teacher

    assert fastkd.nn.Teacher is Teacher and GlobalBatchNorm2d.fx_leaf
    assert fastkd.nn.globalise is globalise and callable(fastkd.nn.instrument)
