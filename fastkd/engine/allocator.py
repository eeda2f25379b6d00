"""Memory that a step has freed stays with the process for the next one.

glibc gives tensors of some 32 MB and more back to the system as soon as they are freed, and what lies on top of its heap as well. Every
step then has the same pages handed out, zeroed, again: a tenth of the time of a generator's step on a CPU. No value is changed by this.
What is free between steps is not given to other processes, and a heap in pieces can be larger than what is live in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch

LARGEST = 1 << 30
"""Bytes from which a block is still mapped of its own, so that stores of images go back to the system as a whole."""
_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_NEVER = (1 << 31) - 1
_USUAL_TRIM, _USUAL_MMAP = 64 << 20, 32 << 20  # what glibc's own adaptation comes to with tensors

OWN_CHOICE = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
"""Variables with which users decide for themselves; so do `GLIBC_TUNABLES` that name malloc."""


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[bool]:
    """Keep what is freed meanwhile; yields whether it is: on a CPU, under glibc, and where the user has not chosen otherwise."""
    libc = _glibc() if device.type == "cpu" and not chosen() else None
    if libc is None or not (libc.mallopt(_MMAP, LARGEST) and libc.mallopt(_TRIM, _NEVER)):
        yield False
        return
    try:
        yield True
    finally:
        libc.mallopt(_MMAP, _USUAL_MMAP)
        libc.mallopt(_TRIM, _USUAL_TRIM)
        libc.malloc_trim(0)


def chosen() -> bool:
    """Whether the environment sets malloc up already."""
    return any(os.environ.get(name) for name in OWN_CHOICE) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 other C libraries have no such function, and mallopt means nothing to them
    except (OSError, AttributeError, TypeError):
        return None
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc
