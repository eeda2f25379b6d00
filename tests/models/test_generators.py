"""Every generator against its published form: parameters, output space, initialisation in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd import models
from fastkd.errors import ConfigError

COUNTS = [  # name, nz, shape, parameters
    ("g_fast", 256, (3, 32, 32), 2_328_899),
    ("g_fast", 512, (3, 32, 32), 4_426_051),
    ("g_fast", 256, (3, 64, 64), 8_644_931),
    ("g_large", 256, (3, 32, 32), 4_581_955),
    ("g_large", 512, (3, 32, 32), 8_776_259),
    ("g_dafl", 1000, (3, 32, 32), 8_423_939),
    ("g_dafl", 100, (1, 32, 32), 1_049_985),
    ("g_pre", 1000, (3, 32, 32), 8_423_939),
    ("g_mem", 1000, (3, 32, 32), 8_423_939),
    ("g_mem", 100, (3, 32, 32), 1_051_139),
    ("g_dfad_a", 256, (3, 32, 32), 2_329_091),
    ("g_zskt", 100, (3, 32, 32), 1_051_145),
    ("g_deep", 256, (3, 224, 224), 592_451),
    ("g_dfad_b", 256, (3, 128, 128), 11_243_203),
    ("g_dfq", 512, (3, 32, 32), 5_753_859),
]
PLAIN = ["g_fast", "g_large", "g_dafl", "g_pre", "g_mem", "g_dfad_a", "g_zskt", "g_deep", "g_dfad_b", "g_dfq"]


def draw(g: nn.Module, batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, *g.latent)


@pytest.mark.parametrize(("name", "nz", "shape", "parameters"), COUNTS)
def test_parameters(name, nz, shape, parameters):
    g = models.generator(name, nz, shape)
    assert sum(p.numel() for p in g.parameters()) == parameters


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 48), (1, 8, 8)])
@pytest.mark.parametrize("name", PLAIN)
def test_output_space(name, shape, fp64):
    if name in ("g_deep", "g_dfad_b") and shape[1] == 8:
        with pytest.raises(ConfigError, match="multiples of 16, found 8 x 8"):
            models.generator(name, 16, shape)
        return
    torch.manual_seed(1)
    g = models.generator(name, 16, shape)
    x = g(draw(g))
    assert x.shape == (6, *shape) and x.dtype == torch.float64 and torch.isfinite(x).all()
    if name in ("g_fast", "g_large", "g_deep"):
        assert x.min() >= 0 and x.max() <= 1
    elif name == "g_dfad_b":
        assert x.min() >= -1 and x.max() <= 1
    else:  # BatchNorm head: normalised per channel, up to its eps
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-6 and var.min() > 0.9 and var.max() <= 1 + 1e-9
        assert g.head[-1].affine == (name == "g_zskt") and len(g.head) == (1 if name == "g_zskt" else 2)
    x.sum().backward()
    assert isinstance(g.bn0, nn.BatchNorm2d) and isinstance(g.l0, nn.Linear | nn.Conv2d)
    assert g.latent == ((16, shape[1] // 16, shape[2] // 16) if name == "g_deep" else (16,))


@pytest.mark.parametrize(
    ("name", "eps"), [("g_fast", 1e-5), ("g_dafl", 0.8), ("g_pre", 0.8), ("g_mem", 0.8), ("g_dfad_a", 1e-5), ("g_zskt", 1e-5)]
)
def test_eps_of_the_inner_norms(name, eps):
    g = models.generator(name, 16, (3, 32, 32))
    assert g.bn0.eps == 1e-5
    assert [m.eps for m in g.body if isinstance(m, nn.BatchNorm2d)] == [eps, eps]
    biased = [m.bias is not None for m in g.body if isinstance(m, nn.Conv2d)]
    assert biased == ([False, False, True] if name == "g_fast" else [True] * 3)


def test_spectral_norm_of_g_pre_and_only_there():
    torch.manual_seed(0)
    g = models.generator("g_pre", 16, (3, 32, 32))
    for _ in range(30):
        g(draw(g))
    for conv in (m for m in g.body if isinstance(m, nn.Conv2d)):
        assert abs(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2).item() - 1) < 0.1
    assert not any("original" in n for n, _ in models.generator("g_mem", 16, (3, 32, 32)).named_parameters())


@pytest.mark.parametrize("name", PLAIN)
def test_reinit_is_in_place_fresh_and_repeatable(name):
    g = models.generator(name, 16, (3, 32, 32))
    before = {n: (p.data_ptr(), p.clone()) for n, p in [*g.named_parameters(), *g.named_buffers()]}
    g(draw(g))
    torch.manual_seed(5)
    g.reinit()
    first = [p.clone() for p in g.parameters()]
    assert all(before[n][0] == p.data_ptr() for n, p in [*g.named_parameters(), *g.named_buffers()])
    drawn = [n for n, p in g.named_parameters() if p.dim() > 1]
    assert drawn and all(not torch.equal(before[n][1], g.get_parameter(n)) for n in drawn)
    assert all(m.num_batches_tracked == 0 and m.running_mean.abs().sum() == 0 for m in g.modules() if isinstance(m, nn.BatchNorm2d))
    z = draw(g)
    torch.manual_seed(5)
    g.reinit()
    assert all(torch.equal(a, b) for a, b in zip(first, g.parameters(), strict=True))
    once = g(z)
    torch.manual_seed(5)
    g.reinit()
    assert torch.equal(once, g(z))  # buffers too: the singular vectors of g_pre start afresh


def test_published_initialisations():
    torch.manual_seed(0)
    uniform = models.generator("g_pre", 100, (3, 32, 32))
    normal = models.generator("g_dfad_b", 64, (3, 128, 128))
    default = models.generator("g_fast", 100, (3, 32, 32))
    cmi = models.generator("g_fast", 100, (3, 32, 32), init="normal")
    for p in (uniform.l0.weight, uniform.body[0].parametrizations.weight.original):
        assert p.abs().max() <= 0.08 and abs(p.std().item() - 0.08 / 3**0.5) < 1e-3
    assert uniform.l0.bias.abs().sum() == 0 and uniform.bn0.weight.unique().tolist() == [1]
    for g in (normal, cmi):
        assert abs(g.l0.weight.std().item() - 0.02) < 5e-4 and g.l0.bias.abs().sum() == 0
        assert abs(g.bn0.weight.mean().item() - 1) < 0.01 and 0.01 < g.bn0.weight.std() < 0.03
    torch.manual_seed(7)
    default.reinit()
    torch.manual_seed(7)
    fresh = nn.Linear(100, 128 * 64)
    assert torch.equal(default.l0.weight, fresh.weight) and torch.equal(default.l0.bias, fresh.bias)  # PyTorch's own


def test_small_start_of_the_64_pixel_form():
    big = models.generator("g_mem", 100, (3, 64, 64), small_start=True)
    assert big.l0.out_features == 128 * 8 * 8
    assert sum(p.numel() for p in big.parameters()) == 1_051_139  # the layers of the 32-pixel form
    assert big(torch.randn(2, 100)).shape == (2, 3, 64, 64)
    assert models.generator("g_pre", 100, (3, 64, 64), small_start=True)(torch.randn(2, 100)).shape == (2, 3, 64, 64)


def test_refusals():
    for args, kw, sentence in (
        (("g_fats", 8, (3, 32, 32)), {}, "unknown generator 'g_fats'; did you mean 'g_fast'"),
        (("g_fast", 8, (3, 30, 32)), {}, "multiples of 4, found 30 x 32"),
        (("g_dfq", 8, (3, 28, 28)), {}, "multiples of 8, found 28 x 28"),
        (("g_fast", 0, (3, 32, 32)), {}, "nz = 0"),
        (("g_fast", 8, (3, 32, 32)), {"init": "normale"}, "did you mean 'normal'"),
        (("g_fast", 8, (3, 32, 32)), {"out": "tan"}, "unknown generator head 'tan'"),
        (("g_nl", None, (3, 32, 32)), {}, "needs a table"),
        (("g_nl", None, (3, 32, 32)), {"embeddings": torch.rand(3, 4), "batch": 8, "classes": 4}, "has 3 rows, expected .* of the 4"),
        (("g_nl", None, (3, 30, 32)), {"embeddings": torch.rand(3, 4), "batch": 8}, "multiples of 4"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            models.generator(*args, **kw)
