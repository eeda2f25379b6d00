"""What the sets with WordNet ids share: class folders named by them, and text files that come beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastkd.data.folder import ENDINGS, sub_folders, walk
from fastkd.data.names import printable
from fastkd.errors import InputError

_LARGEST = 1 << 26


def in_class_folders(place: Path, number: Mapping[str, int]) -> list[tuple[Path, int]]:
    """(picture, class) of all pictures below the folders of `place`, each named by a key of `number`.

    Raises:
      InputError: a folder of another name, or no picture at all.
    """
    example, out = next(iter(number)), []
    for folder in sub_folders(place):
        if folder.name not in number:
            raise InputError(f"'{printable(str(folder))}' is none of the {len(number)} classes; expected such as {example}")
        out += [(file, number[folder.name]) for file in walk(folder, ()) if file.suffix.lower() in ENDINGS]
    if not out:
        raise InputError(f"'{printable(str(place))}' has no images; expected folders such as {example} with *.JPEG in them")
    return out


def lines_of(file: Path) -> list[str]:
    """The lines of a small text file, without empty ones.

    Raises:
      InputError: not there, larger than 64 MiB, or no UTF-8.
    """
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(f"'{printable(str(file))}' has {file.stat().st_size} bytes; expected a text file below {_LARGEST}")
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{printable(str(file))}' cannot be read ({type(error).__name__}); expected a text file") from None
