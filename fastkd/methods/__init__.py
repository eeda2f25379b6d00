"""The methods by name. This table is all that is known of a method without torch; a new one is one file and one line here."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from fastkd.errors import ConfigError, unknown
from fastkd.methods import _card
from fastkd.methods._card import BASES, NEEDS, Card

__all__ = ["BASES", "METHODS", "NEEDS", "Card", "card", "method_class", "names"]

METHODS = {
    "muse": "fastkd.methods.muse:Muse",
    "nayer": "fastkd.methods.nayer:Nayer",
    "fast": "fastkd.methods.fast:Fast",
    "ssd": "fastkd.methods.ssd:Ssd",
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
    "cde": "fastkd.methods.cde:host",
    "vanilla_kd": "fastkd.methods.vanilla_kd:VanillaKd",
    "noise": "fastkd.methods.noise:Noise",
}


def names() -> list[str]:
    """Names of all methods."""
    return list(METHODS)


def card(name: str) -> tuple[str, Card | None]:
    """What a method is, in a paragraph, and its card, read from its file: torch is not loaded.

    Raises:
      ConfigError: no method of that name.
    """
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    found = importlib.util.find_spec(METHODS[name].partition(":")[0])
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"no module named {METHODS[name].partition(':')[0]}")
    return _card.read(Path(found.origin))


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
