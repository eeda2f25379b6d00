"""Augmentation against naive loops over images; gradients in fp64, to second order."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.nn import augment

SIZES = [(8, 8), (7, 5), (1, 3), (3, 1)]


def images(b, h, w, c=3):
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(b * h + w), dtype=torch.float64)


def draws(pad, b=None):
    """All corners and the middle, with and without a flip; or the first `b` of them."""
    every = list(itertools.product(sorted({0, 1, pad, 2 * pad} & set(range(2 * pad + 1))), repeat=2))
    rows = [(y, x, f) for y, x in every for f in (False, True)][:b]
    dy, dx, flip = ([r[i] for r in rows] for i in range(3))
    return torch.tensor(dy, dtype=torch.int64), torch.tensor(dx, dtype=torch.int64), torch.tensor(flip, dtype=torch.bool)


def naive_crop(x, dy, dx, flip, pad):
    out = torch.zeros_like(x)
    h, w = x.shape[-2:]
    for b in range(len(x)):
        for i in range(h):
            for j in range(w):
                r, c = i + int(dy[b]) - pad, (w - 1 - j if flip[b] else j) + int(dx[b]) - pad
                if 0 <= r < h and 0 <= c < w:
                    out[b, :, i, j] = x[b, :, r, c]
    return out


@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("size", SIZES)
def test_crop_flip(size, pad):
    dy, dx, flip = draws(pad)
    x = images(len(dy), *size)
    expected = naive_crop(x, dy, dx, flip, pad)
    assert torch.equal(augment.crop_flip(x, dy, dx, flip, pad), expected)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    out = augment.crop_flip(last, dy, dx, flip, pad)
    assert torch.equal(out, expected) and out.stride() == last.stride()
    weight = images(len(dy) + 1, *size)[1:].to(memory_format=torch.channels_last)
    (g,) = torch.autograd.grad((out * weight).sum(), last)
    plain = x.clone().requires_grad_()
    (h,) = torch.autograd.grad((augment.crop_flip(plain, dy, dx, flip, pad) * weight).sum(), plain)
    assert torch.equal(g, h)


def test_crop_flip_agrees_with_torchs_own_padding():
    x = images(3, 6, 6)
    dy, dx = torch.tensor([0, 3, 4]), torch.tensor([4, 1, 2])
    out = augment.crop_flip(x, dy, dx, torch.tensor([False, True, False]), 2)
    big = F.pad(x, (2, 2, 2, 2))
    expected = [big[i, :, y : y + 6, z : z + 6] for i, (y, z) in enumerate([(0, 4), (3, 1), (4, 2)])]
    expected[1] = expected[1].flip(-1)
    assert torch.equal(out, torch.stack(expected))


@pytest.mark.parametrize("pad", [0, 2])
def test_crop_flip_gradients(pad):
    dy, dx, flip = draws(pad, 6)
    x = images(len(dy), 4, 3, 2).requires_grad_()

    def f(v):
        return augment.crop_flip(v, dy, dx, flip, pad).square()

    assert gradcheck(f, (x,)) and gradgradcheck(f, (x,))


def test_outside_is_black_even_where_the_border_is_not_finite():
    x = torch.full((1, 1, 3, 3), torch.inf, dtype=torch.float64)
    out = augment.crop_flip(x, torch.tensor([0]), torch.tensor([0]), torch.tensor([False]), 1)
    assert (out[0, 0, 0] == 0).all() and (out[0, 0, :, 0] == 0).all() and out[0, 0, 1:, 1:].isinf().all()


def naive_resized(x, top, left, height, width, flip):
    out = []
    for i in range(len(x)):
        y0, x0, h, w = (int(v[i]) for v in (top, left, height, width))
        y = F.interpolate(x[i : i + 1, :, y0 : y0 + h, x0 : x0 + w], size=x.shape[-2:], mode="bilinear", align_corners=False)
        out.append(y.flip(-1) if flip[i] else y)
    return torch.cat(out)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_resized_crop(layout):
    boxes = [(0, 0, 9, 7), (0, 0, 1, 1), (8, 6, 1, 1), (2, 1, 5, 3), (0, 3, 9, 4), (4, 0, 5, 7), (1, 1, 2, 6), (3, 2, 6, 5)]
    boxes = boxes * 2
    top, left, height, width = (torch.tensor([b[i] for b in boxes], dtype=torch.float64) for i in range(4))
    flip = torch.tensor([False] * 8 + [True] * 8)
    x = images(16, 9, 7).to(memory_format=layout)
    out = augment.resized_crop(x, top, left, height, width, flip)
    torch.testing.assert_close(out, naive_resized(x, top, left, height, width, flip), rtol=1e-12, atol=1e-12)
    assert out.is_contiguous(memory_format=layout)


def test_resized_crop_between_pixels_and_gradients():
    top, left = torch.tensor([0.3, 1.25, 0.0], dtype=torch.float64), torch.tensor([0.9, 0.0, 0.5], dtype=torch.float64)
    height, width = torch.tensor([2.6, 3.5, 5.0], dtype=torch.float64), torch.tensor([3.1, 4.0, 2.2], dtype=torch.float64)
    flip = torch.tensor([True, False, True])
    ramp = torch.arange(20.0, dtype=torch.float64).view(1, 1, 5, 4).repeat(3, 1, 1, 1)  # bilinear sampling of a plane is exact
    out = augment.resized_crop(ramp, top, left, height, width, flip)
    y = top[:, None] + ((torch.arange(5) + 0.5) * height[:, None] / 5 - 0.5).clamp_min(0).minimum(height[:, None] - 1)
    z = left[:, None] + ((torch.arange(4) + 0.5) * width[:, None] / 4 - 0.5).clamp_min(0).minimum(width[:, None] - 1)
    z = torch.where(flip[:, None], z.flip(1), z)
    torch.testing.assert_close(out[:, 0], 4 * y[:, :, None] + z[:, None, :])
    x = images(3, 5, 4, 2).requires_grad_()

    def f(v):
        return augment.resized_crop(v, top, left, height, width, flip).square()

    assert gradcheck(f, (x,)) and gradgradcheck(f, (x,))


def test_resized_crop_of_the_whole_image_is_the_image():
    x = images(2, 6, 5).float()
    zero = torch.zeros(2)
    out = augment.resized_crop(x, zero, zero, zero + 6, zero + 5, torch.tensor([False, True]))
    torch.testing.assert_close(out[0], x[0])
    torch.testing.assert_close(out[1], x[1].flip(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.resized_crop(x, zero, zero, zero + 6, zero + 5, torch.tensor([False, True])), out)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (2, -3), (-1, 4), (9, -11)])
def test_roll_flip(dy, dx, flip, layout):
    x = images(3, 5, 7).to(memory_format=layout)
    args = torch.tensor([dy]), torch.tensor([dx]), torch.tensor([flip])
    expected = torch.roll(x, (dy, dx), (2, 3))
    out = augment.roll_flip(x, *args)
    assert torch.equal(out, expected.flip(-1) if flip else expected) and out.is_contiguous(memory_format=layout)
    small = images(1, 3, 4, 1).requires_grad_()
    assert gradcheck(lambda v: augment.roll_flip(v, *args).square(), (small,))
    assert gradgradcheck(lambda v: augment.roll_flip(v, *args).square(), (small,))


def test_empty_batch_and_none():
    x = images(0, 4, 4)
    i, f, b = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.to(memory_format=layout)
        assert augment.crop_flip(x, i, i, b, 2).shape == augment.resized_crop(x, f, f, f + 1, f + 1, b).shape == (0, 3, 4, 4)
        assert augment.roll_flip(x, torch.tensor([1]), torch.tensor([0]), torch.tensor([True])).shape == (0, 3, 4, 4)
    assert augment.none(x) is x


def test_normalise():
    x = images(2, 3, 3)
    mean, std = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    out = augment.normalise(x, mean, std)
    assert torch.equal(out[:, 1], (x[:, 1] - 0.2) / 2) and torch.equal(out, augment.normalise(x, [0.1, 0.2, 0.3], (1.0, 2.0, 4.0)))
    assert augment.normalise(x, None, None) is x
    assert augment.normalise(x.float(), mean, std).dtype == torch.float32


def test_draws_that_do_not_fit_are_named():
    x = images(3, 4, 4)
    with pytest.raises(ValueError, match=r"dx must be \[3\]"):
        augment.crop_flip(x, torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.bool), 1)


def test_no_host_synchronisation():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = images(4, 6, 6).requires_grad_()
    dy, dx, flip = draws(2, 4)
    one, yes = torch.tensor([1]), torch.tensor([True])
    box = [torch.full((4,), v, dtype=torch.float64) for v in (1.0, 1.0, 3.0, 3.0)]
    with Watch():
        y = augment.crop_flip(x, dy, dx, flip, 2) + augment.resized_crop(x, *box, flip) + augment.roll_flip(x, one, one, yes)
        torch.autograd.grad(augment.normalise(y, x.detach().mean((0, 2, 3)), None).square().sum(), x)
    assert seen and not [op for op in seen if any(b in op for b in ("_local_scalar_dense", "nonzero", "masked_select", ".equal"))]


def test_windows_are_crops_of_the_rows_that_are_asked_for_then_flipped():
    x = torch.randint(256, (4, 9, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = x[..., 0].long()
    index, dy, dx = torch.tensor([2, 0, 2, 3]), torch.tensor([0, 4, 5, 1]), torch.tensor([2, 0, 1, 2])
    flip = torch.tensor([False, True, True, False])
    images, maps = (augment.window(v, index, dy, dx, flip, 4) for v in (x, labels))
    assert images.shape == (4, 4, 4, 3) and images.dtype == torch.uint8 and maps.shape == (4, 4, 4)
    for b, (i, top, left, mirrored) in enumerate(zip(*(v.tolist() for v in (index, dy, dx, flip)), strict=True)):
        crop = x[i, top : top + 4, left : left + 4]
        assert torch.equal(images[b], crop.flip(1) if mirrored else crop)
        assert torch.equal(maps[b], images[b, ..., 0].long())  # labels move with their pixels
