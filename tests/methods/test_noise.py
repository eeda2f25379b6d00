"""The noise floor against its card."""

from __future__ import annotations

import pytest
import torch

from fastkd.engine import loop
from fastkd.method import steps
from tests import small


@pytest.mark.parametrize("channels", [1, 3])
def test_gaussian_is_normal_in_normalised_space(channels):
    m = small.prepared("noise", {"n_images": 600}, channels=channels)
    x = m.pool.images.float()
    assert m.pool.images.dtype == torch.float16 and m.space == "normalised"
    assert x.mean((0, 1, 2)).abs().max() < 0.01 and (x.var((0, 1, 2)) - 1).abs().max() < 0.02
    assert x.max() > 3 and x.min() < -3  # unclipped
    m.rng.at(0, 0, "deal", 0)
    m.deal()
    rows = m.pool.next(4)
    torch.testing.assert_close(m.view(rows), m.pool.images[rows.index].permute(0, 3, 1, 2).float())


def test_uniform_is_normalised_with_the_teachers_constants():
    m = small.prepared("noise", {"kind": "uniform", "n_images": 600, "kd_aug": "none"})
    assert m.pool.images.dtype == torch.uint8 and m.space == "unit"
    m.deal()
    rows = m.pool.next(8)
    u = m.pool.images[rows.index].permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(m.view(rows, "none"), (u - 0.4) / 0.3)
    assert 0.45 < u.mean() < 0.55


def test_seed_and_kind_decide_the_images():
    for kind in ("gaussian", "uniform"):
        a, b, c = (small.prepared("noise", {"kind": kind}, seed=s).pool.images for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.float().std() > 50  # of 8 bits: nothing of the Gaussian's space


def test_student_steps_equal_those_of_the_compared_run():
    noise = small.prepared("noise", {"epochs": 2, "warmup": 0})
    muse = small.prepared("muse", {"epochs": 3, "warmup": 1})
    count = lambda m, name: sum(fn.__name__ == name for e in range(m.epochs) for _, fn, _, _ in steps(m, e))  # noqa: E731
    assert count(noise, "learn") == count(muse, "learn") == 6
    rates = []
    for m in (noise, muse):
        rates.append([])
        for e in range(m.epochs):
            for _, fn, args, _ in steps(m, e):
                if fn.__name__ == "anneal":
                    fn(*args)
                    rates[-1].append(m.opt_s.param_groups[0]["lr"].item())
    assert rates[0] == rates[1] and rates[0][0] == pytest.approx(0.05)
    assert noise.images_of("distillation") == muse.images_of("distillation") == 8


def test_no_label_and_no_real_image_enters():
    m = small.small("noise")
    assert not m.uses_real() and not m.needs
    given = small.given()
    given.real = given.embeddings = None
    loop.prepare(m, given)
    assert not m.pool.columns and small.run(m) == 0


@pytest.mark.parametrize("dense", [False, True])
def test_the_loss_is_that_of_the_compared_run(dense):
    kl, l1 = (small.prepared("noise", {"dense": dense, "loss": loss, "tau": 4.0}) for loss in ("kl", "l1"))
    x = torch.randn(6, *kl.shape)
    with torch.no_grad():
        t, s = kl.teacher(x).logits, kl.student.eval()(x)
        l1.student.eval()
        found = {**kl.student_terms(x, t, None), **l1.student_terms(x, t, None)}
    p, q = ((v / 4).softmax(1) for v in (t, s))
    torch.testing.assert_close(found, {"kl": 16 * (p * (p / q).log()).sum(1).mean(), "gap": (t - s).abs().mean()})


def test_the_store_does_not_change_after_build():
    m = small.prepared("noise")
    before = m.pool.images.clone()
    small.run(m)
    assert torch.equal(before, m.pool.images)
