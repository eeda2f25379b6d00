"""Draws that depend on (seed, epoch, step, occurrence, name) and on nothing else: not on ranks, not on history.

Every step of a run begins with `at(...)`. Per-sample draws are made for the global batch and this rank's rows are kept, so
any number of ranks sees the same numbers; an add-on draws from a stream (`name`) of its own, so its host's draws stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd import ranks

FAR = 2**62
"""A draw below this, modulo a count on the device, is uniform to better than 1e-12."""


def derive(*key: object) -> int:
    """A 63-bit seed from any printable key; stable over Python versions and machines."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Rng:
    """Random numbers of a run. One generator (or counter) a stream lives as long as the run and is re-seeded, never replaced.

    Args:
      device: where the draws are made and returned.
      dtype: floating dtype of normal and uniform draws; None is torch's default dtype.
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        self.device, self.dtype = torch.device(device), dtype
        self._streams: dict[str, torch.Generator] = {}
        self._counters: dict[str, Tensor] = {}
        self._key: tuple[object, ...] = (0, -1, "build", 0)

    def at(self, seed: int, epoch: int, step: str, occurrence: int) -> None:
        """Seed all streams, and torch's global generator, for one step."""
        self._key = (seed, epoch, step, occurrence)
        for name, generator in self._streams.items():
            generator.manual_seed(derive(*self._key, name))
        for name, counter in self._counters.items():
            self._restart(counter, name)
        torch.manual_seed(derive(*self._key, "torch"))

    def whole(self, name: str = "") -> torch.Generator:
        """The generator of a stream itself, in the same state on all ranks."""
        if name not in self._streams:
            self._streams[name] = torch.Generator(self.device)
            self._streams[name].manual_seed(derive(*self._key, name))
        return self._streams[name]

    def generators(self) -> Iterator[torch.Generator]:
        """Those of all streams that were drawn from so far."""
        yield from self._streams.values()

    def counter(self, name: str = "") -> Tensor:
        """The key of a stream of counter-based draws (`ops.philox_uniform`): [2] int64, (seed, offset), the same on all ranks.

        It lives on the device as long as the run, so a CUDA graph can hold it; `at` re-seeds it in place. Who draws n numbers adds
        n to the offset.
        """
        if name not in self._counters:
            self._counters[name] = torch.zeros(2, dtype=torch.int64, device=self.device)
            self._restart(self._counters[name], name)
        return self._counters[name]

    def _restart(self, counter: Tensor, name: str) -> None:
        counter[:1].fill_(derive(*self._key, name))  # fills, because an assignment would copy from the host and wait for the device
        counter[1:].fill_(0)

    def _size(self, batch: int | Tensor) -> int:
        return batch if isinstance(batch, int) else batch.shape[0] * ranks.world()

    def _own(self, x: Tensor) -> Tensor:
        x = ranks.local(x)
        x.per_sample = True  # type: ignore[attr-defined]
        return x

    def normal(self, batch: int | Tensor, *shape: int, name: str = "") -> Tensor:
        """N(0, 1), one row a sample of the global batch (`batch`: its size, or a tensor with as many local rows)."""
        size = (self._size(batch), *shape)
        return self._own(torch.randn(size, generator=self.whole(name), device=self.device, dtype=self.dtype))

    def uniform(self, batch: int | Tensor, *shape: int, name: str = "") -> Tensor:
        """U[0, 1), one row a sample of the global batch."""
        size = (self._size(batch), *shape)
        return self._own(torch.rand(size, generator=self.whole(name), device=self.device, dtype=self.dtype))

    def integers(self, high: int, batch: int | Tensor, *shape: int, name: str = "") -> Tensor:
        """int64 uniform on 0 … high - 1, one row a sample of the global batch."""
        size = (self._size(batch), *shape)
        return self._own(torch.randint(high, size, generator=self.whole(name), device=self.device))

    def labels(self, batch: int | Tensor, classes: int, name: str = "") -> Tensor:
        """Uniform class labels [b] int64."""
        return self.integers(classes, batch, name=name)

    def among(self, counts: Tensor, name: str = "") -> Tensor:
        """int64 [b], row i uniform on 0 … counts[i] - 1; `counts` int64 [b] of at least 1, one a local row, not read by the host."""
        return self.integers(FAR, counts, name=name) % counts

    def pick(self, high: int, n: int = 1, name: str = "") -> Tensor:
        """`n` int64 draws on 0 … high - 1, the same on all ranks (slots, rolls)."""
        return torch.randint(high, (n,), generator=self.whole(name), device=self.device)

    def permutation(self, n: int, name: str = "") -> Tensor:
        """A permutation of 0 … n - 1, the same on all ranks."""
        return torch.randperm(n, generator=self.whole(name), device=self.device)
