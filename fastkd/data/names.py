"""Names that come from outside (class folders, sample names), made safe to print and safe to use as a file name. No torch here."""

from __future__ import annotations

import hashlib
import re

_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{device}{i}" for device in ("COM", "LPT") for i in range(1, 10))}
_LONGEST = 100


def printable(name: str) -> str:
    """`name` without control characters and without bytes that are no UTF-8: fit for a terminal, a log line, JSON."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "�" for c in text)


def file_name(name: str) -> str:
    """A file name (one path component, ASCII) for any string.

    A name that is already safe stays as it is. Any other keeps its safe characters and gets eight hexadecimal digits of its
    hash, so that two different names never meet in one file.
    """
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".-").rstrip(".")[:_LONGEST]
    if kept == name and kept and kept.split(".")[0].upper() not in _RESERVED:
        return name
    mark = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{kept.strip('_.') or 'name'}-{mark}" if kept.split(".")[0].upper() not in _RESERVED else f"_{kept}-{mark}"
