"""Caltech-101 in the form of its archive."""

from __future__ import annotations

import pytest
from PIL import Image

from fastkd.data import open_set
from fastkd.errors import InputError

NAMES = ["Faces", "Faces_easy", *(f"thing_{i:02d}" for i in range(99))]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Six images of the first class, five of the second, one of each other; clutter; a file that is no picture."""
    root = tmp_path_factory.mktemp("caltech") / "101_ObjectCategories"
    for k, name in enumerate(["BACKGROUND_Google", *NAMES]):
        (root / name).mkdir(parents=True)
        for i in range({"Faces": 6, "Faces_easy": 5}.get(name, 1)):
            Image.new("RGB", (40 + k % 7, 30), (k, 40 * i, 100)).save(root / name / f"image_{i + 1:04d}.jpg", "JPEG", quality=95)
    (root / "Faces" / "notes.txt").write_text("none")
    return root


def test_every_fifth_image_is_for_the_test_and_no_other(archive):
    train, test = open_set(f"caltech101:{archive.parent}", "train"), open_set(f"caltech101:{archive}")
    assert train.images.shape == (5 + 4 + 99, 128, 128, 3) and train.labels.bincount().tolist() == [5, 4, *[1] * 99]
    assert test.labels.tolist() == [0, 1] and [int(v) // 40 for v in test.images[:, 64, 64, 1] + 4] == [4, 4]
    assert (test.name, test.mean, test.pad, test.flip, test.classes) == ("caltech101", (0.5, 0.5, 0.5), 16, True, 101)
    assert test.class_names == NAMES, "clutter is no class"
    assert any("every fifth" in note for note in test.notes) and any("notes.txt" in note for note in train.notes)


def test_decoded_at_the_size_that_is_wanted(archive):
    assert open_set(f"caltech101:{archive}", size=32).images.shape == (2, 32, 32, 3)


def test_another_folder_is_refused(archive, tmp_path):
    for folder, words in [(archive / "Faces", "has 0 class folders"), (tmp_path / "none", "is no folder")]:
        with pytest.raises(InputError, match=words) as caught:
            open_set(f"caltech101:{folder}")
        assert "\n" not in str(caught.value)
    (tmp_path / "101_ObjectCategories").mkdir()
    for name in NAMES:
        (tmp_path / "101_ObjectCategories" / name).mkdir()
    with pytest.raises(InputError, match="no class with 5 pictures"):
        open_set(f"caltech101:{tmp_path}")
