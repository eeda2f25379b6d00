"""ImageNet-1k (ILSVRC 2012) from folders: `train/<wnid>/*.JPEG`, and `val` in class folders or flat with a list of its classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from fastkd.data.class_names import imagenet
from fastkd.data.folder import ENDINGS, Listing, is_dir, read_listing
from fastkd.data.image_set import ImageSet
from fastkd.data.mat import read_mat
from fastkd.data.names import printable
from fastkd.data.wnids import in_class_folders, lines_of
from fastkd.errors import InputError

_SOLUTION, _TRUTH, _META = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_KIT = ("", "val", "data", "ILSVRC2012_devkit_t12/data")
"""Where the files of the development kit may lie below the folder that was named."""


def read(path: Path | None, split: str, progress: Callable[[int, int], None] | None = None, *, size: int | None = None) -> ImageSet:
    """ImageNet-1k decoded at `size` (224): uint8 [N, size, size, 3]; classes are numbered by the sorted WordNet ids, as everywhere.

    "test" are the 50,000 validation images: 7.0 GiB at 224 pixels. The 1.28 million training images are refused, with the number, where
    they would take more memory than a set may; at 32 pixels they fit.

    Raises:
      InputError: files that are missing, damaged or of another set; as `folder.read_listing`.
    """
    assert path is not None
    root = next((p for p in (path / "ILSVRC/Data/CLS-LOC", path / "Data/CLS-LOC") if is_dir(p)), path)
    place = root / ("train" if split == "train" else "val")
    if not is_dir(place):
        raise InputError(f"'{printable(str(path))}' has no folder '{place.name}'; expected train/<wnid>/*.JPEG and val")
    number = {wnid: i for i, (wnid, _) in enumerate(imagenet())}
    flat = sorted((p for p in place.iterdir() if p.suffix.lower() in ENDINGS), key=lambda p: p.name) if split == "test" else []
    files = _labelled(flat, path, number) if flat else in_class_folders(place, number)
    names = [words for _, words in imagenet()]
    notes = ["the test images are the validation images of the set"] if split == "test" else []
    found = read_listing(path, place, split, Listing(files, names), notes, size or 224, 3, progress)
    return dataclasses.replace(
        found,
        name="imagenet",
        attribution="ImageNet: O. Russakovsky et al., 2015, ImageNet Large Scale Visual Recognition Challenge",
    )


def _labelled(files: list[Path], path: Path, number: Mapping[str, int]) -> list[tuple[Path, int]]:
    """(picture, class) of a flat validation folder, by whichever list of its classes lies beside it."""
    places = [path / below for below in _KIT]
    solution = next((p / _SOLUTION for p in places if (p / _SOLUTION).is_file()), None)
    truth = next((p / _TRUTH for p in places if (p / _TRUTH).is_file()), None)
    if solution is not None:
        by_name = _solution(solution)
    elif truth is not None:
        by_name = _ground_truth(truth)
    else:
        raise InputError(
            f"'{printable(str(files[0].parent))}' has images but no class folders, and nothing names their classes; "
            f"expected val/<wnid>/*.JPEG, or {_SOLUTION}, or the development kit ({_TRUTH} and {_META}) in '{printable(str(path))}'"
        )
    out = []
    for file in files:
        wnid = by_name.get(file.stem, "")
        if wnid not in number:
            said = f"is of class '{printable(wnid)}', none of ImageNet-1k's" if wnid else "is not in the list of classes"
            raise InputError(f"'{printable(str(file))}' {said} ({(solution or truth).name})")  # type: ignore[union-attr]
        out.append((file, number[wnid]))
    return out


def _solution(file: Path) -> dict[str, str]:
    """Image → wnid of lines `ILSVRC2012_val_00000001,n01751748 111 108 230 211`."""
    pairs = (line.partition(",") for line in lines_of(file)[1:])
    return {name: boxes.split(" ", 1)[0] for name, _, boxes in pairs}


def _ground_truth(file: Path) -> dict[str, str]:
    """Image → wnid of the development kit: line k has the ILSVRC2012_ID of image k, and meta.mat says which class that is."""
    synsets = read_mat(file.parent / _META, ("synsets",))["synsets"]
    try:
        wnids = dict(zip((int(i) for i in synsets["ILSVRC2012_ID"]), map(str, synsets["WNID"]), strict=True))
        ids = [int(line) for line in lines_of(file)]
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise InputError(
            f"'{printable(str(file))}' and {_META} beside it are not those of the development kit ({type(error).__name__}); "
            "expected one ILSVRC2012_ID a line"
        ) from None
    return {f"ILSVRC2012_val_{k:08d}": wnids.get(i, str(i)) for k, i in enumerate(ids, 1)}
