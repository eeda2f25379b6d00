"""The 1,797 handwritten digits of the UCI repository, 8 x 8 with 17 gray levels: the set that comes with fastkd.

`digits.npz` holds `images` uint8 [1797, 8, 8] (counts 0 … 16), `labels` uint8 [1797], `test` bool [1797] and `attribution`.
`make_digits.py` makes it. The split is fixed: see `test_mask`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastkd.data.class_names import DIGITS
from fastkd.data.image_set import ImageSet

FILE = Path(__file__).resolve().parent / "digits.npz"
TEST_IMAGES = 500
ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository, "
    "doi 10.24432/C50P49, CC BY 4.0; pixel values unchanged, split by fastkd"
)


def test_mask(labels: np.ndarray) -> np.ndarray:
    """Which images are for testing: bool [N], exactly 500 of them, every class in proportion to within one image.

    The images are numbered k = 0 … N-1 by class, within a class in the order of the file. Image k is a test image when
    500 (k + 1) // N is larger than 500 k // N: every 3.594th, spread evenly over the classes and over the file.
    """
    n = len(labels)
    order = np.argsort(labels, kind="stable")
    k = np.arange(n)
    mask = np.zeros(n, bool)
    mask[order] = TEST_IMAGES * (k + 1) // n > TEST_IMAGES * k // n
    return mask


def read(path: Path | None, split: str, progress: object = None) -> ImageSet:
    """The digits: "train" 1,297 images, "test" 500, uint8 [N, 8, 8, 1] with the 17 levels spread over 0 … 255."""
    with np.load(FILE, allow_pickle=False) as file:
        keep = file["test"] == (split == "test")
        counts, labels, attribution = file["images"][keep], file["labels"][keep], str(file["attribution"])
    images = np.rint(counts * (255 / 16)).astype(np.uint8)[..., None]
    return ImageSet(
        name="digits",
        split=split,
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=list(DIGITS),
        attribution=attribution,
    )
