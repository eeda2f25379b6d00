"""Drop-in modules and model surgery on top of `ops`: instrument a teacher, trace a student, BatchNorm over the global batch.

`import fastkd.nn` does not load torch: names are resolved on first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import augment
    from .bn_ema import BnEma
    from .cam import ClassActivationMap
    from .freeze import evaluating, frozen
    from .fuse_generator import fuse_generator
    from .globalise import globalise
    from .inplace import copy_
    from .instrument import Teacher, instrument
    from .student import Student
    from .trace import Trace

_WHERE = {
    "BnEma": "bn_ema",
    "ClassActivationMap": "cam",
    "Student": "student",
    "Teacher": "instrument",
    "Trace": "trace",
    "copy_": "inplace",
    "evaluating": "freeze",
    "frozen": "freeze",
    "fuse_generator": "fuse_generator",
    "globalise": "globalise",
    "instrument": "instrument",
}

__all__ = [
    "BnEma",
    "ClassActivationMap",
    "Student",
    "Teacher",
    "Trace",
    "augment",
    "copy_",
    "evaluating",
    "frozen",
    "fuse_generator",
    "globalise",
    "instrument",
]


def __getattr__(name: str) -> Any:
    if name == "augment":
        return importlib.import_module(f"{__name__}.augment")
    if name not in _WHERE:
        raise AttributeError(f"module 'fastkd.nn' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`instrument`, `globalise` and `fuse_generator` name a file and its function; importing the file must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
