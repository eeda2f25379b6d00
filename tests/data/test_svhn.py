"""SVHN's cropped digits, and the MATLAB files they come in."""

from __future__ import annotations

import numpy as np
import pytest

from fastkd.data import mat, open_set
from fastkd.errors import InputError

io = pytest.importorskip("scipy.io", reason="scipy is not installed")


def write(folder, split="test", n=7, **change):
    rng = np.random.default_rng(n)
    content = {"X": rng.integers(0, 256, (32, 32, 3, n), np.uint8), "y": (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]} | change
    content = {k: v for k, v in content.items() if v is not None}
    io.savemat(folder / f"{split}_32x32.mat", content, do_compression=True)
    return content


def fails(folder, words):
    with pytest.raises(InputError) as caught:
        open_set(f"svhn:{folder}")
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("n", [1, 12])
def test_images_come_last_in_the_file_and_label_ten_is_the_digit_zero(tmp_path, n):
    written = write(tmp_path, "train", n)
    found = open_set(f"svhn:{tmp_path}", "train")
    assert found.images.shape == (n, 32, 32, 3) and np.array_equal(found.images[-1].numpy(), written["X"][..., -1])
    assert found.labels.tolist() == [(i % 10 + 1) % 10 for i in range(n)]
    assert (found.flip, found.pad, found.classes, found.mean) == (False, 0, 10, (0.5, 0.5, 0.5))
    assert "published train set" in found.notes[0]


def test_size_and_channels_are_converted(tmp_path):
    write(tmp_path)
    found = open_set(f"svhn:{tmp_path}", size=16, channels=1)
    assert found.images.shape == (7, 16, 16, 1) and found.pad == 0


def test_labels_of_floating_type_are_taken_where_they_are_whole(tmp_path):
    write(tmp_path, y=np.arange(1.0, 8.0))
    assert open_set(f"svhn:{tmp_path}").labels.tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"X": None}, "has no X"),
        ({"y": None}, "has no y"),
        ({"X": np.zeros((28, 28, 7), np.uint8)}, "expected uint8 [32, 32, 3, N]"),
        ({"X": np.zeros((32, 32, 3, 7))}, "X is float64"),
        ({"y": np.arange(1, 6)}, "one whole number for each of 7 images"),
        ({"y": np.arange(5, 12)}, "holds label 11"),
        ({"y": np.arange(7) + 0.5}, "SVHN has labels 1 to 10"),
        ({"y": np.array([[{"a": 1}] * 7], object)}, "one whole number"),
    ],
)
def test_other_content_is_refused(tmp_path, change, words):
    write(tmp_path, **change)
    fails(tmp_path, words)


def test_missing_and_damaged_files(tmp_path):
    fails(tmp_path / "nowhere", "does not exist")
    fails(tmp_path, "test_32x32.mat")
    (tmp_path / "test").mkdir()
    fails(tmp_path, "only the cropped digits")
    write(tmp_path)
    whole = (tmp_path / "test_32x32.mat").read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:-20], b"no MATLAB file at all" * 50):
        (tmp_path / "test_32x32.mat").write_bytes(damaged)
        fails(tmp_path, "truncated")
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x00" * 400)
    fails(tmp_path, "version 7.3 (HDF5)")


def test_a_header_that_lies_allocates_nothing(tmp_path):
    write(tmp_path, X=np.zeros((2, 2), np.uint8))
    path = tmp_path / "test_32x32.mat"
    io.savemat(path, {"X": np.zeros((2, 3), np.uint8), "y": np.zeros(3, np.uint8)})  # uncompressed: dimensions can be overwritten
    raw = path.read_bytes()
    at = raw.index(np.array([2, 3], np.int32).tobytes())
    path.write_bytes(raw[:at] + np.array([2**30, 2**30], np.int32).tobytes() + raw[at + 8 :])
    fails(tmp_path, "X claims 1073741824 x 1073741824 values")


def test_without_scipy_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(mat.importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"needs scipy.*fastkd\[mat\]"):
        mat.read_mat(tmp_path / "test_32x32.mat", ("X",))
