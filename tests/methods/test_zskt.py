"""ZSKT against its card."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastkd import models
from fastkd.assemble.job import make_method
from fastkd.engine import loop
from fastkd.errors import ConfigError
from fastkd.method import steps
from fastkd.methods.zskt import stages
from fastkd.nn import Student
from tests import small
from tests.methods import novel
from tests.methods.novel import bits, moved, names, reaches, take

BOX = {"g_steps": 1, "s_steps": 2, "iterations": 2, "epochs": 2}


def walk(m, rounds=1, spy=None):
    """The first rounds of a run; `spy` looks before each step."""
    began = 0
    for _, fn, args, n in steps(m, 0):
        began += fn.__name__ == "anneal"
        if began > rounds:
            return
        if spy is not None:
            spy(fn.__name__)
        take(m, fn, *args, n=n)
        m.step_ends()


def test_the_algorithm_box():
    box = lambda over: names(small.prepared("zskt", {**BOX, **over}))  # noqa: E731
    assert box({}) == ["anneal", "draw", "generate", "answer", "learn", "learn"] * 2
    assert box({"s_batch": "fresh"}) == ["anneal", "draw", "generate", *["draw", "answer", "learn"] * 2] * 2
    assert box({"s_batch": "before_g"}) == ["anneal", "draw", "answer", "generate", "learn", "learn"] * 2
    assert box({"variant": "zju"}) == ["anneal", *["generate", "learn", "learn"] * 2]


def test_the_variant_decides_the_defaults():
    original, zju = (make_method({"name": "zskt", **t}) for t in ({}, {"variant": "zju"}))
    of = lambda m: (m.epochs * m.iterations, m.g_steps, m.s_steps, m.batch, m.nz, m.lr_g, m.beta1_g, m.lr, m.optimiser)  # noqa: E731
    assert of(original) == (80_000, 1, 10, 128, 100, 1e-3, 0.9, 2e-3, "adam")
    assert (original.beta, original.tau, original.grad_clip, original.student_mode_in_g) == (250.0, 1.0, 5.0, "train")
    assert of(zju) == (16_000, 1, 5, 256, 256, 1e-3, 0.5, 0.1, "sgd") and zju.student_mode_in_g == "eval" and not hasattr(zju, "beta")
    assert (original.space, zju.space) == ("normalised", "unit")
    assert sum(p.numel() for p in models.generator("g_zskt", 100, (3, 32, 32)).parameters()) == 1_051_145
    novel.check_settings("zskt", epochs=2, iterations=2)
    novel.check_settings("zskt", variant="zju")


def test_both_cosines_move_every_round_and_end_at_zero():
    m, seen = small.prepared("zskt", {**BOX, "epochs": 2, "iterations": 3}), []
    for e in range(2):
        for _, fn, args, _ in steps(m, e):
            if fn.__name__ == "anneal":
                fn(*args)
                pair = [opt.param_groups[0]["lr"].item() / lr for opt, lr in ((m.opt_s, m.lr), (m.opt_g, m.lr_g))]
                assert pair[0] == pytest.approx(pair[1])
                seen.append(pair[0])
    assert seen == pytest.approx([(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)])
    stepped = small.prepared("zskt", {"schedule": "steps", "milestones": (1,), "iterations": 3})
    assert [stepped.factor("steps", k) for k in range(6)] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1])


def batches(over):
    """Images and latents of the student steps of a round, and what the generator makes of its latents before and after its update."""
    m, seen, latents, made = small.prepared("zskt", {**BOX, **over}), [], [], {}

    def spy(name):
        if name == "learn":
            seen.append(m.x.clone())
            latents.append(m.z.clone())
        elif name in ("generate", "answer"):
            with torch.no_grad():
                made[name] = m.G(m.z)

    walk(m, spy=spy)
    return seen, latents, made


def test_the_students_batches():
    same, latents, made = batches({})
    assert torch.equal(*same) and torch.equal(*latents)
    torch.testing.assert_close(same[0], made["answer"])  # of the updated generator
    assert not torch.allclose(same[0], made["generate"], atol=1e-4)
    fresh, latents, _ = batches({"s_batch": "fresh"})
    assert not torch.equal(*fresh) and not torch.equal(*latents)
    before, _, made = batches({"s_batch": "before_g"})
    assert torch.equal(*before)
    torch.testing.assert_close(before[0], made["generate"])


def test_the_kept_answers_are_the_teachers():
    m = small.prepared("zskt", BOX)
    take(m, m.draw)
    take(m, m.answer)
    t = m.teacher(m.x, "groups")
    torch.testing.assert_close(m.answers, t.logits)
    for kept, features in zip(m.attentions, stages(t), strict=True):
        q = features.square().mean(1).flatten(1)
        torch.testing.assert_close(kept, q / q.norm(dim=1, keepdim=True))
    assert [len(a[0]) for a in m.attentions] == [256, 64, 16] and not m.x.requires_grad


def test_the_stages_are_those_of_the_paper():
    net = Student(models.build("wrn16_1", classes=10), shape=(3, 32, 32))
    maps = stages(net.trace(torch.randn(2, 3, 32, 32), "groups"))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert all(m.min() < 0 for m in maps)  # before the last BatchNorm and ReLU


def terms(m):
    take(m, m.draw)
    take(m, m.answer)
    return m.student_terms(m.x)


def test_the_losses_are_those_of_the_card():
    m = small.prepared("zskt", BOX)
    both = terms(m)
    s = m.student.trace(m.x, "groups")
    kl = nn.functional.kl_div(s.logits.log_softmax(1), m.answers.softmax(1), reduction="none").mean()  # over batch and classes
    torch.testing.assert_close(both["gap"], kl)
    expected = 0
    for kept, features in zip(m.attentions, stages(s), strict=True):
        expected = expected + (nn.functional.normalize(features.square().mean(1).flatten(1)) - kept).square().mean()
    torch.testing.assert_close(both["at"], 250 * expected)
    assert all(reaches(v, m.student.parameters()) for v in both.values())
    adv = m.generator_terms(m.x)["adv"]
    torch.testing.assert_close(adv, -m.gap(m.answers, m.student(m.x)))
    assert set(terms(small.prepared("zskt", {**BOX, "beta": 0.0}))) == {"gap"}


def test_batchmean_multiplies_both_terms_by_the_number_of_classes():
    a, b = (terms(small.prepared("zskt", {**BOX, "kl_reduction": how})) for how in ("elem", "batchmean"))
    for name in ("gap", "at"):
        torch.testing.assert_close(b[name], 4 * a[name])


def test_the_papers_attention_sums_lengths():
    m = small.prepared("zskt", {**BOX, "at_form": "norms", "beta": 2.0})
    value = terms(m)["at"]
    s = stages(m.student.trace(m.x, "groups"))
    own = [nn.functional.normalize(f.square().mean(1).flatten(1)) for f in s]
    lengths = [(a - k).norm(dim=1).mean() for k, a in zip(m.attentions, own, strict=True)]
    torch.testing.assert_close(value, 2 * sum(lengths))


def test_a_student_that_is_the_teacher_has_no_loss():
    given = small.given()
    net = models.build("resnet8", classes=4, channels=1, input_size=16).eval()
    given.teacher, given.student = type(given.teacher)(net, given.shape), Student(net, shape=given.shape)
    m = small.small("zskt", BOX)
    loop.prepare(m, given)
    m.student.eval()
    both = terms(m)
    assert both["gap"].abs() < 1e-6 and both["at"] < 1e-6


def test_each_step_moves_its_own_network():
    m = small.prepared("zskt", BOX)
    take(m, m.draw)
    student, generator = bits(m.student), bits(m.G)
    take(m, m.generate)
    m.step_ends()
    weights, buffers = moved(m.student, student)
    assert not weights and buffers and moved(m.G, generator)[0]  # train mode: the student's BatchNorm absorbs the batch
    take(m, m.answer)
    student, generator = bits(m.student), bits(m.G)
    take(m, m.learn)
    assert moved(m.G, generator) == (set(), set()) and moved(m.student, student)[0]
    other = small.prepared("zskt", {**BOX, "student_mode_in_g": "eval"})
    take(other, other.draw)
    student = bits(other.student)
    take(other, other.generate)
    assert moved(other.student, student) == (set(), set())


@pytest.mark.parametrize("clip", [1e-3, 0.0])
def test_gradients_are_clipped(clip):
    m = small.prepared("zskt", {**BOX, "grad_clip": clip})
    take(m, m.draw)
    take(m, m.answer)
    for fn, net in ((m.generate, m.G), (m.learn, m.student)):
        take(m, fn)
        norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm().item()
        assert norm <= 1e-3 * 1.001 if clip else norm > 1e-3
        m.step_ends()


def test_stages_that_do_not_fit_are_refused():
    given = small.given()
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    given.student = Student(net, shape=given.shape)
    with pytest.raises(ConfigError, match=r"found 16 x 16, 8 x 8, 4 x 4 and 7 x 7; use --set method.beta=0"):
        loop.prepare(small.small("zskt", BOX), given)
    loop.prepare(small.small("zskt", {**BOX, "beta": 0.0}), given)


@pytest.mark.slow
def test_the_digits_recipe_beats_noise():
    assert novel.top1("zskt-digits") > 0.58  # measured: 0.716; noise: 0.446
