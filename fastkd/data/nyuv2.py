"""NYUv2 with 13 classes in the form of nyuv2-meta-data: two folders a split, pictures and label pictures, paired by their number."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from fastkd.data.class_names import NYUV2
from fastkd.data.dense import pictures, read_pairs, value_table
from fastkd.data.image_set import ImageSet
from fastkd.data.names import printable
from fastkd.errors import InputError

_TABLE = value_table(range(1, 14), ignored=(0,))  # 0: unlabelled
_IMAGES = ("nyu_{}_rgb", "{}")
_LABELS = ("nyuv2_{}_class13", "{}_labels_13", "nyuv2-meta-data/{}_labels_13", "{}_labels")
"""What archives unpack to, and what loaders in use expect, in this order."""


def read(path: Path | None, split: str, progress: Callable[[int, int], None] | None = None, *, size: int | None = None) -> ImageSet:
    """NYUv2: 795 training or 654 test images of 480 x 640. Value 0 of a label picture is ignored, k is class k - 1.

    Raises:
      InputError: folders or files that are missing; as `dense.read_pairs`.
    """
    assert path is not None
    images, labels = _numbered(path, split, _IMAGES), _numbered(path, split, _LABELS)
    pairs = []
    for number, picture in images.items():
        if number not in labels:
            raise InputError(f"'{printable(str(picture))}' has no label picture with its number {number}")
        pairs.append((picture, labels[number]))
    who = "NYUv2: N. Silberman et al., 2012; 13 classes of C. Couprie et al., label pictures of A. Handa"
    return read_pairs("nyuv2", split, pairs, _TABLE, NYUV2, {"train": 795, "test": 654}[split], who, size=size, progress=progress)


def _numbered(path: Path, split: str, forms: tuple[str, ...]) -> dict[int, Path]:
    """Number at the end of the name → picture, of the first folder of `forms` that has any."""
    for form in forms:
        place = path / form.format(split)
        found = pictures(place) if place.is_dir() else {}
        if found:
            numbers = {int(m[1]): p for name, p in found.items() if (m := re.search(r"(\d{1,9})$", name))}
            if len(numbers) != len(found):
                raise InputError(
                    f"'{printable(str(place))}' has pictures whose names end in no number of their own; expected such as nyu_rgb_0001.png"
                )
            return numbers
    expected = ", ".join(form.format(split) for form in forms)
    raise InputError(f"'{printable(str(path))}' has no pictures in any of {expected}; expected those of nyuv2-meta-data")
