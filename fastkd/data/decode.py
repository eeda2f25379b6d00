"""One picture file → uint8 RGB or gray pixels, with limits. Used by image folders and by sets of JPEG files."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.data.names import printable
from fastkd.errors import InputError

# A photograph of 8192 x 8192 still passes; what claims more is refused before a pixel is decoded.
MAX_PIXELS = 1 << 26
Progress = Callable[[int, int], None]
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Pillow's own warnings off for the time of a decoding loop (its bomb limit is above ours). Not per thread: enter it once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def header(source: Path | bytes, name: str) -> tuple[int, int]:
    """(height, width) without decoding. Raises InputError for a bomb, anything else for a file that is no picture."""
    with open_picture(source, name) as picture:
        return picture.height, picture.width


def open_picture(source: Path | bytes, name: str) -> Image.Image:
    """A picture whose header alone was read. Raises InputError for a bomb, anything else for a file that is no picture."""
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError:
        raise InputError(f"'{printable(name)}' is refused: it claims more than {MAX_PIXELS} pixels (decompression bomb)") from None
    if picture.width * picture.height > MAX_PIXELS:
        size = f"{picture.width} x {picture.height}"
        picture.close()
        raise InputError(f"'{printable(name)}' is refused: it claims {size} pixels, the limit is {MAX_PIXELS} (decompression bomb)")
    return picture


def _eight_bit(picture: Image.Image, channels: int) -> Image.Image:
    """Any mode → "RGB" or "L". 16-bit gray is scaled; alpha is dropped, as the usual loaders do."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(np.rint(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError(f"{picture.mode}: 32-bit pixels have no agreed range")
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if channels == 3:
        return picture.convert("RGB")
    if picture.mode not in ("L", "1"):
        picture = picture.convert("RGB")  # through RGB, so that CMYK, palettes and alpha give the luma of what is seen
    return picture.convert("L")


def eval_transform(picture: Image.Image, size: int) -> Image.Image:
    """The field's evaluation transform: shorter side to size * 256 / 224 (below 64 pixels: to size), bilinear, then the middle.

    Rounding is torchvision's, so that accuracies can be compared. A picture of exactly size x size stays as it is.
    """
    w, h = picture.size
    if (w, h) == (size, size):
        return picture
    short = round(size * 256 / 224) if size >= 64 else size
    new = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    # A strip of 1 x 8000 must not become a picture of gigabytes.
    if new[0] * new[1] > MAX_PIXELS:
        raise ValueError(f"{w} x {h} is too narrow for a square of {size}")
    if new != (w, h):
        picture = picture.resize(new, Image.Resampling.BILINEAR)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def decode(source: Path | bytes, name: str, size: int, channels: int) -> np.ndarray:
    """One picture as uint8 [size, size, channels] after the evaluation transform.

    Raises:
      InputError: a decompression bomb.
      Exception: whatever Pillow raises for a file that is truncated or no picture; the caller counts it.
    """
    with open_picture(source, name) as picture:
        picture.load()
        out = eval_transform(_eight_bit(picture, channels), size)
    return np.asarray(out, np.uint8).reshape(size, size, channels)


class Unreadable:
    """Counts the pictures of a set that could not be read; up to 1 % are left out and listed, more fail the set."""

    def __init__(self, name: str):
        self.name, self.bad = name, list[tuple[str, str]]()

    def add(self, file: str, error: BaseException) -> None:
        reason = str(error).splitlines()[0][:80] if str(error) else ""
        # Pillow puts the whole path into some of its messages; the kind of error says as much.
        self.bad.append((printable(file), reason if reason and "/" not in reason and "object at" not in reason else type(error).__name__))

    def note(self, total: int) -> list[str]:
        """The note for a set of `total` files. Raises InputError where more than 1 % are unreadable."""
        if not self.bad:
            return []
        shown = ", ".join(f"{file} ({reason})" for file, reason in self.bad[:10])
        more = f", and {len(self.bad) - 10} more" if len(self.bad) > 10 else ""
        text = f"{len(self.bad)} of {total} images could not be read"
        if len(self.bad) * 100 > total:
            raise InputError(f"'{printable(self.name)}': {text}, more than 1 %: {shown}{more}")
        return [f"{text} and were left out: {shown}{more}"]


def each(names: Sequence[str], one: Callable[[int], None], title: str, progress: Progress | None) -> tuple[list[int], list[str]]:
    """Call `one(i)`, which decodes picture i, for all `names`, on several threads.

    Returns:
      The numbers of the pictures that could be read, in order, and notes.
    Raises:
      InputError: what `one` raises of that kind; more than 1 % that cannot be read.
    """

    def tried(i: int) -> Exception | None:
        try:
            one(i)
        except InputError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything for damaged files; the set's rule decides
            return error
        return None

    bad, keep, total = Unreadable(title), list[int](), len(names)
    with quiet(), ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        try:
            for i, error in enumerate(pool.map(tried, range(total))):
                if error is None:
                    keep.append(i)
                else:
                    bad.add(names[i], error)
                if progress is not None and ((i + 1) % 256 == 0 or i + 1 == total):
                    progress(i + 1, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return keep, bad.note(total)
