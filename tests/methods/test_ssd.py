"""SSD-KD against its card."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from fastkd import assemble, config, methods, recipes
from fastkd.assemble.job import make_method
from fastkd.engine import dry, evaluation, loop, state
from fastkd.errors import ConfigError, NumericalError
from fastkd.memory import Rows
from fastkd.methods.ssd import LowestPhi
from fastkd.ops import replay_sums
from fastkd.rng import Rng
from tests import small
from tests.methods import novel
from tests.methods.novel import names, take

PLAIN = {"kd_aug": "none", "aug": "none"}


def softmax(logits, tau=1.0):
    z = np.exp(logits.double().numpy() / tau - (logits.double().numpy() / tau).max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def kl(t, s, tau=1.0):
    p, q = softmax(t, tau), softmax(s, tau)
    return (p * (np.log(p) - np.log(q))).sum(1)


def filled(over=None, calls=2, given=None):
    """A method whose buffer holds the batches of some calls, just before its first student step."""
    m = small.small("ssd", {"warmup": 0, **PLAIN, **(over or {})})
    loop.prepare(m, small.given() if given is None else given)
    for n in range(calls):
        insert(m, n)
    return m


def insert(m, n=0):
    """A call whose kept batch is random: without generator steps."""
    m.task.image.copy_(torch.rand(m.task.image.shape, generator=torch.Generator().manual_seed(n)))
    take(m, m.remember, n=n)


def learning(m, n=0):
    """One student step: the rows that it drew, the student before it, and weights and priorities as they were."""
    draws, draw = [], m.pool.draw

    def spy(*args, **kw):
        draws.append(draw(*args, **kw))
        return draws[-1]

    m.pool.draw = spy
    before = copy.deepcopy(m.student), m.pool.leaves.clone(), m.pool.columns["w"].clone()
    take(m, m.learn, n=n)
    m.step_ends()
    del m.pool.draw
    return draws[0].i, *before


# Order of steps ---------------------------------------------------------------------------------------------------------------


def test_the_algorithm_box():
    m = small.prepared("ssd", {"g_steps": 3, "kd_steps": 2, "reset_l0_at": None})
    assert names(m, 0) == ["start", "adapt", "adapt", "adapt", "meta_update", "remember"]
    assert names(m, 1) == [*names(m, 0), "anneal", "learn", "learn"]
    switched = {"rounds": 2, "sampler": "shuffle", "delta_refresh": "epoch"}
    m = small.prepared("ssd", {"g_steps": 1, "kd_steps": 4, "reset_l0_at": None, **switched})
    assert names(m, 1) == ["start", "adapt", "meta_update", "remember", "anneal", "deal", "refresh", "learn", "learn"] * 2
    with pytest.raises(ConfigError, match=r"kd_steps is 3; expected a multiple of the 2 rounds"):
        small.prepared("ssd", {"rounds": 2})


@pytest.mark.parametrize("start, on", [(None, 3), (2, 5)])
def test_there_is_no_adversary_before_the_student_trains(start, on):
    m = small.prepared("ssd", {"epochs": 6, "warmup": 3, "g_steps": 1, "adv_start": start})
    assert [args[0] for e in range(6) for _, fn, args, _ in novel.steps(m, e) if fn.__name__ == "adapt"] == [False] * (6 - on) + [True] * on


def test_defaults_are_the_cards():
    m = methods.method_class("ssd")()
    assert (m.capacity, m.gamma, m.beta, m.eps, m.batch, m.kd_batch, m.kd_steps, m.warmup) == (5000, 2, 0.4, 1e-6, 256, 256, 400, 20)
    assert (m.adv, m.bn, m.oh, m.bn_mmt, m.tau, m.lr, m.delta_tau) == (1.33, 10, 0.5, 0.9, 20, 0.2, 1)
    assert m.warmup * m.batch >= m.capacity  # the buffer is full when the student begins


def test_the_small_forms_walk_on_fake_tensors():
    for over in ({"evict": "phi", "delta_refresh": "epoch", "epochs": 2}, {"replace": "top", "sampler": "shuffle", "epochs": 2}):
        made = small.small("ssd", over)
        planned = dry.walk(made, dataclasses.replace(small.given(), rng=Rng()))
        assert {r["step"] for r in planned["steps"]} == {n for e in range(2) for n in names(small.small("ssd", over), e)}


# The modulating function ------------------------------------------------------------------------------------------------------


def test_phi_of_a_buffer_by_hand():
    m = filled()
    m.pool.hist.copy_(torch.tensor([15, 3, 2, 0]))
    p = torch.tensor([0.3, 0.3, 0.6, 0.999999, 1.0])
    phi = m.phi(torch.tensor([0, 1, 1, 3, 2]), p)
    np.testing.assert_allclose(phi, [(5 / 20) * 0.7**2, (17 / 20) * 0.7**2, (17 / 20) * 0.4**2, 1e-12, 0], rtol=1e-2, atol=1e-12)
    assert phi[0] < phi[1] and ((phi >= 0) & (phi <= 1)).all()
    for over, expected in (
        ({"gamma": 0.0}, [5 / 20, 17 / 20, 17 / 20, 1, 18 / 20]),
        ({"phi_difficulty": False}, [5 / 20, 17 / 20, 17 / 20, 1, 18 / 20]),
        ({"phi_diversity": False}, [0.49, 0.49, 0.16, 0, 0]),
        ({"phi_n": "capacity", "capacity": 40, "gamma": 0.0}, [25 / 40, 37 / 40, 37 / 40, 1, 38 / 40]),
    ):
        m = filled(over)
        m.pool.hist.copy_(torch.tensor([15, 3, 2, 0]))
        m.pool.stored.fill_(20)
        np.testing.assert_allclose(m.phi(torch.tensor([0, 1, 1, 3, 2]), p), expected, rtol=1e-5, atol=1e-6)


def test_phi_of_an_empty_a_balanced_and_a_one_sided_buffer():
    m = filled(calls=0)
    zero, each = torch.zeros(4), torch.arange(4)
    assert m.phi(each, zero).tolist() == [1, 1, 1, 1]
    m.pool.hist.fill_(5)
    m.pool.stored.fill_(20)
    assert m.phi(each, zero).tolist() == [0.75] * 4
    m.pool.hist.copy_(torch.tensor([20, 0, 0, 0]))
    assert m.phi(each, zero).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("label", ["sampled", "teacher"])
def test_the_generator_loss_by_hand(label):
    m = filled({"task_label": label, "bn": 0.0, "oh": 0.5, "adv": 1.5})
    m.task.y.copy_(torch.arange(12) % 4)
    x = torch.randn(12, *m.shape, requires_grad=True)
    terms = m.inversion_terms(x, m.task, True)
    t, s = m.teacher(x).logits.detach(), copy.deepcopy(m.student).eval()(x).detach()
    p, named = softmax(t), t.argmax(1).numpy()
    y = named if label == "teacher" else m.task.y.numpy()
    phi = (1 - m.pool.hist.numpy()[named] / 20) * (1 - p.max(1)) ** 2
    assert m.pool.hist.sum() == 20 and phi.max() > 0
    np.testing.assert_allclose(terms["oh"].item(), 0.5 * (phi * -np.log(p[np.arange(12), y])).mean(), rtol=1e-4)
    agree = s.argmax(1).numpy() == named
    np.testing.assert_allclose(terms["adv"].item(), -1.5 * (agree * kl(t, s)).mean(), rtol=1e-3, atol=1e-6)
    whole = filled({"adv_mask": "none", "adv": 1.5}).inversion_terms(x, m.task, True)["adv"]
    np.testing.assert_allclose(whole.item(), -1.5 * kl(t, s).mean(), rtol=1e-3)
    assert all(novel.reaches(terms[name], [x]) for name in ("oh", "adv"))


def test_phi_is_a_constant_weight_unless_it_is_asked_for():
    x = torch.randn(12, *small.given().shape, requires_grad=True)
    fixed, through = filled({"bn": 0.0}), filled({"bn": 0.0, "phi_grad": True})
    for m in (fixed, through):
        m.task.y.copy_(torch.arange(12) % 4)
    t = fixed.teacher(x).logits
    phi = fixed.phi(t.argmax(1), torch.softmax(t, 1).amax(1)).detach()
    expected = torch.autograd.grad(0.5 * (phi * torch.nn.functional.cross_entropy(t, fixed.task.y, reduction="none")).mean(), x)[0]
    a, b = (m.inversion_terms(x, m.task, False)["oh"] for m in (fixed, through))
    (ga,), (gb,) = torch.autograd.grad(a, x), torch.autograd.grad(b, x)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ga, expected, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(ga, gb, rtol=1e-2) and gb.isfinite().all()


# Host identities --------------------------------------------------------------------------------------------------------------

HOST = {"phi_diversity": False, "phi_difficulty": False, "sampler": "shuffle", "capacity": 10_000, "adv_start": 1}


@pytest.mark.parametrize("over", [{}, {"loops": 2, "meta": "reptile", "reptile": 1.0}, {"insert_priority": "max", "beta": 0.9}])
def test_without_phi_on_an_unlimited_buffer_in_whole_passes_it_is_fast_bit_for_bit(over):
    ours = small.prepared("ssd", {**HOST, **over})
    host = small.prepared("fast", {"adv_start": 1, **{k: v for k, v in over.items() if k in ("loops", "meta", "reptile")}})
    small.run(ours)
    small.run(host)
    (a, _), (b, _) = state.collect(ours), state.collect(host)
    shared = [k for k in b if not k.startswith("log.") and k != "task.pool.columns.label" and k != "pool.columns.label"]
    assert set(shared) <= set(a) and any(k.startswith("student.") for k in shared) and "pool.images" in shared
    assert not [k for k in shared if not torch.equal(a[k], b[k])]


def test_with_equal_priorities_it_is_uniform_bit_for_bit(monkeypatch):
    """Priorities that stay equal: new images get the highest, and nothing is written back."""
    monkeypatch.setattr(methods.method_class("ssd"), "write_back", lambda *args: None)
    a, b = (small.prepared("ssd", {"sampler": s, "insert_priority": "max"}) for s in ("prioritised", "uniform"))
    small.run(a)
    small.run(b)
    (a, _), (b, _) = state.collect(a), state.collect(b)
    assert a.keys() == b.keys() and not [k for k in a if not torch.equal(a[k], b[k])]


def test_beta_zero_is_no_importance_weight_bit_for_bit():
    a, b = small.prepared("ssd", {"beta": 0.0}), small.prepared("ssd", {"w_in_loss": False, "w_in_delta": "off"})
    small.run(a)
    small.run(b)
    (a, _), (b, _) = state.collect(a), state.collect(b)
    differ = [k for k in a if not torch.equal(a[k], b[k])]
    assert set(differ) <= {k for k in a if k.endswith("columns.w") or k in ("exponent", "log.sums.learn.w")} and "exponent" in differ


# The buffer -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [{}, {"evict": "fifo"}, {"evict": "lowest"}, {"evict": "phi"}, {"replace": "top"}])
def test_the_histogram_is_a_recount_and_the_buffer_never_overflows(over):
    m = filled(over, calls=0)
    for n in range(5):
        before = m.pool.images.clone()
        insert(m, n)
        fill = min(20, 12 * (n + 1))
        assert len(m.pool) == m.pool.stored == m.pool.hist.sum() == fill
        recount = torch.bincount(m.pool.columns["label"][:fill].long(), minlength=4)
        assert torch.equal(m.pool.hist, recount)
        changed = (before != m.pool.images).flatten(1).any(1).sum()
        assert changed == 12 or over.get("replace") == "top"  # as many leave as come


def test_stored_rows_have_the_teachers_class_and_confidence_and_a_fresh_divergence():
    m = filled(calls=0)
    buffers = {k: v.clone() for k, v in m.student.state_dict().items()}
    insert(m)
    x = (m.pool.images[:12].permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    t, s = m.teacher(x).logits.detach(), copy.deepcopy(m.student).eval()(x).detach()
    assert m.pool.columns["label"][:12].tolist() == t.argmax(1).tolist() and m.pool.columns["label"][:12].unique().numel() > 1
    np.testing.assert_allclose(m.pool.columns["confidence"][:12], softmax(t).max(1), rtol=1e-4)
    np.testing.assert_allclose(m.pool.leaves[:12], kl(t, s) + 1e-6, rtol=1e-3, atol=1e-6)
    assert (m.pool.columns["w"][:12] == 1).all() and m.student.training
    assert all(torch.equal(v, m.student.state_dict()[k]) for k, v in buffers.items()), "the forward of an insertion moves no BN buffer"
    learning(m)
    assert any(not torch.equal(v, m.student.state_dict()[k]) for k, v in buffers.items() if "running" in k)


def test_new_images_may_get_the_highest_priority():
    m = filled({"insert_priority": "max"}, calls=1)
    assert (m.pool.leaves[:12] == 1).all()
    m.pool.write(torch.tensor([3]), torch.tensor([7.0]))
    insert(m, 1)
    assert (m.pool.leaves == m.pool.leaves[3]).sum() >= 12


def test_the_lowest_phi_leaves():
    m = filled({"evict": "phi"})
    label, confidence = m.pool.columns["label"].long().numpy(), m.pool.columns["confidence"].numpy()
    phi = (1 - m.pool.hist.numpy()[label] / 20) * (1 - confidence) ** 2
    before = m.pool.images.clone()
    insert(m, 7)
    changed = (before != m.pool.images).flatten(1).any(1).numpy()
    assert isinstance(m.pool, LowestPhi) and changed.sum() == 12 and set(np.flatnonzero(changed)) == set(np.argsort(phi)[:12])


def test_replace_top_keeps_the_highest_of_stored_and_new():
    m = filled({"replace": "top"})
    stored, images = m.pool.leaves.clone(), m.pool.images.clone()
    twin = filled({"replace": "top", "capacity": 100}, calls=0)
    insert(twin, 5)  # the same batch in a buffer of its own: its priorities
    new = twin.pool.leaves[:12]
    insert(m, 5)
    np.testing.assert_array_equal(np.sort(m.pool.leaves), np.sort(np.concatenate([stored, new]))[-20:])
    priorities, images = torch.cat([stored, new]), torch.cat([images, twin.pool.images[:12]])
    for leaf, image in zip(m.pool.leaves, m.pool.images, strict=True):  # they belong together
        assert torch.equal(images[priorities == leaf][0], image)
    assert 0 < sum(v in new for v in m.pool.leaves) < 12


# Sampling and the student's step ----------------------------------------------------------------------------------------------


def test_probabilities_sum_to_one_and_eps_keeps_every_row_drawable():
    m = filled()
    delta = torch.rand(20, generator=torch.Generator().manual_seed(0)).double() * 3
    delta[4] = 0
    m.pool.write(torch.arange(20), delta.float())
    np.testing.assert_allclose(m.pool.probabilities(), (delta + 1e-6) / (delta + 1e-6).sum(), rtol=1e-4)
    assert m.pool.probabilities()[4] > 0
    torch.testing.assert_close(m.pool.probabilities().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_equal_priorities_have_weight_one_for_every_beta(beta):
    m = filled({"beta": beta})
    m.pool.write(torch.arange(20), torch.full((20,), 0.3))
    take(m, m.learn)
    torch.testing.assert_close(m.pool.columns["w"], torch.ones(20))


def test_rows_are_drawn_as_often_as_their_probability_says():
    m = filled()
    m.pool.write(torch.arange(20), torch.arange(1.0, 21.0))
    for uniform, p in ((False, m.pool.probabilities().double()), (True, torch.full((20,), 0.05).double())):
        count = torch.bincount(m.pool.draw(1_000_000, uniform=uniform).i, minlength=20)
        chi = ((count - 1e6 * p).square() / (1e6 * p)).sum()
        assert chi < 49.6, "the 0.9999 quantile of 19 degrees of freedom is 49.6"


WEIGHTS = [{}, {"w_in_delta": "current"}, {"w_in_delta": "off"}, {"w_in_loss": False}, {"w_norm": "none"}, {"delta_tau": 20.0, "beta": 0.9}]


@pytest.mark.parametrize("over", WEIGHTS)
def test_two_student_steps_by_hand(over, monkeypatch):
    m = filled({"kd_batch": 16, **over})
    beta, tau_d = over.get("beta", 0.4), over.get("delta_tau", 1.0)
    for n in range(2):
        terms = []
        minimise = type(m).minimise
        monkeypatch.setattr(type(m), "minimise", lambda self, t, *o, f=minimise, seen=terms, **k: seen.append(t) or f(self, t, *o, **k))
        rows, student, leaves, w_before = learning(m, n)
        monkeypatch.setattr(type(m), "minimise", minimise)
        x = m.view(Rows(m.pool, rows), "none")
        t, s = m.teacher(x).logits.detach(), student(x).detach()  # in training mode
        p = leaves.double().numpy()[rows] / leaves.double().numpy().sum()
        w = (20 * p) ** -beta
        weight = (w / w.max() if over.get("w_norm") != "none" else w) if over.get("w_in_loss", True) else np.ones(16)
        np.testing.assert_allclose(terms[0]["kl"].item(), 400 * (weight * kl(t, s, 20)).mean(), rtol=2e-3)
        assert terms[0]["kl"].item() > 0
        factor = {"previous": w_before.numpy()[rows], "current": w, "off": np.ones(16)}[over.get("w_in_delta", "previous")]
        delta, i = factor * kl(t, s, tau_d), rows.numpy()
        for row in range(20):
            if row in i:
                np.testing.assert_allclose(m.pool.leaves[row], delta[i == row].mean() + 1e-6, rtol=2e-3, atol=1e-6)
                np.testing.assert_allclose(m.pool.columns["w"][row], w[i == row][0], rtol=1e-5)
            else:
                assert m.pool.leaves[row] == leaves[row] and m.pool.columns["w"][row] == w_before[row]
        assert 1 < len(np.unique(i)) < 16, "rows are repeated, and some are not drawn"
        assert torch.equal(m.pool.sums, replay_sums(m.pool.leaves))


def test_a_row_drawn_for_the_first_time_gets_its_divergence_and_later_its_last_weight_too():
    m = filled({"kd_batch": 64})
    rows, student, leaves, w = learning(m)
    assert (w == 1).all()
    x = m.view(Rows(m.pool, rows), "none")
    expected = torch.tensor(kl(m.teacher(x).logits.detach(), student(x).detach()))
    for row in rows.unique():
        np.testing.assert_allclose(m.pool.leaves[row], expected[rows == row].mean() + 1e-6, rtol=2e-3, atol=1e-6)
    assert (m.pool.columns["w"][rows] != 1).any()


def test_a_row_that_was_drawn_more_than_once_gets_the_mean_over_its_views(monkeypatch):
    m, seen = filled({"kd_batch": 32, "kd_aug": "crop_flip"}), []
    view = type(m).view
    monkeypatch.setattr(type(m), "view", lambda self, *a, **k: seen.append(view(self, *a, **k)) or seen[-1])
    rows, student, _, _ = learning(m)
    each, i = kl(m.teacher(seen[0]).logits.detach(), student(seen[0]).detach()), rows.numpy()
    for row in np.unique(i):
        np.testing.assert_allclose(m.pool.leaves[row], each[i == row].mean() + 1e-6, rtol=2e-3, atol=1e-6)
    assert max(np.ptp(each[i == row]) for row in np.unique(i)) > 0.01


def test_the_norm_of_weights_changes_the_loss_and_nothing_that_is_written():
    a, b = filled(), filled({"w_norm": "none"})
    ra, rb = learning(a)[0], learning(b)[0]
    assert torch.equal(ra, rb) and torch.equal(a.pool.leaves, b.pool.leaves) and torch.equal(a.pool.columns["w"], b.pool.columns["w"])
    assert any(not torch.equal(p, q) for p, q in zip(a.student.parameters(), b.student.parameters(), strict=True))


def test_the_plain_divergence_is_that_of_the_stored_image_before_the_step():
    m = filled({"delta_view": "plain", "kd_aug": "crop_flip"})
    rows, student, _, _ = learning(m)
    x = m.view(Rows(m.pool, rows), "none")
    expected = kl(m.teacher(x).logits.detach(), student.eval()(x).detach())
    np.testing.assert_allclose(m.pool.leaves[rows], expected + 1e-6, rtol=2e-3, atol=1e-6)


def test_a_refresh_renews_all_priorities_and_no_weight():
    m = filled({"delta_refresh": "epoch", "kd_batch": 8})  # 20 rows: two batches and a half
    learning(m)
    w = m.pool.columns["w"].clone()
    take(m, m.refresh)
    x = m.view(Rows(m.pool, torch.arange(20)), "none")
    expected = w.numpy() * kl(m.teacher(x).logits.detach(), copy.deepcopy(m.student).eval()(x).detach())
    np.testing.assert_allclose(m.pool.leaves, expected + 1e-6, rtol=2e-3, atol=1e-6)
    assert torch.equal(m.pool.columns["w"], w) and (w != 1).any()


def test_beta_rises_to_one_over_the_epochs_after_warmup():
    seen = {}
    for schedule in ("fixed", "linear"):
        m = small.prepared("ssd", {"epochs": 5, "warmup": 1, "beta_schedule": schedule})
        seen[schedule] = []
        for k in range(4):
            m.anneal(k)
            seen[schedule].append(m.exponent.item())
    np.testing.assert_allclose(seen["fixed"], [0.4] * 4)
    np.testing.assert_allclose(seen["linear"], [0.4, 0.6, 0.8, 1.0])


# What cannot work -------------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"capacity is 5; expected at least batch \(nearest: 12\)"):
        small.prepared("ssd", {"capacity": 5})
    with pytest.raises(ConfigError, match=r"gamma is 0.5; with phi_grad expected 0, or at least 1"):
        small.prepared("ssd", {"gamma": 0.5, "phi_grad": True})


def test_a_student_that_is_not_finite_ends_with_a_sentence():
    m = small.prepared("ssd")
    with torch.no_grad():
        next(iter(m.student.parameters())).fill_(float("nan"))
    with pytest.raises(NumericalError, match="3 'learn' steps in a row were not finite \\(term kl\\)"):
        small.run(m)
    assert m.pool.leaves.isfinite().all() and (m.pool.leaves > 0).all()


# Dense teachers ---------------------------------------------------------------------------------------------------------------


def test_a_dense_teacher_is_distilled_per_pixel():
    m = filled({"epochs": 2, "kd_steps": 2, "bn": 0.0}, given=small.given(size=32, classes=5, dense=True))
    x = torch.randn(12, *m.shape, requires_grad=True)
    t = m.teacher(x).logits
    assert t.shape == (12, 5, 32, 32)
    p, named = softmax(t.detach()), t.argmax(1).numpy()
    phi = (1 - m.pool.hist.numpy()[named] / 20) * (1 - p.max(1)) ** 2
    term = m.inversion_terms(x, m.task, False)["oh"]
    np.testing.assert_allclose(term.item(), 0.5 * (phi * -np.log(p.max(1))).mean(), rtol=1e-4)
    assert novel.reaches(term, [x])

    stored = m.teacher(m.view(Rows(m.pool, torch.arange(20)), "none")).logits
    most = [np.bincount(image.ravel(), minlength=5).argmax() for image in stored.argmax(1).numpy()]
    assert m.pool.columns["label"].tolist() == most
    np.testing.assert_allclose(m.pool.columns["confidence"], softmax(stored).max(1).mean((1, 2)), rtol=1e-4)

    rows, student, _, _ = learning(m)
    x = m.view(Rows(m.pool, rows), "none")
    expected = kl(m.teacher(x).logits.detach(), student(x).detach()).mean((1, 2))
    for row in rows.unique():
        np.testing.assert_allclose(m.pool.leaves[row], expected[rows == row].mean() + 1e-6, rtol=2e-3, atol=1e-6)
    assert small.run(m) == 0
    assert all(0 <= v <= 1 for k, v in evaluation.health(m, 512).items() if k != "distance")


# Recipes ----------------------------------------------------------------------------------------------------------------------


def test_recipes_of_the_published_pairs_have_the_hosts_weights_and_a_tenth_of_the_images():
    for data in ("cifar10", "cifar100"):
        for pair in recipes.pairs("ssd")["ssd"][data]:
            m, host = (make_method(recipes.read(f"{stem}-{data}-{pair}")["method"]) for stem in ("ssd", "fast-5"))
            assert m.capacity == 5000
            assert all(getattr(m, f.name) == getattr(host, f.name) for f in dataclasses.fields(host))
    m, host = (make_method(recipes.read(f"{stem}-nyuv2")["method"]) for stem in ("ssd", "fast"))
    assert (m.g_steps, m.lr_g, m.lr, m.kd_steps) == (host.g_steps, host.lr_g, host.lr, host.kd_steps)
    assert m.calls(m.warmup) * m.batch <= m.capacity <= m.calls(m.epochs) * m.batch


@pytest.mark.slow
def test_the_digits_recipe_beats_noise():
    """Mean of the last ten epochs, measured: seeds 0 and 1 95.5 and 96.6 %, without the BN term 90.6 %; noise ends at 44.6 %."""
    outcome = assemble.distil(config.resolve("ssd-digits", {"seed": 0, "device": "cpu"}), None)
    assert outcome.summary["student"]["last10"] > 0.93
