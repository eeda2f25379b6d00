"""The published pool: images as PNG files in a folder, read by a DataLoader with crop, flip and normalisation in its workers."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ._case import Call, CannotRun

WORKERS = 4
"""As published; at most one a core, and one a thread of those that the other providers have."""
BATCHES = 8
"""Batches of a call."""


class Folder(Dataset[Tensor]):
    """Images cropped from a padded self, flipped, normalised: [C, H, W] float."""

    def __init__(self, folder: str, pad: int, mean: Tensor, std: Tensor):
        self.paths = sorted(Path(folder).glob("*.png"))
        self.pad, self.mean, self.std = pad, mean.view(3, 1, 1), std.view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        with Image.open(self.paths[i]) as file:
            image = file.convert("RGB")
        (top, left), (width, height) = torch.randint(2 * self.pad + 1, (2,)).tolist(), image.size
        image = image.crop((left - self.pad, top - self.pad, left - self.pad + width, top - self.pad + height))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
        return (pixels.float().div(255) - self.mean) / self.std


def pool(images: Tensor, batch: int, pad: int, mean: Tensor, std: Tensor, *, rebuilt: bool) -> Call:
    """A call reads `BATCHES` batches, drawn from a pool of 2·batch files: nothing is fetched ahead of the call, so none of its work is
    done while another provider is timed, and none is left behind.

    Args:
      rebuilt: a call makes the loader, as published code does each round, and starts its workers; else they live on, idle between calls.
    """
    if images.is_cuda:
        raise CannotRun("files are read by the CPU; see the row of a CPU run")
    folder = tempfile.TemporaryDirectory()
    for i, pixels in enumerate(images[: 2 * batch]):
        Image.fromarray(pixels.numpy()).save(Path(folder.name) / f"{i}.png")
    data = Folder(folder.name, pad, mean, std)
    draws = RandomSampler(data, replacement=True, num_samples=BATCHES * batch)
    kept: dict[int, DataLoader[Tensor]] = {}

    def loader() -> DataLoader[Tensor]:
        workers = min(WORKERS, os.cpu_count() or 1, torch.get_num_threads())
        if rebuilt:
            return DataLoader(data, batch, sampler=draws, num_workers=workers)
        if workers not in kept:
            kept[workers] = DataLoader(data, batch, sampler=draws, num_workers=workers, persistent_workers=True)
        return kept[workers]

    def batches() -> tuple[Tensor]:
        assert folder.name  # the folder lives as long as the call
        return (deque(loader(), maxlen=1).pop(),)

    return batches
