"""CIFAR in its three forms, on files written here; hostile ones too (fault T18)."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import open_set
from fastkd.data.class_names import CIFAR10, CIFAR100
from fastkd.errors import InputError

N = 4
FORMS = ["binary", "python", "webp"]


def pixels(seed, n=N):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def planes(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def write(folder, form, classes=10, n=N):
    """A small CIFAR in one form; returns {split: (images, labels)}."""
    folder.mkdir(exist_ok=True)
    batches = {f"data_batch_{i}": i for i in range(1, 6)} | {"test_batch": 0}
    if classes == 100 and form != "webp":
        batches = {"train": 1, "test": 0}
    content = {name: (pixels(seed, n), np.random.default_rng(seed).integers(0, classes, n)) for name, seed in batches.items()}
    for name, (images, labels) in content.items():
        if form == "binary":
            head = [labels] if classes == 10 else [labels // 5, labels]
            rows = np.concatenate([np.stack(head, 1).astype(np.uint8), planes(images)], 1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        elif form == "python":
            key = b"labels" if classes == 10 else b"fine_labels"
            batch = {b"batch_label": b"one", key: labels.tolist(), b"data": planes(images), b"filenames": [b"a.png"] * n}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            Image.fromarray(images.reshape(n, 1024, 3)).save(folder / f"{name}.webp", lossless=True)
    train, test = [c for k, c in content.items() if "test" not in k], [c for k, c in content.items() if "test" in k]
    out = {k: tuple(np.concatenate(part) for part in zip(*v, strict=True)) for k, v in {"train": train, "test": test}.items()}
    if form == "webp":
        names = CIFAR10 if classes == 10 else CIFAR100
        np.savez(
            folder / "labels.npz", train=out["train"][1].astype(np.uint8), test=out["test"][1].astype(np.uint8), classes=np.array(names)
        )
    return out


def fails(folder, words, name="cifar10", split="test"):
    with pytest.raises(InputError) as caught:
        open_set(f"{name}:{folder}", split)
    assert words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", FORMS)
def test_reads_every_form(tmp_path, form, classes, split):
    images, labels = write(tmp_path / "set", form, classes)[split]
    found = open_set(f"cifar{classes}:{tmp_path / 'set'}", split)
    assert np.array_equal(found.images.numpy(), images) and np.array_equal(found.labels.numpy(), labels)
    assert found.images.is_contiguous() and found.classes == classes and found.flip and found.pad == 4
    assert "published" in found.notes[0]


def test_finds_the_folder_that_the_archive_makes(tmp_path):
    write(tmp_path / "cifar-10-batches-py", "python")
    assert len(open_set(f"cifar10:{tmp_path}")) == N


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_python_form_in_every_pickle_protocol(tmp_path, protocol):
    images, labels = pixels(3), [1, 2, 3, 4]
    for data in (planes(images), np.asfortranarray(planes(images))):
        (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol=protocol))
        found = open_set(f"cifar10:{tmp_path}")
        assert np.array_equal(found.images.numpy(), images) and found.labels.tolist() == labels


def test_python_form_as_python_2_wrote_it(tmp_path):
    """Byte strings are written as text by the old opcodes, and numpy's module had its old name."""
    images = pixels(3, 1)
    raw = planes(images).tobytes()
    text = lambda s: b"U" + bytes([len(s)]) + s  # noqa: E731
    dtype = b"cnumpy\ndtype\n" + b"(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR(K\x01(K\x01M\x00\x0ct" + dtype
    array += b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    (tmp_path / "test_batch").write_bytes(b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"]K\x07au.")
    found = open_set(f"cifar10:{tmp_path}")
    assert np.array_equal(found.images.numpy(), images) and found.labels.tolist() == [7]


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class HostileBuiltin(Hostile):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.fault("T18")
@pytest.mark.parametrize("kind", [Hostile, HostileBuiltin])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle_runs_nothing(tmp_path, protocol, kind):
    marker = tmp_path / "marker"
    batch = {b"data": planes(pixels(0)), b"labels": [0] * N, b"extra": kind(marker)}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
    fails(tmp_path, ".system'" if kind is Hostile else ".eval'")
    assert not marker.exists()


@pytest.mark.fault("T18")
def test_hostile_pickle_by_the_old_instruction(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "test_batch").write_bytes(f"(S'touch {marker}'\nios\nsystem\n.".encode())
    fails(tmp_path, "os.system")
    assert not marker.exists()


@pytest.mark.fault("T18")
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04cnumpy\nndarray\n}b.",  # a state for a class
        b"\x80\x04cnumpy.core.multiarray\n_reconstruct\nN}X\x08\x00\x00\x00__code__K\x01s\x86b.",  # attributes for a function
        b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of 2^40 bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",  # bytes of 2^40 bytes
        b"\x80\x04K\x01r" + struct.pack("<I", 2**31) + b"h\x00.",  # a memo of 2^31 entries
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",  # a frame of 2^62 bytes
        b"\x80\x04cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",  # no dict
        b"\x80\x04P1\n.",
        b"",
        b"<html>",
    ],
)
def test_damaged_or_hostile_pickles_are_one_sentence_and_little_memory(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    tracemalloc.start()
    fails(tmp_path, "test_batch'")
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


@pytest.mark.fault("T18")
def test_arrays_of_objects_and_lying_shapes_are_refused(tmp_path):
    objects = np.empty((1, 3072), object)
    objects[:] = 1
    for data in (objects, np.zeros(3, [("a", "u1"), ("b", "u1")])):
        (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": [0]}, protocol=2))
        fails(tmp_path, "dtype")
    whole = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}, protocol=2)
    assert whole.count(b"M\x00\x0c") == 1
    (tmp_path / "test_batch").write_bytes(whole.replace(b"M\x00\x0c", b"M\x00\x0d"))
    fails(tmp_path, "shape (1, 3328)")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, "float32"),
        ({b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}, "[2, 100]"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "[0, 3072]"),
        ({b"data": [1, 2], b"labels": [0, 1]}, "list"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "1 labels"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "label 10"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]}, "label -1"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "1"]}, "whole numbers"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]}, "another set"),
        ([1, 2], "holds a list"),
    ],
)
def test_wrong_python_batches(tmp_path, batch, words):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    fails(tmp_path, words)


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files(tmp_path, form):
    write(tmp_path, form)
    file = next(path for path in tmp_path.iterdir() if path.stem == "test_batch")
    whole = file.read_bytes()
    for keep in (len(whole) - 50, len(whole) // 2 + 1, 0):
        file.write_bytes(whole[:keep])
        fails(tmp_path, "truncated")


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_training_file_is_named(tmp_path, form):
    write(tmp_path, form)
    next(path for path in tmp_path.iterdir() if path.stem == "data_batch_3").unlink()
    assert len(open_set(f"cifar10:{tmp_path}")) == N
    fails(tmp_path, "has no data_batch_3", split="train")


def test_wrong_set_mixed_forms_and_empty_folder(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(empty, "has no files of cifar10")
    fails(tmp_path / "nowhere", "does not exist")
    write(tmp_path / "ten", "binary")
    fails(tmp_path / "ten", "write cifar10:", name="cifar100")
    write(tmp_path / "hundred", "python", classes=100)
    fails(tmp_path / "hundred", "write cifar100:")
    write(tmp_path / "webp", "webp", classes=100)
    fails(tmp_path / "webp", "write cifar100:")
    write(tmp_path / "ten", "python")
    fails(tmp_path / "ten", "mixes files of the binary and python forms")


def test_labels_out_of_range_in_the_binary_form(tmp_path):
    write(tmp_path, "binary", n=2)
    file = tmp_path / "test_batch.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    fails(tmp_path, "label 10")


def test_webp_with_wrong_width_count_or_labels(tmp_path):
    write(tmp_path, "webp")
    Image.new("RGB", (1000, N)).save(tmp_path / "test_batch.webp", lossless=True)
    fails(tmp_path, "1000 x 4")
    Image.new("RGB", (1024, N + 1)).save(tmp_path / "test_batch.webp", lossless=True)
    fails(tmp_path, "1024 x 5")
    (tmp_path / "labels.npz").write_bytes(b"no zip")
    fails(tmp_path, "labels.npz")
    np.savez(tmp_path / "labels.npz", test=np.array([{}], object))
    fails(tmp_path, "labels.npz")
    (tmp_path / "labels.npz").unlink()
    fails(tmp_path, "no labels.npz")


def test_real_cifar10_in_webp_form(shared_data):
    found = open_set(f"cifar10:{shared_data / 'cifar10'}")
    assert found.images.shape == (10_000, 32, 32, 3) and torch.bincount(found.labels).tolist() == [1000] * 10 and found.notes == []
    # The published order: the first test images are a cat, two ships and an airplane.
    assert [found.class_names[i] for i in found.labels[:4]] == ["cat", "ship", "ship", "airplane"]
    # The background of planes and ships is bluer than that of frogs and deer: rows belong to their labels.
    blue = torch.stack(
        [
            found.images[found.labels == c][..., 2].double().mean() - found.images[found.labels == c][..., 0].double().mean()
            for c in range(10)
        ]
    )
    assert min(blue[0], blue[8]) > max(blue[4], blue[6]) + 5


def test_real_cifar100_in_webp_form(shared_data):
    found = open_set(f"cifar100:{shared_data / 'cifar100'}")
    assert found.images.shape == (10_000, 32, 32, 3) and torch.bincount(found.labels).tolist() == [100] * 100
    fails(shared_data / "cifar100", "not the training images", name="cifar100", split="train")
