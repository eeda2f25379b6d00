"""ImageNet-1k from its published folders."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastkd.data import open_set
from fastkd.data.class_names import imagenet
from fastkd.errors import InputError

WNIDS = [wnid for wnid, _ in imagenet()]
PICKED = (0, 7, 999)


def save(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (300, 260), (k % 256, 80, 160)).save(path, "JPEG", quality=95)


def class_folders(place):
    for k in PICKED:
        for i in range(2):
            save(place / WNIDS[k] / f"{WNIDS[k]}_{i}.JPEG", k)


def flat(place):
    """Three validation images of the classes 999, 0, 7, in the order of their numbers."""
    for i, k in enumerate((999, 0, 7), 1):
        save(place / f"ILSVRC2012_val_{i:08d}.JPEG", k)


def kit(folder, ids=(3, 1, 2), synsets=((1, WNIDS[0]), (2, WNIDS[7]), (3, WNIDS[999]), (1001, "n00001740"))):
    io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    table = np.array([(i, w, "words") for i, w in synsets], [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    io.savemat(folder / "meta.mat", {"synsets": table[:, None]})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in ids))


def solution(file):
    lines = [f"ILSVRC2012_val_{i:08d},{WNIDS[k]} 1 2 3 4 {WNIDS[k]} 5 6 7 8\n" for i, k in enumerate((999, 0, 7), 1)]
    file.write_text("ImageId,PredictionString\n" + "".join(lines[::-1]))


def fails(folder, words, split="test", **more):
    with pytest.raises(InputError) as caught:
        open_set(f"imagenet:{folder}", split, **more)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_class_folders_keep_the_numbers_of_the_thousand(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val")
    for split in ("train", "test"):
        found = open_set(f"imagenet:{tmp_path}", split)
        assert found.labels.tolist() == [0, 0, 7, 7, 999, 999] and found.images.shape == (6, 224, 224, 3)
        assert found.classes == 1000 and found.class_names[0] == imagenet()[0][1]
    assert (found.name, found.mean, found.pad) == ("imagenet", (0.485, 0.456, 0.406), 28)
    assert any("997 classes have no images" in note for note in found.notes) and "validation images" in found.notes[0]


@pytest.mark.parametrize("place", ["", "ILSVRC2012_devkit_t12/data"])
def test_a_flat_folder_with_the_development_kit(tmp_path, place):
    flat(tmp_path / "val")
    kit(tmp_path / place)
    assert open_set(f"imagenet:{tmp_path}").labels.tolist() == [999, 0, 7]


def test_a_flat_folder_with_the_solution_file_and_the_other_layout(tmp_path):
    flat(tmp_path / "ILSVRC/Data/CLS-LOC/val")
    solution(tmp_path / "LOC_val_solution.csv")
    assert open_set(f"imagenet:{tmp_path}", size=32).labels.tolist() == [999, 0, 7]


def test_decoded_at_the_size_that_is_wanted_by_the_evaluation_transform(tmp_path):
    class_folders(tmp_path / "val")
    found = open_set(f"imagenet:{tmp_path}", size=96, channels=1)
    assert found.images.shape == (6, 96, 96, 1) and len(found.mean) == 1


def test_more_than_fits_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    from fastkd.data import folder, image_set

    class_folders(tmp_path / "train")
    monkeypatch.setattr(folder, "decode_all", lambda *a: pytest.fail("decoded"))
    monkeypatch.setattr(image_set.check_memory, "__defaults__", (1 << 19,))
    fails(tmp_path, "use a smaller size or fewer images", "train")


def test_what_is_missing_or_wrong_is_named(tmp_path):
    fails(tmp_path, "has no folder 'val'")
    (tmp_path / "val").mkdir()
    fails(tmp_path, "has no images")
    (tmp_path / "val" / "dogs").mkdir()
    fails(tmp_path, "none of the 1000 classes")
    (tmp_path / "val" / "dogs").rmdir()
    flat(tmp_path / "val")
    fails(tmp_path, "nothing names their classes")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n")
    fails(tmp_path, "is not in the list of classes (LOC_val_solution.csv)")
    (tmp_path / "LOC_val_solution.csv").unlink()


def test_a_kit_that_is_damaged_or_of_another_set(tmp_path):
    flat(tmp_path / "val")
    kit(tmp_path, ids=(3, 1))
    fails(tmp_path, "is not in the list of classes")
    kit(tmp_path, ids=(3, 1, 1001))
    fails(tmp_path, "is of class 'n00001740', none of ImageNet-1k's")
    kit(tmp_path, ids=("a", 1, 2))
    fails(tmp_path, "expected one ILSVRC2012_ID a line")
    (tmp_path / "meta.mat").write_bytes(b"damaged")
    fails(tmp_path, "cannot be read")
