"""The ladder of a generator step: every rung makes the published way's images and gradients, or has its reason."""

from __future__ import annotations

import pytest
import torch

import fastkd.nn as fnn
from benches import _timing, bench_generator, check, targets, verdicts
from benches._case import Plan
from fastkd import ops

from .records import record

PLAN = Plan(torch.device("cpu"), quick=True, compile=False)


@pytest.fixture(scope="module")
def case():
    (found,) = bench_generator.cases(PLAN)
    return found


@pytest.fixture(scope="module")
def truth(case):
    ops.use("reference")
    found = case.truth()
    ops.use("auto")
    return found


def test_rungs_stand_in_their_order(case):
    assert [p.rung for p in case.providers if p.rung] == [
        *("as published", "freezing", "channels_last", "identity"), *3 * ["kernels"], "bf16",
    ]  # fmt: skip
    assert all(p.call is not None or p.reason for p in case.providers)


def test_every_rung_is_the_published_computation(case, truth):
    for p in case.providers:
        if p.call is None:
            assert p.kind == "compile" or "bf16" in p.name or not hasattr(fnn, "fuse_generator"), (p.name, p.reason)
            continue
        found, failed = check.attempt(p.call, p.backend)
        assert found is not None, (p.name, failed)
        right, said = check.of_provider(case, p, found, truth)
        assert right, (p.name, said)


@pytest.mark.parametrize(("name", "value"), [("BN", 9.0), ("stat_distance", lambda x, mean, var: (x.mean((0, 2, 3)) - mean).norm())])
def test_another_loss_is_seen(case, truth, monkeypatch: pytest.MonkeyPatch, name: str, value):
    monkeypatch.setattr(bench_generator, name, value)
    (other,) = bench_generator.cases(PLAN)
    published = other.providers[0]
    right, said = check.of_provider(other, published, published.call(), truth)
    assert not right and "off by" in said


def test_gradients_of_frozen_weights_are_asked_for_by_the_published_way_only():
    base = bench_generator.setting(PLAN)
    assert all(p.requires_grad for p in base.copied(frozen=False).teacher.parameters())
    frozen = base.copied()
    assert not any(p.requires_grad for net in (frozen.teacher, frozen.student) for p in net.parameters())
    assert frozen.generator.training and not frozen.teacher.training and not frozen.student.training


def test_its_targets_find_their_rows(case):
    found = record(_timing.measure(case, PLAN), "generator", type="cpu", flags=["amx_bf16"])
    for target in targets.CPU:
        if target.bench == "generator":
            text = verdicts.judge(target, found).text
            assert "no such row" not in text and "no row" not in text, text
            assert "x" in text or "not compiled" in text or "fuse_generator" in text or "bf16 arithmetic" in text, text
