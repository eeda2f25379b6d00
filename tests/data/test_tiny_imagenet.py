"""Tiny-ImageNet in the form of its archive."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from fastkd.data import open_set
from fastkd.errors import InputError

WNIDS = [f"n{1443537 + 7 * i:08d}" for i in range(200)]


def picture(k, size=64):
    return Image.new("RGB", (size, size), (k, 255 - k, 100))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """200 classes with one training image each, three validation images."""
    root = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    for k, wnid in enumerate(WNIDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        picture(k).save(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", "JPEG", quality=95)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    (root / "val" / "images").mkdir(parents=True)
    for i in range(3):
        picture(80 * i).save(root / "val" / "images" / f"val_{i}.JPEG", "JPEG", quality=95)
    lines = [f"val_{i}.JPEG\t{WNIDS[k]}\t0\t32\t44\t62\n" for i, k in enumerate((199, 0, 5))]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\tthing {k}, object {k}\n" for k, wnid in enumerate(WNIDS[:-1])))
    return root


@pytest.fixture
def copy(archive, tmp_path):
    return shutil.copytree(archive, tmp_path / "copy")


def fails(folder, words, split="test"):
    with pytest.raises(InputError) as caught:
        open_set(f"tiny-imagenet:{folder}", split)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_classes_are_sorted_by_wordnet_id_and_validation_labels_come_from_the_annotations(archive):
    train = open_set(f"tiny-imagenet:{archive}", "train")
    assert train.images.shape == (200, 64, 64, 3) and train.labels.tolist() == list(range(200))
    assert abs(int(train.images[150, 32, 32, 0]) - 150) <= 2
    test = open_set(f"tiny-imagenet:{archive.parent}")  # the folder it was unpacked in
    assert test.labels.tolist() == [199, 0, 5] and abs(int(test.images[1, 0, 0, 0]) - 80) <= 2
    assert test.class_names[3] == "thing 3, object 3" and test.class_names[199] == WNIDS[199]
    assert (test.name, test.mean, test.pad, test.flip, test.classes) == ("tiny-imagenet", (0.5, 0.5, 0.5), 4, True, 200)
    assert any("validation images" in note for note in test.notes)


def test_decoded_at_the_size_that_is_wanted(archive):
    found = open_set(f"tiny-imagenet:{archive}", size=32, channels=1)
    assert found.images.shape == (3, 32, 32, 1) and found.pad == 2 and len(found.mean) == 1


def test_a_validation_folder_sorted_into_classes_is_read_too(copy):
    for i, k in enumerate((199, 0, 5)):
        (copy / "val" / WNIDS[k]).mkdir()
        (copy / "val" / "images" / f"val_{i}.JPEG").rename(copy / "val" / WNIDS[k] / f"val_{i}.JPEG")
    (copy / "val" / "images").rmdir()
    assert open_set(f"tiny-imagenet:{copy}").labels.tolist() == [0, 5, 199]


def test_what_is_missing_or_wrong_is_named(copy):
    fails(copy / "val", "has no folder 'train'")
    annotations = copy / "val" / "val_annotations.txt"
    whole = annotations.read_text()
    for text, words in [
        ("", "is empty"),
        (whole.replace("val_1.JPEG", "../../secret"), "line 2"),
        (whole.replace(WNIDS[5], "n99999999"), "line 3"),
        ("val_0.JPEG", "line 1"),
        (whole.replace("val_1.JPEG", "val_7.JPEG"), "1 of 3 images could not be read"),
    ]:
        annotations.write_text(text)
        fails(copy, words)
    annotations.write_bytes(b"\xff\xfe\x00")
    fails(copy, "expected a text file")
    annotations.unlink()
    fails(copy, "has no val_annotations.txt")
    shutil.rmtree(copy / "val")
    fails(copy, "has no folder 'val'")
    shutil.rmtree(copy / "train" / WNIDS[0])
    fails(copy, "has 199 class folders", "train")
