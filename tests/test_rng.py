"""Draws depend on (seed, epoch, step, occurrence, name) and on nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd import ranks
from fastkd.rng import Rng, derive


def test_the_same_key_gives_the_same_draws_whatever_came_before():
    a, b = Rng(), Rng()
    a.at(3, 1, "adapt", 0)
    a.normal(7, 2)
    a.integers(10, 5, name="other")
    for rng in (a, b):
        rng.at(3, 2, "adapt", 1)
    assert torch.equal(a.normal(4, 3), b.normal(4, 3))
    assert torch.equal(torch.randn(3), _after(b, 3, 2, "adapt", 1))


def _after(rng, *key):
    rng.at(*key)
    return torch.randn(3)


def test_every_part_of_the_key_matters():
    rng, keys = Rng(), [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    draws = []
    for key in keys:
        rng.at(*key)
        draws += [rng.normal(4), rng.normal(4, name="stream")]
    assert all(not torch.equal(x, y) for i, x in enumerate(draws) for y in draws[:i])


def test_an_added_stream_moves_no_other():
    a, b = Rng(), Rng()
    for rng in (a, b):
        rng.at(0, 0, "s", 0)
    first = a.normal(4)
    b.normal(100, name="addon")
    assert torch.equal(first, b.normal(4))


def test_ranks_draw_for_the_global_batch_and_keep_their_rows(monkeypatch):
    whole = Rng()
    whole.at(0, 0, "s", 0)
    expected, same = whole.normal(6, 2), whole.pick(100, 3)
    for r in range(2):
        monkeypatch.setattr(ranks, "world", lambda: 2)
        monkeypatch.setattr(ranks, "rank", lambda r=r: r)
        own = Rng()
        own.at(0, 0, "s", 0)
        got = own.normal(6, 2)
        assert torch.equal(got, expected[r::2]) and got.per_sample
        assert torch.equal(own.pick(100, 3), same)


def test_draws_among_counts_are_uniform_on_each():
    rng, counts = Rng(), torch.tensor([1, 2, 5] * 2000)
    drawn = rng.among(counts)
    assert drawn.dtype == torch.int64 and (drawn >= 0).all() and (drawn < counts).all()
    for n in (1, 2, 5):
        share = torch.bincount(drawn[counts == n], minlength=n) / 2000
        assert (share - 1 / n).abs().max() < 0.05


KEYS = st.tuples(st.integers(0, 2**63 - 1), st.integers(-1, 10**6), st.text(max_size=8), st.integers(0, 10**6))
DRAWS = st.sampled_from(
    [
        lambda rng, n, name: rng.normal(n, 2, name=name), lambda rng, n, name: rng.uniform(n, name=name),
        lambda rng, n, name: rng.integers(7, n, 3, name=name), lambda rng, n, name: rng.labels(n, 10, name=name),
    ]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(KEYS, st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 5), st.lists(st.tuples(DRAWS, st.text(max_size=4)), min_size=1, max_size=4))
def test_draws_are_independent_of_the_number_of_ranks(key, world, rows, draws):
    whole = Rng()
    whole.at(*key)
    expected = [draw(whole, world * rows, name) for draw, name in draws]
    alike = whole.permutation(9)
    for r in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "world", lambda: world)
            patch.setattr(ranks, "rank", lambda r=r: r)
            own = Rng()
            own.at(*key)
            assert all(torch.equal(draw(own, world * rows, name), e[r::world]) for (draw, name), e in zip(draws, expected, strict=True))
            assert torch.equal(own.permutation(9), alike)


def test_derived_seeds_are_stable_over_versions():
    assert derive(0, 1, "adapt", 2, "") == derive(0, 1, "adapt", 2, "")
    assert derive("a", "b") != derive("ab")
    assert derive(0) == 4246866556266386882


def test_dtype_follows_the_default(fp64):
    rng = Rng()
    assert rng.normal(2).dtype == rng.uniform(2).dtype == torch.float64
