"""Tiny-ImageNet as its archive unpacks: `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` with `val/val_annotations.txt`, `words.txt`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fastkd.data.folder import Listing, is_dir, read_listing, sub_folders
from fastkd.data.image_set import ImageSet
from fastkd.data.names import printable
from fastkd.data.wnids import in_class_folders, lines_of
from fastkd.errors import InputError

_CLASSES = 200


def read(path: Path | None, split: str, progress: Callable[[int, int], None] | None = None, *, size: int | None = None) -> ImageSet:
    """Tiny-ImageNet: uint8 [100000 or 10000, 64, 64, 3]; classes are numbered by the sorted WordNet ids, as those of image folders.

    "test" are the validation images, as in the literature: those of the test folder have no labels. A `val` folder that was sorted into
    class folders is read too.

    Raises:
      InputError: files that are missing, damaged or of another set; as `folder.read_listing`.
    """
    assert path is not None
    root = path if is_dir(path / "train") else path / "tiny-imagenet-200"
    if not is_dir(root / "train"):
        raise InputError(f"'{printable(str(path))}' has no folder 'train'; expected the folder that tiny-imagenet-200.zip unpacks to")
    wnids = [p.name for p in sub_folders(root / "train")]
    if len(wnids) != _CLASSES or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids):
        first = f", the first '{printable(wnids[0])}'" if wnids else ""
        raise InputError(
            f"'{printable(str(root / 'train'))}' has {len(wnids)} class folders{first}; "
            f"Tiny-ImageNet has {_CLASSES}, named such as n01443537"
        )
    number = {wnid: i for i, wnid in enumerate(wnids)}
    place = root / ("train" if split == "train" else "val")
    annotations = place / "val_annotations.txt"
    if not is_dir(place):
        raise InputError(f"'{printable(str(root))}' has no folder 'val', which holds the images to measure on")
    flat = split == "test" and [p.name for p in sub_folders(place)] == ["images"]
    if flat and not annotations.is_file():
        raise InputError(f"'{printable(str(place))}' has no val_annotations.txt, which names the classes of its images")
    files = _annotated(annotations, number) if flat else in_class_folders(place, number)
    notes = ["the test images are the validation images of the set"] if split == "test" else []
    found = read_listing(root, place, split, Listing(files, _words(root, wnids)), notes, size or 64, 3, progress)
    return dataclasses.replace(
        found,
        name="tiny-imagenet",
        attribution="Tiny-ImageNet: Stanford CS231n, images of ILSVRC",
    )


def _annotated(file: Path, number: Mapping[str, int]) -> list[tuple[Path, int]]:
    """(picture, class) of each line `name <tab> wnid <tab> box` of val_annotations.txt."""
    out = []
    for i, line in enumerate(lines_of(file), 1):
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in number or Path(name).name != name:
            raise InputError(f"'{printable(str(file))}', line {i}, is '{printable(line[:60])}'; expected a file name, a tab and a class")
        out.append((file.parent / "images" / name, number[wnid]))
    if not out:
        raise InputError(f"'{printable(str(file))}' is empty; expected a line for each image")
    return out


def _words(root: Path, wnids: list[str]) -> list[str]:
    """The words of each class where `words.txt` has them, else its WordNet id."""
    file = root / "words.txt"
    known = dict(line.split("\t", 1) for line in lines_of(file) if "\t" in line) if file.is_file() else {}
    return [printable(known.get(wnid, wnid)) for wnid in wnids]
