"""Loading, mending, fitting and writing weights."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fastkd import models
from fastkd.errors import InputError, PlaceError


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return models.build("resnet8", classes=10).state_dict()


def stored(tmp_path, obj, name="net.pth"):
    torch.save(obj, tmp_path / name)
    return models.load_weights(tmp_path / name)


def equal(net: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, state[k].to(t.dtype)) for k, t in net.state_dict().items())


def fresh(**kw) -> nn.Module:
    return models.build("resnet8", **{"classes": 10, **kw})


@pytest.mark.fault("T17")
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "student"])
def test_nested_keys_are_opened_and_said(tmp_path, state, key):
    weights = stored(tmp_path, {key: state, "epoch": 3, "best": torch.tensor(0.9)})
    assert weights.state.keys() == state.keys() and weights.notes == [f"the weights were taken from the key '{key}'"]
    net = fresh()
    assert models.fit(net, weights, what="teacher") == weights.notes and equal(net, state)


@pytest.mark.fault("T17")
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_are_removed_and_said(tmp_path, state, prefix):
    weights = stored(tmp_path, {"model": {"state_dict": {prefix + k: t for k, t in state.items()}}})
    assert weights.state.keys() == state.keys()
    assert weights.notes[-1] == f"the prefix '{prefix}' was removed from the keys" and len(weights.notes) == 3


def test_compiled_parts_are_mended(tmp_path, state):
    weights = stored(tmp_path, {k.replace("layer1.", "layer1._orig_mod."): t for k, t in state.items()})
    assert weights.state.keys() == state.keys() and "_orig_mod." in weights.notes[0]


def test_a_prefix_that_only_some_keys_have_is_no_wrapper(tmp_path, state):
    assert "module.x" in stored(tmp_path, {**state, "module.x": torch.ones(1)}).state


@pytest.mark.fault("T17")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_said(tmp_path, state, dtype):
    half = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    weights = stored(tmp_path, half)
    assert weights.state["linear.weight"].dtype == torch.float32 and weights.state["bn1.num_batches_tracked"].dtype == torch.int64
    assert weights.notes == [f"weights of {str(dtype)[6:]} were widened to float32"]
    net = fresh()
    models.fit(net, weights, what="teacher")
    assert equal(net, half)


def test_other_precisions_follow_the_network(tmp_path, state, fp64):
    net = fresh()
    notes = models.fit(net, stored(tmp_path, {k: t.clone() for k, t in state.items()}), what="teacher")
    assert net.linear.weight.dtype == torch.float64 and equal(net, state)
    assert notes == ["weights of float32 were converted to float64"]


@pytest.mark.fault("T17")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, state, value):
    state["layer2.0.conv1.weight"].view(-1)[:3] = value
    with pytest.raises(InputError, match=r"not finite: 3 of 4608 values of 'layer2.0.conv1.weight'"):
        stored(tmp_path, state)


@pytest.mark.parametrize(
    ("obj", "sentence"),
    [
        (torch.ones(3), "holds a Tensor"),
        ([torch.ones(3)], "holds a list"),
        ({"epoch": 3, "lr": 0.1}, "holds no weights \\(found 'epoch', 'lr'\\)"),
        ({}, "holds no weights \\(found nothing\\)"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex tensor under 'w'"),
        ({"w": torch.ones(2, 2).to_sparse()}, "sparse tensor under 'w'"),
    ],
)
def test_other_contents_are_refused(tmp_path, obj, sentence):
    with pytest.raises(InputError, match=sentence):
        stored(tmp_path, obj)


def test_entries_that_are_no_tensors_are_left_out_and_said(tmp_path, state):
    assert stored(tmp_path, {**state, "version": 3}).notes == ["1 entries that are no tensors were left out (first: 'version')"]


def test_the_digest_is_of_the_file(tmp_path, state):
    weights = stored(tmp_path, state)
    assert weights.sha256 == hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest() and weights.path.endswith("net.pth")


# fit ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("T17")
def test_another_number_of_classes_names_the_option(tmp_path, state):
    net = fresh(classes=100)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    with pytest.raises(InputError, match=r"do not fit teacher 'resnet8': found 10 classes, expected 100; use `--classes 10`"):
        models.fit(net, stored(tmp_path, state), what="teacher 'resnet8'")
    assert equal(net, before)  # nothing was loaded


def test_another_number_of_channels_is_named(tmp_path, state):
    with pytest.raises(InputError, match=r"'conv1.weight' takes images of 3 channels, expected 1"):
        models.fit(fresh(channels=1), stored(tmp_path, state), what="teacher")


@pytest.mark.fault("T17")
def test_another_architecture_names_the_first_keys_and_the_right_one(tmp_path, state):
    with pytest.raises(InputError) as e:
        models.fit(models.build("wrn16_1", classes=10), stored(tmp_path, state), what="teacher 'wrn16_1'")
    text = str(e.value)
    assert "missing keys ('block1.layer.0.bn1.weight'" in text and "unexpected keys (" in text and "\n" not in text
    assert "those of 'resnet8'" in text


def test_a_deeper_network_and_another_width(tmp_path, state):
    with pytest.raises(InputError, match=r"missing keys \('layer1.1.conv1.weight'"):
        models.fit(models.build("resnet20", classes=10), stored(tmp_path, state), what="teacher")
    wide = models.build("wrn16_2", classes=10).state_dict()
    with pytest.raises(InputError, match=r"expected .*; the keys and shapes are those of 'wrn16_2'"):
        models.fit(models.build("wrn16_1", classes=10), stored(tmp_path, wide), what="teacher")


def test_unknown_weights_get_no_name(tmp_path):
    with pytest.raises(InputError, match="is it the right arch"):
        models.fit(fresh(), stored(tmp_path, {"a": torch.ones(2)}), what="teacher")


def test_counters_do_not_matter(tmp_path, state):
    bare = {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}
    net = fresh()
    assert models.fit(net, stored(tmp_path, bare), what="teacher") == []
    extra = {**state, "other.num_batches_tracked": torch.tensor(3)}
    assert models.fit(net, stored(tmp_path, extra), what="teacher") == [] and equal(net, state)


def test_whole_numbers_are_no_weights(tmp_path, state):
    state["linear.weight"] = torch.zeros(10, 64, dtype=torch.int8)
    with pytest.raises(InputError, match=r"'linear\.weight' is int8, expected float32"):
        models.fit(fresh(), stored(tmp_path, state), what="teacher")


def test_recognise_sees_width_depth_and_family(tmp_path):
    for name in ("resnet20", "wrn40_2", "karanchahal_wrn16_1", "vgg11_bn", "lenet5_half", "mobilenet_v1_x050", "cifar_resnet34"):
        weights = models.Weights(models.build(name, classes=17, channels=1 if name == "lenet5_half" else 3).state_dict())
        assert models.recognise(weights) == [name]
    assert models.recognise(models.Weights({"a": torch.ones(2)})) == []


# save_weights -------------------------------------------------------------------------------------------------------------


def test_written_and_read_back(tmp_path, state):
    tied = state["conv1.weight"]
    file, names = tmp_path / "student.safetensors", ["a, b", "ü", *"cdefghij"]
    meta = {"architecture": "resnet8", "classes": 10, "mean": (0.5, 0.25, 0.1), "class_names": names, "accuracy": 91.25, "data": None}
    models.save_weights(file, {**state, "tied": tied, "view": state["linear.weight"].t()}, meta)
    weights = models.load_weights(file)
    assert torch.equal(weights.state["tied"], tied) and torch.equal(weights.state["view"], state["linear.weight"].t())
    assert weights.notes == [] and "data" not in weights.metadata
    said = models.describe(weights)
    assert (said["mean"], said["classes"], said["class_names"]) == ((0.5, 0.25, 0.1), 10, names)
    assert (said["spec"], said["accuracy"]) == ("resnet8", 91.25)
    with safe_open(file, "pt") as f:
        assert json.loads(f.metadata()["class_names"]) == names
    assert os.listdir(tmp_path) == ["student.safetensors"]


def test_a_failed_write_leaves_what_was_there(tmp_path, state, monkeypatch):
    file = tmp_path / "student.safetensors"
    models.save_weights(file, state)
    before = file.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PlaceError, match=r"cannot write .*No space left"):
        models.save_weights(file, {k: t * 0 for k, t in state.items()})
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["student.safetensors"]
    with pytest.raises(PlaceError, match="cannot write"):
        models.save_weights(tmp_path / "none" / "a.safetensors", state)
