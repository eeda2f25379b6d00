"""The toolbox: what a class may not do, how views augment, what optimisers are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fastkd import optim
from fastkd.errors import MethodError
from fastkd.memory import Rows, Store
from fastkd.method import Method, step, steps
from tests import small


def test_a_field_that_hides_the_toolbox_is_refused():
    with pytest.raises(MethodError, match=r"Bad\.view would hide 'view'") as caught:

        @dataclass
        class Bad(Method):
            view: int = 1

    assert isinstance(caught.value, TypeError)


def test_an_override_inherits_phase_and_eagerness():
    class A(Method):
        @step("memory", eager=True)
        def learn(self):
            pass

    class B(A):
        def learn(self):
            pass

    assert B.learn.phase == "memory" and B.learn.eager


def test_functions_of_a_method_cannot_be_overwritten():
    m = small.small("noise")
    with pytest.raises(MethodError, match="cannot be overwritten") as caught:
        m.minimise = 1
    assert isinstance(caught.value, AttributeError)


def test_steps_count_occurrences_by_name():
    class A(Method):
        @step("synthesis")
        def a(self, x=0):
            pass

        def epoch(self, e):
            yield self.a
            yield self.a, 2

    assert [(i, args, n) for i, _, args, n in steps(A(), 0)] == [(0, (), 0), (1, (2,), 1)]


@pytest.mark.parametrize("kind", ["none", "crop", "crop_flip", "resized_crop", "roll_flip"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_stored_batch_and_a_live_one_are_seen_alike(kind, channels):
    m = small.prepared("noise", {"kind": "uniform"}, channels=channels)
    m.rng.at(0, 0, "learn", 0)
    store = Store(m.rng, 6, (channels, 16, 16))
    store.add(torch.rand(6, channels, 16, 16))
    index = torch.tensor([5, 0, 3, 3])
    live = store.read(index)
    m.rng.at(0, 0, "learn", 0)
    stored = m.view(Rows(store, index), kind)
    m.rng.at(0, 0, "learn", 0)
    torch.testing.assert_close(stored, m.view(live, kind))
    assert stored.shape == (4, channels, 16, 16)
    if kind == "none":
        torch.testing.assert_close(stored, (live - 0.4) / 0.3)
    else:
        assert not torch.allclose(stored, (live - 0.4) / 0.3)


def test_padding_is_black_before_it_is_normalised():
    m = small.prepared("noise", {"kind": "uniform"})
    m.rng.at(0, 0, "learn", 0)
    seen = m.view(torch.ones(64, 1, 16, 16), "crop")
    black, white = (0 - 0.4) / 0.3, (1 - 0.4) / 0.3
    assert sorted(seen.unique().tolist()) == pytest.approx([black, white])


def test_flips_are_off_where_the_data_forbid_them():
    given = small.given()
    from fastkd.engine import loop
    from fastkd.method import Augment

    given.augmentation = Augment(flip=False, pad=0)
    m = small.small("noise", {"kind": "uniform"})
    loop.prepare(m, given)
    m.rng.at(0, 0, "learn", 0)
    x = torch.rand(32, 1, 16, 16)
    torch.testing.assert_close(m.view(x, "crop_flip"), (x - 0.4) / 0.3)


@pytest.mark.parametrize("kind", ["crop_flip", "resized_crop", "roll_flip"])
def test_views_are_differentiable(kind):
    m = small.prepared("noise", {"kind": "uniform"})
    m.rng.at(0, 0, "learn", 0)
    x = torch.rand(4, 1, 16, 16, requires_grad=True)
    (g,) = torch.autograd.grad(m.view(x, kind).sum(), x)
    assert g.abs().sum() > 0


def test_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="unknown augmentation 'flipp'"):
        small.prepared("noise", {"kind": "uniform"}).view(torch.zeros(1, 1, 16, 16), "flipp")


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_optimisers_equal_torchs_and_reset_in_place(kind):
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    ours = optim.adam([p], lr=0.1, betas=(0.5, 0.999)) if kind == "adam" else optim.sgd([p], lr=0.1, weight_decay=0.01)
    theirs = (
        torch.optim.Adam([q], lr=0.1, betas=(0.5, 0.999))
        if kind == "adam"
        else torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.01)
    )
    held = [id(t) for t in ours.state[p].values()]
    for _ in range(4):
        p.grad = torch.randn(5)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)
    assert [id(t) for t in ours.state[p].values()] == held
    optim.reset(ours)
    assert all((t == 0).all() for t in ours.state[p].values())
    optim.set_lr(ours, 0.25)
    assert ours.param_groups[0]["lr"].item() == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_any_value_that_is_not_finite_is_found(dtype, bad):
    tensors = [torch.randn(7, 5).to(dtype), torch.zeros(0, dtype=dtype), torch.full((3,), torch.finfo(dtype).max, dtype=dtype)]
    assert Method._finite(tensors) and Method._finite([])
    tensors[0][3, 2] = bad
    assert not Method._finite(tensors)


def test_what_was_applied_is_zero_where_the_step_was_skipped():
    method = small.prepared("noise")
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = method.sgd([w], lr=0.1)
    method.minimise({"square": w.square().sum()}, opt)
    assert torch.equal(method.applied([w])[0], torch.tensor([2.0, 4.0]))
    method.step_ends()
    method.minimise({"root": (w - w.detach()).sqrt().sum()}, opt)
    assert method.not_finite() == 1 and torch.equal(method.applied([w])[0], torch.zeros(2))
