"""A small set with labels of pixels in CamVid's form, all 11 classes, and two networks that can learn it in seconds.

Boxes of ten colours lie on a grey ground, all grainy; a rim of void pixels stands around a box. The networks see the mean of 4 x 4 pixels,
so that pure noise is grey to them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

VOID = 11
COLOURS = np.array([(128, 128, 128), *itertools.product((50, 205), repeat=3), (50, 128, 205), (205, 128, 50)])
"""Class → mean colour."""


def _scene(rng: np.random.Generator, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [h, w, 3] and labels uint8 [h, w]."""
    labels = np.zeros((h, w), np.uint8)
    truth = labels.copy()
    for k in rng.permutation(10)[:6] + 1:
        top, left = rng.integers(0, h - 20), rng.integers(0, w - 20)
        box = slice(top, top + rng.integers(16, 28)), slice(left, left + rng.integers(16, 28))
        truth[box], labels[box] = k, VOID
        labels[tuple(slice(s.start + 2, s.stop - 2) for s in box)] = k
    pixels = COLOURS[truth] + 30 * rng.standard_normal((h, w, 3))
    return pixels.clip(0, 255).astype(np.uint8), labels


def write(folder: Path, train: int = 48, test: int = 24, h: int = 64, w: int = 88) -> Path:
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
    layers: list[nn.Module] = [nn.AvgPool2d(4)]
    for inputs in (3, width, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, classes, 1), nn.Upsample(scale_factor=4, mode="bilinear"))


def teacher(classes: int) -> nn.Module:
    """Three convolutions of 32 channels at a quarter of the size; images [N, 3, H, W] → logits [N, classes, H, W]."""
    return _net(32, classes)


def student(classes: int) -> nn.Module:
    """Three convolutions of 12 channels."""
    return _net(12, classes)
