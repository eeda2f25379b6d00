"""Ranks that see different states of one folder, as on a network disk that lags, go on from the newest checkpoint that all can read."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd.engine import checkpoint, events, loop
from fastkd.errors import CheckpointError
from tests import small


def run(rank, out, **settings):
    method = small.prepared("fast")
    return loop.run(method, loop.Settings(poll=1, keep=9, **settings), events.Events(out if rank == 0 else None), out, resume=True)


def lagging(rank, world, folder):
    """Rank 1 sees no checkpoint of step 9 and only a part of that of step 6: it takes 3, and so do all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    out, whole = folder / "run", folder / "whole"
    for place in (out, whole) if rank == 0 else ():
        place.mkdir()
    dist.barrier()
    assert run(rank, out, every_steps=3, max_steps=9) == 75 and run(rank, whole, every_steps=10**6) == 0
    listed, read = checkpoint.listed, checkpoint.read

    def on_its_way(path):
        if path.name == checkpoint.name_of(6):
            raise ValueError("state.safetensors is missing")
        return read(path)

    if rank:
        checkpoint.listed = lambda place: [p for p in listed(place) if p.name != checkpoint.name_of(9)]
        checkpoint.read = on_its_way
    assert run(rank, out, every_steps=10**6) == 0
    checkpoint.listed, checkpoint.read = (lambda place: []) if rank else listed, read
    with pytest.raises(CheckpointError, match=r"^rank 1 cannot read the checkpoint of step \d+, nor an older one; all must see the same"):
        run(rank, out)
    small.end_of_rank()


def test_ranks_agree_on_the_newest_checkpoint_that_all_can_read(tmp_path):
    mp.spawn(lagging, (2, tmp_path), nprocs=2)
    seen = list(events.read(tmp_path / "run" / "events.jsonl"))
    (said,) = [e["text"] for e in seen if e["kind"] == "warning" and "checkpoint" in e["text"]]
    assert said == "rank 1 cannot read the checkpoint of step 9; all ranks go on from step 3"
    assert [e["checkpoint"] for e in seen if e["kind"] == "resumed"] == [checkpoint.name_of(3)]
    assert not checkpoint.set_aside(tmp_path / "run" / "checkpoints")  # what is on its way to one rank is whole for another
    a, b = (checkpoint.newest(tmp_path / name / "checkpoints", []) for name in ("run", "whole"))
    assert a.position == b.position and a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors if not k.startswith("log."))


def test_what_a_run_takes_again_in_another_way_is_forgotten(tmp_path):
    small.run(small.prepared("noise"), tmp_path, every_steps=2, keep=9, max_steps=6)
    checkpoint.forget_after(tmp_path / "checkpoints", 4)
    assert [p.name for p in checkpoint.listed(tmp_path / "checkpoints")] == [checkpoint.name_of(n) for n in (4, 2)]
