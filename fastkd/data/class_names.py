"""Class names of the known data sets, in label order. No torch here."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

_HERE = Path(__file__).resolve().parent

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION_MNIST = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
NYUV2 = ("bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv", "wall", "window")
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar cattle
    chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
    kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
    otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew
    skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
    tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(_CIFAR100.split())


@functools.cache
def imagenet() -> tuple[tuple[str, str], ...]:
    """The 1,000 classes of ImageNet-1k: (WordNet id, comma-separated WordNet synonyms), in the usual order."""
    rows = json.loads((_HERE / "imagenet_classes.json").read_text(encoding="utf-8"))
    return tuple((wnid, words) for wnid, words in rows)


SETS: dict[str, Callable[[], list[str]]] = {
    "digits": lambda: list(DIGITS),
    "fashion-mnist": lambda: list(FASHION_MNIST),
    "cifar10": lambda: list(CIFAR10),
    "cifar100": lambda: list(CIFAR100),
    "imagenet": lambda: [words for _, words in imagenet()],
}
"""The sets that have a shipped label-text table, each with its class names; ImageNet's are read when they are asked for."""


def known(name: str) -> list[str] | None:
    """Class names of one of `SETS`, or None."""
    return SETS[name]() if name in SETS else None


def recognise(names: list[str] | None) -> str | None:
    """The known set whose class names, in order, are `names`; WordNet ids count as ImageNet's names. None where nothing matches."""
    if not names:
        return None
    if len(names) == 1000 and list(names) == [wnid for wnid, _ in imagenet()]:
        return "imagenet"
    return next((name for name in SETS if known(name) == list(names)), None)
