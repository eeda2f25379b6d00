"""Reads the pickles of CIFAR's python form without executing anything.

Only the instructions that build dicts, lists, tuples, strings, bytes, numbers and numpy arrays are known; every global but the few that
numpy's arrays name is refused, and even those are stand-ins of ours: numpy sees raw bytes, a dtype code and a shape, never a pickled state.
The pure Python unpickler is used, because the C one sizes its tables by numbers in the file.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.names import printable
from fastkd.errors import InputError

_LARGEST = 1 << 30
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS
    PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL INST REDUCE BUILD
"""
_CODES = {"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "b1"}


class _Dtype:
    """Stands for numpy.dtype: a code such as 'u1' and a byte order."""

    def __init__(self, code: Any, *rest: Any):
        self.code = code.decode("ascii", "replace") if isinstance(code, bytes) else str(code)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1].decode("ascii", "replace") if isinstance(state[1], bytes) else str(state[1])

    def real(self) -> np.dtype[Any]:
        code = self.code.lstrip("<>|=")
        order = self.code[0] if self.code[:1] in ("<", ">") else self.order
        if code not in _CODES or order not in ("<", ">", "|", "="):
            raise InputError(f"an array of dtype '{printable(self.code)}', expected plain numbers")
        return np.dtype(order + code if order in ("<", ">") else code)


class _Array:
    """Stands for numpy.ndarray: shape, dtype, bytes."""

    def __init__(self) -> None:
        self.parts: tuple[Any, Any, Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, raw = state[-4:]
        self.parts = (shape, dtype, fortran, raw)

    def real(self) -> np.ndarray:
        if self.parts is None:
            raise InputError("an array without content")
        shape, dtype, fortran, raw = self.parts
        if isinstance(raw, str):  # bytes written by Python 2 and read as text
            raw = raw.encode("latin1")
        sizes = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not (sizes and isinstance(dtype, _Dtype) and isinstance(raw, bytes)):
            raise InputError("an array that is not made of a shape, a dtype and bytes")
        kind = dtype.real()
        if math.prod(shape) * kind.itemsize != len(raw):
            raise InputError(f"an array of shape {shape} with {len(raw)} bytes")
        return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")


class _Call:
    """A function that a pickle may call but not change: it has no attributes to set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function with a state")


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    out = _Array()
    out.parts = (shape, dtype, order == "F", raw)
    return out


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("text that is no latin1")
    return text.encode("latin1")


_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Call(_encode),
}
for _core in ("numpy.core", "numpy._core"):
    _GLOBALS[(f"{_core}.multiarray", "_reconstruct")] = _Call(_reconstruct)
    _GLOBALS[(f"{_core}.numeric", "_frombuffer")] = _Call(_frombuffer)


def _refuse_instruction(self: Any) -> None:
    raise InputError("a pickle instruction that plain data do not need")


def _bytearray(self: Any) -> None:
    """As bytes, and read before anything is allocated: pickle's own makes room for whatever length the file claims."""
    (size,) = struct.unpack("<Q", self.read(8))
    raw = self.read(size)
    if len(raw) != size:
        raise pickle.UnpicklingError("bytes that end early")
    self.append(raw)


class _Strict(pickle._Unpickler):
    dispatch = dict.fromkeys(range(256), _refuse_instruction) | {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS.split()
    }
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray

    def find_class(self, module: str, name: str) -> Any:
        found = _GLOBALS.get((module, name))
        if found is None:
            raise InputError(f"'{printable(f'{module}.{name}')}', which is code and was not called")
        return found


def load(path: Path) -> dict[bytes, Any]:
    """The dict that a CIFAR batch holds: bytes keys → lists, bytes, numbers, numpy arrays of numbers.

    Raises:
      InputError: anything else in the file, named; a file that is truncated or above 1 GiB.
    """
    if path.stat().st_size > _LARGEST:
        raise InputError(f"'{path}' has {path.stat().st_size} bytes; a CIFAR batch in python form has at most {_LARGEST}")
    try:
        content = _Strict(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except InputError as error:
        raise InputError(
            f"'{path}' is refused: a CIFAR batch holds dict, list, str, bytes and numpy arrays, this file has {error}"
        ) from None
    except Exception as error:  # a damaged pickle fails in a hundred ways, all of them the file's fault
        raise InputError(f"'{path}' is no readable CIFAR batch in python form ({type(error).__name__}): truncated or damaged") from None
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds a {type(content).__name__}, a CIFAR batch in python form holds a dict")
    out: dict[bytes, Any] = {}
    for key, value in content.items():
        name = key.encode() if isinstance(key, str) else key
        try:
            out[name] = value.real() if isinstance(value, _Array) else value
        except InputError as error:
            raise InputError(f"'{path}' is refused: it has {error}") from None
    return out
