"""The IDX files of MNIST and Fashion-MNIST, gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from fastkd.data.class_names import FASHION_MNIST
from fastkd.data.image_set import ImageSet
from fastkd.errors import InputError

# Debian's package puts the files here.
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
_LARGEST = 1 << 28


def _find(folder: Path, split: str, kind: str) -> Path:
    prefix = "train" if split == "train" else "t10k"
    rank = 3 if kind == "images" else 1
    names = [f"{prefix}-{kind}{dot}idx{rank}-ubyte{end}" for end in ("", ".gz") for dot in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"'{folder}' has no {names[0]} (plain or .gz); expected the four IDX files of the set")


def read_idx(path: Path, rank: int) -> np.ndarray:
    """One IDX file of unsigned bytes as uint8 array with `rank` dimensions.

    Raises:
      InputError: another magic number, dimensions that are empty or lie, a file that ends early or goes on.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank:
                raise InputError(f"'{path}' is truncated: {len(header)} bytes, an IDX header has {4 + 4 * rank}")
            if header[:4] != bytes((0, 0, 8, rank)):
                raise InputError(
                    f"'{path}' is no IDX file of unsigned bytes with {rank} dimensions "
                    f"(it begins with {header[:4].hex()}, expected 000008{rank:02x})"
                )
            shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
            count = math.prod(shape)
            if not 0 < count <= _LARGEST:
                raise InputError(f"'{path}' claims {' x '.join(map(str, shape))} bytes; expected 1 to {_LARGEST}")
            body = file.read(count + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise InputError(f"'{path}' cannot be read ({str(error).rstrip('.')}): truncated or damaged") from error
    if len(body) != count:
        state = "is truncated" if len(body) < count else "goes on after its data"
        raise InputError(f"'{path}' {state}: its header says {count} bytes ({' x '.join(map(str, shape))})")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read(name: str, folder: Path, split: str, class_names: list[str], attribution: str) -> ImageSet:
    if not folder.is_dir():
        raise InputError(f"data folder '{folder}' does not exist or is no folder; expected the IDX files of {name} there")
    image_file, label_file = _find(folder, split, "images"), _find(folder, split, "labels")
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise InputError(
            f"'{image_file}' has {len(images)} images but '{label_file.name}' has {len(labels)} labels: files of different sets"
        )
    if images.shape[1:] != (28, 28):
        raise InputError(f"'{image_file}' has images of {images.shape[1]} x {images.shape[2]}; {name} has 28 x 28")
    if labels.max() > 9:
        raise InputError(f"'{label_file}' holds label {labels.max()}; {name} has labels 0 to 9")
    expected = 60_000 if split == "train" else 10_000
    notes = [] if len(images) == expected else [f"{len(images)} images, the published {split} set of {name} has {expected}"]
    return ImageSet(
        name=name,
        split=split,
        images=torch.from_numpy(images[..., None].copy()),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=class_names,
        attribution=attribution,
        notes=notes,
    )


def mnist(path: Path | None, split: str, progress: object = None) -> ImageSet:
    """MNIST from a folder of IDX files: uint8 [60000 or 10000, 28, 28, 1]. Digits are not mirrored."""
    assert path is not None
    attribution = "MNIST: Y. LeCun, C. Cortes, C. Burges"
    return _read("mnist", path, split, [str(i) for i in range(10)], attribution)


def fashion_mnist(path: Path | None, split: str, progress: object = None) -> ImageSet:
    """Fashion-MNIST from a folder of IDX files, by default that of Debian's package."""
    if path is None:
        path = FASHION_DIR
        if not path.is_dir():
            raise InputError(
                "fashion-mnist is not installed: `apt-get install dataset-fashion-mnist` puts it where it is found, "
                "or name the folder of its IDX files: fashion-mnist:DIR"
            )
    attribution = "Fashion-MNIST: H. Xiao, K. Rasul, R. Vollgraf, 2017, Zalando SE, MIT"
    return _read("fashion-mnist", path, split, list(FASHION_MNIST), attribution)
