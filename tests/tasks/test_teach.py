"""Teaching: the schedule, the folder it leaves, exact resume, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastkd import models
from fastkd.config import TeachConfig
from fastkd.data import ImageSet
from fastkd.engine.settings import Settings
from fastkd.errors import ConfigError, InputError
from fastkd.method import Augment, Pace, steps
from fastkd.rng import Rng
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
    teach(TeachConfig(**QUICK), tmp_path / "whole")
    with monkeypatch.context() as m:
        whole = Settings.of
        m.setattr(Settings, "of", lambda config, **more: whole(config, max_steps=37, **more))
        assert teach(TeachConfig(**QUICK), tmp_path / "cut").code == 75
    assert teach(TeachConfig(**QUICK), tmp_path / "cut", resume="must").code == 0
    a, b = (models.load_weights(tmp_path / n / "teacher.safetensors").state for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_rate_rises_and_falls_to_zero():
    class Real:
        labels = torch.zeros(100)

    m = Teach(epochs=10, batch=10, lr=0.2, warmup=0.1)
    object.__setattr__(m, "real", Real)
    object.__setattr__(m, "pace", Pace())
    seen = [args[0] for e in range(10) for _, fn, args, _ in steps(m, e) if fn.__name__ == "anneal"]
    assert seen == list(range(100))
    rates = []
    object.__setattr__(m, "opt", type("Opt", (), {"param_groups": [{"lr": torch.zeros(())}]})())
    for k in seen:
        m.anneal(k)
        rates.append(m.opt.param_groups[0]["lr"].item())
    assert rates[0] == pytest.approx(0.02) and max(rates) == pytest.approx(0.2) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 1e-3 and rates[10:] == sorted(rates[10:], reverse=True)


def dense_teach(aug="crop_flip", size=4):
    """`Teach` on three images of 8 x 10 whose red channel is their label."""
    labels = torch.arange(240).view(3, 8, 10)
    images = torch.stack([labels, labels * 0, labels * 0], -1).to(torch.uint8)
    m = Teach(epochs=1, batch=2, aug=aug)
    given = {
        **{"real": ImageSet("toy", "train", images, labels, [""] * 240), "shape": (3, size, size), "rng": Rng("cpu")},
        **{"mean": torch.zeros(3), "std": torch.ones(3), "augmentation": Augment(True, 2)},
    }
    for name, value in given.items():
        object.__setattr__(m, name, value)
    return m, labels


@pytest.mark.parametrize("aug", ["none", "crop", "crop_flip"])
def test_crops_keep_each_label_with_its_pixel(aug):
    m, labels = dense_teach(aug)
    places, mirrored = set(), 0
    for n in range(60):
        m.rng.at(0, 0, "learn", n)
        x, y = m.crops(m.real.images, m.real.labels, torch.tensor([2, 0]), m.aug, "real")
        assert x.shape == (2, 3, 4, 4) and y.shape == (2, 4, 4)
        assert torch.equal((x[:, 0] * 255).round().long(), y)
        flipped = (y[:, 0, 0] > y[:, 0, 1]).tolist()
        mirrored += sum(flipped)
        for image, crop, turned in zip((2, 0), y, flipped, strict=True):
            corner = int((crop.flip(1) if turned else crop)[0, 0]) - 80 * image
            places.add((corner // 10, corner % 10))
    if aug == "none":
        assert places == {(2, 3)} and not mirrored
    else:
        assert {y for y, _ in places} == set(range(5)) and {x for _, x in places} == set(range(7))
        assert (30 < mirrored < 90) if aug == "crop_flip" else not mirrored


@pytest.mark.parametrize(
    "over, error, sentence",
    [
        ({"model": "resnet9"}, ConfigError, "resnet8"),
        ({"data": "digitz"}, ConfigError, "digits"),
        ({"batch": 5000}, ConfigError, "1297 images"),
        ({"data": "none"}, ConfigError, "cannot train"),
        ({"mean": (0.5, 0.5)}, ConfigError, "mean has 2 and std 1 numbers; expected one for each of the 1 channels"),
        ({"data": "cifar10:/nowhere"}, InputError, "nowhere"),
    ],
)
def test_refusals(over, error, sentence):
    with pytest.raises(error, match=sentence):
        teach(TeachConfig(**{**QUICK, **over}), None)
