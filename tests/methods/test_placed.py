"""A whole small run ends in the same bits wherever the images of its stores are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd import ranks
from fastkd.engine import loop, state
from fastkd.memory import Places
from tests import small

VARIANTS = [
    ("fast", {"kd_aug": "resized_crop"}),
    ("muse", {"resolutions": (8, 16), "res_schedule": "remaining"}),
    ("mb", {"epochs": 4}),  # a ring of fp16, read by rows that each rank draws for itself
    ("cmi", {"preinverted": True}),
    ("ssd", {}),  # drawn by priority, with eviction
]
"""Every way in which a method uses its stores."""


def ended(variant, images, tier):
    """All state after a run, with the images of all ranks."""
    method = small.small(*variant)
    loop.prepare(method, dataclasses.replace(small.given(), places=Places(images, tier)))
    assert small.run(method) == 0
    tensors, numbers = state.collect(method)
    apart = {i.path: i.store for i in state.walk(method) if isinstance(i, state.ImagesItem)}
    assert bool(apart) == ((images, tier) != ("replicated", "device"))
    for path, store in apart.items():
        own = store.held()
        assert store.shards == (ranks.world() if images == "sharded" else 1) and len(own)
        most = torch.zeros(store.capacity, *own.shape[1:], dtype=torch.float64)
        mine = most[ranks.rank() :: store.shards] if store.shards > 1 else most
        mine[: len(own)] = own.double()
        tensors[path] = (ranks.total(most) if store.shards > 1 else most).to(own.dtype)
    return tensors, numbers


def compare(variant, places):
    whole = ended(variant, "replicated", "device")
    for images, tier in places:
        tensors, numbers = ended(variant, images, tier)
        assert numbers == whole[1] and tensors.keys() == whole[0].keys()
        far = [k for k in tensors if not torch.equal(tensors[k].nan_to_num(7e7), whole[0][k].nan_to_num(7e7))]
        assert not far, (variant, images, tier, far)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for variant in VARIANTS:
        compare(variant, [("sharded", "device"), ("sharded", "host")])
    small.end_of_rank()


def test_on_two_ranks_sharded_equals_replicated(tmp_path):
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2]], ids=small.ident)
def test_on_one_rank_host_memory_equals_the_device(variant):
    compare(variant, [("replicated", "host")])
