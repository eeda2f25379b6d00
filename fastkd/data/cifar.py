"""CIFAR-10 and CIFAR-100 in their three forms: published binary, published python (pickles), and lossless WebP.

WebP: one file a published batch, 1,024 x N pixels, row i = image i in row-major order, labels in `labels.npz`.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastkd.data import strict_pickle
from fastkd.data.class_names import CIFAR10, CIFAR100
from fastkd.data.image_set import ImageSet
from fastkd.errors import InputError

_PIXELS = 32 * 32 * 3
_FORMS = {"binary": ".bin", "python": "", "WebP": ".webp"}
# Where the published archives unpack to, tried below the folder that was named.
_INNER = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python")


@dataclass(frozen=True)
class _Kind:
    name: str
    class_names: tuple[str, ...]
    train: tuple[str, ...]
    test: str
    label_bytes: int  # before the pixels of a binary record; the last one counts
    label_key: bytes

    def stems(self, split: str, form: str) -> tuple[str, ...]:
        if form == "WebP":
            return ("test_batch",) if split == "test" else tuple(f"data_batch_{i}" for i in range(1, 6))
        return (self.test,) if split == "test" else self.train

    def published(self, split: str) -> int:
        return 10_000 if split == "test" else 50_000


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR10 = _Kind("cifar10", CIFAR10, _BATCHES, "test_batch", 1, b"labels")
_CIFAR100 = _Kind("cifar100", CIFAR100, ("train",), "test", 2, b"fine_labels")


def _forms(folder: Path, kind: _Kind) -> list[str]:
    """Forms of which at least one file lies in `folder`."""
    return [
        form
        for form, end in _FORMS.items()
        if any((folder / (stem + end)).is_file() for split in ("train", "test") for stem in kind.stems(split, form))
    ]


def _find(folder: Path, kind: _Kind) -> tuple[Path, str]:
    """The folder that holds the files (the one named, or what a published archive makes below it) and their form."""
    if not folder.is_dir():
        raise InputError(f"data folder '{folder}' does not exist or is no folder; expected the files of {kind.name} there")
    for place in (folder, *(folder / inner for inner in _INNER)):
        forms = _forms(place, kind)
        if len(forms) > 1:
            raise InputError(f"'{place}' mixes files of the {' and '.join(forms)} forms of {kind.name}; keep one form a folder")
        if forms:
            return place, forms[0]
    other = _CIFAR100 if kind is _CIFAR10 else _CIFAR10
    if any(_forms(place, other) for place in (folder, *(folder / inner for inner in _INNER))):
        raise InputError(f"'{folder}' holds {other.name}, not {kind.name}; write {other.name}:{folder}")
    first = ", ".join(kind.stems("test", form)[0] + end for form, end in _FORMS.items())
    raise InputError(
        f"'{folder}' has no files of {kind.name}; expected the binary, python or WebP form (one of {first}, and the training files)"
    )


def _binary(path: Path, kind: _Kind) -> tuple[np.ndarray, np.ndarray]:
    record = kind.label_bytes + _PIXELS
    raw = np.fromfile(path, np.uint8)
    if len(raw) == 0 or len(raw) % record:
        raise InputError(
            f"'{path}' has {len(raw)} bytes, no multiple of the {record} that one image of {kind.name} takes: truncated, or another set"
        )
    rows = raw.reshape(-1, record)
    return rows[:, kind.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, kind.label_bytes - 1]


def _python(path: Path, kind: _Kind) -> tuple[np.ndarray, np.ndarray]:
    content = strict_pickle.load(path)
    if b"data" not in content or kind.label_key not in content:
        raise InputError(f"'{path}' has no 'data' and '{kind.label_key.decode()}' as a batch of {kind.name} has; it may be another set")
    data, labels = content[b"data"], content[kind.label_key]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS or not len(data):
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"'{path}': 'data' is {found}; expected uint8 [N, {_PIXELS}]")
    if isinstance(labels, np.ndarray):
        labels = labels.tolist() if labels.dtype.kind in "iu" and labels.ndim == 1 else None
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise InputError(f"'{path}': '{kind.label_key.decode()}' is no list of whole numbers")
    if not all(0 <= label < len(kind.class_names) for label in labels):
        raise InputError(f"'{path}' holds label {max(labels, key=abs)}; {kind.name} has labels 0 to {len(kind.class_names) - 1}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, np.int64)


def _webp(path: Path, kind: _Kind, rows: int | None) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["WEBP"]) as picture:
                if picture.width != 1024 or (rows is not None and picture.height != rows):
                    raise InputError(
                        f"'{path}' is {picture.width} x {picture.height} pixels; expected 1024 x {rows or 'N'}, one row an image"
                    )
                pixels = np.asarray(picture.convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # whatever the decoder says, the file is the reason
        raise InputError(f"'{path}' cannot be decoded ({type(error).__name__}): truncated, or no WebP file") from None
    return pixels.reshape(-1, 32, 32, 3)


def _webp_labels(folder: Path, kind: _Kind, split: str) -> np.ndarray:
    path = folder / "labels.npz"
    if not path.is_file():
        raise InputError(f"'{folder}' has no labels.npz, which holds the labels of the WebP form")
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = file[split]
            names = [str(name) for name in file["classes"]] if "classes" in file.files else list(kind.class_names)
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"'{path}' cannot be read or has no '{split}' ({type(error).__name__})") from None
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"'{path}': '{split}' is {labels.dtype} {list(labels.shape)}; expected whole numbers [N]")
    if names != list(kind.class_names):
        right = next((k.name for k in (_CIFAR10, _CIFAR100) if names == list(k.class_names)), None)
        hint = f"; write {right}:{folder}" if right else ""
        raise InputError(f"'{path}' names {len(names)} other classes than {kind.name}{hint}")
    return labels


def _missing(folder: Path, kind: _Kind, split: str, form: str, files: list[Path]) -> None:
    gone = [file.name for file in files if not file.is_file()]
    if not gone:
        return
    if split == "train" and form == "WebP" and len(gone) == len(files):
        raise InputError(f"'{folder}' has the test images of {kind.name} but not the training images ({gone[0]} … are missing)")
    raise InputError(
        f"'{folder}' has no {', '.join(gone)}; the {split} set of {kind.name} in {form} form needs {', '.join(f.name for f in files)}"
    )


def _read(kind: _Kind, path: Path | None, split: str) -> ImageSet:
    assert path is not None
    folder, form = _find(path, kind)
    files = [folder / (stem + _FORMS[form]) for stem in kind.stems(split, form)]
    _missing(folder, kind, split, form, files)
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    if form == "WebP":
        all_labels = _webp_labels(folder, kind, split)
        images = [_webp(file, kind, len(all_labels) if len(files) == 1 else None) for file in files]
        if sum(map(len, images)) != len(all_labels):
            raise InputError(f"'{folder}': {sum(map(len, images))} images but {len(all_labels)} labels of the {split} set")
        labels = [all_labels]
    else:
        for file in files:
            part, part_labels = (_binary if form == "binary" else _python)(file, kind)
            if len(part) != len(part_labels):
                raise InputError(f"'{file}' has {len(part)} images but {len(part_labels)} labels")
            images.append(part)
            labels.append(part_labels)
    target = np.concatenate(labels).astype(np.int64)
    if target.min() < 0 or target.max() >= len(kind.class_names):
        raise InputError(f"'{folder}' holds label {target.max()}; {kind.name} has labels 0 to {len(kind.class_names) - 1}")
    pixels = np.ascontiguousarray(np.concatenate(images))
    notes = []
    if len(pixels) != kind.published(split):
        notes.append(f"{len(pixels)} images, the published {split} set of {kind.name} has {kind.published(split)}")
    return ImageSet(
        name=kind.name,
        split=split,
        images=torch.from_numpy(pixels),
        labels=torch.from_numpy(target),
        class_names=list(kind.class_names),
        attribution=f"CIFAR-{len(kind.class_names)}: A. Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images",
        notes=notes,
    )


def cifar10(path: Path | None, split: str, progress: object = None) -> ImageSet:
    """CIFAR-10: uint8 [50000 or 10000, 32, 32, 3]. Raises InputError for files that are missing, mixed, damaged or hostile."""
    return _read(_CIFAR10, path, split)


def cifar100(path: Path | None, split: str, progress: object = None) -> ImageSet:
    """CIFAR-100 with its 100 fine labels: uint8 [50000 or 10000, 32, 32, 3]. Raises as `cifar10`."""
    return _read(_CIFAR100, path, split)
