"""IDX files: MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from fastkd.data import idx, open_set
from fastkd.errors import InputError


def write(folder, split="test", n=7, size=28, zipped=False, labels=None, images=None):
    prefix = "t10k" if split == "test" else "train"
    rng = np.random.default_rng(n)
    images = rng.integers(0, 256, (n, size, size), np.uint8) if images is None else images
    labels = np.arange(n, dtype=np.uint8) % 10 if labels is None else np.asarray(labels, np.uint8)
    opened = gzip.open if zipped else open
    end = ".gz" if zipped else ""
    with opened(folder / f"{prefix}-images-idx3-ubyte{end}", "wb") as file:
        file.write(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())
    with opened(folder / f"{prefix}-labels-idx1-ubyte{end}", "wb") as file:
        file.write(struct.pack(">4B1I", 0, 0, 8, 1, len(labels)) + labels.tobytes())
    return images, labels


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_reads_plain_and_gzipped(tmp_path, name, zipped):
    images, labels = write(tmp_path, zipped=zipped)
    found = open_set(f"{name}:{tmp_path}")
    assert np.array_equal(found.images[..., 0].numpy(), images) and np.array_equal(found.labels.numpy(), labels)
    assert found.flip is (name == "fashion-mnist") and found.images.shape == (7, 28, 28, 1)
    assert "published test set" in found.notes[0]


def test_splits_are_kept_apart(tmp_path):
    write(tmp_path, "test", n=5)
    write(tmp_path, "train", n=9)
    assert len(open_set(f"mnist:{tmp_path}", "train")) == 9 and len(open_set(f"mnist:{tmp_path}", "test")) == 5


def fails(folder, words, name="mnist"):
    with pytest.raises(InputError) as caught:
        open_set(f"{name}:{folder}")
    assert words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_files(tmp_path):
    fails(tmp_path / "not_there", "does not exist")
    fails(tmp_path, "t10k-images-idx3-ubyte")


@pytest.mark.parametrize("zipped", [False, True])
def test_truncated(tmp_path, zipped):
    write(tmp_path, zipped=zipped)
    file = next(tmp_path.glob("t10k-images*"))
    file.write_bytes(file.read_bytes()[:-100])
    fails(tmp_path, "truncated")
    file.write_bytes(file.read_bytes()[:3])
    fails(tmp_path, "truncated")


def test_goes_on_after_its_data(tmp_path):
    write(tmp_path)
    with (tmp_path / "t10k-images-idx3-ubyte").open("ab") as file:
        file.write(b"x")
    fails(tmp_path, "goes on")


def test_no_gzip_at_all(tmp_path):
    write(tmp_path, zipped=True)
    next(tmp_path.glob("t10k-images*")).write_bytes(b"<html>not found</html>" * 10)
    fails(tmp_path, "damaged")


def test_lying_header_allocates_nothing(tmp_path):
    write(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 28) + b"x" * 100)
    fails(tmp_path, "claims")


def test_wrong_kind_of_file(tmp_path):
    write(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes((tmp_path / "t10k-labels-idx1-ubyte").read_bytes() + b"x" * 20)
    fails(tmp_path, "no IDX file")


def test_mixed_wrong_size_wrong_label(tmp_path):
    write(tmp_path, labels=range(6))
    fails(tmp_path, "different sets")
    write(tmp_path, size=32)
    fails(tmp_path, "32 x 32")
    write(tmp_path, labels=[0, 1, 2, 3, 4, 5, 200])
    fails(tmp_path, "label 200")


def test_fashion_that_is_not_installed_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "FASHION_DIR", tmp_path / "nowhere")
    with pytest.raises(InputError) as caught:
        open_set("fashion-mnist")
    assert "dataset-fashion-mnist" in str(caught.value) and "fashion-mnist:DIR" in str(caught.value)


def test_real_fashion_mnist():
    if not idx.FASHION_DIR.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    found = open_set("fashion-mnist", "train")
    assert found.images.shape == (60_000, 28, 28, 1) and torch.bincount(found.labels).tolist() == [6000] * 10 and not found.notes
    pixels = found.images.double() / 255
    assert float(pixels.mean()) == pytest.approx(found.mean[0], abs=1e-3) and float(pixels.std()) == pytest.approx(found.std[0], abs=1e-3)
