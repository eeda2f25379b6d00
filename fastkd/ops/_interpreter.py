"""Triton's interpreter and numpy: Triton 3.6 turns an array of one element into a loop bound by `int`, which numpy 2.4 refuses."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def prepare() -> None:
    """Let interpreted kernels count to their arguments, with any pair of versions; for processes with TRITON_INTERPRET=1 alone."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor  # called before each kernel, with a scope that undoes it afterwards

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
