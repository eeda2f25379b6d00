"""Where a run that is only asked about (`plan`, `--dry-run`) would run: its device, and the memory that its images could take there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastkd.assemble.device import resolve_device
from fastkd.errors import ConfigError, PlaceError
from fastkd.memory import Places

ASSUMED = 80 << 30
"""Bytes of a GPU that is not here and of which nobody has said how large it is."""


@dataclass(frozen=True)
class Target:
    """The device of each of `world` ranks on one machine with as much host memory as this one.

    Attributes:
      name: "cpu", or "cuda" with its number where it has one. on_gpu: whether it is a GPU. here: that device, or None where it is not here.
      memory: bytes of one GPU, 0 on a CPU. world: ranks. said: what was assumed.
    """

    name: str
    on_gpu: bool
    here: torch.device | None
    memory: int = 0
    world: int = 1
    said: list[str] = field(default_factory=list)

    @property
    def stand_in(self) -> torch.device:
        """The device of this machine on which its steps can be tried."""
        return self.here or torch.device("cpu")

    def places(self, images: str, tier: str) -> Places:
        """Where the run's stores would go."""
        return Places.of(self.memory if self.on_gpu else None, images, tier, ranks_here=self.world)


def target(name: str, world: int = 1, memory: int | None = None) -> Target:
    """The device that a run with `--device NAME` on `world` ranks uses.

    It may be elsewhere: a GPU that is named, whose memory is stated, or that each of several ranks needs while none is here.

    Args:
      memory: bytes of the GPU, None: those of the one here, else `ASSUMED`.
    Raises:
      ConfigError: no device name, or memory of a GPU for a CPU.
    """
    try:
        here: torch.device | None = resolve_device(name)
    except PlaceError:
        here = None
    if name == "auto" and here is not None and here.type == "cpu" and (memory is not None or world > 1):
        here = None  # a CPU is never chosen for several ranks: it must be named
    if here is not None and here.type == "cpu":
        if memory is not None:
            raise ConfigError("--device-memory is that of a GPU, and --device cpu asks for none; leave out one of them.")
        return Target("cpu", False, here, world=world)
    if here is not None:
        return Target(str(here), True, here, memory or torch.cuda.get_device_properties(here).total_memory, world)
    assumed = f"no GPU is here: one of {ASSUMED >> 30} GiB is assumed (`fastkd plan --device-memory` states another)"
    return Target("cuda" if name == "auto" else name, True, None, memory or ASSUMED, world, [] if memory else [assumed])
