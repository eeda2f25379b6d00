"""Evaluation and training sets by name or folder, normalisation constants, label-text embeddings.

`open_set("digits")`, `open_set("cifar10:DIR", "train")`, `open_set("photos/")`. Nothing here imports torch before a set is opened.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd.data.constants import constants
from fastkd.data.names import printable
from fastkd.errors import ConfigError, InputError, nearest, unknown

if TYPE_CHECKING:
    from fastkd.data.condensed import CondensedSet
    from fastkd.data.image_set import ImageSet

__all__ = ["DATASETS", "SPLITS", "CondensedSet", "DatasetEntry", "ImageSet", "check_spec", "open_images", "open_set"]

SPLITS = ("train", "test")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DatasetEntry:
    """One line of the table of data sets.

    Attributes:
      description: what it is, in a few words.
      classes, channels, size: number of classes, of channels, and the side of an image in pixels.
      constants: key in `fastkd.data.constants.CONSTANTS`, of the set's mean and standard deviation.
      reader: "module:function", called with (path or None, split, progress); with `sized` also with size= (int or None). It gives images,
        labels and names; what stands in this table, `open_set` adds.
      flip, pad: whether an image may be mirrored, and by how many pixels a crop of `size` is padded; in proportion at another size.
      needs: "" (comes with fastkd), "dir" (NAME:DIR only) or "dir?" (DIR has a default).
      sized: the reader decodes at the size that is wanted, so that a large set is never held at another one.
      dense: labels of pixels; `size` is then that of the crops a network is trained on, and images are larger (`data.dense`).
    """

    description: str
    classes: int
    channels: int
    size: int
    constants: str
    reader: str
    needs: str
    flip: bool = True
    pad: int = 4
    sized: bool = False
    dense: bool = False


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry("UCI handwritten digits, comes with fastkd", 10, 1, 8, "digits", "fastkd.data.digits:read", "", False, 1),
    "mnist": DatasetEntry("MNIST, IDX files", 10, 1, 28, "mnist", "fastkd.data.idx:mnist", "dir", False, 2),
    "fashion-mnist": DatasetEntry("Fashion-MNIST, IDX files", 10, 1, 28, "fashion-mnist", "fastkd.data.idx:fashion_mnist", "dir?", True, 2),
    "cifar10": DatasetEntry("CIFAR-10: binary, python or WebP form", 10, 3, 32, "cifar10", "fastkd.data.cifar:cifar10", "dir"),
    "cifar100": DatasetEntry("CIFAR-100: binary, python or WebP form", 100, 3, 32, "cifar100", "fastkd.data.cifar:cifar100", "dir"),
    "svhn": DatasetEntry("SVHN, cropped digits (.mat)", 10, 3, 32, "svhn", "fastkd.data.svhn:read", "dir", False, 0),
    "tiny-imagenet": DatasetEntry(
        "Tiny-ImageNet, the folder tiny-imagenet-200", 200, 3, 64, "tiny-imagenet", "fastkd.data.tiny_imagenet:read", "dir", sized=True
    ),
    "imagenet": DatasetEntry(
        "ImageNet-1k, folders train and val", 1000, 3, 224, "imagenet", "fastkd.data.imagenet:read", "dir", True, 28, sized=True
    ),
    "caltech101": DatasetEntry(
        "Caltech-101, the folder 101_ObjectCategories", 101, 3, 128, "half", "fastkd.data.caltech101:read", "dir", True, 16, sized=True
    ),
    "nyuv2": DatasetEntry(
        "NYUv2, labels of pixels, 13 classes", 13, 3, 128, "half", "fastkd.data.nyuv2:read", "dir", True, 16, sized=True, dense=True
    ),
    "camvid": DatasetEntry(
        "CamVid, labels of pixels, 11 classes", 11, 3, 128, "half", "fastkd.data.camvid:read", "dir", True, 16, sized=True, dense=True
    ),
    "imagenet-compat": DatasetEntry(
        "1,000 photographs with ImageNet-1k classes (compat1000_224px.npz)",
        1000,
        3,
        224,
        "imagenet",
        "fastkd.data.imagenet_compat:read",
        "dir",
        True,
        28,
    ),
}

_NOT_BUILT = {"wds": "tar shards", "hf": "Hugging Face data sets"}


def _split(spec: str) -> tuple[str | None, Path | None]:
    """A specification as (name of a built-in set or None, folder or None); ('none', None) for no data."""
    text = spec.strip()
    if text == "none":
        return "none", None
    name, colon, rest = text.partition(":")
    if name in DATASETS:
        if colon and not rest:
            raise ConfigError(f"data '{spec}' names no folder; expected {name}:DIR")
        if not colon and DATASETS[name].needs == "dir":
            raise ConfigError(f"data '{name}' needs the folder of its files; expected {name}:DIR")
        if colon and not DATASETS[name].needs:
            raise ConfigError(f"data '{name}' comes with fastkd and takes no folder; write '{name}', not '{spec}'")
        return name, Path(rest).expanduser() if colon else None
    if colon and name in _NOT_BUILT:
        raise ConfigError(f"data '{spec}': {_NOT_BUILT[name]} are not read by this version; expected a folder with one sub-folder a class")
    path = Path(text).expanduser()
    if text and path.exists():
        return None, path
    # A typing error in a name comes first: 'cifra10', 'cifar_10:dir'. What looks like a path is told that it is not there.
    close = nearest(name, [*DATASETS, "none"])
    looks_like_path = "/" in name or "\\" in name or name.startswith((".", "~"))
    if text and looks_like_path:
        raise InputError(f"data folder '{text}' does not exist; expected a folder, or one of {', '.join(DATASETS)}, none")
    if close or not text:
        raise ConfigError(unknown("data set", name, [*DATASETS, "none"]))
    raise ConfigError(unknown("data set", name, [*DATASETS, "none"]) + " A folder of that name does not exist either.")


def check_spec(spec: str) -> None:
    """Raises what `open_set` would for a specification that is wrong as text; loads nothing, imports no torch."""
    _split(spec)


def open_set(
    spec: str, split: str = "test", *, size: int | None = None, channels: int | None = None, progress: Progress | None = None
) -> ImageSet | None:
    """Read a data set into memory.

    Args:
      spec: NAME, NAME:DIR, DIR (one sub-folder a class, or train and test|val sub-folders of such) or "none".
      split: "train" or "test".
      size: side of the square images wanted; None keeps the set's own. Dense sets keep the shape of their images: the shorter side is
        twice `size`, and training takes crops of `size` from them.
      channels: 1 or 3; None keeps the set's own (3 for image folders).
      progress: called with (images done, images in all) now and then while a folder is decoded.

    Returns:
      The set, images uint8 [N, H, W, C], labels int64 [N] (dense: [N, H, W]); None for "none".

    Raises:
      ConfigError: an unknown name, split, size or channel count.
      InputError: files that are missing, damaged, mixed or hostile.
    """
    if split not in SPLITS:
        raise ConfigError(unknown("split", split, SPLITS))
    name, path = _split(spec)
    if name == "none":
        return None
    from fastkd.data.image_set import check_wish, convert, padding

    check_wish(size, channels)
    if name is None:
        from fastkd.data.folder import read_folder

        assert path is not None
        return read_folder(path, split, size=size, channels=channels or 3, progress=progress)
    entry = DATASETS[name]
    mean, std, _ = constants(entry.constants)
    module, _, function = entry.reader.partition(":")
    read = getattr(importlib.import_module(module), function)
    try:
        found = read(path, split, progress, size=size) if entry.sized else read(path, split, progress)
    except OSError as error:
        where = printable(str(error.filename or path))
        raise InputError(f"'{where}' cannot be read: {error.strerror or type(error).__name__}") from None
    pad = padding(entry.pad, entry.size, size if entry.sized and size else entry.size)
    found = dataclasses.replace(found, mean=mean, std=std, flip=entry.flip, pad=pad)
    return convert(found, None if entry.sized else size, channels)


def open_images(spec: str, *, size: int | None = None, channels: int | None = None, progress: Progress | None = None) -> ImageSet | None:
    """Images to learn from: the training split that `open_set` gives, or all pictures of a folder that has no class sub-folders.

    Returns:
      As `open_set`; labels are -1 where the pictures have none.
    Raises:
      As `open_set`.
    """
    name, path = _split(spec)
    if name is None:
        from fastkd.data.folder import has_classes, read_pictures

        assert path is not None
        if not has_classes(path):
            return read_pictures(path, size=size, channels=channels or 3, progress=progress)
    return open_set(spec, "train", size=size, channels=channels, progress=progress)


def __getattr__(name: str) -> object:
    if name == "ImageSet":
        from fastkd.data.image_set import ImageSet

        return ImageSet
    if name == "CondensedSet":
        from fastkd.data.condensed import CondensedSet

        return CondensedSet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
