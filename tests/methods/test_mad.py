"""MAD against its card."""

from __future__ import annotations

import pytest
import torch

from fastkd.engine import state
from fastkd.errors import ConfigError
from fastkd.method import steps
from tests import small
from tests.methods import novel
from tests.methods.novel import names, reaches, take

BOX = {"g_steps": 1, "s_steps": 2, "iterations": 2, "epochs": 2}


def walk(m, until=None):
    for e in range(m.epochs):
        for _, fn, args, n in steps(m, e):
            if fn.__name__ == until:
                return
            take(m, fn, *args, e=e, n=n)
            m.step_ends()


def test_the_algorithm_box():
    box = ["anneal", "draw", "generate", "average", "answer", "learn", "learn"]
    assert names(small.prepared("mad", BOX)) == box * 2
    many = small.prepared("mad", {**BOX, "g_steps": 2, "ema_update": 4, "iterations": 3})
    assert [names(many, e).count("average") for e in range(2)] == [1, 2]  # after the 4th; after the 8th and the 12th of the run
    novel.check_settings("mad", epochs=2, iterations=2)


def test_without_the_old_images_the_run_is_zskts_to_the_bit():
    m, host = small.prepared("mad", {**BOX, "lambda_1": 0.0}), small.prepared("zskt", {**BOX, "beta": 0.0})
    assert small.run(m) == small.run(host) == 0
    mine, theirs = state.collect(m)[0], state.collect(host)[0]
    assert all(torch.equal(mine[k], v) for k, v in theirs.items()) and len(theirs) > 50


def parameters(m):
    return [p for net in m.averaged() for p in net.parameters()], [p for net in m.memory for p in net.parameters()]


@pytest.mark.parametrize("conditional", [False, True])
def test_the_ends_of_alpha(conditional):
    m = small.prepared("mad", {**BOX, "ema_alpha": 0.0, "conditional": conditional})
    walk(m)
    new, old = parameters(m)
    assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True)) and len(new) > 10
    m = small.prepared("mad", {**BOX, "ema_alpha": 1.0, "conditional": conditional})
    first = [p.clone() for p in parameters(m)[1]]
    walk(m)
    new, old = parameters(m)
    assert all(torch.equal(a, b) for a, b in zip(first, old, strict=True)) and not torch.equal(new[0], old[0])


def test_the_average_has_its_closed_form(fp64):
    m = small.prepared("mad", {**BOX, "ema_alpha": 0.9})
    start = [p.clone() for p in parameters(m)[1]]
    with torch.no_grad():
        for p in parameters(m)[0]:
            p.add_(1.0)
    for _ in range(5):
        m.average()
    for p, s in zip(parameters(m)[1], start, strict=True):
        torch.testing.assert_close(p, s + 1 - 0.9**5)


def test_no_gradient_reaches_the_average():
    m = small.prepared("mad", {**BOX, "conditional": True})
    walk(m, until="average")
    assert all(not p.requires_grad and p.grad is None for p in parameters(m)[1])
    assert not m.x.requires_grad and {id(p) for p in parameters(m)[1]}.isdisjoint(
        id(p) for opt in (m.opt_g, m.opt_s) for g in opt.param_groups for p in g["params"]
    )


@pytest.mark.parametrize("mix, rows", [("half", 12), ("full", 24)])
def test_a_student_step_sees_both_generators(mix, rows):
    m = small.prepared("mad", {**BOX, "mix": mix, "lambda_0": 0.5, "lambda_1": 3.0})
    walk(m, until="average")
    m.average()
    take(m, m.draw)
    with torch.no_grad():
        new = m.G(m.z[: rows // 2])
        m.rng.at(m.seed, 0, "answer", 0)
        z = m.rng.normal(rows // 2, m.nz, name="memory")
        old = m.memory[0](z)
    take(m, m.answer)
    assert len(m.x) == rows == m.images_of("distillation") and m.images_of("synthesis") == 12
    torch.testing.assert_close(m.x, torch.cat([new, old]))
    assert not torch.equal(z, m.z[: rows // 2])
    s = m.student(m.x)
    terms = m.belief_terms(s)
    torch.testing.assert_close(terms["gap"], 0.5 * m.gap(m.answers[: rows // 2], s[: rows // 2]))
    torch.testing.assert_close(terms["memory"], 3 * m.gap(m.answers[rows // 2 :], s[rows // 2 :]))
    assert all(reaches(v, m.student.parameters()) for v in terms.values())


def test_shared_latents_give_both_generators_the_same():
    m = small.prepared("mad", {**BOX, "z_shared": True})
    take(m, m.draw)
    take(m, m.answer)
    torch.testing.assert_close(m.x[:6], m.x[6:])  # before the first update the average is the generator


def test_copied_buffers_are_used_in_eval_mode():
    m = small.prepared("mad", {**BOX, "ema_buffers": "copy"})
    walk(m, until="answer")
    assert all(torch.equal(a, b) for a, b in zip(m.memory[0].buffers(), m.G.buffers(), strict=True))
    take(m, m.answer)
    m.rng.at(m.seed, 0, "answer", 0)
    with torch.no_grad():
        old = m.memory[0].eval()(m.rng.normal(6, m.nz, name="memory"))
    torch.testing.assert_close(m.x[6:], old)
    plain = small.prepared("mad", BOX)
    walk(plain, until="answer")
    assert any(not torch.equal(a, b) for a, b in zip(plain.memory[0].buffers(), plain.G.buffers(), strict=True))


def test_the_conditional_form_learns_an_embedding_of_the_label(monkeypatch):
    m = small.prepared("mad", {**BOX, "conditional": True, "norm": 2.0, "oh": 3.0})
    assert m.embed.weight.shape == (4, 8)
    take(m, m.draw)
    assert m.y.unique().numel() > 1
    before = m.embed.weight.detach().clone()
    seen = novel.spied_terms(m, monkeypatch)
    take(m, m.generate)
    monkeypatch.undo()
    terms = seen[0][0]
    x = m.G(m.z + m.embed(m.y))
    torch.testing.assert_close(terms["oh"], 3 * torch.nn.functional.cross_entropy(m.teacher(x).logits, m.y))
    torch.testing.assert_close(terms["norm"], 2 * (m.z + m.embed(m.y)).square().mean())
    assert all(reaches(v, [m.embed.weight]) for v in terms.values())
    assert set(small.prepared("mad", BOX).generator_terms(x)) == {"adv"}
    take(m, m.generate)
    assert not torch.equal(before, m.embed.weight) and m.sample(3).shape[0] == 3


def test_replay_bytes_are_the_generators():
    m = small.prepared("mad", BOX)
    assert m.report()["replay_bytes"] == sum(t.numel() * t.element_size() for t in m.G.state_dict().values())
    wider = small.prepared("mad", {**BOX, "conditional": True}).report()["replay_bytes"]
    assert wider == m.report()["replay_bytes"] + 4 * 8 * 4
    assert small.prepared("mad", {**BOX, "lambda_1": 0.0}).report()["replay_bytes"] == 0, "nothing is replayed"


def test_an_odd_batch_has_no_halves():
    with pytest.raises(ConfigError, match=r"batch is 7; expected an even number.*method.mix=full"):
        small.prepared("mad", {**BOX, "batch": 7})
    small.prepared("mad", {**BOX, "batch": 7, "mix": "full"})


@pytest.mark.slow
def test_the_digits_recipe_beats_noise():
    assert novel.top1("mad-digits") > 0.6  # measured: 0.748; noise: 0.446
