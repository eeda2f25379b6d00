"""Teaching: the schedule, the folder it leaves, exact resume, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastkd import models
from fastkd.config import TeachConfig
from fastkd.errors import ConfigError, InputError
from fastkd.method import steps
from fastkd.tasks.teach import Teach, teach

QUICK = {"model": "resnet8", "data": "digits", "epochs": 4, "batch": 64, "lr": 0.1, "device": "cpu"}


def test_a_few_epochs_learn_digits_and_leave_a_teacher(tmp_path):
    outcome = teach(TeachConfig(**{**QUICK, "epochs": 8}), tmp_path / "t")
    assert outcome.summary["student"]["top1"] > 0.85
    saved = models.load_weights(tmp_path / "t" / "teacher.safetensors")
    said = models.describe(saved)
    assert (said["spec"], said["classes"], said["input_size"], said["data"], said["mean"]) == ("resnet8", 10, 8, "digits", (0.3049,))
    assert said["class_names"][:2] == ["zero", "one"]


def test_stopped_and_resumed_equals_undisturbed(tmp_path, monkeypatch):
    from fastkd.engine import loop

    teach(TeachConfig(**QUICK), tmp_path / "whole")
    with monkeypatch.context() as m:
        original = loop.Settings
        m.setattr(loop, "Settings", lambda **kw: original(**{**kw, "max_steps": 37}))
        assert teach(TeachConfig(**QUICK), tmp_path / "cut").code == 75
    assert teach(TeachConfig(**QUICK), tmp_path / "cut", resume="must").code == 0
    a, b = (models.load_weights(tmp_path / n / "teacher.safetensors").state for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_rate_rises_and_falls_to_zero():
    class Real:
        labels = torch.zeros(100)

    m = Teach(epochs=10, batch=10, lr=0.2, warmup=0.1)
    object.__setattr__(m, "real", Real)
    seen = [args[0] for e in range(10) for _, fn, args, _ in steps(m, e) if fn.__name__ == "anneal"]
    assert seen == list(range(100))
    rates = []
    object.__setattr__(m, "opt", type("Opt", (), {"param_groups": [{"lr": torch.zeros(())}]})())
    for k in seen:
        m.anneal(k)
        rates.append(m.opt.param_groups[0]["lr"].item())
    assert rates[0] == pytest.approx(0.02) and max(rates) == pytest.approx(0.2) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 1e-3 and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "over, error, sentence",
    [
        ({"model": "resnet9"}, ConfigError, "resnet8"),
        ({"data": "digitz"}, ConfigError, "digits"),
        ({"batch": 5000}, ConfigError, "1297 images"),
        ({"data": "none"}, ConfigError, "cannot train"),
        ({"data": "cifar10:/nowhere"}, InputError, "nowhere"),
    ],
)
def test_refusals(over, error, sentence):
    with pytest.raises(error, match=sentence):
        teach(TeachConfig(**{**QUICK, **over}), None)
