"""Differentiable augmentation in groups (DiffAugment, Zhao et al. 2020) and its siamese form (DSA, Zhao and Bilen 2021).

Every draw is an argument. Images are [n, m, C, H, W] in normalised space: n sets, each with a draw of its own that its m images share.
What is moved in is 0, the mean colour. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import crop_flip

GROUPS = ("colour", "crop", "cutout", "scale", "rotate", "flip")
"""What a siamese draw chooses among; flip is the last, so that sets without flips draw among the first five."""
DRAWS = 3
"""Uniform numbers that a group may use."""
BRIGHTNESS, SATURATION, CONTRAST, CROP, CUTOUT, SCALE, DEGREES = 1.0, 2.0, 0.5, 0.125, 0.5, 1.2, 15.0


def siamese(x: Tensor, group: Tensor, u: Tensor) -> Tensor:
    """One of `GROUPS` for each set: real and synthetic images of a class that get equal draws are changed alike.

    Args:
      x: [n, m, C, H, W]. group: int64 [n], places in `GROUPS`. u: [n, DRAWS] in [0, 1).
    Returns:
      [n, m, C, H, W]; crop, cutout and a flip that is not drawn are exact, what lies inside is untouched.
    """
    is_ = {name: group == i for i, name in enumerate(GROUPS)}
    out = _moved(x, u, is_["crop"], is_["flip"] & (u[:, 0] < 0.5))
    out = torch.where(_wide(is_["cutout"]), cutout(x, u), out)
    out = torch.where(_wide(is_["scale"] | is_["rotate"]), _affine(x, u, is_["rotate"]), out)
    return torch.where(_wide(is_["colour"]), colour(x, u), out)


def strong(x: Tensor, u: Tensor) -> Tensor:
    """DiffAugment's colour, translation and cutout, all three on each image.

    Args:
      x: [B, C, H, W]. u: [B, 3, DRAWS] in [0, 1), one row a group.
    """
    out = colour(x[:, None], u[:, 0])
    yes = torch.ones(len(x), dtype=torch.bool, device=x.device)
    return cutout(_moved(out, u[:, 1], yes, ~yes), u[:, 2])[:, 0]


def colour(x: Tensor, u: Tensor) -> Tensor:
    """Brightness + U(-.5, .5), then saturation x U(0, 2) about the gray of a pixel, then contrast x U(.5, 1.5) about an image's mean."""
    brightness, saturation, contrast = (v[:, None, None, None, None] for v in u.to(x.dtype).unbind(1))
    x = x + (brightness - 0.5) * BRIGHTNESS
    gray = x.mean(2, keepdim=True)
    x = (x - gray) * (saturation * SATURATION) + gray
    mean = x.mean((2, 3, 4), keepdim=True)
    return (x - mean) * (contrast + CONTRAST) + mean


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """A square of half the side, anywhere that its centre is in the image, becomes 0."""
    inside = None
    for axis, at in ((-2, u[:, 0]), (-1, u[:, 1])):
        side = x.shape[axis]
        length = int(side * CUTOUT + 0.5)
        first = _below(at, side + 1 - length % 2) - length // 2
        i = torch.arange(side, device=x.device)
        line = (i >= first[:, None]) & (i < first[:, None] + length)
        inside = line[:, :, None] if inside is None else inside & line[:, None, :]
    return torch.where(inside[:, None, None], x.new_zeros(()), x)  # type: ignore[index]


def _moved(x: Tensor, u: Tensor, shifted: Tensor, flipped: Tensor) -> Tensor:
    """A shift of up to an eighth of the height in both directions where `shifted`, a flip where `flipped` [n]."""
    n, m = x.shape[:2]
    pad = int(x.shape[-2] * CROP + 0.5)
    dy, dx = (torch.where(shifted, _below(v, 2 * pad + 1), pad).repeat_interleave(m) for v in (u[:, 0], u[:, 1]))
    return crop_flip(x.flatten(0, 1), dy, dx, flipped.repeat_interleave(m), pad).unflatten(0, (n, m))


def _affine(x: Tensor, u: Tensor, rotate: Tensor) -> Tensor:
    """A rotation by U(-15, 15) degrees where `rotate` [n], elsewhere a scaling by 1 / U(1 / 1.2, 1.2) along each axis."""
    angle = (u[:, 0] - 0.5) * (2 * math.radians(DEGREES))
    wide, high = (torch.where(rotate, torch.cos(angle), v * (SCALE - 1 / SCALE) + 1 / SCALE) for v in (u[:, 0], u[:, 1]))
    sine = torch.where(rotate, torch.sin(angle), 0.0)
    zero = torch.zeros_like(sine)
    theta = torch.stack([torch.stack([wide, -sine, zero], 1), torch.stack([sine, high, zero], 1)], 1).to(x.dtype)
    n, m, c, h, w = x.shape
    grid = F.affine_grid(theta, [n, m * c, h, w], align_corners=False)
    return F.grid_sample(x.flatten(1, 2), grid, align_corners=False).view(n, m, c, h, w)


def _below(u: Tensor, count: int) -> Tensor:
    """int64 uniform on 0 … count - 1 of u in [0, 1)."""
    return (u * count).long().clamp_max(count - 1)


def _wide(mask: Tensor) -> Tensor:
    return mask[:, None, None, None, None]
