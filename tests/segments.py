"""A small set with labels of pixels in CamVid's form: boxes of three weaves on a plain ground, and two networks that can learn it.

The weaves differ in structure and have any two colours each, so that a pixel alone tells nothing; a rim of void pixels stands around a box.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

VOID = 11


def _weaves(h: int, w: int) -> dict[int, np.ndarray]:
    """Class → which of two colours a pixel has: stripes along, stripes down, chequered. Class 0 is the plain ground."""
    y, x = np.mgrid[:h, :w]
    return {1: y // 2 % 2 == 0, 3: x // 2 % 2 == 0, 5: (y + x) % 2 == 0}


def _scene(rng: np.random.Generator, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [h, w, 3] and labels uint8 [h, w]."""
    weaves, labels, pixels = _weaves(h, w), np.zeros((h, w), np.uint8), np.empty((h, w, 3))
    pixels[:] = rng.integers(40, 216, 3)
    for k in rng.permutation([1, 3, 5, 1, 3, 5]):
        top, left = rng.integers(0, h - 10), rng.integers(0, w - 10)
        box = slice(top, top + rng.integers(8, 16)), slice(left, left + rng.integers(8, 16))
        step = rng.choice([-1, 1], 3) * rng.integers(50, 100, 3)
        pixels[box] = (rng.integers(40, 216, 3) + weaves[k][..., None] * step)[box]
        labels[box] = VOID
        labels[tuple(slice(s.start + 1, s.stop - 1) for s in box)] = k
    return (pixels + 6 * rng.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8), labels


def write(folder: Path, train: int = 48, test: int = 24, h: int = 32, w: int = 44) -> Path:
    """Writes the folders `train`, `trainannot`, `test` and `testannot`; returns `folder`."""
    for split, n, seed in (("train", train, 1), ("test", test, 2)):
        rng = np.random.default_rng(seed)
        for place in (folder / split, folder / f"{split}annot"):
            place.mkdir(parents=True)
        for i in range(n):
            pixels, labels = _scene(rng, h, w)
            Image.fromarray(pixels).save(folder / split / f"{i:04d}.png")
            Image.fromarray(labels).save(folder / f"{split}annot" / f"{i:04d}.png")
    return folder


def _net(width: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, dilation in ((3, 1), (width, 1), (width, 2)):
        layers += [nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, classes, 1))


def teacher(classes: int) -> nn.Module:
    """Three convolutions of 32 channels; images [N, 3, H, W] → logits [N, classes, H, W]."""
    return _net(32, classes)


def student(classes: int) -> nn.Module:
    """Three convolutions of 16 channels."""
    return _net(16, classes)
