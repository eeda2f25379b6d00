"""PRE-DFKD's encoder."""

from __future__ import annotations

import pytest
import torch

from fastkd import models
from fastkd.errors import ConfigError


def test_parameters_and_width():
    e = models.encoder("enc_pre", 1000, (3, 32, 32))
    assert sum(p.numel() for p in e.parameters()) == 4_321_872
    assert e.mean.in_features == 2048
    assert models.encoder("enc_pre", 10, (3, 64, 64), small_start=True).mean.in_features == 2048
    assert models.encoder("enc_pre", 10, (3, 64, 64)).mean.in_features == 32 * 16 * 16


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (1, 28, 28), (3, 16, 24), (1, 30, 30)])
def test_shapes(shape, fp64):
    e = models.encoder("enc_pre", 12, shape)
    mean, logvar = e(torch.rand(3, *shape))
    assert mean.shape == logvar.shape == (3, 12) and mean.dtype == torch.float64
    (mean.sum() + logvar.sum()).backward()


def test_each_column_is_normalised(fp64):
    """Scaling one column of one channel of one image changes nothing."""
    e = models.encoder("enc_pre", 12, (3, 32, 32)).eval()
    x = torch.rand(2, 3, 32, 32)
    scaled = x.clone()
    scaled[0, 1, :, 7] *= 5
    torch.testing.assert_close(e(x)[0], e(scaled)[0])
    scaled[0, 1, 7, :] *= 5
    assert not torch.allclose(e(x)[0], e(scaled)[0])


def test_the_two_heads_differ_and_are_drawn_anew():
    e = models.encoder("enc_pre", 12, (3, 32, 32))
    assert not torch.equal(e.mean.weight, e.logvar.weight)
    assert e.mean.weight.abs().max() <= 0.08 and e.mean.bias.abs().sum() == 0
    assert (e.bn1.eps, e.bn2.eps, e.bn3.eps) == (0.8, 0.8, 1e-5)
    before, place = e.conv3.weight.clone(), e.conv3.weight.data_ptr()
    e.reinit()
    assert not torch.equal(before, e.conv3.weight) and e.conv3.weight.data_ptr() == place


def test_refusals():
    with pytest.raises(ConfigError, match="did you mean 'enc_pre'"):
        models.encoder("enc_per", 10, (3, 32, 32))
    with pytest.raises(ConfigError, match="at least 8 x 8"):
        models.encoder("enc_pre", 10, (3, 4, 4))
