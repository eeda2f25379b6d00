"""Where the images of a run's stores live: on which tier, and whether every rank holds them all. An estimate decides what is left open."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastkd import ranks
from fastkd.files import amount

Sharing = Literal["replicated", "sharded"]
Tier = Literal["device", "host"]
SHARE = 0.5
"""What images may take of a device's memory, or of a rank's part of the host's; networks, activations and the system have the rest."""


@dataclass
class Places:
    """Decides for one store after the other, as they are made.

    Attributes:
      images, tier: what a run asks for; "auto" is the first that fits, in this order: replicated on the device, sharded on the device,
        replicated in host memory, sharded in host memory (the last one even if it does not fit). On a CPU the two tiers are one.
      device_bytes, host_bytes: what images may take on this rank, the same on all ranks; `measured` finds them.
    """

    images: Literal["auto", "replicated", "sharded"] = "auto"
    tier: Literal["auto", "device", "host"] = "auto"
    on_gpu: bool = False
    device_bytes: int = 0
    host_bytes: int = 0
    said: list[str] = field(default_factory=list)

    @classmethod
    def measured(cls, device: torch.device, images: str = "auto", tier: str = "auto") -> Places:
        """With `SHARE` of the memory of `device` and of this rank's part of the host's; a collective."""
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        found = cls.of(memory, images, tier, ranks_here=ranks.local_world())
        least = -ranks.max(torch.tensor([-found.device_bytes, -found.host_bytes]))  # one decision for all, whatever machines they are on
        found.device_bytes, found.host_bytes = least.tolist()
        return found

    @classmethod
    def of(cls, memory: int | None, images: str = "auto", tier: str = "auto", *, ranks_here: int = 1) -> Places:
        """With `SHARE` of a GPU's `memory` in bytes (None: on a CPU), and of one of `ranks_here` ranks' part of this machine's."""
        host = int(SHARE * host_memory() / ranks_here)
        own = host if memory is None else int(SHARE * memory)
        return cls(images, tier, memory is not None, own, host)  # type: ignore[arg-type]

    def choose(self, size: int, images: Sharing | None = None, tier: Tier | None = None) -> tuple[Sharing, Tier]:
        """Where a store with `size` bytes of images goes, which itself may ask for a place; its room is taken."""
        tiers: list[Tier] = ["device", "host"] if self.on_gpu else ["device"]
        sharing: list[Sharing] = ["replicated", "sharded"] if ranks.world() > 1 else ["replicated"]
        if tier is not None or self.tier != "auto":
            tiers = [tier or self.tier]  # type: ignore[list-item]
        if images is not None or self.images != "auto":
            sharing = [images or self.images]  # type: ignore[list-item]
        options: list[tuple[Sharing, Tier]] = [(s, t) for t in tiers for s in sharing]
        chosen = next((o for o in options if self._need(size, o) <= self._left(o[1])), options[-1])
        need = self._need(size, chosen)
        if chosen[1] == "device":
            self.device_bytes -= need
        else:
            self.host_bytes -= need
        if chosen != ("replicated", "device"):
            where = {"device": "on the device", "host": "in host memory"}[chosen[1]]
            how = f"sharded over {ranks.world()} ranks" if chosen[0] == "sharded" else "whole on every rank"
            self.said.append(f"a store's images ({amount(size)}) are kept {where}, {how}")
        return chosen

    def _need(self, size: int, option: tuple[Sharing, Tier]) -> int:
        return -(-size // ranks.world()) if option[0] == "sharded" else size

    def _left(self, tier: Tier) -> int:
        return self.device_bytes if tier == "device" else self.host_bytes


def host_memory() -> int:
    """Bytes of this machine's memory, or of what its container may use."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        most = min(most, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return most


_places: contextvars.ContextVar[Places | None] = contextvars.ContextVar("places", default=None)


@contextlib.contextmanager
def placed(places: Places | None) -> Iterator[None]:
    """Context: stores that do not say where their images live ask `places`; None: on the device, replicated."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


def place(size: int, images: Sharing | None, tier: Tier | None) -> tuple[Sharing, Tier]:
    """Where a store goes that asks for `images` and `tier`, None where it leaves them open."""
    places = _places.get()
    return places.choose(size, images, tier) if places is not None else (images or "replicated", tier or "device")
