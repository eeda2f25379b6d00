"""The digits that come with fastkd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastkd.data import digits, open_set
from fastkd.data.constants import CONSTANTS


def test_sizes_split_and_range():
    train, test = open_set("digits", "train"), open_set("digits", "test")
    assert train.images.shape == (1297, 8, 8, 1) and test.images.shape == (500, 8, 8, 1)
    assert set(train.images.unique().tolist()) == {int(np.rint(v * 255 / 16)) for v in range(17)}
    assert train.flip is False and train.pad == 1 and train.class_names[0] == "zero" and "CC BY 4.0" in train.attribution
    counts = torch.bincount(test.labels) / torch.bincount(torch.cat([train.labels, test.labels]))
    assert (counts - 500 / 1797).abs().max() < 0.01


def test_constants_are_those_of_the_training_images():
    pixels = open_set("digits", "train").images.double() / 255
    assert round(float(pixels.mean()), 4) == CONSTANTS["digits"].mean[0]
    assert round(float(pixels.std()), 4) == CONSTANTS["digits"].std[0]


def test_mask_has_exactly_500_and_does_not_depend_on_anything_else():
    labels = np.random.default_rng(0).integers(0, 10, 1797)
    assert digits.test_mask(labels).sum() == 500
    assert np.array_equal(digits.test_mask(labels), digits.test_mask(labels.copy()))


def test_file_is_small_and_remaking_gives_the_same(tmp_path):
    assert digits.FILE.stat().st_size < 100_000
    pytest.importorskip("sklearn", reason="scikit-learn carries the original numbers")
    from fastkd.data.make_digits import make

    make(tmp_path / "digits.npz")
    with np.load(digits.FILE, allow_pickle=False) as ours, np.load(tmp_path / "digits.npz", allow_pickle=False) as again:
        assert ours.files == again.files
        for key in ours.files:
            assert np.array_equal(ours[key], again[key]), key


def test_digits_can_be_told_apart():
    """Nearest class mean on the test images: labels and images belong together, in both splits."""
    train, test = open_set("digits", "train"), open_set("digits", "test")
    means = torch.stack([train.images[train.labels == c].double().mean(0) for c in range(10)])
    nearest = torch.cdist(test.images.double().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test.labels).double().mean() > 0.85
