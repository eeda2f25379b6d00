"""Condensed sets: what is read, to which numbers, and the sentence for each thing that can be wrong."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastkd.data import CondensedSet, condensed
from fastkd.errors import ConfigError, InputError, PlaceError
from tests import small

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
CONSTANTS = {"mean": json.dumps(MEAN), "std": json.dumps(STD)}
SHAPE = (3, 4, 4)


def images(n=6, dtype=torch.float32):
    x = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0)) * 3
    return (x * 40 + 128).clamp(0, 255).to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)


def file(folder, x=None, y=None, metadata=CONSTANTS, name="set.safetensors", **more):
    x = images() if x is None else x
    y = torch.arange(len(x)) % 3 if y is None else y
    save_file({"images": x.contiguous(), "labels": y, **more}, folder / name, metadata=metadata)
    return folder / name


def read(path, classes=3, shape=SHAPE):
    return condensed.read(path, classes=classes, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_a_floating_set_is_unclipped_and_leaves_its_space_by_its_constants(tmp_path, dtype):
    x = images(dtype=dtype)
    found = read(file(tmp_path, x))
    expected = x.double().numpy() * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    order = np.argsort(np.arange(6) % 3, kind="stable")
    np.testing.assert_allclose(found.images.numpy(), expected[order], rtol=0, atol=1e-6)
    assert found.images.min() < -0.5 and found.images.max() > 1.5 and found.images.dtype == torch.float32
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.starts.tolist() == [0, 2, 4] and found.counts.tolist() == [2, 2, 2]
    again = (found.images - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    torch.testing.assert_close(again, x.float()[torch.from_numpy(order)], rtol=0, atol=2e-6)


def test_an_8_bit_set_is_over_255_and_needs_no_constants(tmp_path):
    x = images(dtype=torch.uint8)
    found = read(file(tmp_path, x, torch.arange(6) // 2, metadata=None))
    assert torch.equal(found.images, x.float() / 255) and any("clipped" in n for n in found.notes)


def test_constants_may_stand_with_commas_and_labels_in_any_whole_type(tmp_path):
    text = {k: ",".join(map(str, v)) for k, v in (("mean", MEAN), ("std", STD))}
    a, b = read(file(tmp_path)), read(file(tmp_path, y=(torch.arange(6) % 3).to(torch.uint8), metadata=text))
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_what_is_written_is_read(tmp_path):
    x, y = images(), torch.arange(3).repeat_interleave(2)
    condensed.write(tmp_path / condensed.FILE, x, y, torch.tensor(MEAN), torch.tensor(STD), {"method": "dm", "ipc": 2, "seed": 3})
    found = read(tmp_path)  # by its folder
    torch.testing.assert_close(found.images, x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1))
    assert torch.equal(found.labels, y) and found.method == "dm" and not found.notes
    with pytest.raises(PlaceError, match="cannot write"):
        condensed.write(tmp_path / "no" / "x.safetensors", x, y, torch.tensor(MEAN), torch.tensor(STD), {})


def test_the_first_of_each_class(tmp_path):
    x = images(7)
    found = read(file(tmp_path, x, torch.tensor([2, 0, 1, 0, 1, 2, 0]), CONSTANTS))
    one = found.per_class(1)
    assert one.labels.tolist() == [0, 1, 2] and one.counts.tolist() == [1, 1, 1] and one.starts.tolist() == [0, 1, 2]
    assert torch.equal(one.images, found.images[[0, 3, 5]])
    with pytest.raises(InputError, match="2 images of its smallest class, 3 are wanted"):
        found.per_class(3)


def test_real_images_are_a_few_shot_set():
    real = small.real(classes=4, size=4, channels=3, n=8)
    found = CondensedSet.of_real(real, 4, 2)
    assert found.method == "real" and found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(found.images[1], real.images[4].permute(2, 0, 1).float() / 255)
    with pytest.raises(InputError, match="has 4 classes, the teacher has 5"):
        CondensedSet.of_real(real, 5, 2)
    with pytest.raises(ConfigError, match="2 images of its smallest class"):
        CondensedSet.of_real(real, 4, 3)
    real.labels[0] = -1
    with pytest.raises(InputError, match="has no labels"):
        CondensedSet.of_real(real, 4, 2)


BAD = {
    "images without their labels": (lambda p: save_file({"images": images()}, p), "no tensor 'labels' .found images."),
    "three axes": (lambda p: file(p.parent, images()[:, 0]), r"shape \[6, 4, 4\]; expected \[N, C, H, W\]"),
    "another shape": (lambda p: file(p.parent, images()[..., :3]), r"\[3, 4, 3\], the teacher's \[3, 4, 4\]"),
    "fractions as labels": (lambda p: file(p.parent, y=torch.zeros(6)), "labels .* are float32"),
    "too few labels": (lambda p: file(p.parent, y=torch.arange(5)), r"int64 \[5\]; expected one whole number .* 6 images"),
    "a label too large": (lambda p: file(p.parent, y=torch.arange(6)), "labels 0 … 5, the teacher 3 classes"),
    "a negative label": (lambda p: file(p.parent, y=torch.arange(6) % 3 - 1), "labels -1 … 1"),
    "an empty class": (lambda p: file(p.parent, y=torch.arange(6) % 2 * 2), "no image of class 1"),
    "nothing": (lambda p: file(p.parent, images(0), torch.zeros(0, dtype=torch.int64)), "has no image"),
    "no constants": (lambda p: file(p.parent, metadata=None), "no 'mean'; expected mean and std"),
    "no deviation": (lambda p: file(p.parent, metadata={"mean": "0,0,0"}), "no 'std'"),
    "two constants": (lambda p: file(p.parent, metadata=CONSTANTS | {"mean": "0.5,0.5"}), "one number for each of 3 channels"),
    "words": (lambda p: file(p.parent, metadata=CONSTANTS | {"std": "like CIFAR"}), "'std' .* is 'like CIFAR'"),
    "a deviation of zero": (lambda p: file(p.parent, metadata=CONSTANTS | {"std": "1,0,1"}), "one positive number"),
    "a deviation that is none": (lambda p: file(p.parent, metadata=CONSTANTS | {"std": "1,nan,1"}), "one positive number"),
    "whole numbers": (lambda p: file(p.parent, images().to(torch.int32)), "int32; expected uint8, or floating"),
    "0 … 255 as floats": (lambda p: file(p.parent, images(dtype=torch.uint8).float()), "which no normalised image does"),
    "not finite": (lambda p: file(p.parent, images() / 0), "not finite"),
    "no safetensors": (lambda p: p.write_bytes(b"PK\x03\x04" * 9), "no readable safetensors file"),
    "a lying header": (lambda p: p.write_bytes(struct.pack("<Q", 2**40) + b"{}"), "no readable safetensors file"),
    "no file": (lambda p: None, "is no file"),
}


@pytest.mark.parametrize("what", BAD)
def test_one_sentence_for_each_mistake(what, tmp_path):
    path = tmp_path / "set.safetensors"
    make, sentence = BAD[what]
    make(path)
    with pytest.raises(InputError, match=sentence) as caught:
        read(path)
    said = str(caught.value)
    assert str(path) in said and "\n" not in said and said.endswith(".")


def test_pickles_are_not_opened_and_odd_values_are_said(tmp_path):
    (tmp_path / "res_DC.pt").write_bytes(b"anything")
    with pytest.raises(InputError, match="pickles are not opened"):
        read(tmp_path / "res_DC.pt")
    assert any("may not be" in n for n in read(file(tmp_path, images().sigmoid())).notes)


@pytest.mark.parametrize(("method", "share"), [("dc", 0.35), ("dsa", 0.53), ("dm", 0.31), ("real", 1.0)])
def test_a_pretrained_network_gives_published_sets_their_labels_as_often_as_stated(shared_data, method, share):
    from fastkd import models
    from fastkd.nn.augment import normalise

    weights = models.load_weights(shared_data / "checkpoints" / "cifar10" / "akamaster_resnet56.safetensors")
    found = condensed.read(shared_data / "condensed" / f"cifar10_{method}_10ipc.safetensors", classes=10, shape=(3, 32, 32))
    net, said = models.build("resnet56", classes=10).eval(), models.describe(weights)
    models.fit(net, weights, what="teacher")
    with torch.no_grad():
        named = net(normalise(found.images, said["mean"], said["std"])).argmax(1)
    assert found.counts.tolist() == [10] * 10
    assert (named == found.labels).float().mean().item() == pytest.approx(share, abs=0.005)
