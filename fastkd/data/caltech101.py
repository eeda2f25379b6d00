"""Caltech-101 as its archive unpacks: `101_ObjectCategories`, one folder of JPEG files a class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from fastkd.data.folder import Listing, is_dir, pictures_of, read_listing, sub_folders
from fastkd.data.image_set import ImageSet
from fastkd.data.names import printable
from fastkd.errors import InputError

FOLDER, CLUTTER = "101_ObjectCategories", "BACKGROUND_Google"
_CLASSES = 101
_FIFTH = 5


def read(path: Path | None, split: str, progress: Callable[[int, int], None] | None = None, *, size: int | None = None) -> ImageSet:
    """Caltech-101: about 7,000 and 1,700 photographs, uint8 [n, size, size, 3] (size 128); the folder of clutter is no class.

    The published set has no split. Every fifth image of a class, in the order of the file names, is for the test: no seed decides, so that
    no run measures on what a teacher learned from.

    Raises:
      InputError: the folder is missing or has other classes; as `folder.read_listing`.
    """
    assert path is not None
    root = path / FOLDER if is_dir(path / FOLDER) else path
    if not is_dir(root):
        raise InputError(f"'{printable(str(path))}' is no folder; expected the folder {FOLDER} or the one that has it")
    classes = [p for p in sub_folders(root) if p.name != CLUTTER]
    if len(classes) != _CLASSES:
        raise InputError(
            f"'{printable(str(root))}' has {len(classes)} class folders beside {CLUTTER}; Caltech-101 has {_CLASSES} in its folder {FOLDER}"
        )
    whole = pictures_of(root, classes)
    seen: dict[int, int] = {}
    files = []
    for file, label in whole.files:
        seen[label] = seen.get(label, 0) + 1
        if (seen[label] % _FIFTH == 0) == (split == "test"):
            files.append((file, label))
    if not files:
        raise InputError(f"'{printable(str(root))}' has no class with {_FIFTH} pictures; expected 31 to 800 in each class")
    notes = ["the published set has no split: every fifth image of a class, by file name, is a test image"]
    found = read_listing(root, root, split, Listing(files, whole.names, whole.others), notes, size or 128, 3, progress)
    return dataclasses.replace(found, name="caltech101", attribution="Caltech-101: L. Fei-Fei, R. Fergus and P. Perona, 2004")
