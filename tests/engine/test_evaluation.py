"""mIoU against hand-counted tables, and what does not fit together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastkd import ranks
from fastkd.data.image_set import IGNORE, ImageSet
from fastkd.engine import evaluation
from fastkd.errors import InputError

MEAN, STD = torch.zeros(3), torch.ones(3)


class Painted(nn.Module):
    """Answers with the class that stands in the red channel of each pixel."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        named = (x[:, 0] * 255).round().long()
        return nn.functional.one_hot(named, self.classes).movedim(-1, 1).to(x.dtype)


def painted(answers, labels, classes=4):
    """A set on which `Painted` gives `answers`."""
    answers, labels = torch.tensor(answers), torch.tensor(labels)
    images = torch.stack([answers, answers * 0, answers * 0], -1).to(torch.uint8)
    return ImageSet("painted", "test", images, labels, [f"c{i}" for i in range(classes)])


def test_intersection_over_union_of_a_table_counted_by_hand():
    #                 answer 0  1  2  3
    table = torch.tensor([[3.0, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    each = evaluation.iou(table)
    assert each[:2].tolist() == [3 / 6, 4 / 8]
    assert math.isnan(each[2]) and each[3] == 0  # class 2 is nowhere and not counted, class 3 is never found


def test_miou_ignores_pixels_without_a_label_and_classes_that_are_nowhere():
    data = painted(
        [[[0, 0, 1], [1, 1, 0]], [[1, 1, 0], [0, 1, 2]]],
        [[[0, 0, 0], [1, 1, 1]], [[1, IGNORE, IGNORE], [1, 3, IGNORE]]],
    )
    net = Painted(4)
    found = evaluation.segmentation(net, data, MEAN, STD, batch=1)
    # class 0: 2 hits, 1 missed, 2 named too often; class 1: 3 hits, 2 missed, 2 too often; class 2: nowhere; class 3: 1 missed
    assert found.iou[:2] == (2 / 5, 3 / 7) and math.isnan(found.iou[2]) and found.iou[3] == 0
    assert found.miou == pytest.approx((2 / 5 + 3 / 7 + 0) / 3) and found.pixel_accuracy == 5 / 9 and found.images == 2
    assert evaluation.measure(net, data, MEAN, STD) == {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}
    assert evaluation.headline(data) == "miou" and evaluation.headline(None) == "top1"


def test_miou_equals_an_independent_count(fp64):
    rng = np.random.default_rng(0)
    answers, labels = rng.integers(0, 5, (7, 9, 11)), rng.integers(0, 5, (7, 9, 11))
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    found = evaluation.segmentation(Painted(5), painted(answers, labels, 5), torch.zeros(3), torch.ones(3), batch=3)
    seen = labels != IGNORE
    pairs = [((answers == k) & seen, labels == k) for k in range(5)]
    assert found.iou == pytest.approx([(a & b).sum() / (a | b).sum() for a, b in pairs])
    assert found.pixel_accuracy == pytest.approx((answers == labels)[seen].mean())


def test_the_mode_of_the_network_is_kept():
    data = painted([[[0]]], [[[0]]])
    for mode in (True, False):
        net = Painted(4).train(mode)
        evaluation.segmentation(net, data, MEAN, STD)
        assert net.training is mode


def test_ranks_count_their_own_images_and_add_up(monkeypatch):
    rng = np.random.default_rng(1)
    data = painted(rng.integers(0, 4, (5, 6, 6)), rng.integers(0, 4, (5, 6, 6)))
    whole, tables = evaluation.segmentation(Painted(4), data, MEAN, STD), []
    monkeypatch.setattr(ranks, "total", lambda table: tables.append(table.clone()) or table)
    for rank in range(2):
        monkeypatch.setattr(ranks, "local", lambda x, rank=rank: x[rank::2])
        evaluation.segmentation(Painted(4), data, MEAN, STD)
    assert float(evaluation.iou(sum(tables)[:-1].view(4, 4)).nanmean()) == whole.miou


def test_answers_of_another_kind_are_named():
    dense = painted([[[0, 1], [1, 0]]], [[[0, 1], [1, 0]]])
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(InputError, match="answers with one label, 'painted' has labels of 2 x 2 pixels"):
        evaluation.measure(classifier, dense, MEAN, STD)
    with pytest.raises(InputError, match="answers with a map of 1 x 1"):
        evaluation.measure(nn.MaxPool2d(2), dense, MEAN, STD)
    single = ImageSet("one", "test", dense.images, torch.zeros(1, dtype=torch.int64), ["a", "b", "c", "d"])
    with pytest.raises(InputError, match="'one' has one label an image"):
        evaluation.measure(Painted(4), single, MEAN, STD)
    assert evaluation.measure(classifier, single, MEAN, STD).keys() == {"top1", "top5"}


@pytest.mark.parametrize("dense", [False, True])
def test_a_stop_between_batches_ends_a_measurement_and_leaves_the_network_as_it_was(dense):
    images = torch.zeros(7, 2, 2, 3, dtype=torch.uint8)
    data = ImageSet("seven", "test", images, torch.zeros((7, 2, 2) if dense else 7, dtype=torch.long))
    net = (Painted(2) if dense else nn.Sequential(nn.Flatten(), nn.Linear(12, 2))).train()
    kind, looks = evaluation.segmentation if dense else evaluation.accuracy, []

    def asked(n):
        looks.clear()
        return lambda: looks.append(1) or len(looks) == n

    with pytest.raises(evaluation.Interrupted):
        kind(net, data, MEAN, STD, batch=2, asked=asked(3))
    assert len(looks) == 3 and net.training
    assert kind(net, data, MEAN, STD, batch=2, asked=asked(0)).images == 7 and len(looks) == 4


@pytest.mark.parametrize("images", [3, 4, 5, 8])
def test_ranks_with_unequal_shares_look_equally_often_for_a_stop(images, monkeypatch):
    data = ImageSet("few", "test", torch.zeros(images, 2, 2, 3, dtype=torch.uint8), torch.zeros(images, dtype=torch.long))
    net, looks = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), {}
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "total", lambda x: x)
    for r in range(2):
        looks[r] = []
        monkeypatch.setattr(ranks, "local", lambda x, r=r: x[r::2])
        evaluation.accuracy(net, data, MEAN, STD, batch=1, asked=lambda r=r: bool(looks[r].append(1)))
    assert len(looks[0]) == len(looks[1]) == images // 2  # each look is a collective
