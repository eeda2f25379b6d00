"""PRE-DFKD's encoder: synthetic images to the latent of the memory generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import ConfigError, unknown

from .generators import Shape, leaky, reinitialise


class HalveNearest(nn.Module):
    """Nearest-neighbour scaling by one half: every second row and column."""

    fx_leaf = True

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H // 2, W // 2]."""
        height, width = x.shape[-2:]
        return x[..., : height // 2 * 2 : 2, : width // 2 * 2 : 2]


class PreEncoder(nn.Module):
    """Images to mean and log-variance (PRE-DFKD, encoder of the VAE).

    The input is first scaled so that each column of each channel has unit norm. The published code normalises that axis,
    probably by accident; it stays.

    Args:
      small_start: halve once more, for the 64x64 form whose decoder starts at H / 8.
    """

    def __init__(self, nz: int, shape: Shape, *, small_start: bool = False, init: str = "uniform"):
        super().__init__()
        channels, *size = shape
        least = 16 if small_start else 8
        if min(size) < least:
            raise ConfigError(f"enc_pre needs images of at least {least} x {least} pixels, found {size[0]} x {size[1]}.")
        self.init = init
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(64, 0.8)
        self.conv2 = nn.Conv2d(64, 128, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(128, 0.8)
        self.act = leaky()
        self.halve = HalveNearest()
        self.conv3 = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(128)  # no activation behind it
        self.tail = nn.Sequential(*(HalveNearest() for _ in range(2 if small_start else 1)))
        size = [-(-(s // 2) // 2) // (4 if small_start else 2) for s in size]
        self.mean = nn.Linear(128 * size[0] * size[1], nz)
        self.logvar = nn.Linear(128 * size[0] * size[1], nz)
        self.reinit()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [b, c, H, W] → mean [b, nz], log-variance [b, nz]."""
        x = F.normalize(x, dim=2)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.tail(self.bn3(self.conv3(self.halve(x))))
        x = torch.flatten(x, 1)
        return self.mean(x), self.logvar(x)

    def reinit(self, init: str | None = None) -> None:
        """Draw all weights anew, in place, from torch's global generator (see `Generator.reinit`)."""
        reinitialise(self, init or self.init)


def encoder(name: str, nz: int, shape: Shape, *, small_start: bool = False) -> nn.Module:
    """An encoder by name (`fastkd.models.ENCODERS`): images [b, c, H, W] → mean and log-variance [b, nz].

    Raises:
      ConfigError: an unknown name, or images that are too small.
    """
    from . import ENCODERS

    if name not in ENCODERS:
        raise ConfigError(unknown("encoder", name, ENCODERS))
    return PreEncoder(nz, shape, small_start=small_start)
