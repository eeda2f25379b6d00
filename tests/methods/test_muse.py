"""MUSE and NAYER against their cards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastkd.engine import loop, state
from fastkd.errors import ConfigError
from fastkd.memory import Rows
from fastkd.method import steps
from fastkd.nn import instrument
from tests import small

OFF = {"a_cam": 0.0, "a_ed": 0.0, "a_aed": 0.0}


def walk(m, epochs=None):
    for e in range(epochs or m.epochs):
        for _, fn, args, n in steps(m, e):
            m.rng.at(m.seed, e, fn.__name__, n)
            m.log.prefix = fn.__name__
            fn(*args)
            m.step_ends()


def test_one_resolution_and_zero_weights_is_nayer_bit_for_bit():
    nayer, muse = small.prepared("nayer"), small.prepared("muse", OFF)
    walk(nayer)
    walk(muse)
    a, b = state.collect(nayer)[0], state.collect(muse)[0]
    shared = {k for k in a if not k.startswith("log.")}
    assert any(k.startswith("G.") for k in shared) and any(k.startswith("student.") for k in shared)
    assert all(torch.equal(a[k], b[k]) for k in shared)


def test_nayers_pool_and_life():
    m = small.prepared("nayer", {"epochs": 25, "warmup": 20, "g_life": 10, "gwp_loops": 10, "g_loops": 2, "kd_steps": 1})
    odd = small.prepared("nayer", {"epochs": 25, "warmup": 4, "g_life": 10, "kd_steps": 1})
    assert [e for e in range(25) if "recreate" in [fn.__name__ for _, fn, _, _ in steps(odd, e)]] == [0, 4, 10, 14, 20, 24]
    made = 0
    for e in range(25):
        called = [fn.__name__ for _, fn, _, _ in steps(m, e)]
        made += called.count("remember") * m.batch
        assert made == m.batch * 10 * min(e + 1, 20) + m.batch * 2 * max(0, e - 19)
        assert ("recreate" in called) == (e % 10 == 0)
        assert ("learn" in called) == (e >= 20)
        assert all(args[1] == (e >= 20) for _, fn, args, _ in steps(m, e) if fn.__name__ == "invert")
    assert m.pool.capacity == made


@pytest.mark.parametrize("batch, classes", [(12, 4), (14, 4)])
def test_labels_are_balanced_with_a_random_remainder(batch, classes):
    m = small.prepared("nayer", {"batch": batch}, classes=classes)
    m.rng.at(0, 0, "redraw", 0)
    m.redraw(16, 0)
    whole = batch // classes * classes
    assert m.at[16].y[:whole].tolist() == list(range(classes)) * (batch // classes)
    assert (m.at[16].y[whole:] >= 0).all() and (m.at[16].y[whole:] < classes).all()


def test_a_batch_below_the_classes_takes_slices_of_shuffled_lists():
    m = small.prepared("nayer", {"batch": 4}, classes=10)
    drawn = []
    for k in range(5):
        m.rng.at(0, 0, "redraw", k)
        m.redraw(16, k)
        drawn += m.at[16].y.tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert len(m.G[16].noisy.weight) == 1


def test_redraw_touches_the_noisy_layers_and_recreate_everything():
    m = small.prepared("nayer")
    noisy = {id(p) for p in m.G[16].noisy.parameters()}
    before = {n: p.detach().clone() for n, p in m.G[16].named_parameters()}
    m.rng.at(0, 5, "redraw", 0)
    m.redraw(16, 0)
    changed = {id(p) for n, p in m.G[16].named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= noisy
    first = m.G[16](m.at[16].y)
    m.rng.at(0, 5, "redraw", 0)
    m.redraw(16, 0)
    assert torch.equal(first, m.G[16](m.at[16].y))
    m.rng.at(0, 5, "redraw", 1)
    m.redraw(16, 0)
    assert not torch.equal(first, m.G[16](m.at[16].y))
    weights = {n: p.detach().clone() for n, p in m.G[16].named_parameters() if p.ndim > 1 and id(p) not in noisy}
    m.recreate()
    assert weights and all(not torch.equal(p, weights[n]) for n, p in m.G[16].named_parameters() if n in weights)


def test_noisy_layers_that_are_not_drawn_anew_are_trained_on():
    m = small.prepared("nayer", {"redraw_noise": False})
    before = [p.detach().clone() for p in m.G[16].noisy.parameters()]
    for k in range(2):
        m.rng.at(0, 0, "redraw", k)
        m.redraw(16, k)
        assert all(torch.equal(p, q) for p, q in zip(m.G[16].noisy.parameters(), before))
    m.rng.at(0, 0, "invert", 0)
    m.invert(16, False)
    trained = m.G[16].noisy.weight.detach().clone()
    assert not torch.equal(trained, before[0])
    m.rng.at(0, 0, "recreate", 0)
    m.recreate()
    assert not torch.equal(m.G[16].noisy.weight, trained), "a new generator does not start behind the old one's noisy layers"


@pytest.mark.parametrize("sizes", [(8,), (16,), (8, 16), (8, 12, 16)])
@pytest.mark.parametrize("schedule", ["cycle", "random", "remaining"])
def test_the_pixel_budget_equals_the_hosts(sizes, schedule):
    over = {"resolutions": sizes, "res_schedule": schedule, "epochs": 30, "warmup": 5, "gwp_loops": 3, "g_loops": 1}
    m = small.prepared("muse", over)
    host = 5 * 3 + 25
    plan = m._plan
    made = {size: sum(loops.count(size) for loops in plan) for size in sizes}
    for size in sizes:
        assert abs(made[size] - host * (16 / size) ** 2 / len(sizes)) <= 1
    assert plan == small.prepared("muse", over)._plan and m.at[sizes[0]].pool.capacity == made[sizes[0]] * m.batch
    if sizes == (16,):
        assert [len(p) for p in plan] == [3] * 5 + [1] * 25


def test_budget_in_images_ignores_resolution():
    m = small.prepared("muse", {"resolutions": (8, 16), "budget": "images", "epochs": 9, "warmup": 1, "gwp_loops": 2, "g_loops": 1})
    made = [size for loops in m._plan for size in loops]
    assert len(made) == 10 and made.count(8) == made.count(16) == 5


def test_student_batches_hold_one_resolution_drawn_by_stored_images():
    m = small.prepared("muse", {"resolutions": (8, 16), "kd_steps": 400, "epochs": 6, "warmup": 3})
    drawn = m.student_resolutions(5)
    made = [size for loops in m._plan for size in loops]
    assert drawn == m.student_resolutions(5) != m.student_resolutions(4)
    assert drawn.count(8) / 400 == pytest.approx(made.count(8) / len(made), abs=0.1)
    by_pixels = small.prepared("muse", {"resolutions": (8, 16), "kd_steps": 400, "epochs": 6, "warmup": 3, "kd_pool_choice": "pixels"})
    assert by_pixels.student_resolutions(5).count(16) > drawn.count(16)


def test_labels_stay_with_their_images():
    m = small.prepared("muse", {"epochs": 2, "warmup": 1})
    walk(m)
    pool = m.at[16].pool
    pool.images.copy_(pool.columns["label"].to(torch.uint8)[:, None, None, None].expand_as(pool.images))
    pool.deal()
    rows = pool.next(8)
    assert torch.equal((pool.read(rows.index)[:, 0, 0, 0] * 255).round().long(), rows.column("label").long())


def trace(m, adversary=True):
    y = m.at[16].y.copy_(torch.arange(m.batch) % m.classes)
    x = torch.randn(m.batch, *m.shape, requires_grad=True)
    t = m.teacher(x, "bn", "groups")
    s = None
    if adversary:
        with m.evaluating(m.student):
            s = m.student.trace(x)
    return x, y, t, s


def test_cam_mean_plus_bias_is_the_logit():
    m = small.prepared("muse")
    _, y, t, _ = trace(m)
    weight, bias = m.teacher.head
    cam = torch.einsum("bk,bkhw->bhw", weight[y], t.map)
    torch.testing.assert_close(cam.mean((1, 2)) + bias[y], t.logits.gather(1, y[:, None])[:, 0])


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"cam_weights": "gradient"},
        {"cam_layer": "pre_last_stage"},
        {"cam_compare": "image"},
        {"cam_norm": "relu_max"},
        {"cam_norm_grad": True},
    ],
)
def test_every_form_of_the_cam_term_reaches_the_images(over):
    m = small.prepared("muse", over)
    x, _, t, _ = trace(m, adversary=False)
    term = m.more_terms(x, t, None, m.at[16])["cam"]
    assert 0 <= term.item() <= 1
    assert torch.autograd.grad(term, x)[0].abs().max() > 0


def test_stages_that_are_not_known_are_refused():
    """Without a global pooling the last stage has no known end: the map before the last stride would be another stage's."""
    parts = [layer for a, b in ((1, 8), (8, 8), (8, 8)) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())]
    flat = nn.Sequential(*parts, nn.Flatten(), nn.Linear(32, 4))
    for name, over, said in (
        ("muse", {"cam_layer": "pre_last_stage"}, "the map before the last stride is not found"),
        ("cmi", {"feature_tap": "stage_outputs"}, "use --set method.feature_tap=bn_inputs"),
        ("cmi", {"feature_tap": "stage_inputs"}, "use --set method.feature_tap=bn_inputs"),
    ):
        given = small.given()
        given.teacher = instrument(flat, shape=given.shape)
        with pytest.raises(ConfigError, match=said):
            loop.prepare(small.small(name, over), given)


def test_linear_and_gradient_weights_give_the_same_normalised_map():
    a, b = small.prepared("muse"), small.prepared("muse", {"cam_weights": "gradient"})
    x, y, t, _ = trace(a)
    torch.testing.assert_close(a.cam_of(t, y, (16, 16)), b.cam_of(t, y, (16, 16)), rtol=1e-3, atol=1e-4)


def test_gradient_through_the_extremes_does_not_change_the_value():
    a, b = small.prepared("muse"), small.prepared("muse", {"cam_norm_grad": True})
    x, y, t, _ = trace(a)
    ca, cb = a.cam_of(t, y, (16, 16)), b.cam_of(t, y, (16, 16))
    torch.testing.assert_close(ca, cb)
    ga, gb = (torch.autograd.grad(c.square().sum(), x, retain_graph=True)[0] for c in (ca, cb))
    assert not torch.allclose(ga, gb)


def test_adversarial_embedding_term():
    m = small.prepared("muse", {"aed_mask": "none"})
    x, y, t, s = trace(m)
    term = m.more_terms(x, t, s, m.at[16])["aed"]
    with torch.no_grad():
        p = s.feature @ m.project.weight.T + m.project.bias
        expected = -(p - m.targets[y]).square().mean(1).mean()
    torch.testing.assert_close(term, expected)
    assert torch.autograd.grad(term, x, retain_graph=True)[0].abs().max() > 0
    others = [*m.project.parameters(), *m.student.parameters()]
    assert all(p.requires_grad for p in others)
    assert all(g is None for g in torch.autograd.grad(term, others, allow_unused=True, retain_graph=True))
    capped = small.prepared("muse", {"aed_mask": "none", "aed_cap": 0.5})
    x, y, t, s = trace(capped)
    assert capped.more_terms(x, t, s, capped.at[16])["aed"].item() == pytest.approx(-0.5)  # every distance exceeds the cap
    agreeing = small.prepared("muse")
    x, y, t, s = trace(agreeing)
    s.logits = t.logits.roll(1, 1)
    assert agreeing.more_terms(x, t, s, agreeing.at[16])["aed"] == 0


def test_embedding_term_trains_head_and_student_and_has_no_silent_zero():
    m = small.prepared("muse", {"epochs": 2, "warmup": 1, "r": 2.0})
    walk(m, 1)
    m.student.eval()
    m.at[16].pool.deal()
    rows = m.at[16].pool.next(8)
    x = m.view(rows)
    terms = m.student_terms(x, m.teacher(x).logits, rows)
    distance = (m.project(m.student.trace(x).feature) - m.targets[rows.column("label").long()]).square().mean()
    assert distance > 2 and set(terms) == {"kl", "ed"}
    assert terms["ed"].item() == pytest.approx(5 * (distance.item() - 2.0), rel=1e-5)
    grads = torch.autograd.grad(terms["ed"], [m.project.weight, next(iter(m.student.parameters()))])
    assert all(g.abs().max() > 0 for g in grads)


def test_embedding_term_is_zero_inside_its_radius_and_a_detached_head_spares_the_student():
    m = small.prepared("muse", {"epochs": 2, "warmup": 1, "r": 1e4, "head": "detached"})
    walk(m, 1)
    m.at[16].pool.deal()
    rows = m.at[16].pool.next(8)
    x = m.view(rows)
    term = m.student_terms(x, m.teacher(x).logits, rows)["ed"]
    assert term == 0
    head, first = torch.autograd.grad(term, [m.project.weight, next(iter(m.student.parameters()))], allow_unused=True)
    assert (head == 0).all() and first is None


def test_a_unit_table_at_norm_ten_is_no_silent_zero():
    from fastkd.data import embeddings

    table = embeddings.table("random", None, 10, norm=10.0).values
    assert table.norm(dim=1).mean().item() == pytest.approx(10.0, rel=1e-3)
    assert table.square().mean() > 0.015 and (table / 10).square().mean() < 0.015


def test_a_radius_beyond_the_class_spacing_is_said():
    assert small.prepared("muse").notes() == []
    assert "exceeds the smallest distance" in small.prepared("muse", {"r": 1e4}).notes()[0]


@pytest.mark.parametrize("classes", [4, 30])
def test_classes_of_one_name_do_not_set_off_the_warning(classes):
    m = small.prepared("muse", classes=classes)
    assert m.notes() == []
    m.embeddings[1] = m.embeddings[0]
    assert m.notes() == []


def test_synthesis_leaves_the_student_as_it_is():
    m = small.prepared("muse", {"warmup": 0, "epochs": 1})
    before = {k: v.clone() for k, v in m.student.state_dict().items()}
    m.rng.at(0, 0, "redraw", 0)
    m.redraw(16, 0)
    m.invert(16, True)
    assert all(torch.equal(v, before[k]) for k, v in m.student.state_dict().items()) and m.student.training


def test_the_adversary_is_absent_in_warm_up():
    m = small.prepared("muse")
    x = torch.randn(m.batch, *m.shape)
    assert set(m.inversion_terms(x, m.at[16], False)) == {"bn", "oh", "cam"}
    assert set(m.inversion_terms(x, m.at[16], True)) == {"bn", "oh", "cam", "adv", "aed"}


def test_terms_are_told_by_resolution():
    m = small.prepared("muse", {"resolutions": (8, 16)})
    walk(m, 1)
    assert {"invert.bn_8", "invert.bn_16"} <= m.log.read().keys()


def test_a_call_without_a_finite_step_repeats_a_consistent_pair_and_poisons_nothing():
    m = small.prepared("nayer", {"epochs": 2, "warmup": 1, "g_steps": 1})
    call = m.at[16]
    m.rng.at(0, 0, "redraw", 0)
    m.redraw(16, 0)
    m.invert(16, False)
    m.remember(16)
    call.ema.last.fill_(float("nan"))
    call.y.zero_()
    call.best.reset()
    m.remember(16)
    assert call.ema.mean_var.isfinite().all() and call.ema.calls == 1
    labels = call.pool.columns["label"]
    assert torch.equal(call.pool.images[:12], call.pool.images[12:24]) and torch.equal(labels[:12], labels[12:24])


def test_shared_generators_share_their_convolutions():
    m = small.prepared("muse", {"resolutions": (8, 16), "generators": "shared"})
    a, b = ({id(p) for p in m.G[size].parameters()} for size in (8, 16))
    assert a & b and a - b and b - a
    walk(m, 2)


@pytest.mark.parametrize(
    "over, sentence",
    [
        ({"resolutions": (10,)}, "resolution 10 .*nearest: 16"),
        ({"resolutions": (16, 16)}, "expected different ones"),
        ({"resolutions": (8, 32)}, "none above the teacher's input of 16 px"),
        ({"a_ed": 0.0}, "a_aed needs a_ed > 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(over, sentence):
    with pytest.raises(ConfigError, match=sentence):
        small.prepared("muse", over)


def test_embeddings_of_either_published_width_run():
    for width in (384, 512):
        given = small.given()
        given.embeddings = torch.randn(4, width)
        m = small.small("muse")
        from fastkd.engine import loop

        loop.prepare(m, given)
        m.rng.at(0, 0, "redraw", 0)
        m.redraw(16, 0)
        m.invert(16, False)
        assert m.targets.shape == (4, width)


def test_sample_is_what_the_student_sees():
    m = small.prepared("muse", {"epochs": 2, "warmup": 1})
    assert m.sample(4) is None
    walk(m, 1)
    pool = m.at[16].pool
    expected = (pool.images[pool.newest(4)].permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    torch.testing.assert_close(m.sample(4), expected)
    assert isinstance(Rows(pool, pool.newest(2)).column("label"), torch.Tensor)
    assert math.isfinite(m.report()["replay_bytes"])
