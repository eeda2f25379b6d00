"""SVHN, the cropped digits: `train_32x32.mat` and `test_32x32.mat` as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastkd.data.image_set import ImageSet
from fastkd.data.mat import read_mat
from fastkd.errors import InputError

_PUBLISHED = {"train": 73_257, "test": 26_032}


def read(path: Path | None, split: str, progress: object = None) -> ImageSet:
    """SVHN: uint8 [73257 or 26032, 32, 32, 3]. Digits are neither mirrored nor shifted: neighbouring digits stand at the borders.

    Raises:
      InputError: the file is missing, damaged or of another set, or scipy is not installed.
    """
    assert path is not None
    if not path.is_dir():
        raise InputError(f"data folder '{path}' does not exist or is no folder; expected train_32x32.mat and test_32x32.mat there")
    file = path / f"{split}_32x32.mat"
    if not file.is_file():
        full = "; the full numbers (train.tar.gz) are not read, only the cropped digits" if (path / split).is_dir() else ""
        raise InputError(f"'{path}' has no {file.name}{full}")
    content = read_mat(file, ("X", "y"))
    x, y = np.asarray(content["X"]), np.atleast_1d(np.asarray(content["y"]))
    x = x[..., None] if x.ndim == 3 else x  # one image: the last axis is gone
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise InputError(f"'{file}': X is {x.dtype} {list(x.shape)}; expected uint8 [32, 32, 3, N]")
    if y.shape != x.shape[3:] or y.dtype.kind not in "iuf":
        raise InputError(f"'{file}': y is {y.dtype} {list(y.shape)}; expected one whole number for each of {x.shape[3]} images")
    if not ((y >= 0) & (y <= 10) & (y == np.floor(y))).all():
        raise InputError(f"'{file}' holds label {y.max():g}; SVHN has labels 1 to 10, where 10 is the digit 0")
    n = len(y)
    return ImageSet(
        name="svhn",
        split=split,
        images=torch.from_numpy(np.ascontiguousarray(x.transpose(3, 0, 1, 2))),
        labels=torch.from_numpy(y.astype(np.int64) % 10),
        class_names=[str(i) for i in range(10)],
        attribution="SVHN: Y. Netzer et al., 2011, Reading Digits in Natural Images with Unsupervised Feature Learning",
        notes=[] if n == _PUBLISHED[split] else [f"{n} images, the published {split} set of svhn has {_PUBLISHED[split]}"],
    )
