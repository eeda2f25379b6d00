"""Names that come from outside (class folders, sample names), made safe to print. No torch here."""

from __future__ import annotations


def printable(name: str) -> str:
    """`name` without control characters and without bytes that are no UTF-8: fit for a terminal, a log line, JSON."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "�" for c in text)
