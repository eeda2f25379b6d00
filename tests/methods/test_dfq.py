"""DFQ against its card."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fastkd import methods, models
from fastkd.assemble.job import check_needs, make_method
from fastkd.errors import ConfigError
from fastkd.nn import Student, instrument
from tests import small
from tests.methods import novel
from tests.methods.novel import bits, grads, images, moved, names, reaches, take

ORIGINAL = {"variant": "original", "g_steps": 1, "s_steps": 3, "iterations": 2}


def test_the_algorithm_box():
    zju = small.prepared("dfq", {"g_steps": 1, "s_steps": 3, "iterations": 2})
    assert names(zju) == ["anneal", *["generate", "learn", "learn", "learn"] * 2]
    original = small.prepared("dfq", {**ORIGINAL, "warmup": 2})
    assert names(original, 1) == ["anneal", "generate", "generate"]
    assert names(original, 2) == names(zju)
    assert not original.trains_student(1) and original.trains_student(2)


def test_the_variant_decides_the_defaults():
    zju, original = (make_method({"name": "dfq", **t}) for t in ({}, {"variant": "original"}))
    of = lambda m: (m.epochs, m.iterations, m.s_steps, m.batch, m.nz, m.lr_g, m.lr, m.weight_decay, m.optimiser, m.gen_mode_in_kd)  # noqa: E731
    assert of(zju) == (200, 40, 10, 256, 256, 1e-3, 0.1, 1e-4, "sgd", "train")
    assert of(original) == (250, 400, 10, 256, 512, 1e-3, 0.1, 1e-4, "nesterov", "eval")
    assert (zju.bn, zju.oh, zju.balance, zju.adv) == (1.0, 1.0, 20.0, 1.0)
    assert (original.warmup, original.alpha, original.alpha_schedule) == (50, 0.01, "constant")
    assert (zju.space, original.space, original.generator_name) == ("unit", "normalised", "g_dfq")
    assert sum(p.numel() for p in models.generator("g_dfq", 512, (3, 32, 32)).parameters()) == 5_753_859
    novel.check_settings("dfq")
    novel.check_settings("dfq", variant="original", epochs=3, warmup=1)


def rates(m):
    out = []
    for e in range(m.epochs):
        m.anneal(e)
        out.append((m.opt_g.param_groups[0]["lr"].item() / m.lr_g, m.opt_s.param_groups[0]["lr"].item() / m.lr, m.weight.item() / m.alpha))
    return out


def test_warm_up_keeps_the_rates_and_both_cosines_follow():
    for g, s, alpha in rates(small.prepared("dfq", {**ORIGINAL, "epochs": 6, "warmup": 2}))[:3]:
        assert (g, s, alpha) == pytest.approx((1, 1, 1))
    g, s, alpha = rates(small.prepared("dfq", {**ORIGINAL, "epochs": 6, "warmup": 2}))[4]
    assert (g, s, alpha) == pytest.approx((0.5, 0.5, 1), abs=1e-6)


def test_a_cosine_that_begins_in_warm_up_rises_again():
    g = [r[0] for r in rates(small.prepared("dfq", {**ORIGINAL, "epochs": 6, "warmup": 2, "cosine_in_warmup": True}))]
    assert g[4] == pytest.approx(0, abs=1e-6) and g[5] == pytest.approx(g[3]) and g[3] > 0.1


def test_alpha_may_fall_over_the_epochs_after_warm_up():
    alphas = [r[2] for r in rates(small.prepared("dfq", {**ORIGINAL, "epochs": 6, "warmup": 2, "alpha_schedule": "linear"}))]
    assert alphas == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])


def test_terms_of_the_benchmark_row():
    m, x = small.prepared("dfq"), images(small.prepared("dfq"))
    terms = m.generator_terms(x)
    assert set(terms) == {"bn", "oh", "balance", "adv"}
    t = m.teacher(x, "bn")
    d = (t.bn - m.teacher.target).split([b - a for a, b in zip(m.teacher.split, m.teacher.split[1:])], 1)
    torch.testing.assert_close(terms["bn"], sum(layer.norm(dim=1).sum() for layer in d))
    with m.evaluating(m.student):
        s = m.student(x)
    torch.testing.assert_close(terms["adv"], -nn.functional.kl_div(s.log_softmax(1), t.logits.softmax(1), reduction="batchmean"))
    assert terms["adv"] <= 0 and -20 * math.log(4) <= terms["balance"] <= 0
    for name, term in terms.items():
        assert reaches(term, [x]), name
        assert all(g is None for g in grads(term, m.student.parameters())), name
    twice = small.prepared("dfq", {"bn": 2.0, "oh": 2.0, "balance": 40.0, "adv": 2.0}).generator_terms(x)
    for name in terms:
        torch.testing.assert_close(twice[name], 2 * terms[name])


def test_terms_of_the_original():
    m, x = small.prepared("dfq", ORIGINAL), images(small.prepared("dfq"))
    terms = m.generator_terms(x)
    assert set(terms) == {"bn", "h_inst", "h_batch", "adv"} and set(m.generator_terms(x, False)) == {"bn", "h_inst", "h_batch"}
    p = m.teacher(x).logits.softmax(1)
    torch.testing.assert_close(terms["h_inst"], 0.01 * -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(terms["h_batch"], 0.01 * (p.mean(0) * p.mean(0).log()).sum())
    assert terms["bn"] > 0 and all(reaches(term, [x]) for term in terms.values())


def test_without_alpha_only_the_adversary_is_left_and_it_vanishes_where_the_student_is_the_teacher():
    given = small.given()
    net = models.build("resnet8", classes=4, channels=1, input_size=16)
    given.teacher, given.student = instrument(copy.deepcopy(net), shape=given.shape), Student(net, shape=given.shape)
    m = small.small("dfq", {**ORIGINAL, "alpha": 0.0})
    from fastkd.engine import loop

    loop.prepare(m, given)
    x = images(m)
    terms = m.generator_terms(x)
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total, terms["adv"])
    assert total.abs() < 1e-6 and grads(total, [x])[0].abs().max() < 1e-6


def test_a_dead_channel_stays_finite():
    m = small.prepared("dfq", ORIGINAL)
    x = torch.zeros(m.batch, *m.shape, requires_grad=True)  # every variance is 0
    term = m.generator_terms(x)["bn"]
    (g,) = grads(term, [x])
    assert term.isfinite() and g.isfinite().all()
    wider = small.prepared("dfq", {**ORIGINAL, "eps_dn": 1e-3}).generator_terms(x)["bn"]
    assert wider < term


@pytest.mark.parametrize("over", [{}, ORIGINAL])
def test_each_step_moves_its_own_network(over):
    m = small.prepared("dfq", over)
    m.anneal(2)
    student, generator = bits(m.student), bits(m.G)
    take(m, m.generate)
    m.step_ends()
    assert moved(m.student, student) == (set(), set()) and all(moved(m.G, generator)) and m.student.training
    generator = bits(m.G)
    take(m, m.learn)
    m.step_ends()
    assert all(moved(m.student, student)) and not moved(m.G, generator)[0]
    assert bool(moved(m.G, generator)[1]) == (m.gen_mode_in_kd == "train") and m.G.training


def test_warm_up_asks_nothing_of_the_student(monkeypatch):
    m = small.prepared("dfq", ORIGINAL)
    monkeypatch.setattr(type(m.student), "forward", lambda *_: pytest.fail("the student was asked"))
    take(m, m.generate, False)
    assert "generate.adv" not in m.log.read()


def test_a_teacher_without_batch_norm_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    for variant in ("zju", "original"):
        method = make_method({"name": "dfq", "variant": variant})
        with pytest.raises(ConfigError, match=r"method 'dfq' needs a teacher with BatchNorm.*dafl"):
            check_needs(method, "dfq", instrument(net, shape=(1, 16, 16)), False)
    assert "bn" not in methods.method_class("dafl").needs


@pytest.mark.slow
def test_the_digits_recipe_beats_noise():
    assert novel.top1("dfq-digits") > 0.7  # measured: 0.826; noise: 0.446
