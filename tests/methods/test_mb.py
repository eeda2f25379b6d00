"""MB-DFKD against its card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.engine import loop, state
from fastkd.errors import ConfigError
from fastkd.method import steps
from fastkd.nn import instrument
from tests import small
from tests.methods.test_pre import do, recipe, walk


def bits(method):
    return {k: v for k, v in state.collect(method)[0].items() if k.startswith(("student.", "G.", "opt_s.", "opt_g.", "x"))}


def equal(a, b):
    assert a.keys() == b.keys() and any(k.startswith("student.") for k in a)
    return all(torch.equal(a[k], b[k]) for k in a)


def push(m, value):
    m.x.copy_(torch.as_tensor(value))
    do(m, m.remember)


def test_the_algorithm_box():
    m = small.prepared("mb", {"iterations": 2, "g_steps": 1, "s_steps": 2, "epochs": 12, "push_period": 5})
    box = [(fn.__name__, args) for _, fn, args, _ in steps(m, 0)]
    new = ("learn", (False,))
    assert box == [("anneal", (0,)), ("generate", ()), new, new, ("generate", ()), new, new, ("remember", ())]
    assert all(args == (True,) for e in range(1, 12) for _, fn, args, _ in steps(m, e) if fn.__name__ == "learn")
    assert [e for e in range(12) if any(fn.__name__ == "remember" for _, fn, _, _ in steps(m, e))] == [0, 5, 10]


def test_without_a_bank_it_is_pre_without_vae_and_replay_bit_for_bit():
    mb, pre = small.prepared("mb", {"bank_slots": 0}), small.prepared("pre", {"replay_batch": 0, "vae_steps": 0})
    walk(mb, 3)
    walk(pre, 3)
    a, b = bits(mb), bits(pre)
    assert equal(a, b) and not mb.report()["replay_bytes"]


def test_a_bank_changes_nothing_in_the_first_epoch_and_something_in_the_second():
    banked, none = small.prepared("mb"), small.prepared("mb", {"bank_slots": 0})
    for epochs, alike in ((1, True), (2, False)):
        for m in (banked, none):
            for _, fn, args, n in steps(m, epochs - 1):
                do(m, fn, *args, e=epochs - 1, n=n)
        assert equal(bits(banked), bits(none)) == alike


def test_the_ring_overwrites_its_oldest_slot():
    m = small.prepared("mb", {"bank_slots": 10, "bank_batch": 3})
    for k in range(11):
        push(m, k)
        assert m.filled.item() == len(m.bank) == 3 * min(k + 1, 10)
    assert m.bank.images[:, 0, 0, 0].tolist() == [10] * 3 + [k for k in range(1, 10) for _ in range(3)]


def test_a_push_holds_the_first_novel_images_of_the_last_student_step():
    m = small.prepared("mb")
    walk(m)
    assert m.bank.images.dtype == torch.float16 and len(m.bank) == 4
    torch.testing.assert_close(m.bank.read(torch.arange(4)), m.x[:4].half().float())
    exact = small.prepared("mb", {"bank_dtype": "fp32"})
    walk(exact)
    assert torch.equal(exact.bank.read(torch.arange(4)), exact.x[:4])


def test_a_read_is_one_whole_slot_uniform_over_the_filled_ones():
    m = small.prepared("mb", {"bank_slots": 5, "bank_batch": 4})
    for k in range(3):
        push(m, k + torch.arange(12.0)[:, None, None, None] / 16)
    counts = [0, 0, 0]
    for n in range(600):
        m.rng.at(0, 1, "learn", n)
        x = m.recall()
        (k,) = [k for k in range(3) if torch.equal(x, m.bank.read(torch.arange(4 * k, 4 * k + 4)))]
        counts[k] += 1
    assert min(counts) > 150 and sum(counts) == 600


def test_a_read_may_mix_all_stored_images():
    m = small.prepared("mb", {"bank_slots": 5, "bank_batch": 4, "read": "images"})
    for k in range(3):
        push(m, k)
    seen = []
    for n in range(100):
        m.rng.at(0, 1, "learn", n)
        seen.append(m.recall()[:, 0, 0, 0])
    assert any(len(x.unique()) > 1 for x in seen)
    share = torch.bincount(torch.cat(seen).long(), minlength=5) / 400
    assert share[3:].sum() == 0 and share[:3].min() > 0.25


def test_rows_of_a_student_step():
    m, seen = small.prepared("mb", {"batch": 16, "bank_batch": None, "iterations": 2, "s_steps": 3}), []
    m.student.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for e in range(2):
        for _, fn, args, n in steps(m, e):
            if fn.__name__ != "generate":
                do(m, fn, *args, e=e, n=n)
    assert seen == [16] * 6 + [18] * 6 and m.images_of("distillation") == 18


@pytest.mark.parametrize("form", ["l2", "gauss_kl"])
def test_the_bn_term(form):
    m = small.prepared("mb", {"match": "prior+bn", "bn_form": form, "lambda_bn": 0.5})
    x = torch.randn(12, *m.shape)
    t = m.teacher(x, "bn")
    mean, var, rm, rv = (v.double().numpy() for v in (*t.bn, *m.teacher.target))
    if form == "l2":
        layers = list(zip(m.teacher.split, m.teacher.split[1:]))
        expected = sum(np.linalg.norm((mean - rm)[a:b]) + np.linalg.norm((var - rv)[a:b]) for a, b in layers)
    else:
        expected = (((mean - rm) ** 2 + var) / (2 * rv) - np.log(np.sqrt(var / rv)) - 0.5).sum()
    assert m.generator_terms(x)["bn"].item() == pytest.approx(0.5 * expected, rel=1e-4)
    assert "bn" not in small.prepared("mb").generator_terms(x)


def test_a_bn_weight_of_zero_is_the_prior_alone():
    a, b, c = (small.prepared("mb", over) for over in ({}, {"match": "prior+bn", "lambda_bn": 0.0}, {"match": "prior+bn"}))
    for m in (a, b, c):
        walk(m, 2)
    a, b, c = bits(a), bits(b), bits(c)
    assert equal(a, b) and not equal(a, c)


def test_a_slot_is_a_part_of_the_batch():
    with pytest.raises(ConfigError, match=r"a slot of the bank has 17 images of a batch of 16.*method\.bank_batch=16"):
        small.prepared("mb", {"batch": 16, "bank_batch": 17})
    assert any("nothing is replayed" in note for note in small.prepared("mb", {"batch": 7, "bank_batch": None}).notes())
    assert not small.prepared("mb", {"batch": 8, "bank_batch": None}).notes()


def test_bn_statistics_need_batchnorm():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    given = small.given()
    given.teacher = instrument(plain, shape=given.shape)
    with pytest.raises(ConfigError, match="needs a teacher with BatchNorm"):
        loop.prepare(small.small("mb", {"match": "prior+bn"}), given)
    loop.prepare(m := small.small("mb"), given)
    walk(m, 2)


@pytest.mark.slow
def test_the_digits_recipe_learns(tmp_path):
    top1, first, last = recipe("mb", tmp_path / "run")
    assert top1 > 0.65  # measured 0.800; noise reaches 0.446
    assert last["generate.oh"] < 0.9 * first["generate.oh"] and last["learn.gap"] < 0.7 * first["learn.gap"]
