"""DiffAugment and its siamese form against loops in NumPy, one group at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from fastkd.nn import diff_augment as da
from tests.recorder import NoHostRead

N, M, C, H, W = 4, 3, 3, 8, 6


def images(n=N, m=M, h=H, w=W):
    return torch.randn(n, m, C, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def draws(n=N, seed=0):
    return torch.rand(n, da.DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def only(name, x, u):
    return da.siamese(x, torch.full((len(x),), da.GROUPS.index(name)), u).numpy()


def test_colour():
    x, u = images(), draws()
    got, expected = only("colour", x, u), x.numpy().copy()
    for n in range(N):
        b, s, k = u[n].tolist()
        for m in range(M):
            image = expected[n, m] + (b - 0.5)
            gray = image.mean(0)
            image = (image - gray) * (2 * s) + gray
            expected[n, m] = (image - image.mean()) * (k + 0.5) + image.mean()
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_crop_is_a_shift_of_up_to_an_eighth_of_the_height():
    x = images(64)
    u = draws(64)
    got, seen = only("crop", x, u), set()
    for n in range(64):
        dy, dx = (math.floor(v * 3) - 1 for v in u[n, :2].tolist())
        padded = np.pad(x[n].numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
        np.testing.assert_array_equal(got[n], padded[..., 1 + dy : 1 + dy + H, 1 + dx : 1 + dx + W])
        seen.add((dy, dx))
    assert len(seen) == 9


def test_cutout_is_a_square_of_half_the_side_whose_centre_is_inside():
    x, u = images(200), draws(200)
    got, sizes = only("cutout", x, u), set()
    for n in range(200):
        changed = got[n] != x[n].numpy()
        hole = changed.any((0, 1))
        rows, columns = hole.any(1), hole.any(0)
        assert np.array_equal(hole, rows[:, None] & columns[None, :]) and (got[n][changed] == 0).all()
        sizes.add((int(rows.sum()), int(columns.sum())))
        kept = ~hole
        np.testing.assert_array_equal(got[n][..., kept], x[n].numpy()[..., kept])
    assert max(sizes) == (4, 3) and min(s[0] for s in sizes) == 2 and min(s[1] for s in sizes) >= 1


def test_flip_with_probability_one_half():
    x, u = images(400, 1), draws(400)
    got = only("flip", x, u)
    for n in range(400):
        np.testing.assert_array_equal(got[n], x[n].numpy()[..., ::-1] if u[n, 0] < 0.5 else x[n].numpy())
    assert 150 < (u[:, 0] < 0.5).sum() < 250


def bilinear(image, y, x):
    """Value of [C, H, W] at a place in pixels, zero outside."""
    out, y0, x0 = np.zeros(len(image)), math.floor(y), math.floor(x)
    for i in (y0, y0 + 1):
        for j in (x0, x0 + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                out += image[:, i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return out


@pytest.mark.parametrize("name", ["scale", "rotate"])
def test_scale_and_rotation(name):
    x, u = images(3, 2, 6, 6), draws(3)
    got = only(name, x, u)
    for n in range(3):
        if name == "scale":
            sx, sy = (1 / 1.2 + v * (1.2 - 1 / 1.2) for v in u[n, :2].tolist())
            theta = np.array([[sx, 0], [0, sy]])
        else:
            a = math.radians((u[n, 0].item() - 0.5) * 30)
            theta = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        for m in range(2):
            for i in range(6):
                for j in range(6):
                    px, py = theta @ np.array([(2 * j + 1) / 6 - 1, (2 * i + 1) / 6 - 1])
                    value = bilinear(x[n, m].numpy(), ((py + 1) * 6 - 1) / 2, ((px + 1) * 6 - 1) / 2)
                    np.testing.assert_allclose(got[n, m, :, i, j], value, atol=1e-6)


def test_equal_images_are_changed_alike_and_draws_differ():
    x = images(24, 1).expand(24, 5, C, H, W)
    group = torch.arange(24) % len(da.GROUPS)
    a, b = da.siamese(x, group, draws(24)), da.siamese(x, group, draws(24, 1))
    assert all(torch.equal(a[:, 0], a[:, m]) for m in range(5))  # real and synthetic side share what the class drew
    assert not torch.equal(a, b)
    real, made = da.siamese(x[:, :3], group, draws(24)), da.siamese(x[:, 3:], group, draws(24))
    assert torch.equal(torch.cat([real, made], 1), a)


def test_gradients_and_no_host_read():
    x, group = images(len(da.GROUPS), 1, 6, 6).requires_grad_(), torch.arange(len(da.GROUPS))
    assert gradcheck(lambda v: da.siamese(v, group, draws(len(da.GROUPS))), (x,))
    with NoHostRead() as watch:
        da.siamese(x, group, draws(len(da.GROUPS)))
        da.strong(x[:, 0], torch.rand(len(da.GROUPS), 3, da.DRAWS))
    assert not watch.found


def test_strong_is_all_three_on_each_image():
    x, u = images(5)[:, 0], torch.rand(5, 3, da.DRAWS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    out = da.colour(x[:, None], u[:, 0])
    out = torch.from_numpy(only("crop", out, u[:, 1]))
    expected = only("cutout", out, u[:, 2])[:, 0]
    np.testing.assert_array_equal(da.strong(x, u).numpy(), expected)
