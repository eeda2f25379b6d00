"""Images that are dealt to the ranks, on either tier: the same draws and the same bits as whole on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from fastkd import ranks
from fastkd.memory import Prioritised, Store
from fastkd.memory.shard import deal, held
from fastkd.rng import Rng
from tests import small
from tests.recorder import NoHostRead

SHAPE = (2, 3, 4)
ELSEWHERE = [("sharded", "device"), ("sharded", "host"), ("replicated", "host")]


@given(n=st.integers(0, 40), before=st.integers(1, 9), after=st.integers(1, 9), spare=st.integers(0, 2), chunk=st.integers(1, 200))
def test_dealing_to_another_number_of_ranks_conserves_every_sample(n, before, after, spare, chunk):
    x = torch.arange(n * 24).reshape(n, 3, 4, 2).to(torch.float32)
    parts = [x[r::before] for r in range(before)]
    again = [torch.full((held(n, r, after) + spare, 3, 4, 2), -1.0) for r in range(after)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.memory.shard.CHUNK", chunk * 96)
        for r in range(after):
            deal(parts, again[r], r, after)
    assert all(torch.equal(again[r][: held(n, r, after)], x[r::after]) for r in range(after))
    assert all((rows[held(n, r, after) :] == -1).all() for r, rows in enumerate(again))


def test_parts_that_do_not_fit_are_refused():
    x = torch.zeros(5, 3, 4, 2)
    with pytest.raises(ValueError, match=r"part 0 of 2 has 2 rows; expected 3 of 5"):
        deal([x[:2], x[2:]], torch.zeros(5, 3, 4, 2), 0, 1)
    with pytest.raises(ValueError, match=r"rows are \(3, 4, 2\) torch.uint8, saved as \(3, 4, 2\) torch.float32"):
        deal([x], torch.zeros(5, 3, 4, 2, dtype=torch.uint8), 0, 1)
    with pytest.raises(ValueError, match="5 rows are saved for this rank, there is room for 4"):
        deal([x], torch.zeros(4, 3, 4, 2), 0, 1)


# Two and three ranks ------------------------------------------------------------------------------------------------------------


def pair(kind, where, **more):
    """A store that is whole here on every rank, and one that is not."""
    rngs = Rng(), Rng()
    stores = kind(rngs[0], SHAPE, **more), kind(rngs[1], SHAPE, images=where[0], tier=where[1], **more)

    def at(n):
        for rng in rngs:
            rng.at(0, 0, "step", n)

    return *stores, at


def same_rows(a, b):
    assert torch.equal(a.index, b.index) and torch.equal(a.column("label"), b.column("label"))
    crop = {"pad": 1, "dy": torch.full_like(a.index, 2), "flip": a.index % 2 == 0}
    assert torch.equal(a.gather(**crop), b.gather(**crop)) and torch.equal(a.read(), b.read())


def batch(n):
    whole = torch.rand(n * ranks.world(), *SHAPE)
    return ranks.local(whole), {"label": ranks.local(torch.arange(len(whole)))}


def append_and_deal(where, dtype, ring):
    world = ranks.world()
    capacity = 6 * world + 1  # not a multiple of the ranks

    def kind(rng, shape, **more):
        return Store(rng, capacity, shape, dtype, ring=ring, label=torch.int16, **more)

    whole, apart, at = pair(kind, where)
    for store in (whole, apart):
        store.reserve(5 * 2 * world)
        with pytest.raises(ValueError, match="nothing is stored"):
            store.deal()
    for n in range(4 if ring else 2):  # a ring goes round
        x, columns = batch(3)
        assert torch.equal(whole.add(x, **columns), apart.add(x, **columns))
        at(n)
        for store in (whole, apart):
            store.deal()
        for size in (2, 2, 2, 1, 1, 2, 2):  # another size in between, and past the end of the order
            with NoHostRead() as watch:
                rows = apart.next(size * world)
                rows.gather()
            assert set(watch.found) <= {"aten::lift_fresh"}  # the host's own list of rows
            same_rows(whole.next(size * world), rows)
    for store in (whole, apart):
        with pytest.raises(ValueError, match="at once do not fit" if ring else "more do not fit"):
            store.put(torch.zeros(capacity + 1, 3, 4, 2, dtype=torch.uint8), label=torch.zeros(capacity + 1, dtype=torch.int16))
    assert len(whole) == len(apart) and whole.bytes == apart.bytes
    own = torch.arange(ranks.rank(), len(whole), 2)[:3]  # each rank asks for rows of its own
    same_rows(whole.rows(own), apart.rows(own))
    if where[0] == "sharded":
        assert torch.equal(apart.held(), ranks.local(whole.images[: len(whole)]))
        assert len(apart.images) == (7 + 1 if world > 1 else 7)  # with other ranks, a last row for what is theirs
    # Who writes to the order or to the images behind the store's back, as a resume does, is noticed.
    at(99)
    for store in (whole, apart):
        store.deal()
    same_rows(whole.next(world), apart.next(world))
    for store in (whole, apart):
        store.order.copy_(store.order.flip(0))
        store.cursor.fill_(world)
    same_rows(whole.next(world), apart.next(world))
    apart.load([whole.images[: len(whole)].flip(0)])
    whole.images[: len(whole)] = whole.images[: len(whole)].flip(0)
    same_rows(whole.next(world), apart.next(world))


def draw_and_write(where):
    world = ranks.world()

    def kind(rng, shape, **more):
        return Prioritised(rng, 4 * world + 1, shape, classes=3, label=torch.int64, **more)

    whole, apart, at = pair(kind, where)
    for n in range(4):
        at(n)
        x, columns = batch(2)
        columns["label"] %= 3
        assert torch.equal(whole.add(x, **columns), apart.add(x, **columns))  # from the third on, rows are evicted
        for _ in range(3):
            a = whole.draw(2 * world)
            with NoHostRead() as watch:
                b = apart.draw(2 * world)
                b.rows.gather()
            assert not watch.found and torch.equal(a.p, b.p)
            same_rows(a.rows, b.rows)
            for store, drawn in ((whole, a), (apart, b)):
                store.write(drawn.i, drawn.p + drawn.i % 3)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    for where in ELSEWHERE:
        append_and_deal(where, torch.uint8, ring=False)
        append_and_deal(where, torch.float16, ring=True)
        draw_and_write(where)
    small.end_of_rank()


@pytest.mark.parametrize("world", [2, 3])
def test_batches_are_the_same_bits_wherever_the_images_are(world, tmp_path):
    mp.spawn(worker, (world, str(tmp_path)), nprocs=world)


@pytest.mark.parametrize("where", ELSEWHERE)
def test_on_one_rank_too(where):
    append_and_deal(where, torch.uint8, ring=True)
    draw_and_write(where)
