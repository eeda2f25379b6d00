"""Sets with a label for each pixel: pairs of a picture and a label picture → one `ImageSet`, by the pipeline of DFAD and FastDFKD.

The shorter side is resized to twice the size of a training crop (256 for 128), pictures bilinearly, labels to the nearest; nothing is cut
off, so that a network is measured on whole images and trained on crops of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastkd.data.decode import Progress, each, header, open_picture, quiet
from fastkd.data.folder import ENDINGS
from fastkd.data.image_set import IGNORE, ImageSet
from fastkd.data.names import printable
from fastkd.errors import InputError

_LIMIT = 8 << 30
_REFUSED = 254


def pictures(folder: Path) -> dict[str, Path]:
    """File name without its ending → path, of the pictures that lie directly in `folder`, by name."""
    return {p.stem: p for p in sorted(folder.iterdir(), key=lambda p: p.name) if p.suffix.lower() in ENDINGS and not p.name.startswith(".")}


def read_pairs(
    name: str,
    split: str,
    pairs: Sequence[tuple[Path, Path]],
    table: np.ndarray,
    class_names: Sequence[str],
    published: int,
    attribution: str,
    *,
    size: int | None,
    progress: Progress | None,
) -> ImageSet:
    """Decode pairs of (picture, label picture) of one size.

    Args:
      table: what the values of label pictures mean (`value_table`).
      published: number of images that the published split has.
      size: of the training crops (None: 128).

    Returns:
      images uint8 [N, H, W, 3], labels int64 [N, H, W], min(H, W) = 2 · size.
    Raises:
      InputError: pictures of several sizes, a label picture of another size or kind, values that are no classes, more than 1 % unreadable,
        more than 8 GiB, a decompression bomb.
    """
    size = size or 128
    h, w = _shape(pairs[0][0])
    new = (2 * size, 2 * size * w // h) if h <= w else (2 * size * h // w, 2 * size)
    need = len(pairs) * new[0] * new[1] * (3 + 8)
    if need > _LIMIT:
        raise InputError(
            f"'{name}': {len(pairs)} images of {new[0]} x {new[1]} with their labels would take {need / 2**30:.1f} GiB, "
            f"data sets are held in memory up to {_LIMIT >> 30} GiB; use a smaller size"
        )
    images = np.empty((len(pairs), *new, 3), np.uint8)
    labels = np.empty((len(pairs), *new), np.uint8)

    def one(i: int) -> None:
        images[i], labels[i] = _pair(*pairs[i], (h, w), new, table, len(class_names))

    keep, notes = each([picture.name for picture, _ in pairs], one, name, progress)
    if len(pairs) != published:
        notes.append(f"{len(pairs)} images, the published {split} set of {name} has {published}")
    if new != (h, w):
        notes.append(f"images of {h} x {w} were resized to {new[0]} x {new[1]}: bilinear, labels to the nearest")
    return ImageSet(
        name=name,
        split=split,
        images=torch.from_numpy(images)[keep],
        labels=torch.from_numpy(labels)[keep].long(),
        class_names=list(class_names),
        attribution=attribution,
        notes=notes,
    )


def value_table(classes: Sequence[int], ignored: Sequence[int]) -> np.ndarray:
    """uint8 [256] for `read_pairs`: the values `classes` mean 0, 1, …, `ignored` and 255 mean `IGNORE`, all others are refused."""
    table = np.full(256, _REFUSED, np.uint8)
    table[list(classes)] = np.arange(len(classes))
    table[[*ignored, IGNORE]] = IGNORE
    return table


def _shape(picture: Path) -> tuple[int, int]:
    """(height, width) of the first picture, which all others must have."""
    try:
        with quiet():
            return header(picture, picture.name)
    except InputError:
        raise
    except Exception as error:  # whatever the decoder says, the file is the reason
        raise InputError(f"'{printable(str(picture))}' cannot be read ({type(error).__name__}): damaged, or no picture") from None


def _pair(
    picture: Path, label: Path, shape: tuple[int, int], new: tuple[int, int], table: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """One picture [H, W, 3] and its labels [H, W], both uint8, resized."""
    with open_picture(picture, picture.name) as opened:
        if (opened.height, opened.width) != shape:
            found, expected = f"{opened.height} x {opened.width}", f"{shape[0]} x {shape[1]}"
            raise InputError(f"'{printable(str(picture))}' is {found}, the first picture of the set {expected}; expected one size")
        rgb = opened.convert("RGB")
    with open_picture(label, label.name) as opened:
        if opened.mode not in ("L", "P"):
            raise InputError(
                f"'{printable(str(label))}' has pixels of kind {opened.mode}; expected one 8-bit class number a pixel (no colours)"
            )
        if (opened.height, opened.width) != shape:
            raise InputError(f"'{printable(str(label))}' is {opened.height} x {opened.width}, its picture {shape[0]} x {shape[1]}")
        values = np.array(opened, np.uint8)
    y = table[values]
    if (y == _REFUSED).any():
        found = values[y == _REFUSED].max()
        raise InputError(f"'{printable(str(label))}' holds the value {found}, which is none of the {classes} classes and is not ignored")
    size = (new[1], new[0])
    nearest = Image.fromarray(y).resize(size, Image.Resampling.NEAREST)
    return np.asarray(rgb.resize(size, Image.Resampling.BILINEAR)), np.asarray(nearest)
