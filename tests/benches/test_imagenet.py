"""The ImageNet bench: the weight of the BN term follows the teacher's own statistics, and a record says what each image was judged by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benches import imagenet
from fastkd.methods._pool import statistics_norm


def test_the_size_of_the_statistics_is_summed_layer_by_layer():
    target = torch.tensor([[3.0, 4.0, 5.0], [0.0, 1.0, 12.0]])
    assert statistics_norm(SimpleNamespace(target=target, split=(0, 2, 3))) == pytest.approx(5 + 5 + 1 + 12)


def test_a_row_stands_beside_the_photographs_of_its_size():
    row = {"method": "muse", "size": 96, "bn": 0.03, "steps": 60, "step_seconds": 0.2, "cpu_seconds": 12.0}
    row |= {"images": 24, "megapixels": 0.22, "named": 0.25}
    assert imagenet.cells(row, {"64": 0.1, "96": 0.386})[-2:] == ["25.0 %", "38.6 %"]
    assert imagenet.key(row) != imagenet.key({**row, "bn": 10.0})
