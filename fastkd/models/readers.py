"""Reading the two formats of weights. Nothing in a file is executed, and nothing is allocated that the file does not hold."""

from __future__ import annotations

import argparse
import os
import pickletools
import re
import struct
import warnings
import zipfile
from typing import Any

import numpy as np
import torch

from fastkd.errors import InputError

CALLABLE = re.compile(r"[\w.]+ [\w.]+")
"""Module and name. In the text of a program, which is no pickle, the walk over the opcodes finds `mport torch` and the next line."""
EXPECTED = "a state dict in a .safetensors, .pt, .pth or .th file"


def read(path: str) -> tuple[Any, dict[str, str], list[str]]:
    """The object in a file, its metadata and notes.

    Raises:
      InputError: see `load_weights`.
    """
    start = _start(path)
    if _is_safetensors(path, start):
        state, metadata = _read_safetensors(path)
        return state, metadata, []
    return _read_torch(path), {}, []


def _start(path: str) -> bytes:
    """The first bytes of a file that can be one of weights."""
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, ".metadata")):
            raise InputError(f"'{path}' is a distributed checkpoint, whose index would run code when read; expected {EXPECTED}.")
        raise InputError(f"'{path}' is a directory; expected {EXPECTED}.")
    if not os.path.exists(path):
        raise InputError(f"there is no file '{path}'; expected {EXPECTED}.")
    if not os.path.isfile(path):
        raise InputError(f"'{path}' is not a regular file; expected {EXPECTED}.")
    try:
        with open(path, "rb") as f:
            start = f.read(1024)
    except OSError as e:
        raise InputError(f"'{path}' cannot be read: {e.strerror or e}.") from None
    if not start:
        raise InputError(f"'{path}' is empty; expected {EXPECTED}.")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise InputError(f"'{path}' is a web page (HTML), not weights: the download saved the page about the file; expected {EXPECTED}.")
    if text.startswith(b"version https://git-lfs"):
        raise InputError(f"'{path}' is a Git LFS pointer, not the weights themselves; fetch the file with `git lfs pull`.")
    return start


# safetensors --------------------------------------------------------------------------------------------------------------


def _is_safetensors(path: str, start: bytes) -> bool:
    return path.endswith(".safetensors") or start[8:9] == b"{"


def _read_safetensors(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Header first: its length, and every tensor's place, must lie within the file before anything is allocated."""
    from safetensors import SafetensorError, safe_open

    size = os.path.getsize(path)
    with open(path, "rb") as f:
        first = f.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if len(first) < 8 or length < 2 or 8 + length > size:
            raise InputError(f"'{path}' is no safetensors file or is cut off: its header should have {length} bytes, the file has {size}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (no mapping, it only has keys())
            return state, {str(k): str(v) for k, v in (f.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, MemoryError) as e:
        raise InputError(f"'{path}' is a damaged safetensors file ({_line(e)}); load the file anew.") from None


# torch.save ---------------------------------------------------------------------------------------------------------------


def _allowed() -> list[Any]:
    """What research checkpoints carry beside tensors and cannot do harm: option namespaces and numpy scalars."""
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8, np.bool_]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and 2 write different names
    return [argparse.Namespace, np.dtype, *(type(np.dtype(k)) for k in kinds), *((scalar, f"{m}.scalar") for m in modules)]


def _read_torch(path: str) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path)
    elif not _legacy(path):
        with open(path, "rb") as f:
            start = f.read(1024)
        other = "a text file, not weights" if _is_text(start) else "neither a safetensors nor a torch file"
        what = "a cut-off file" if start[:2] == b"PK" else other
        raise InputError(f"'{path}' is {what}; expected {EXPECTED}.")
    try:
        with torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        names = _blocked(path, zipped)
        if names:
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            raise InputError(
                f"'{path}' was refused, nothing in it was run: it is a pickle that calls for {shown}; "
                "expected only tensors: save `model.state_dict()`, best as .safetensors."
            ) from None
        raise InputError(f"'{path}' is damaged or cut off ({_line(e)}); expected {EXPECTED}.") from None


def _check_zip(path: str) -> None:
    """Refuse archives that unpack to far more than they are, and compiled programs."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise InputError(f"'{path}' is damaged or cut off ({_line(e)}); expected {EXPECTED}.") from None
    inner = sum(e.file_size for e in entries)
    if inner > 4 * os.path.getsize(path) + (1 << 20):
        raise InputError(f"'{path}' would unpack to {inner} bytes from {os.path.getsize(path)}, which no weights do; expected {EXPECTED}.")
    names = [e.filename for e in entries]
    if any(n.endswith("/constants.pkl") for n in names):
        raise InputError(f"'{path}' is a TorchScript program, not weights; save its `state_dict()`, best as .safetensors.")
    if not any(n.endswith("data.pkl") for n in names):
        first = names[0] if names else "none"
        raise InputError(f"'{path}' is a zip archive without weights (first entry: '{first}'); expected {EXPECTED}.")


def _legacy(path: str) -> bool:
    """A pickle, or the tar form of the first torch versions."""
    with open(path, "rb") as f:
        start = f.read(512)
    return start[:1] == b"\x80" or start[257:262] == b"ustar" or _is_text_pickle(path)


def _is_text_pickle(path: str) -> bool:
    """Protocols 0 and 1 have no mark; a small file that names a callable in their form is taken for one."""
    return os.path.getsize(path) < (1 << 20) and bool(_globals(path))


def _is_text(start: bytes) -> bool:
    """Whether the first bytes of a file are lines that people read."""
    text = start.decode("utf-8", errors="ignore")
    return len(text.encode()) > len(start) - 4 and all(c.isprintable() or c in "\t\r\n\f" for c in text)


def _blocked(path: str, zipped: bool) -> list[str]:
    """The callables that a pickle asks for and that are not admitted. Reads opcodes, builds nothing."""
    if zipped:
        try:
            with torch.serialization.safe_globals(_allowed()):
                return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:
            return []
    return sorted({name for name in _globals(path) if not _admitted(name)})


def _admitted(name: str) -> bool:
    """Whether a name in a file that torch cannot list belongs to plain tensors and options."""
    storage = name.startswith("torch.") and name.endswith("Storage")
    numpy = re.fullmatch(r"numpy\.(dtype|dtypes\.\w+|_?core\.multiarray\.scalar)", name) is not None
    plain = name in ("argparse.Namespace", "collections.OrderedDict", "torch.Size", "torch.device", "_codecs.encode")
    return storage or numpy or plain or name.startswith("torch._utils._rebuild_")


def _globals(path: str) -> list[str]:
    """Names of all callables in the pickles at the start of a file, by walking its opcodes."""
    names: list[str] = []
    with open(path, "rb") as f:
        try:
            for _ in range(8):  # a legacy torch file is several pickles in a row
                strings: list[str] = []
                for op, arg, _ in pickletools.genops(f):
                    if op.name in ("GLOBAL", "INST") and CALLABLE.fullmatch(str(arg)):
                        names.append(str(arg).replace(" ", "."))
                    elif op.name == "STACK_GLOBAL":
                        names.append(".".join(strings[-2:]))
                    elif isinstance(arg, str):
                        strings.append(arg)
        except Exception:  # the end of the pickles, or bytes that are none
            pass
    return names


def _line(e: BaseException) -> str:
    """Kind and first line of an exception."""
    text = (str(e).strip().splitlines() or ["no message"])[0]
    return f"{type(e).__name__}: {text[:160]}"
