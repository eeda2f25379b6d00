"""What the walk finds, refuses and restores."""

from __future__ import annotations

import pytest
import torch

from fastkd.engine import state
from fastkd.errors import MethodError
from tests import small


def test_it_finds_networks_optimisers_stores_logs_and_numbers():
    method = small.prepared("muse")
    tensors, numbers = state.collect(method)
    for path in (
        "student.net.",
        "G.16.",
        "opt_s.0.0.momentum_buffer",
        "opt_g.16.0.0.exp_avg",
        "at.16.pool.images",
        "at.16.ema.",
        "opt_s.0.lr",
        "project.weight",
    ):
        assert any(path in k for k in tensors), path
    assert numbers["at.16.pool.fill"] == 0
    assert not any(k.startswith(("teacher", "mean", "embeddings")) for k in tensors)


def test_a_tensor_reached_twice_is_saved_once():
    paths = [i.path for i in state.walk(small.prepared("fast"))]
    assert len(paths) == len(set(paths))
    tensors = [i.tensor for i in state.walk(small.prepared("fast")) if isinstance(i, state.TensorItem)]
    assert len({id(t) for t in tensors}) == len(tensors)


def test_a_kind_that_cannot_be_saved_is_refused_by_name():
    method = small.prepared("noise")
    object.__setattr__(method, "odd", {"inner": [iter([])]})
    with pytest.raises(MethodError, match=r"odd\.inner\.0 is a list_iterator"):
        list(state.walk(method))


def test_host_numbers_in_dicts_lists_and_objects_are_state():
    a, b = small.prepared("noise"), small.prepared("noise")
    for method, value in ((a, 5), (b, 0)):
        object.__setattr__(method, "counts", {"x": value, "y": [value, {"z": value * 1.5}]})
    state.restore(b, *state.collect(a))
    assert b.counts == {"x": 5, "y": [5, {"z": 7.5}]}


def test_restore_goes_into_the_existing_tensors_and_refuses_foreign_ones():
    a, b = small.prepared("fast", seed=1), small.prepared("fast", seed=2)
    held = b.theta.l0.weight
    assert not torch.equal(held, a.theta.l0.weight)
    tensors, numbers = state.collect(a)
    state.restore(b, tensors, numbers)
    assert b.theta.l0.weight is held and torch.equal(held, a.theta.l0.weight)
    with pytest.raises(ValueError, match="not part of this one"):
        state.restore(b, {**tensors, "foreign": torch.zeros(1)}, numbers)
    tensors.pop("z")
    with pytest.raises(ValueError, match="z is not in it"):
        state.restore(b, tensors, numbers)
