"""NAYER's generator against its card: who goes through which noisy layer, what a re-draw changes, any number of ranks."""

from __future__ import annotations

import pytest
import torch

from fastkd import models, ranks
from fastkd.models.noisy import NoisyGenerator, NoisyLinear


def small(batch: int = 15, classes: int = 5, **kw) -> NoisyGenerator:
    torch.manual_seed(3)
    return models.generator("g_nl", 20, (3, 8, 8), embeddings=torch.randn(classes, 6) * 3 + 1, batch=batch, **kw)


def loop(layer: NoisyLinear, x: torch.Tensor, classes: int) -> torch.Tensor:
    """As published: block i of C rows through linear i, what remains through the last one."""
    n = layer.weight.shape[0]
    parts = [x[i * classes : (i + 1) * classes if i < n - 1 else None] @ layer.weight[i].T + layer.bias[i] for i in range(n)]
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("name", "classes", "batch", "shape", "parameters", "layers"),
    [
        ("g_nl", 10, 400, (3, 32, 32), 28_944_771, 40),
        ("g_nl", 100, 400, (3, 32, 32), 10_476_771, 4),
        ("g_nl", 200, 200, (3, 64, 64), 33_538_347, 1),
    ],
)
def test_parameters(name, classes, batch, shape, parameters, layers):
    g = models.generator(name, None, shape, embeddings=torch.zeros(classes, 512), batch=batch)
    assert sum(p.numel() for p in g.parameters()) == parameters
    assert g.noisy.weight.shape == (layers, 1000, 512)


def test_parameters_of_the_deep_form():
    g = models.generator("g_nl_deep", 1000, (3, 224, 224), embeddings=torch.zeros(10, 8), batch=10)
    assert sum(p.numel() for p in g.l0.parameters()) == 25_113_088
    parts = (g.conv0, g.bn0, g.body)
    assert sum(p.numel() for m in parts for p in m.parameters()) == 444_995
    g = models.generator("g_nl_deep", 20, (1, 32, 32), embeddings=torch.randn(10, 8), batch=12)
    x = g(torch.arange(12) % 10)
    assert x.shape == (12, 1, 32, 32) and x.min() >= 0 and x.max() <= 1


def test_images(fp64):
    g = small()
    x = g(torch.arange(15) % 5)
    assert x.shape == (15, 3, 8, 8) and x.dtype == torch.float64 and x.min() >= 0 and x.max() <= 1
    x.sum().backward()
    assert all(p.grad is not None for p in g.parameters())


def test_bn1d_of_a_balanced_batch_is_the_standardised_table(fp64):
    g = small()
    y = torch.arange(15) % 5
    e = g.bn(g.table[y])
    var, mean = torch.var_mean(g.table, 0, correction=0)
    expected = (g.table - mean) / (var + g.bn.eps).sqrt()
    for copy in e.split(5):
        torch.testing.assert_close(copy, expected)


def test_every_noisy_layer_sees_every_class_once():
    layer = NoisyLinear(5, 1, 5, 15)
    with torch.no_grad():
        layer.bias.zero_()
        for i in range(3):
            layer.weight[i].fill_(10.0 ** (3 * i))  # a row's result tells the layer it went through
        y = torch.arange(15) % 5
        seen = layer(torch.eye(5)[y]).flatten()
    for i in range(3):
        through = y[seen == 10.0 ** (3 * i)]
        assert sorted(through.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("classes", "batch"), [(5, 15), (5, 17), (5, 4), (10, 10), (7, 100), (2, 9)])
def test_the_batched_product_is_the_loop(classes, batch, fp64):
    torch.manual_seed(0)
    layer = NoisyLinear(6, 4, classes, batch)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(batch, 6, requires_grad=True)
    assert layer.weight.shape[0] == -(-batch // classes)
    ours, theirs = layer(x), loop(layer, x, classes)
    torch.testing.assert_close(ours, theirs)
    probe = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * probe).sum(), [x, *layer.parameters()]),
        torch.autograd.grad((theirs * probe).sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("world", "classes", "batch"), [(2, 5, 20), (3, 5, 21), (4, 10, 16), (2, 3, 2)])
def test_ranks_compute_what_one_rank_computes(world, classes, batch, monkeypatch, fp64):
    torch.manual_seed(0)
    whole = NoisyLinear(6, 4, classes, batch)
    x = torch.randn(batch, 6)
    expected = whole(x)
    for r in range(world):
        monkeypatch.setattr(ranks, "world", lambda: world)
        monkeypatch.setattr(ranks, "rank", lambda r=r: r)
        part = NoisyLinear(6, 4, classes, batch)
        part.load_state_dict(whole.state_dict())  # the state is the same for any number of ranks
        torch.testing.assert_close(part(x[r::world]), expected[r::world])


def test_index_maps_are_no_state_but_follow_the_module():
    layer = NoisyLinear(6, 4, 5, 7)
    assert sorted(layer.state_dict()) == ["bias", "weight"] and not list(layer.buffers())
    assert layer.to("meta")._slot.is_meta and layer._slot.dtype == torch.int64


def test_redraw_touches_only_the_noisy_layers():
    g = small()
    noisy = {id(p) for p in g.noisy.parameters()}
    assert len(noisy) == 2
    with torch.no_grad():
        g.noisy.bias.fill_(1)
    before = {n: t.clone() for n, t in [*g.named_parameters(), *g.named_buffers()]}
    state = torch.get_rng_state()
    g.redraw(torch.Generator().manual_seed(4))
    assert torch.equal(state, torch.get_rng_state())  # the generator that was given, no other
    for n, t in [*g.named_parameters(), *g.named_buffers()]:
        assert torch.equal(before[n], t) != (id(t) in noisy), n
    assert g.noisy.bias.abs().sum() == 0
    big = NoisyLinear(50, 60, 5, 15)
    big.redraw(torch.Generator().manual_seed(1))
    assert abs(big.weight.mean()) < 0.05 and abs(big.weight.std() - 1) < 0.05


def test_the_same_seed_gives_the_same_images_and_another_seed_others():
    g, y = small(), torch.arange(15) % 5
    images = []
    for seed in (4, 4, 5):
        g.redraw(torch.Generator().manual_seed(seed))
        images.append(g(y).detach())
    assert torch.equal(images[0], images[1]) and not torch.allclose(images[0], images[2])


def test_reinit_changes_everything_else():
    g = small()
    noisy = {id(p) for p in g.noisy.parameters()}
    with torch.no_grad():
        for p in g.parameters():
            p.add_(1)
    before = {n: t.clone() for n, t in [*g.named_parameters(), *g.named_buffers()]}
    g.reinit()
    for n, t in g.named_parameters():
        assert torch.equal(before[n], t) == (id(t) in noisy), n
    assert torch.equal(before["table"], g.table)


def test_a_wrong_number_of_rows_is_named():
    with pytest.raises(ValueError, match="this rank's 15 rows of the batch, found 14"):
        small()(torch.arange(14) % 5)
