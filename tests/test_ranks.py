"""Collectives over gloo ranks, forward and backward; one rank is plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd import ranks
from fastkd.errors import ConfigError
from tests import small


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    w = torch.randn(6, 3, dtype=torch.float64)
    own = ranks.local(x).clone().requires_grad_()
    assert torch.equal(ranks.gather(own), x) and list(ranks.rows(6)) == list(range(rank, 6, world))
    torch.testing.assert_close(ranks.total(own.sum(0)), x.sum(0))
    torch.testing.assert_close(ranks.batch_mean(own), x.mean(0))
    torch.testing.assert_close(ranks.max(own.amax()), x.max())
    # A batch-coupled objective: mean over ranks of the local loss, gradient of the local rows.
    whole = x.clone().requires_grad_()
    expected = torch.autograd.grad(((whole.mean(0) ** 2).sum().log() + (whole * w).sum(1).mean()), whole)[0]
    loss = (ranks.batch_mean(own) ** 2).sum().log() + (own * ranks.local(w)).sum(1).mean()
    torch.testing.assert_close(torch.autograd.grad(loss / world, own)[0], ranks.local(expected))
    loss = (ranks.gather(own) @ ranks.gather(own).T).pow(2).sum()
    expected = torch.autograd.grad((whole @ whole.T).pow(2).sum(), whole)[0]
    torch.testing.assert_close(torch.autograd.grad(loss / world, own)[0], ranks.local(expected))
    # Second order: the adjoint of an all-reduce is an all-reduce.
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad((ranks.batch_mean(own * scale) ** 3).sum() / world, own, create_graph=True)
    (second,) = torch.autograd.grad(g.pow(2).sum(), scale)
    second = ranks.total(second)
    s1 = torch.ones((), dtype=torch.float64, requires_grad=True)
    (g1,) = torch.autograd.grad(((whole * s1).mean(0) ** 3).sum(), whole, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(g1.pow(2).sum(), s1)[0])
    small.end_of_rank()


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_equal_one_rank_on_the_whole_batch(world, tmp_path):
    mp.spawn(worker, (world, str(tmp_path)), nprocs=world)


def test_one_rank_is_plain_torch():
    x = torch.randn(4, 2, requires_grad=True)
    assert ranks.world() == 1 and ranks.rank() == 0
    assert ranks.total(x) is x and ranks.mean(x) is x and ranks.gather(x) is x and ranks.local(x) is x
    assert torch.equal(ranks.batch_mean(x), x.mean(0))


def test_rows_that_cannot_be_dealt_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    with pytest.raises(ConfigError, match=r"10 rows cannot be dealt to 3 ranks.*nearest: 9"):
        ranks.rows(10)
