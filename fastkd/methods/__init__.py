"""The methods by name. This table is all that is known of a method without torch; a new one is one file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from fastkd.errors import ConfigError, unknown

METHODS = {
    "muse": "fastkd.methods.muse:Muse",
    "nayer": "fastkd.methods.nayer:Nayer",
    "fast": "fastkd.methods.fast:Fast",
    "dafl": "fastkd.methods.dafl:choose",
    "dfq": "fastkd.methods.dfq:choose",
    "dfad": "fastkd.methods.dfad:choose",
    "zskt": "fastkd.methods.zskt:choose",
    "mad": "fastkd.methods.mad:Mad",
    "pre": "fastkd.methods.pre:Pre",
    "mb": "fastkd.methods.mb:Mb",
    "lra": "fastkd.methods.lra:host",
    "cmi": "fastkd.methods.cmi:Cmi",
    "deepinversion": "fastkd.methods.deepinversion:DeepInversion",
    "vanilla_kd": "fastkd.methods.vanilla_kd:VanillaKd",
    "noise": "fastkd.methods.noise:Noise",
}


def names() -> list[str]:
    """Names of all methods."""
    return list(METHODS)


def method_class(name: str, table: dict[str, Any] | None = None) -> Any:
    """The class of a method. An entry may also name a function from the method's table of fields to a class.

    Raises:
      ConfigError: no method of that name.
    """
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    module, _, attribute = METHODS[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return found if isinstance(found, type) else found(table or {})
