"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from fastkd.cli.words import BLOCKS, duration, percent, size, sparkline


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (187, "3:07"), (7384.4, "2:03:04"), (-3, "0.0 s"), (None, "–"), (math.inf, "–")],
)
def test_duration(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (3_400_000, "3.4 MB"), (48e9, "48.0 GB"), (2e15, "2000.0 TB")])
def test_size(count: float, said: str) -> None:
    assert size(count) == said


@pytest.mark.parametrize(("share", "said"), [(0.93125, "93.12 %"), (1.0, "100.00 %"), (None, "–"), (math.nan, "–")])
def test_percent(share: float | None, said: str) -> None:
    assert percent(share) == said


def test_sparkline_scales_and_keeps_the_newest() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == BLOCKS[0] + BLOCKS[4] + BLOCKS[-1]
    assert len(sparkline(list(range(100)), width=30)) == 30
    assert sparkline([0.5, 0.5]) == BLOCKS[0] * 2
    assert sparkline([]) == "" and sparkline([math.nan]) == ""
