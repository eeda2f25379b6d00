"""FastDFKD against its card."""

from __future__ import annotations

import pytest
import torch

from fastkd.config import read_recipe
from fastkd.engine import evaluation, loop, state
from fastkd.errors import ConfigError
from fastkd.method import steps
from fastkd.methods import method_class
from fastkd.methods._pool import statistics_norm
from fastkd.methods.fast import Fast
from tests import small


def walk(method, until=None, epochs=1):
    for e in range(epochs):
        for _, fn, args, n in steps(method, e):
            if fn.__name__ == until:
                return
            method.rng.at(method.seed, e, fn.__name__, n)
            method.log.prefix = fn.__name__
            fn(*args)
            method.step_ends()


def names(method, e):
    return [fn.__name__ for _, fn, _, _ in steps(method, e)]


def test_the_algorithm_box():
    m = small.prepared("fast", {"g_steps": 3, "kd_steps": 2, "reset_l0_at": None, "epochs": 3, "warmup": 1})
    assert names(m, 0) == ["start", "adapt", "adapt", "adapt", "meta_update", "remember"]
    assert names(m, 1) == [*names(m, 0), "anneal", "deal", "learn", "learn"]


def test_statistics_that_drown_the_class_are_said_with_a_weight_that_does_not():
    m = small.prepared("fast", {"bn": 10.0})
    m.teacher.target.mul_(500 / m.teacher.target.norm())
    assert not m.notes()
    m.teacher.target.mul_(1000)
    (said,) = m.notes()
    fits = float(said.partition("method.bn=")[2].split()[0])
    assert fits * statistics_norm(m.teacher) == pytest.approx(400 * m.oh, rel=0.05)


def test_adversary_starts_when_the_one_based_call_reaches_warmup():
    m = small.prepared("fast", {"epochs": 6, "warmup": 4})
    on = [args[0] for e in range(6) for _, fn, args, _ in steps(m, e) if fn.__name__ == "adapt"]
    assert on == [False] * 6 + [True] * 6  # two inner steps a call; calls 4, 5, 6 (epochs 3, 4, 5)
    m = small.prepared("fast", {"epochs": 6, "warmup": 4, "adv_start": 5})
    assert sum(args[0] for e in range(6) for _, fn, args, _ in steps(m, e) if fn.__name__ == "adapt") == 4
    m = small.prepared("fast", {"epochs": 4, "warmup": 2, "loops": 3, "g_steps": 1})
    assert [args[0] for e in range(4) for _, fn, args, _ in steps(m, e) if fn.__name__ == "adapt"] == [False] * 5 + [True] * 7


@pytest.mark.parametrize("at, expected", [(-1, 139), (7, 6), (None, None)])
def test_the_first_layer_is_reset_exactly_once(at, expected):
    m = small.prepared("fast", {"epochs": 220, "warmup": 20, "reset_l0_at": at, "kd_steps": 1})
    assert [e for e in range(220) if "reset_first_layer" in names(m, e)] == ([] if expected is None else [expected])
    before = {k: v.clone() for k, v in m.theta.state_dict().items()}
    m.reset_first_layer()
    changed = {k.rsplit(".", 1)[0] for k, v in m.theta.state_dict().items() if not torch.equal(v, before[k])}
    touched = {n for n, mod in m.theta.named_modules() if mod in (m.theta.l0, m.theta.bn0)}
    assert changed == touched and m.theta.bn0.weight.abs().max() < 0.2


def test_the_reset_keeps_its_epoch_with_several_calls_and_spares_the_latent_map():
    m = small.prepared("fast", {"epochs": 220, "warmup": 20, "reset_l0_at": -1, "loops": 3, "kd_steps": 1})
    assert [e for e in range(220) if "reset_first_layer" in names(m, e)] == [139] and names(m, 139)[0] == "reset_first_layer"
    deep = small.prepared("fast", {"epochs": 220, "warmup": 20, "reset_l0_at": -1, "generator_name": "g_deep", "kd_steps": 1}, size=32)
    assert not any("reset_first_layer" in names(deep, e) for e in range(220))


def test_mean_and_sum_of_the_inner_gradients_differ_by_the_number_of_steps():
    a, b = (small.prepared("fast", {"meta_grad_reduce": how}) for how in ("sum", "mean"))
    for m in (a, b):
        walk(m, until="meta_update")
        m.meta_update()
    for p, q in zip(a.theta.parameters(), b.theta.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * 2)


def test_fomaml_takes_the_sum_of_the_clones_gradients():
    m = small.prepared("fast", {"g_steps": 3})
    seen = []
    original = m.meta_grad
    m.rng.at(0, 0, "start", 0)
    m.start()
    for n in range(3):
        m.rng.at(0, 0, "adapt", n)
        m.adapt(False)
        seen.append([p.grad.clone() for p in m.clone.parameters()])
        m.step_ends()
    for total, *parts in zip(original, *seen, strict=True):
        torch.testing.assert_close(total, sum(parts))
    assert any(g.abs().max() > 0 for g in original)


def test_with_one_step_the_meta_gradient_is_the_gradient_at_theta():
    m = small.prepared("fast", {"g_steps": 1})
    m.rng.at(0, 0, "start", 0)
    m.start()
    m.rng.at(0, 0, "adapt", 0)
    x = m.theta(m.z)
    expected = torch.autograd.grad(sum(m.inversion_terms(m.view(x), m.task, False).values()), list(m.theta.parameters()))
    m.rng.at(0, 0, "adapt", 0)
    m.adapt(False)
    for got, want in zip(m.meta_grad, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_meta_learning_rate_zero_leaves_theta_and_moves_the_clone():
    m = small.prepared("fast", {"lr_meta": 0.0})
    before = [p.detach().clone() for p in m.theta.parameters()]
    walk(m, until="remember")
    assert all(torch.equal(a, b) for a, b in zip(before, m.theta.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, m.clone.parameters(), strict=True))


def test_reptile_and_none():
    m = small.prepared("fast", {"meta": "reptile", "reptile": 2.0})
    walk(m, until="meta_update")
    p, q = next(iter(m.theta.parameters())), next(iter(m.clone.parameters()))
    moved = 2.0 * (p - q).detach()
    m.meta_update()
    torch.testing.assert_close(p.grad, moved)
    m = small.prepared("fast", {"meta": "none"})
    walk(m, until="remember")
    assert all(torch.equal(a, b) for a, b in zip(m.theta.parameters(), m.clone.parameters(), strict=True))


def test_zero_weights_leave_the_one_hot_loss():
    m = small.prepared("fast", {"adv": 0.0, "bn": 0.0, "oh": 1.0})
    m.rng.at(0, 0, "start", 0)
    m.start()
    x = m.view(m.clone(m.z))
    terms = m.inversion_terms(x, m.task, True)
    expected = torch.nn.functional.cross_entropy(m.teacher(x).logits, m.task.y)
    torch.testing.assert_close(sum(terms.values()), expected)


def test_the_teacher_recovers_more_labels_along_the_inner_loop():
    m = small.prepared("fast", {"adv": 0.0, "bn": 0.0, "oh": 1.0, "batch": 32, "lr_g": 3e-3, "aug": "none"})
    m.rng.at(0, 0, "start", 0)
    m.start()
    right = []
    for n in range(20):
        with torch.no_grad():
            right.append((m.teacher(m.view(m.clone(m.z))).logits.argmax(1) == m.task.y).float().mean().item())
        m.rng.at(0, 0, "adapt", n)
        m.adapt(False)
        m.step_ends()
    assert right[-1] > right[0] + 0.3 and right[10] > right[0], right


def test_first_call_has_the_plain_bn_loss_and_later_ones_a_scaled_gradient():
    m = small.prepared("fast", {"adv": 0.0, "oh": 0.0, "bn": 1.0})
    m.rng.at(0, 0, "start", 0)
    m.start()
    image = torch.rand(m.batch, *m.shape, requires_grad=True)

    def gradient():
        m.rng.at(0, 0, "adapt", 0)
        x = m.view(image)
        value = m.inversion_terms(x, m.task, False)["bn"]
        return value, torch.autograd.grad(value, image)[0]

    plain, g = gradient()
    stats = m.teacher(m.view(image, "none"), "bn").bn
    assert stats.requires_grad
    m.task.ema.update()
    same, scaled = gradient()  # the average now equals these statistics: same value, gradient (1 - m) times as strong
    torch.testing.assert_close(same, plain)
    torch.testing.assert_close(scaled, 0.1 * g, rtol=1e-3, atol=1e-8)


def test_the_pool_grows_by_a_batch_an_epoch_and_keeps_the_best_iterate(monkeypatch):
    m = small.prepared("fast", {"epochs": 3, "g_steps": 4})
    totals, images = [], []
    offer, view = m.task.best.offer, type(m).view

    def spy(total, always=False, **rows):
        totals.append(total.item())
        offer(total, always=always, **rows)

    def seen(self, x, *args, **kw):
        if isinstance(x, torch.Tensor):  # what the generator made, before augmentation and before the update
            images.append(x.detach().clone())
        return view(self, x, *args, **kw)

    m.task.best.offer = spy
    monkeypatch.setattr(type(m), "view", seen)
    walk(m, epochs=3)
    assert len(m.pool) == 3 * m.batch
    for call in range(3):
        part = totals[4 * call : 4 * call + 4]
        best = images[4 * call + part.index(min(part))]
        stored = m.pool.images[call * m.batch : (call + 1) * m.batch].permute(0, 3, 1, 2)
        assert torch.equal(stored, (best.clamp(0, 1) * 255).floor().to(torch.uint8))


def test_the_published_pool_has_its_sizes():
    m = Fast()
    assert (m.calls(m.warmup) * m.batch, m.calls(m.epochs) * m.batch) == (5_120, 56_320)
    assert [m.calls(e + 1) * m.batch for e in range(3)] == [256, 512, 768]


def test_frozen_networks_during_synthesis():
    m = small.prepared("fast", {"warmup": 0, "epochs": 1, "adv_start": 1})
    buffers = [b.clone() for b in m.student.buffers()]
    weights = [p.detach().clone() for p in m.student.parameters()]
    walk(m, until="anneal")
    assert all(torch.equal(a, b) for a, b in zip(buffers, m.student.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, m.student.parameters(), strict=True))
    assert m.student.training and all(p.requires_grad for p in m.student.parameters())


def test_the_imagenet_form_learns_its_latents():
    m = small.prepared(
        "fast",
        {
            **{"generator_name": "g_deep", "meta_latent": True, "meta": "reptile", "reptile": 1.0, "redraw_every": 2, "loops": 2, "nz": 8},
            "imagenet_init": "none",
        },
        size=32,
    )
    assert m.z.shape == (12, 8, 2, 2)
    assert [n for n in names(m, 0) if n in ("start", "redraw_latents")] == ["redraw_latents", "start", "redraw_latents", "start"]
    walk(m, until="meta_update")
    z0 = m.z0.detach().clone()
    assert not torch.equal(m.z.detach(), z0)
    m.meta_update()
    assert not torch.equal(m.z0.detach(), z0)


def test_rounds_alternate_images_and_student_steps():
    m = small.prepared("fast", {"epochs": 2, "warmup": 1, "rounds": 2, "kd_steps": 4, "g_steps": 1, "reset_l0_at": None})
    call, learn = ["start", "adapt", "meta_update", "remember"], ["anneal", "deal", "learn", "learn"]
    assert names(m, 0) == call * 2 and names(m, 1) == (call + learn) * 2
    small.run(m)
    assert len(m.pool) == 4 * m.batch == m.pool.capacity
    with pytest.raises(ConfigError, match=r"kd_steps is 10; expected a multiple of the 4 rounds .*nearest: 8"):
        small.prepared("fast", {"rounds": 4, "kd_steps": 10})


def test_the_initial_set_is_made_once_before_the_first_student_step_and_only_with_the_latent_map():
    deep = {"generator_name": "g_deep", "epochs": 2, "warmup": 0, "g_steps": 1, "kd_steps": 2, "init_images": 30, "rounds": 2}
    deep["reset_l0_at"] = None
    m = small.prepared("fast", deep, size=32)
    made = [names(m, e)[: names(m, e).index("learn")].count("start") for e in range(2)]
    assert made == [3 + 1, 1]  # 30 images are three batches of 12
    small.run(m)
    assert len(m.pool) == (3 + 4) * m.batch == m.pool.capacity
    without = small.prepared("fast", {**deep, "imagenet_init": "none"}, size=32)
    assert names(without, 0) == names(m, 1)
    plain = small.prepared("fast", {**deep, "generator_name": "g_fast"})
    assert names(plain, 0) == names(m, 1)


def test_the_imagenet_recipe_is_the_published_schedule():
    m = method_class("fast")(**{k: v for k, v in read_recipe("fast-imagenet")["method"].items() if k != "name"})
    assert m.calls(0) * m.batch == 140_000 and (m.calls(400) - m.calls(0)) * m.batch == 400_000
    assert (m.lr, m.eta_min, m.momentum, m.weight_decay, m.tau) == (0.1, 0.0, 0.9, 1e-4, 5.0)  # cosine to 0, not to CIFAR's 2e-4
    step_names = [s[0].__name__ if isinstance(s, tuple) else s.__name__ for s in m.epoch(1)]
    assert step_names.count("start") == 10 and step_names.count("learn") == 1000
    assert step_names.index("learn") < len(step_names) - 1 - step_names[::-1].index("start")


class OneRound(Fast):
    """The box of the CIFAR form alone: all calls of an epoch, then its student steps; no initial set, no dense teacher."""

    def epoch(self, e):
        for call in range(e * self.loops + 1, (e + 1) * self.loops + 1):
            if call == self.reset_l0_at:
                yield self.reset_first_layer
            yield self.start
            for _ in range(self.g_steps):
                yield self.adapt, call >= self.warmup * self.loops
            yield self.meta_update
            yield self.remember
        if e >= self.warmup:
            yield self.anneal, e - self.warmup
            yield self.deal
            for _ in range(self.kd_steps):
                yield self.learn

    def wanted(self, t, call):
        return call.y


@pytest.mark.parametrize("over", [{}, {"imagenet_init": "none", "segmentation": "generator_name"}])
def test_the_new_switches_change_no_bit_of_the_cifar_form(over):
    known = {k: v for k, v in small.FIELDS.items() if k in Fast.__dataclass_fields__}
    plain = OneRound(**{**known, "loops": 2})
    loop.prepare(plain, small.given())
    switched = small.prepared("fast", {"loops": 2, **over})
    small.run(plain)
    small.run(switched)
    a, b = state.collect(plain), state.collect(switched)
    assert a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_a_dense_teacher_is_distilled_per_pixel():
    m = small.small("fast", {"epochs": 2, "warmup": 0, "adv_start": 1, "kd_steps": 4})
    loop.prepare(m, small.given(size=32, classes=5, dense=True))
    assert type(m.theta).__name__ == "Dcgan" and isinstance(m.theta.head[-1], torch.nn.Sigmoid)
    m.rng.at(0, 0, "start", 0)
    m.start()
    x = m.view(m.clone(m.z))
    t = m.teacher(x).logits
    assert t.shape == (m.batch, 5, 32, 32)
    terms = m.inversion_terms(x, m.task, True)
    torch.testing.assert_close(terms["oh"], m.oh * torch.nn.functional.cross_entropy(t, t.argmax(1)))
    before = [p.detach().clone() for p in m.student.parameters()]
    assert small.run(m) == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, m.student.parameters(), strict=True))
    assert all(0 <= v <= 1 for k, v in evaluation.health(m, 512).items() if k != "distance")
    other = small.small("fast", {"segmentation": "generator_name"})
    loop.prepare(other, small.given(size=32, classes=5, dense=True))
    assert type(other.theta).__name__ == "FcUp"
