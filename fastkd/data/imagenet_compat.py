"""imagenet-compat: 1,000 photographs with ImageNet-1k classes in one `compat1000_224px.npz`.

`data` uint8: JPEG files one after another, image i = data[offsets[i] : offsets[i + 1]]; `labels` int16 (0 … 999); `names`; `words`.
The photographs are not from the ILSVRC validation set: compare networks on them, quote no ImageNet accuracy.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastkd.data.class_names import known
from fastkd.data.folder import decode_all
from fastkd.data.image_set import ImageSet
from fastkd.errors import InputError

FILE = "compat1000_224px.npz"


def _load(path: Path) -> dict[str, np.ndarray]:
    keys = ("data", "offsets", "labels", "names", "words")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise InputError(f"'{path}' has no {', '.join(missing)}; expected the arrays {', '.join(keys)}")
            out = {key: file[key] for key in keys}
    except (OSError, ValueError, EOFError, MemoryError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"'{path}' cannot be read as .npz ({type(error).__name__}): truncated, or another kind of file") from None
    data, offsets, labels = out["data"], out["offsets"], out["labels"]
    good = data.dtype == np.uint8 and data.ndim == 1 and offsets.dtype.kind in "iu" and offsets.ndim == 1 and len(offsets) > 1
    good = good and labels.dtype.kind in "iu" and labels.shape == (len(offsets) - 1,) and len(out["names"]) == len(labels)
    if not good or offsets[0] < 0 or (offsets[1:] < offsets[:-1]).any() or offsets[-1] > len(data):
        raise InputError(f"'{path}' is inconsistent: its offsets, labels and data do not belong together")
    if labels.min() < 0 or labels.max() > 999:
        raise InputError(f"'{path}' holds label {labels.max()}; ImageNet-1k has labels 0 to 999")
    return out


def read(path: Path | None, split: str, progress: Callable[[int, int], None] | None = None) -> ImageSet:
    """The photographs: uint8 [1000, 224, 224, 3]; `path` is the folder of the file or the file.

    Raises:
      InputError: no such file, a damaged one, split "train" (there is none).
    """
    assert path is not None
    if split != "test":
        raise InputError("imagenet-compat has test images only; for training images name an image folder")
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"'{path}' has no {FILE}; expected that file or the folder that holds it")
    content = _load(file)
    data, offsets, names = content["data"], content["offsets"], content["names"]

    def jpeg(i: int) -> bytes:
        return data[offsets[i] : offsets[i + 1]].tobytes()

    images, kept, notes = decode_all([str(name) for name in names], jpeg, 224, 3, str(path), progress)
    words = [str(word) for word in content["words"]]
    return ImageSet(
        name="imagenet-compat",
        split=split,
        images=images,
        labels=torch.from_numpy(content["labels"].astype(np.int64))[kept],
        class_names=words if len(words) == 1000 else known("imagenet"),
        attribution="1,000 photographs from Flickr (NIPS 2017 development set), CC BY 2.0; authors in compat1000_attribution.csv",
        notes=[*notes, "not the ILSVRC validation set: compare networks on it, quote no ImageNet accuracy from it"],
    )
