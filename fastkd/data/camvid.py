"""CamVid with 11 classes in the form of the SegNet tutorial: `train`, `val`, `test`, and labels of the same names in `trainannot` …"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastkd.data.class_names import CAMVID
from fastkd.data.dense import pictures, read_pairs, value_table
from fastkd.data.image_set import ImageSet
from fastkd.data.names import printable
from fastkd.errors import InputError

_TABLE = value_table(range(11), ignored=(11,))  # 11: void


def read(path: Path | None, split: str, progress: Callable[[int, int], None] | None = None, *, size: int | None = None) -> ImageSet:
    """CamVid: 367 training or 233 test images of 360 x 480; value 11 (void) is ignored. The 101 images of `val` are not used.

    Raises:
      InputError: folders or files that are missing; as `dense.read_pairs`.
    """
    assert path is not None
    root = path / "CamVid" if not (path / split).is_dir() and (path / "CamVid").is_dir() else path
    images, annotations = root / split, root / f"{split}annot"
    for place in (images, annotations):
        if not place.is_dir():
            raise InputError(
                f"'{printable(str(root))}' has no folder '{place.name}'; expected {split} and {split}annot, as in the SegNet tutorial"
            )
    labels, pairs = pictures(annotations), []
    for name, picture in pictures(images).items():
        if name not in labels:
            raise InputError(f"'{printable(str(picture))}' has no label picture '{name}.png' in {annotations.name}")
        pairs.append((picture, labels[name]))
    if not pairs:
        raise InputError(f"'{printable(str(images))}' has no pictures")
    who = "CamVid: G. Brostow et al., 2008; labels of V. Badrinarayanan et al., SegNet tutorial"
    return read_pairs("camvid", split, pairs, _TABLE, CAMVID, {"train": 367, "test": 233}[split], who, size=size, progress=progress)
