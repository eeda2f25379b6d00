"""The real images that a method learns from: those of `real`, else the training split of the run's data; or its condensed set."""

from __future__ import annotations

from typing import Any

import torch

from fastkd import data
from fastkd.assemble.networks import Network, embedded, is_embedded
from fastkd.config import RunConfig
from fastkd.data import condensed
from fastkd.errors import ConfigError, InputError
from fastkd.method import Method


def real_images(config: RunConfig, method: Method, name: str, teacher: Network, test: Any, *, dense: bool = False) -> Any:
    """What becomes `Given.real`: a set of the teacher's size and channels, or None where the method uses none or none is named.

    Args:
      test: the evaluation set, or None.
      dense: whether the teacher answers for each pixel, so that a set with labels of pixels can be learned from.
    Raises:
      ConfigError: images for a method that uses none, or that it cannot use. InputError: files that are missing or damaged; data whose
        training and test images are the same.
    """
    if config.condensed is not None:
        return condensed_set(config, method, name, teacher)
    if not method.uses_real():
        if config.real is not None:
            raise ConfigError(f"real is '{config.real}', and method '{name}' with these settings uses no real images; leave it out.")
        return None
    spec = config.real or (config.data if "data" in method.needs else None)
    if spec in (None, "none"):
        return None
    found = data.open_images(spec, size=teacher.shape[1], channels=teacher.shape[0])
    if found is None:
        return None
    if found.dense and not dense:
        raise ConfigError(
            f"'{spec}' has labels of pixels, and the teacher answers once an image; expected another set, or a folder of pictures."
        )
    if test is not None and torch.equal(found.images, test.images):
        raise InputError(
            f"'{spec}' has the same images for training and for testing; "
            "expected train and test sub-folders, other images with --set real=DIR, or --data none."
        )
    return method.choose_real(found, teacher.classes)


def condensed_set(config: RunConfig, method: Method, name: str, teacher: Network) -> Any:
    """The condensed set that `config` names, as `Given.real`.

    Raises:
      ConfigError: a method that takes none, or real images beside it. InputError: a file that is missing, damaged or of another teacher.
    """
    assert config.condensed is not None
    if not method.uses_condensed():
        raise ConfigError(f"condensed is '{config.condensed}', and method '{name}' takes none; leave it out, or use --method cde.")
    if config.real is not None:
        both = f"both condensed ('{config.condensed}') and real ('{config.real}') are given"
        raise ConfigError(f"{both}; expected one of them: --set condensed=none, or --set real=none.")
    path = embedded(config.condensed, "condensed") if is_embedded(config.condensed) else config.condensed
    return method.choose_real(condensed.read(path, classes=teacher.classes, shape=teacher.shape), teacher.classes)
