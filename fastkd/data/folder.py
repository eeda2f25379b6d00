"""Image folders: one sub-folder a class, sorted by name; or `train` and `test` (or `val`) folders of such."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastkd.data.decode import Progress, decode, each, header, quiet
from fastkd.data.image_set import ImageSet, check_memory, check_wish
from fastkd.data.names import printable
from fastkd.errors import InputError

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar")
_TEST_NAMES = ("test", "val", "valid", "validation")
_DEFAULT_SIZE = 224
_DEEPEST = 8


@dataclass
class Listing:
    """What lies in an image folder: (path, class) of every picture, the class names, the files that are no pictures."""

    files: list[tuple[Path, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def sub_folders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if not _hidden(p.name) and is_dir(p)), key=lambda p: p.name)


def is_dir(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"'{printable(str(path))}' is a symbolic link that leads to itself; remove it") from None
        return False
    return path.is_dir()


def walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """All files below `folder`, by name; links are followed, a folder inside itself is refused."""
    state = folder.stat()
    here = (state.st_dev, state.st_ino)
    if here in above:
        raise InputError(f"'{printable(str(folder))}' is a symbolic link to a folder that contains it (a loop); remove it")
    if len(above) > _DEEPEST:
        raise InputError(
            f"'{printable(str(folder))}' lies more than {_DEEPEST} folders deep; expected images at most {_DEEPEST} below the data folder"
        )
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if _hidden(path.name):
            continue
        if is_dir(path):
            yield from walk(path, (*above, here))
        else:
            yield path


def _pick_split(folder: Path, split: str) -> tuple[Path, list[str]]:
    """The folder of class folders for a split, and what is to be said about it."""
    found = sub_folders(folder)
    by_name = {path.name.lower(): path for path in found}
    tests = [by_name[name] for name in _TEST_NAMES if name in by_name]
    splits = {"train", *_TEST_NAMES}
    if not found or not set(by_name) <= splits:
        return folder, [] if split == "test" else ["the folder has no train and test sub-folders: all of its images are used"]
    wanted = by_name.get("train") if split == "train" else (tests[0] if tests else None)
    if wanted is None:
        expected = "train" if split == "train" else "test or val"
        raise InputError(
            f"'{printable(str(folder))}' has {', '.join(p.name for p in found)} but no {expected} sub-folder; "
            f"the {split} images are asked for"
        )
    return wanted, [f"the {split} images are those of its sub-folder {wanted.name}"] if wanted.name != split else []


def pictures_of(folder: Path, classes: list[Path]) -> Listing:
    """All pictures below each of the class folders of `folder`, by name."""
    out = Listing()
    top = (folder.stat().st_dev, folder.stat().st_ino)
    for label, place in enumerate(classes):
        out.names.append(printable(place.name))
        for path in walk(place, (top,)):
            if path.suffix.lower() in ENDINGS:
                out.files.append((path, label))
            else:
                out.others.append(str(path.relative_to(folder)))
    return out


def _hint(folder: Path) -> str:
    """What else a folder without class folders may be."""
    names = {path.name for path in folder.iterdir()}
    if {"data_batch_1", "data_batch_1.bin", "data_batch_1.webp", "test_batch.bin", "cifar-10-batches-py", "cifar-10-batches-bin"} & names:
        return f"; it looks like cifar10: write cifar10:{folder}"
    if {"train.bin", "test.bin", "test_batch.webp", "cifar-100-python", "cifar-100-binary"} & names:
        return f"; it looks like cifar100: write cifar100:{folder}"
    if any("idx3-ubyte" in name for name in names):
        return f"; it looks like MNIST files: write mnist:{folder} or fashion-mnist:{folder}"
    if "compat1000_224px.npz" in names:
        return f"; it looks like imagenet-compat: write imagenet-compat:{folder}"
    return ""


def _native_size(files: list[tuple[Path, int]], root: Path) -> int:
    """The common side of all pictures when they are square and alike, else 224. Headers only; stops at the first other one."""
    size = 0
    for path, _ in files:
        try:
            h, w = header(path, str(path.relative_to(root)))
        except InputError:
            raise
        except Exception:  # counted when it is decoded
            continue
        if h != w or h > 4096 or (size and h != size):
            return _DEFAULT_SIZE
        size = h
    return size or _DEFAULT_SIZE


def decode_all(
    names: Sequence[str],
    source: Callable[[int], Path | bytes],
    size: int,
    channels: int,
    title: str,
    progress: Progress | None,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Decode pictures into one tensor, on several threads, in order.

    Args:
      names: what each picture is called in messages.
      source: number of a picture → its path or its bytes.
      size, channels: of the result, after the evaluation transform.
      title: the set's name, for messages.

    Returns:
      Images uint8 [n, size, size, channels], the numbers of the pictures that could be read int64 [n], notes.

    Raises:
      InputError: a decompression bomb; more than 1 % that cannot be read.
    """
    total = len(names)
    out = np.empty((total, size, size, channels), np.uint8)

    def one(i: int) -> None:
        out[i] = decode(source(i), names[i], size, channels)

    keep, notes = each(names, one, title, progress)
    for to, i in enumerate(keep):  # close the gaps in place: the array may be most of the memory
        if to != i:
            out[to] = out[i]
    return torch.from_numpy(out[: len(keep)]), torch.tensor(keep, dtype=torch.int64), notes


def read_folder(folder: Path, split: str, *, size: int | None = None, channels: int = 3, progress: Progress | None = None) -> ImageSet:
    """An image folder, decoded once through the evaluation transform (`decode.eval_transform`).

    Args:
      size: side of the images; None: the pictures' own where all are square and alike, else 224.

    Returns:
      ImageSet without constants (the teacher's are used), classes numbered by the sorted names of their folders.

    Raises:
      InputError: no class folders, one class only, no images, a loop of links, a decompression bomb, more than 1 % unreadable,
        more than 8 GiB.
    """
    shown = printable(str(folder))
    check_wish(size, channels)
    if not is_dir(folder):
        if folder.name.lower().endswith(_ARCHIVES):
            raise InputError(f"'{shown}' is an archive and archives are not opened; unpack it and name the folder")
        raise InputError(f"'{shown}' is no folder; expected a folder with one sub-folder a class")
    try:
        place, notes = _pick_split(folder, split)
        classes = sub_folders(place)
        if not classes:
            raise InputError(f"'{printable(str(place))}' has no class sub-folders; expected one sub-folder a class{_hint(place)}")
        listing = pictures_of(place, classes)
    except OSError as error:
        raise InputError(f"'{shown}' cannot be read: {error.strerror or type(error).__name__}") from None
    if len(classes) == 1:
        raise InputError(f"'{printable(str(place))}' has one class sub-folder ('{listing.names[0]}'); expected at least two")
    if not listing.files:
        raise InputError(
            f"'{printable(str(place))}' has {len(classes)} class sub-folders but no images ({', '.join(sorted(ENDINGS))}) in them"
        )
    with_images = {label for _, label in listing.files}
    if 2 * len(with_images) < len(classes):
        bare = ", ".join(name for label, name in enumerate(listing.names[:20]) if label not in with_images)
        raise InputError(f"'{printable(str(place))}': most sub-folders have no images ({bare}); expected one sub-folder a class")
    return read_listing(folder, place, split, listing, notes, size, channels, progress)


def has_classes(folder: Path) -> bool:
    """Whether the training images of a folder stand in class sub-folders; False for a folder of pictures alone."""
    place = _pick_split(folder, "train")[0] if is_dir(folder) else folder
    if not is_dir(place):
        return True  # the reader of class folders says what is wrong
    return len(sub_folders(place)) > 1 and not any(p.suffix.lower() in ENDINGS for p in place.iterdir() if not _hidden(p.name))


def read_pictures(folder: Path, *, size: int | None = None, channels: int = 3, progress: Progress | None = None) -> ImageSet:
    """All pictures in a folder and below it, without labels (-1); decoded as by `read_folder`.

    Raises:
      InputError: no pictures, or as `read_folder`.
    """
    check_wish(size, channels)
    listing = Listing()
    try:
        place, notes = _pick_split(folder, "train")
        for path in walk(place, ()):
            if path.suffix.lower() in ENDINGS:
                listing.files.append((path, -1))
            else:
                listing.others.append(str(path.relative_to(place)))
    except OSError as error:
        raise InputError(f"'{printable(str(folder))}' cannot be read: {error.strerror or type(error).__name__}") from None
    if not listing.files:
        raise InputError(f"'{printable(str(place))}' has no pictures ({', '.join(sorted(ENDINGS))}){_hint(place)}")
    return read_listing(folder, place, "train", listing, [*notes, "the pictures have no labels"], size, channels, progress)


def read_listing(
    folder: Path, place: Path, split: str, listing: Listing, notes: list[str], size: int | None, channels: int, progress: Progress | None
) -> ImageSet:
    """Decode what is listed into a set without constants.

    Args:
      folder: what the set is called by. place: what the names of the pictures are relative to.
      size: side of the images; None: the pictures' own where all are square and alike, else 224.
    Raises:
      InputError: more than 8 GiB, more than 1 % unreadable, a decompression bomb.
    """
    shown = printable(str(folder))
    if listing.others:
        first = ", ".join(map(printable, listing.others[:5])) + (", …" if len(listing.others) > 5 else "")
        notes.append(f"{len(listing.others)} files without an image's ending were skipped: {first}")
    if size is None:
        with quiet():
            size = _native_size(listing.files, place)
    check_memory(len(listing.files), size, channels, shown)
    files = [path for path, _ in listing.files]
    images, kept, more = decode_all([str(p.relative_to(place)) for p in files], files.__getitem__, size, channels, shown, progress)
    labels = torch.tensor([label for _, label in listing.files], dtype=torch.int64)[kept]
    notes += more
    counts = torch.bincount(labels.clamp_min(0), minlength=len(listing.names)).tolist()
    empty = [name for name, n in zip(listing.names, counts) if n == 0]
    if empty:
        notes.append(f"{len(empty)} classes have no images: {', '.join(empty[:10])}{', …' if len(empty) > 10 else ''}")
    side = "256/224 of it" if size >= 64 else "it"
    notes.append(f"images are {size} x {size}: other sizes had their shorter side resized to {side} (bilinear) and their centre cut out")
    return ImageSet(
        name=printable(folder.resolve().name) or shown,
        split=split,
        images=images,
        labels=labels,
        class_names=listing.names or None,
        flip=True,
        pad=max(1, size // 8),
        attribution="",
        notes=notes,
    )
