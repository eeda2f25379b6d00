"""DFAD against its card."""

from __future__ import annotations

import pytest
import torch

from fastkd import models
from fastkd.assemble.job import make_method
from tests import small
from tests.methods import novel
from tests.methods.novel import bits, grads, images, moved, names, reaches, take


def test_the_algorithm_box():
    over = {"g_steps": 1, "s_steps": 3, "iterations": 2}
    assert names(small.prepared("dfad", over)) == ["anneal", *["learn", "learn", "learn", "generate"] * 2]
    assert names(small.prepared("dfad", {**over, "variant": "zju"})) == ["anneal", *["generate", "learn", "learn", "learn"] * 2]


def test_the_variant_decides_the_defaults():
    original, zju = (make_method({"name": "dfad", **t}) for t in ({}, {"variant": "zju"}))
    of = lambda m: (m.epochs, m.iterations, m.s_steps, m.batch, m.nz, m.lr_g, m.beta1_g, m.lr, m.weight_decay)  # noqa: E731
    assert of(original) == (500, 50, 5, 256, 256, 1e-3, 0.9, 0.1, 5e-4) and original.milestones == (100, 200)
    assert of(zju) == (200, 80, 5, 256, 256, 1e-3, 0.5, 0.1, 1e-4) and zju.schedule == "cosine"
    assert (original.student_mode_in_g, zju.student_mode_in_g) == ("train", "eval")
    assert (original.space, zju.space) == ("normalised", "unit")
    novel.check_settings("dfad")
    novel.check_settings("dfad", variant="zju")


@pytest.mark.parametrize("sched_step, first", [("after", 4), ("before", 3)])
def test_both_rates_fall_at_the_milestones(sched_step, first):
    m = small.prepared("dfad", {"epochs": 8, "milestones": (4,), "sched_step": sched_step})
    low = []
    for e in range(8):
        _, *args = next(iter(m.epoch(e)))
        m.anneal(*args)
        pair = m.opt_s.param_groups[0]["lr"].item() / m.lr, m.opt_g.param_groups[0]["lr"].item() / m.lr_g
        assert pair[0] == pytest.approx(pair[1])
        low.append(pair[0] == pytest.approx(0.1))
    assert low.index(True) == first and all(low[first:])


def test_the_players_have_opposite_signs():
    m = small.prepared("dfad")
    x = images(m)
    d = (m.teacher(x).logits - m.student(x)).abs().mean()
    torch.testing.assert_close(m.generator_terms(x)["adv"], -d)
    torch.testing.assert_close(m.student_terms(x)["gap"], d)
    log = small.prepared("dfad", {"adv_form": "log_l1"}).generator_terms(x)["adv"]
    torch.testing.assert_close(log, -(d + 1).log())
    (a,), (b,) = grads(m.generator_terms(x)["adv"], [x]), grads(log, [x])
    torch.testing.assert_close(b, a / (d + 1))
    assert not grads(m.generator_terms(x)["adv"], m.student.parameters())[0] and not reaches(m.student_terms(x)["gap"], [images(m)])


def test_equal_logits_are_no_gap():
    m = small.prepared("dfad")
    t = torch.randn(3, 4)
    assert m.gap(t, t) == 0 and m.gap(t, t + 1) == pytest.approx(1)


def test_a_generator_step_moves_the_students_buffers_and_not_its_weights():
    m = small.prepared("dfad")
    student = bits(m.student)
    take(m, m.generate)
    m.step_ends()
    weights, buffers = moved(m.student, student)
    assert not weights and buffers and all(p.requires_grad for p in m.student.parameters())
    zju = small.prepared("dfad", {"variant": "zju"})
    student = bits(zju.student)
    take(zju, zju.generate)
    assert moved(zju.student, student) == (set(), set())


def test_a_student_step_leaves_the_generator(monkeypatch):
    m = small.prepared("dfad")
    generator = bits(m.G)
    take(m, m.learn)
    assert not moved(m.G, generator)[0] and all(p.grad is None for p in m.G.parameters())
    seen = novel.spied_terms(m, monkeypatch)
    take(m, m.learn)
    assert all(g is None for g in grads(seen[0][0]["gap"], m.G.parameters()))


def test_each_step_draws_its_own_latents(monkeypatch):
    m, seen = small.prepared("dfad"), []
    monkeypatch.setattr(type(m.G), "forward", lambda self, z: seen.append(z) or torch.zeros(len(z), *m.shape) + 0 * self.l0.weight.sum())
    for fn, n in ((m.learn, 0), (m.learn, 1), (m.generate, 0)):
        take(m, fn, n=n)
    assert len({tuple(z.flatten().tolist()) for z in seen}) == 3


def test_the_generator_steps_towards_disagreement():
    m = small.prepared("dfad", {"lr_g": 1e-2, "student_mode_in_g": "eval"})
    z = m.rng.normal(m.batch, m.nz)
    gap = lambda: m.generator_terms(m.G(z))["adv"].item()  # noqa: E731
    before = gap()
    for n in range(5):
        take(m, m.generate, n=n)
        m.step_ends()
    assert gap() < before


def test_the_generators_have_the_published_size_and_range():
    assert sum(p.numel() for p in models.generator("g_dfad_a", 256, (3, 32, 32)).parameters()) == 2_329_091
    a = small.prepared("dfad", channels=3)
    x = a.G(a.rng.normal(12, 8))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-2, rtol=0)
    b = small.prepared("dfad", {"generator_name": "g_dfad_b"})
    assert b.G(b.rng.normal(12, 8)).abs().max() < 1


@pytest.mark.slow
def test_the_digits_recipe_beats_noise():
    assert novel.top1("dfad-digits") > 0.85  # measured: 0.968; noise: 0.446
