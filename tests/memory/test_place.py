"""Where a store's images go: the estimate, and what may be left to it."""

from __future__ import annotations

import pytest
import torch

from fastkd import ranks
from fastkd.memory import Places, Prioritised, Store, placed
from fastkd.memory.place import SHARE, host_memory
from fastkd.rng import Rng

GB = 10**9


def on_gpu(images="auto", tier="auto"):
    """A GPU of 80 GB in a machine where each rank may fill 100 GB."""
    return Places(images, tier, True, 40 * GB, 100 * GB)


@pytest.mark.parametrize(
    ("size", "world", "expected"),
    [
        (2 * GB, 8, ("replicated", "device")),
        (48 * GB, 8, ("sharded", "device")),  # 1.28 M images of 112²
        (81 * GB, 1, ("replicated", "host")),  # 540,000 of 224²
        (81 * GB, 2, ("replicated", "host")),
        (150 * GB, 2, ("sharded", "host")),
        (900 * GB, 2, ("sharded", "host")),  # does not fit: the place with most room
        (900 * GB, 1, ("replicated", "host")),
    ],
)
def test_the_first_place_with_room_is_taken(size, world, expected, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: world)
    assert on_gpu().choose(size) == expected


def test_several_stores_share_the_room(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 4)
    places = on_gpu()
    assert [places.choose(size * GB) for size in (30, 30, 30, 1)] == [
        ("replicated", "device"), ("sharded", "device"), ("replicated", "host"), ("replicated", "device"),
    ]  # fmt: skip
    assert places.said == [
        "a store's images (30 GB) are kept on the device, sharded over 4 ranks",
        "a store's images (30 GB) are kept in host memory, whole on every rank",
    ]


def test_what_a_run_asks_for_is_done(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    assert on_gpu(images="sharded").choose(GB) == ("sharded", "device")
    assert on_gpu(images="sharded").choose(90 * GB) == ("sharded", "host")
    assert on_gpu(tier="host").choose(GB) == ("replicated", "host")
    assert on_gpu(tier="device").choose(500 * GB) == ("sharded", "device")
    assert on_gpu(images="replicated", tier="device").choose(500 * GB) == ("replicated", "device")


def test_on_a_cpu_the_tiers_are_one(monkeypatch):
    monkeypatch.setattr(ranks, "max", lambda x: x)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    places = Places.measured(torch.device("cpu"))
    assert places.host_bytes == places.device_bytes == int(SHARE * host_memory() / 2) > 0
    assert places.choose(GB // 1000) == ("replicated", "device")
    assert places.choose(100_000 * GB) == ("sharded", "device")


def test_a_store_may_ask_for_a_place_of_its_own(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    assert on_gpu().choose(60 * GB, images="replicated") == ("replicated", "host")
    assert on_gpu(images="sharded", tier="device").choose(GB, tier="host") == ("sharded", "host")
    monkeypatch.undo()
    with placed(on_gpu(tier="host")):
        assert Store(Rng(), 4, (1, 2, 2)).tier == "host" and Prioritised(Rng(), 4, (1, 2, 2), rule="fifo").hosted
        assert Store(Rng(), 4, (1, 2, 2), images="replicated", tier="device").tier == "device"
    assert Store(Rng(), 4, (1, 2, 2)).tier == "device" and not Store(Rng(), 4, (1, 2, 2)).apart


def test_the_ranks_of_this_machine(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 16)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.local_world() == 16
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    assert ranks.local_world() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ranks.local_world() == 8
