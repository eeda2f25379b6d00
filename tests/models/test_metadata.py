"""What files say about themselves, however they write it."""

from __future__ import annotations

import pytest
import torch

from fastkd import models


def said(planes: int = 3, **text: str) -> dict:
    state = {"conv1.weight": torch.zeros(8, planes, 3, 3), "fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}
    return models.describe(models.Weights(state, text))


@pytest.mark.parametrize("text", ["0.5,0.25,0.125", "[0.5, 0.25, 0.125]", "(0.5 0.25 0.125)", "0.5; 0.25; 0.125", "1/2,1/4,1/8"])
def test_lists_of_numbers(text):
    assert said(mean=text)["mean"] == (0.5, 0.25, 0.125)


def test_the_exact_value_is_preferred_and_spread_over_channels():
    found = said(mean="0.498,0.498,0.498", mean_exact="127/255", std_exact="128/255")
    assert found["mean"] == (127 / 255,) * 3 and found["std"] == (128 / 255,) * 3
    assert said(1, mean="0.5")["mean"] == (0.5,)


def test_what_cannot_be_read_is_none_and_said():
    found = said(
        mean="a,b,c", std="0.5,0.0,0.5", classes="ten", channels="-1", input_size="224,192",
        class_names="[1, 2]", architecture="my net", accuracy="?",
    )  # fmt: skip
    assert [found[k] for k in ("mean", "std", "classes", "input_size", "class_names", "channels", "spec", "accuracy")] == [None] * 8
    assert len(found["notes"]) == 6
    assert said(mean="0.5,0.5")["mean"] is None and said(mean="1/0")["mean"] is None and said(mean="nan,nan,nan")["mean"] is None
    assert said(class_names='["a", "b"]')["class_names"] is None  # ten classes


def test_broken_exact_value_falls_back():
    found = said(mean="0.5,0.5,0.5", mean_exact="?")
    assert found["mean"] == (0.5, 0.5, 0.5) and len(found["notes"]) == 1


def test_numbers_and_names():
    found = said(classes="12", channels="3", input_size="3,64,64", architecture="timm:resnet18", data="cifar10", accuracy="93.1")
    assert [found[k] for k in ("classes", "classes_in_head", "channels", "input_size", "spec", "data", "accuracy")] == [
        12, 10, 3, 64, "timm:resnet18", "cifar10", 93.1,
    ]  # fmt: skip
    assert said(architecture="MobileNet v1 alpha=0.25 at 224; ReLU6")["input_size"] == 224
    assert said(architecture="py:evil.py:f")["spec"] is None  # code is only what somebody types


@pytest.mark.parametrize("name", models.names())
def test_head_and_channels_of_every_network(name):
    from fastkd.models.metadata import channels_of, head_of

    for channels in (1, 3):
        with torch.device("meta"):
            state = models.build(name, classes=23, channels=channels).state_dict()
        assert state[f"{head_of(state)}.weight"].shape[0] == 23
        assert channels_of(state) == channels
