"""The table of data sets, specifications, and what all sets share."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd import data
from fastkd.data.constants import CONSTANTS
from fastkd.data.image_set import IGNORE, ImageSet, check_memory, convert, luma, resize
from fastkd.errors import ConfigError, InputError


def make(n: int = 40, classes: int = 4, size: int = 6, channels: int = 3, **more: object) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, size, size, channels), generator=generator, dtype=torch.uint8)
    return ImageSet("toy", "test", images, torch.arange(n) % classes, [f"c{i}" for i in range(classes)], **more)  # type: ignore[arg-type]


def test_import_is_free_of_torch():
    code = "import sys, fastkd.data as d; d.check_spec('digits'); d.DATASETS; from fastkd.data import constants, class_names, names"
    subprocess.run([sys.executable, "-c", code + "; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"], check=True)


def test_table_names_existing_readers_and_constants():
    import importlib

    for entry in data.DATASETS.values():
        module, _, function = entry.reader.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert len(CONSTANTS[entry.constants].mean) == len(CONSTANTS[entry.constants].std) == entry.channels


def test_what_the_table_says_of_a_set_is_what_it_opens_with(monkeypatch):
    """Constants, flips and padding stand in the table alone: readers say nothing of them."""
    plain = data.open_set("digits")
    changed = dataclasses.replace(data.DATASETS["digits"], flip=True, pad=2, constants="mnist")
    monkeypatch.setitem(data.DATASETS, "digits", changed)
    found = data.open_set("digits")
    assert (plain.flip, plain.pad, plain.mean) == (False, 1, (0.3049,))
    assert (found.flip, found.pad, found.mean, found.std) == (True, 2, (0.1307,), (0.3081,))
    monkeypatch.setitem(data.DATASETS, "digits", dataclasses.replace(changed, constants="mnits"))
    with pytest.raises(ConfigError, match="unknown normalisation constants 'mnits'; did you mean 'mnist'"):
        data.open_set("digits")


def test_constants_are_the_published_ones():
    assert CONSTANTS["cifar10"][:2] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert CONSTANTS["cifar100"][:2] == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert CONSTANTS["imagenet"][:2] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert CONSTANTS["mnist"][:2] == ((0.1307,), (0.3081,))


def test_none_is_no_data():
    assert data.open_set("none") is None


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("cifra10", ConfigError, "did you mean 'cifar10'"),
        ("digit", ConfigError, "did you mean 'digits'"),
        ("cifar10", ConfigError, "cifar10:DIR"),
        ("mnist", ConfigError, "mnist:DIR"),
        ("cifar10:", ConfigError, "cifar10:DIR"),
        ("digits:folder", ConfigError, "takes no folder"),
        ("wds:shard-{0..9}.tar", ConfigError, "tar shards"),
        ("hf:owner/name", ConfigError, "Hugging Face"),
        ("./not/there", InputError, "does not exist"),
        ("", ConfigError, "unknown data set"),
        ("nope\x00nope", ConfigError, "unknown data set"),
    ],
)
def test_wrong_specification(spec, error, words):
    with pytest.raises(error, match=None) as caught:
        data.open_set(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wish", [{"size": 0}, {"size": 5000}, {"channels": 2}])
def test_wrong_wish(wish):
    with pytest.raises(ConfigError):
        data.open_set("digits", **wish)


def test_wrong_split():
    with pytest.raises(ConfigError, match="did you mean 'test'"):
        data.open_set("digits", "tests")


def test_a_label_for_each_pixel():
    labels = torch.zeros(3, 4, 6, dtype=torch.int64)
    labels[1, 2], labels[2, 0] = 6, IGNORE
    dense = ImageSet("toy", "test", torch.zeros(3, 4, 6, 3, dtype=torch.uint8), labels)
    assert dense.dense and dense.classes == 7 and not make().dense
    with pytest.raises(ValueError, match=r"\[3\] or \[3, 4, 6\]"):
        ImageSet("toy", "test", dense.images, labels[:, :3])


def test_image_set_refuses_other_dtypes():
    with pytest.raises(ValueError, match="uint8"):
        ImageSet("toy", "test", torch.zeros(2, 3, 3, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="int64"):
        ImageSet("toy", "test", torch.zeros(2, 3, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_expect_class_count():
    make(classes=4).expect(4)
    with pytest.raises(InputError, match=r"4 classes, the teacher has 10"):
        make(classes=4).expect(10)


def test_luma_equals_pillow():
    images = make(n=20, size=16).images
    expected = np.stack([np.asarray(Image.fromarray(row.numpy()).convert("L")) for row in images])
    assert np.array_equal(luma(images)[..., 0].numpy(), expected)


def test_resize_is_antialiased_and_close_to_torch():
    images = make(n=4, size=32).images
    ours = resize(images, 8).double()
    torchs = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2).double(), size=(8, 8), mode="bilinear", antialias=True, align_corners=False
    )
    assert (ours - torchs.permute(0, 2, 3, 1)).abs().max() <= 1.0


def test_convert_channels_both_ways_with_constants():
    gray = make(channels=1, mean=(0.3,), std=(0.2,))
    colour = convert(gray, channels=3)
    assert colour.images.shape[3] == 3 and (colour.images == gray.images).all()
    assert colour.mean == (0.3,) * 3 and colour.std == (0.2,) * 3 and len(colour.notes) == 1
    back = convert(colour, channels=1)
    assert torch.equal(back.images, gray.images) and back.mean == pytest.approx((0.3,), abs=1e-4)
    assert gray.notes == []  # the set that was converted is untouched


def test_convert_size_scales_pad_and_says_so():
    out = convert(make(size=8, pad=1), size=32)
    assert out.images.shape[1:3] == (32, 32) and out.pad == 4 and "resized" in out.notes[0]
    assert convert(make(size=8), size=8).notes == []


def test_memory_limit():
    check_memory(1_000_000, 32, 3, "x")
    with pytest.raises(InputError, match=r"would take 179\.\d GiB"):
        check_memory(1_281_167, 224, 3, "x")


def test_subset_is_stratified_and_repeatable():
    whole = make(n=103, classes=4)
    part = whole.subset(40, seed=3)
    assert len(part) == 40
    counts, all_counts = torch.bincount(part.labels), torch.bincount(whole.labels)
    assert (counts - all_counts * 40 / 103).abs().max() < 1
    assert torch.equal(part.images, whole.subset(40, seed=3).images)
    assert not torch.equal(part.images, whole.subset(40, seed=4).images)
    # Rows keep their label and the set's order, none twice.
    where = [(whole.images == row).flatten(1).all(1).nonzero().item() for row in part.images]
    assert where == sorted(set(where)) and torch.equal(whole.labels[where], part.labels)
    assert len(make(n=12).subset(99)) == 12
    with pytest.raises(ConfigError):
        whole.subset(0)


def test_subset_of_one_image_and_with_an_empty_class():
    data_set = make(n=30, classes=3)
    data_set.class_names = ["a", "b", "c", "never"]
    assert len(data_set.subset(1)) == 1
    assert len(data_set.subset(29)) == 29


def test_to_device_moves_both():
    moved = make().to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"


def test_repr_is_one_short_line():
    assert len(repr(make())) < 400 and "\n" not in repr(make())
