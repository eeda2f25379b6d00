"""imagenet-compat: JPEG files in one .npz."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastkd.data import open_set
from fastkd.data.class_names import imagenet
from fastkd.errors import InputError


def write(folder, n=3, **change):
    files = []
    for i in range(n):
        out = io.BytesIO()
        Image.new("RGB", (224, 224), (40 * i, 100, 200)).save(out, "JPEG", quality=95)
        files.append(np.frombuffer(out.getvalue(), np.uint8))
    arrays = {
        "data": np.concatenate(files),
        "offsets": np.cumsum([0, *map(len, files)]).astype(np.int64),
        "labels": (np.arange(n) * 300).astype(np.int16),
        "names": np.array([f"photo{i}" for i in range(n)]),
        "words": np.array([words for _, words in imagenet()]),
    } | change
    np.savez(folder / "compat1000_224px.npz", **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def fails(folder, words, **more):
    with pytest.raises(InputError) as caught:
        open_set(f"imagenet-compat:{folder}", **more)
    assert words in str(caught.value), str(caught.value)


def test_reads_folder_or_file(tmp_path):
    write(tmp_path)
    for place in (tmp_path, tmp_path / "compat1000_224px.npz"):
        found = open_set(f"imagenet-compat:{place}")
        assert found.images.shape == (3, 224, 224, 3) and found.labels.tolist() == [0, 300, 600] and found.classes == 1000
        assert abs(int(found.images[2, 0, 0, 0]) - 80) < 4 and "ImageNet accuracy" in found.notes[-1]


def test_refusals(tmp_path):
    fails(tmp_path, "compat1000_224px.npz")
    write(tmp_path)
    fails(tmp_path, "test images only", split="train")
    whole = (tmp_path / "compat1000_224px.npz").read_bytes()
    (tmp_path / "compat1000_224px.npz").write_bytes(whole[: len(whole) // 2])
    fails(tmp_path, "truncated")
    write(tmp_path, labels=None)
    fails(tmp_path, "has no labels")
    write(tmp_path, labels=np.array([0, 1, 1000]))
    fails(tmp_path, "label 1000")
    write(tmp_path, offsets=np.array([0, 10, 5, 20]))
    fails(tmp_path, "inconsistent")
    write(tmp_path, offsets=np.array([0, 10, 20, 10**9]))
    fails(tmp_path, "inconsistent")
    write(tmp_path, names=np.array([{}, {}, {}], object))
    fails(tmp_path, "cannot be read")
    arrays = write(tmp_path)
    arrays["data"][:20] = 0
    write(tmp_path, data=arrays["data"])
    fails(tmp_path, "1 of 3 images could not be read")


def test_real_photographs(shared_data):
    found = open_set(f"imagenet-compat:{shared_data / 'imagenet'}")
    assert found.images.shape == (1000, 224, 224, 3) and found.labels.unique().numel() == 430
    assert found.class_names == [words for _, words in imagenet()]
    with np.load(shared_data / "imagenet" / "compat1000_224px.npz", allow_pickle=False) as file:
        assert [wnid for wnid, _ in imagenet()] == file["wnids"].tolist()
        first = Image.open(io.BytesIO(file["data"][: file["offsets"][1]].tobytes()))
    assert np.array_equal(found.images[0].numpy(), np.asarray(first.convert("RGB")))
