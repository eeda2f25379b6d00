"""A run whose images are dealt to its ranks, stopped in mid-epoch and continued on other numbers of ranks: T26 of the fault table."""

from __future__ import annotations

import collections
import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from fastkd import ranks
from fastkd.engine import checkpoint, loop
from fastkd.engine.events import Events
from fastkd.memory import Places
from fastkd.method import steps
from tests import small

pytestmark = pytest.mark.faults

VARIANT = ("fast", {"kd_aug": "resized_crop"})
NEAR = 1e-9
"""Relative to the largest value of a tensor, in fp64."""


def walked(out, images, tier, **settings):
    """A run up to `max_steps`, or to its end; rank 0 alone writes events."""
    method = small.small(*VARIANT)
    loop.prepare(method, dataclasses.replace(small.given(), places=Places(images, tier)))
    events = Events(out if ranks.rank() == 0 else None)
    code = loop.run(method, loop.Settings(poll=1, every_minutes=1e6, about={"method": "fast"}, **settings), events, out, resume=True)
    assert code == (0 if settings.get("max_steps") is None else 75)


def worker(rank, world, out, images, tier, settings):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{out}/store-{world}", rank=rank, world_size=world)
    walked(out, images, tier, **settings)
    small.end_of_rank()


def on(world, out, images="sharded", tier="device", **settings):
    out.mkdir(exist_ok=True)
    (out / f"store-{world}").unlink(missing_ok=True)  # of an attempt before, whose ranks have left at once
    mp.spawn(worker, (world, out, images, tier, settings), nprocs=world)


def newest(out):
    """The newest checkpoint, its tensors and the images of all of its files in the order of their numbers."""
    saved = checkpoint.newest(out / "checkpoints", [])
    (parts,) = saved.images.values() if saved.images else ([saved.tensors.pop("pool.images")],)
    n = saved.numbers["pool.fill"]
    whole = torch.zeros(max(n, sum(map(len, parts))), *parts[0].shape[1:], dtype=parts[0].dtype)
    for r, part in enumerate(parts):
        whole[r :: len(parts)] = part[:]
    return saved, whole[:n], len(parts)


def samples(images):
    return collections.Counter(bytes(row.numpy().tobytes()) for row in images)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One rank, images whole on it."""
    out = tmp_path_factory.mktemp("undisturbed")
    on(1, out, "replicated")
    return newest(out)


@pytest.mark.fault("T26")
def test_stopped_on_two_ranks_continued_on_one_and_then_on_four(tmp_path, undisturbed):
    total, out = sum(1 for e in range(3) for _ in steps(small.prepared(*VARIANT), e)), tmp_path / "run"
    on(2, out, max_steps=14)  # after the first of three student steps
    two, images, parts = newest(out)
    assert two.tensors["pool.cursor"] == 8 and two.position == (1, 9)
    assert parts == 2 and len(images) == 24 and two.manifest["world"] == 2
    assert {"images-r000.safetensors", "images-r001.safetensors"} <= two.manifest["files"].keys()
    on(1, out, "auto", "auto", max_steps=5)  # it takes them into its state, as one rank keeps them
    one, again, parts = newest(out)
    assert one.position == (2, 3) and parts == 1 and not (samples(images) - samples(again)) and torch.equal(again[: len(images)], images)
    assert "saved by 2 ranks, continued by 1: equal to rounding, not to the bit" in (out / "events.jsonl").read_text()
    on(4, out, tier="host")
    last, images, parts = newest(out)
    first, expected, _ = undisturbed
    assert parts == 4 and last.manifest["step"] == total and last.numbers == first.numbers
    assert len(images) == len(expected) == 36 and samples(images) == samples(expected)
    assert last.tensors.keys() == first.tensors.keys()
    pairs = {k: (first.tensors[k].double(), t.double()) for k, t in last.tensors.items() if t.numel()}
    far = sorted(((float((a - b).abs().max() / (1 + a.abs().max())), k) for k, (a, b) in pairs.items()), reverse=True)
    assert far[0][0] < NEAR, far[:5]


@pytest.mark.fault("T9", "T11")
def test_damaged_or_missing_images_are_noticed_and_the_older_checkpoint_is_taken(tmp_path):
    out = tmp_path / "run"
    on(2, out, max_steps=4)
    on(2, out, max_steps=4)
    path = checkpoint.listed(out / "checkpoints")[0] / "images-r001.safetensors"
    tensors = load_file(path)
    tensors["pool.images"][0] ^= 1
    save_file(tensors, path)
    said: list[str] = []
    assert checkpoint.newest(out / "checkpoints", said).manifest["step"] == 4
    assert "images-r001.safetensors does not match its checksum" in said[0]
    checkpoint.listed(out / "checkpoints")[0].joinpath("images-r000.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"step-00000004: images-r000.safetensors is missing"):
        checkpoint.newest(out / "checkpoints", said)


def full_disk(rank, world, out):
    """Rank 1 cannot write its images in the second save: no rank keeps that checkpoint, and the third is whole again."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    real, calls = checkpoint.write_tensors, []

    def write_tensors(path, tensors):
        calls.append(path)
        if rank == 1 and len(calls) in (2, 3):  # the save and its second try
            raise OSError(28, "No space left on device")
        return real(path, tensors)

    checkpoint.write_tensors = write_tensors
    method = small.small(*VARIANT)
    loop.prepare(method, dataclasses.replace(small.given(), places=Places("sharded", "device")))
    settings = loop.Settings(poll=1, every_steps=5, keep=9, max_steps=15)
    assert loop.run(method, settings, Events(out if rank == 0 else None), out) == 75
    found = [p.name for p in checkpoint.listed(out / "checkpoints")]
    assert found == ["step-00000015", "step-00000005"] and not list((out / "checkpoints").glob(".tmp*"))
    small.end_of_rank()


@pytest.mark.fault("T13")
def test_a_full_disk_on_one_rank_costs_that_checkpoint_on_all(tmp_path):
    mp.spawn(full_disk, (2, tmp_path), nprocs=2)
    assert "checkpoint at step 10 could not be written: another rank could not write its part" in (tmp_path / "events.jsonl").read_text()
