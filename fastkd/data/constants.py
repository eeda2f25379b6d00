"""Normalisation constants of the field, in one table: mean and standard deviation a channel, for images in [0, 1].

A teacher is normalised with the constants it was trained with, and several papers use other ones than the set's own; hence the variants.
No torch here.
"""

from __future__ import annotations

from typing import NamedTuple

from fastkd.errors import ConfigError, unknown


class Constants(NamedTuple):
    """Mean and standard deviation, one value a channel, and who uses them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    who: str


_HALF3 = (0.5, 0.5, 0.5)

CONSTANTS: dict[str, Constants] = {
    "digits": Constants((0.3049,), (0.3753,), "the 1,297 training images of this package, 8 x 8"),
    "mnist": Constants((0.1307,), (0.3081,), "all"),
    "fashion-mnist": Constants((0.2861,), (0.3530,), "VICO; the 28 x 28 training images"),
    "fashion-mnist-pre": Constants((0.2856,), (0.3385,), "PRE-DFKD; resized to 32 x 32"),
    "cifar10": Constants((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "all"),
    "cifar100": Constants((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "CMI, Fast, NAYER"),
    "cifar100-vico": Constants((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), "VICO condensed sets"),
    "cifar100-karanchahal": Constants((0.507, 0.487, 0.441), (0.267, 0.256, 0.276), "karanchahal checkpoints"),
    "svhn": Constants(_HALF3, _HALF3, "CMI, Fast"),
    "svhn-zskt": Constants((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "ZSKT, VICO"),
    "svhn-pre": Constants((0.4378, 0.4439, 0.4729), (0.1980, 0.2011, 0.1971), "PRE-DFKD"),
    "tiny-imagenet": Constants(_HALF3, _HALF3, "Fast, NAYER"),
    "imagenet": Constants(
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "all; also the akamaster CIFAR-10 checkpoints and Tiny-ImageNet in PRE-DFKD"
    ),
    "half": Constants(_HALF3, _HALF3, "DFAD on Caltech-101, DFAD and Fast on NYUv2 and CamVid; MetaQuant on CIFAR-100"),
}


def constants(key: str) -> Constants:
    """The constants of a key.

    Raises:
      ConfigError: there are none, with the nearest.
    """
    if key not in CONSTANTS:
        raise ConfigError(unknown("normalisation constants", key, CONSTANTS))
    return CONSTANTS[key]
