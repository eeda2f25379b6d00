"""Make `digits.npz` anew: `python -m fastkd.data.make_digits [FILE]`. Needs scikit-learn, which carries the original numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fastkd.data import digits


def make(file: Path) -> None:
    """Write the digits to `file`; the same content every time."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.images.astype(np.uint8), data.target.astype(np.uint8)
    if images.shape != (1797, 8, 8) or not np.array_equal(images, data.images) or images.max() > 16:
        raise SystemExit("scikit-learn's digits are not the 1,797 images of 8 x 8 with values 0 … 16 that were expected")
    np.savez_compressed(file, images=images, labels=labels, test=digits.test_mask(labels), attribution=np.array(digits.ATTRIBUTION))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else digits.FILE
    make(target)
    print(f"{target}: {target.stat().st_size} bytes")
