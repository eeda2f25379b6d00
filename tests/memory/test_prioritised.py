"""Prioritised replay: draws in proportion, write-back, eviction, histogram; state, resume, and ranks that agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd import ranks
from fastkd.engine import loop, state
from fastkd.engine.dry import walk
from fastkd.errors import ConfigError
from fastkd.memory import Prioritised, Rows, Store
from fastkd.memory.evict import entering, frequent, lowest
from fastkd.method import Method, Step, step
from fastkd.ops import replay_sums
from fastkd.rng import Rng
from tests import small

SHAPE = (1, 2, 3)


def store(capacity=10, **kw):
    rng = Rng()
    rng.at(0, 0, "draw", 0)
    return Prioritised(rng, capacity, SHAPE, **{"classes": 3, "label": torch.int16, "eps": 0.0, **kw})


def fill(s, priority, label=None):
    priority = torch.as_tensor(priority, dtype=torch.float32)
    label = torch.zeros(len(priority)) if label is None else torch.tensor(label)
    return s.add(torch.rand(len(priority), *SHAPE), priority, label=label)


def test_rows_are_drawn_in_proportion_to_their_priority():
    s = store(6)
    fill(s, [1, 0, 3, 0, 4])
    rows, index, p = s.draw(80_000)
    count = torch.bincount(index, minlength=6)
    assert count[[1, 3, 5]].sum() == 0 and torch.equal(rows.index, index)
    torch.testing.assert_close(count[[0, 2, 4]] / len(index), torch.tensor([1, 3, 4]) / 8, rtol=0.02, atol=0)
    torch.testing.assert_close(p, s.probabilities()[index])
    assert s.least() == 1 / 8 and s.probabilities().sum() == 1


def test_equal_priorities_give_weights_of_one_and_eps_keeps_rows_drawable():
    s = store(4, eps=1e-6)
    fill(s, [0, 0, 0, 0])
    _, _, p = s.draw(16)
    torch.testing.assert_close((len(s) * p) ** -0.4, torch.ones(16))


def test_write_changes_drawn_rows_only_and_settles_duplicates():
    for duplicates, expected in (("last", 2.0), ("max", 6.0), ("mean", 4.0)):
        s = store(5)
        fill(s, [1, 1, 1, 1, 1])
        s.write(torch.tensor([3, 0, 3]), torch.tensor([6.0, -7.0, 2.0]), duplicates=duplicates)
        assert s.leaves.tolist() == [7, 1, 1, expected, 1]
        assert torch.equal(s.sums, replay_sums(s.leaves))


def test_columns_are_written_with_the_priorities():
    s = store(4, w=torch.float32)
    s.add(torch.rand(4, *SHAPE), torch.ones(4), label=torch.zeros(4), w=torch.ones(4))
    s.write(torch.tensor([2, 0, 2]), torch.tensor([6.0, 7.0, 2.0]), w=torch.tensor([0.5, 0.25, 0.5]))
    assert s.columns["w"].tolist() == [0.25, 1, 0.5, 1] and s.leaves.tolist() == [7, 1, 2, 1]


def test_uniform_draws_are_those_of_equal_priorities():
    s = store(8)
    fill(s, torch.ones(7))
    rows, index, p = s.draw(4096)
    s.rng.at(0, 0, "draw", 0)
    s.write(torch.tensor([5]), torch.tensor([40.0]))
    same, again, q = s.draw(4096, uniform=True)
    assert torch.equal(index, again) and torch.equal(p, q) and torch.equal(rows.index, same.index)
    assert again.unique().tolist() == list(range(7)), "what is not stored is not drawn"
    assert not torch.equal(s.draw(4096, uniform=True).i, again), "a step's second draw differs"


def test_alpha_is_an_exponent_and_can_be_changed():
    s = store(3, alpha=0.5)
    fill(s, [4, 9, 0])
    assert s.leaves.tolist() == [2, 3, 0]
    s.set_alpha(1.0)
    torch.testing.assert_close(s.leaves, torch.tensor([4.0, 9.0, 0.0]))
    torch.testing.assert_close(s.sums, replay_sums(s.leaves))
    with pytest.raises(ValueError, match=r"from 1.0 to 0.0; both must be positive"):
        s.set_alpha(0.0)


def test_a_new_row_without_a_priority_gets_the_highest():
    s = store(4)
    assert s.add(torch.rand(1, *SHAPE), label=torch.zeros(1)).tolist() == [0] and s.leaves[0] == 1
    fill(s, [5])
    s.add(torch.rand(2, *SHAPE), label=torch.zeros(2))
    assert s.leaves.tolist() == [1, 5, 5, 5]


# Eviction ---------------------------------------------------------------------------------------------------------------------


def one_by_one(score, label, n):
    """The rule as a sentence: the most frequent class gives up its lowest, n times; of equally frequent ones, the lowest of all."""
    left, gone = list(range(len(score))), []
    for _ in range(n):
        counts = {c: sum(label[i] == c for i in left) for c in label}
        most = max(counts.values())
        gone.append(min((i for i in left if counts[label[i]] == most), key=lambda i: score[i]))
        left.remove(gone[-1])
    return gone


@pytest.mark.parametrize("seed", range(8))
def test_the_most_frequent_class_gives_up_its_lowest(seed):
    gen = torch.Generator().manual_seed(seed)
    score, label = torch.rand(40, generator=gen), torch.randint(0, 4, (40,), generator=gen).clamp_min(1)
    for n in (0, 1, 7, 40):
        assert frequent(score, label, n).tolist() == one_by_one(score.tolist(), label.tolist(), n)


def test_lowest_of_equals_is_the_first():
    assert lowest(torch.tensor([2.0, 1.0, 1.0, 0.0]), 3).tolist() == [3, 1, 2]


@pytest.mark.parametrize(("places", "stored"), [(9, 4), (6, 4), (6, 6), (40, 6)])
def test_the_new_rows_that_are_among_the_highest(places, stored):
    gen = torch.Generator().manual_seed(places)
    new, old = torch.rand(5, generator=gen), torch.rand(stored, generator=gen)
    highest = torch.cat([new, old]).sort(descending=True).values[:places]
    expected = sorted((i for i in range(5) if new[i] in highest), key=lambda i: -new[i])
    assert entering(new, old, places).tolist() == expected
    assert entering(old.min()[None], old, stored).tolist() == [], "of equals the stored one stays"


@pytest.mark.parametrize(
    ("rule", "gone"),
    [("frequent", [1, 4]), ("lowest", [1, 3]), ("fifo", [0, 1])],  # class 0 has four rows, class 1 has two
)
def test_a_full_store_gives_up_rows_by_its_rule(rule, gone):
    s = store(6, rule=rule)
    fill(s, [9, 1, 8, 2, 3, 7], [0, 0, 0, 1, 0, 1])
    assert fill(s, [5, 6], [2, 2]).tolist() == gone
    assert s.leaves[gone].tolist() == [5, 6] and len(s) == 6 and s.newest(2).tolist() == gone
    assert s.hist.tolist() == [int((s.columns["label"] == c).sum()) for c in range(3)] and s.hist.sum() == 6


def test_rows_that_every_rank_holds_get_priority_count_and_age():
    s = store(4, rule="fifo")
    images = torch.zeros(3, 2, 3, 1, dtype=torch.uint8)
    assert s.put(images, label=torch.tensor([0, 1, 1])).tolist() == [0, 1, 2] and s.leaves.tolist() == [1, 1, 1, 0]
    assert s.put(images[:2], torch.tensor([5.0, 7.0]), label=torch.tensor([2, 2])).tolist() == [3, 0]
    assert s.leaves.tolist() == [7, 1, 1, 5] and s.hist.tolist() == [0, 2, 2] and s.born.tolist() == [4, 1, 2, 3]
    assert torch.equal(s.sums, replay_sums(s.leaves))


def test_what_does_not_fit_changes_nothing():
    s = store(3)
    fill(s, [1, 2, 3], [0, 1, 2])
    before = {k: v.clone() for k, v in (*vars(s).items(), *s.columns.items()) if isinstance(v, torch.Tensor)}
    x = torch.rand(2, *SHAPE)
    one, two = torch.ones(1), torch.ones(2)
    for images, priority, label in ((x, two, one), (x, one, two), (x[..., :1], None, two)):
        with pytest.raises(ValueError, match="must be of shape"):
            s.add(images, priority, label=label)
    s.leaves.fill_(1e20)
    before["leaves"] = s.leaves.clone()
    with pytest.raises(ValueError, match="not finite"):
        s.set_alpha(2.0)
    assert s.alpha == 1 and all(torch.equal({**vars(s), **s.columns}[k], v) for k, v in before.items())


def test_a_rule_of_ones_own():
    class LastRows(Prioritised):
        def leaving(self, n):
            return torch.arange(self.fill - n, self.fill)

    s = LastRows(Rng(), 4, SHAPE, rule="lowest", eps=0.0, label=torch.int16)
    fill(s, [1, 2, 3])
    assert fill(s, [4, 5, 6]).tolist() == [3, 1, 2] and s.leaves.tolist() == [1, 5, 6, 4]


def test_histogram_equals_a_recount_after_any_inserts():
    s, gen = store(20), torch.Generator().manual_seed(1)
    assert s.share().tolist() == [0, 0, 0]
    for n in (3, 10, 20, 1, 19, 7):
        fill(s, torch.rand(n, generator=gen), torch.randint(0, 3, (n,), generator=gen).tolist())
        recount = torch.bincount(s.columns["label"][: len(s)].long(), minlength=3)
        assert torch.equal(s.hist, recount) and s.stored == len(s) <= 20
        torch.testing.assert_close(s.share(), recount / len(s))
        torch.testing.assert_close(s.sums, replay_sums(s.leaves))


def test_refused():
    s = store(4)
    with pytest.raises(ValueError, match="nothing is stored yet"):
        s.draw(2)
    with pytest.raises(ValueError, match="holds 4 images; 5 at once do not fit"):
        fill(s, [1] * 5)
    fill(s, [1, 2])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            s.write(torch.tensor([0]), torch.tensor([bad]))
    with pytest.raises(ValueError, match="did you mean 'lowest'"):
        store(rule="lowst")
    with pytest.raises(ValueError, match="counting needs"):
        Prioritised(Rng(), 4, SHAPE)
    assert s.leaves.tolist() == [1, 2, 0, 0] and s.refused == 0


# Tiers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Store, Prioritised])
def test_the_host_tier_without_a_gpu_gives_the_same_bits(kind):
    more = {"classes": 2} if kind is Prioritised else {}
    x, label = torch.rand(5, *SHAPE), torch.arange(5) % 2
    stores = [kind(Rng(), 5, SHAPE, tier=tier, label=torch.int16, **more) for tier in ("device", "host")]
    for s in stores:
        s.add(x, label=label)
        s.rng.at(0, 0, "s", 0)
    index = torch.tensor([4, 0])
    assert torch.equal(stores[0].read(index), stores[1].read(index)) and stores[1].images.device.type == "cpu"
    rows = [s.draw(3).rows if kind is Prioritised else Rows(s, index) for s in stores]
    assert torch.equal(rows[0].gather(pad=1), rows[1].gather(pad=1)) and rows[0].fetch is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_rows_in_host_memory_arrive_on_the_gpu():
    stores = [Prioritised(Rng("cuda"), 50, SHAPE, tier=tier, classes=2, label=torch.int16) for tier in ("device", "host")]
    x, label = torch.rand(40, *SHAPE, device="cuda"), torch.arange(40, device="cuda") % 2
    for s in stores:
        s.add(x, label.float() + 1, label=label)
        s.rng.at(0, 0, "s", 0)
    assert stores[1].images.is_pinned() and stores[1].leaves.is_cuda
    for _ in range(5):
        a, b = (s.draw(16) for s in stores)
        assert torch.equal(a.i, b.i) and torch.equal(a.rows.gather(), b.rows.gather())
    for s in stores:  # a dealt order, the next batches under way; then rows that are overwritten meanwhile
        s.reserve(40)
        s.deal()
    for n in range(8):
        a, b = (s.next(8) for s in stores)
        assert torch.equal(a.index, b.index) and torch.equal(a.gather(), b.gather())
        if n == 5:
            for s in stores:
                s.add(x[:10].flip(0), label[:10].float() + 1, label=label[:10])


# State ------------------------------------------------------------------------------------------------------------------------


@dataclass
class Replay(Method):
    """The smallest method on a prioritised store: its log is what was drawn."""

    epochs: int = 2
    batch: int = 6
    aug: str = "none"
    needs = frozenset()

    def build(self) -> None:
        self.store = Prioritised(self.rng, 16, self.shape, classes=4, label=torch.int16, w=torch.float32)
        self.seen = torch.zeros((), dtype=torch.int64)

    def epoch(self, e: int) -> Iterator[Step]:
        yield self.insert
        for _ in range(3):
            yield self.learn
        yield self.insert

    @step("memory", eager=True)
    def insert(self) -> None:
        x, y = self.rng.uniform(self.batch, *self.shape), self.rng.labels(self.batch, 4)
        self.store.add(x, x.mean((1, 2, 3)), label=y, w=torch.ones(len(y)))

    @step("distillation")
    def learn(self) -> None:
        rows, index, p = self.store.draw(self.batch)
        x = self.view(rows, "none")
        self.seen.copy_((self.seen * 31 + index.sum()) % 1_000_003)
        self.tell(p=p.mean())
        self.store.write(index, x.square().mean((1, 2, 3)) * (len(self.store) * p), duplicates="mean")


def prepared(seed=0):
    method = Replay()
    loop.prepare(method, small.given(seed))
    return method


def test_its_tensors_are_its_state():
    tensors, numbers = state.collect(prepared())
    expected = {"images", "leaves", "sums", "born", "hist", "stored", "refused", "order", "cursor", "columns.label", "columns.w"}
    assert {k.removeprefix("store.") for k in tensors if k.startswith("store.")} == expected
    assert {"store.fill", "store.written", "store.alpha"} <= set(numbers)


@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_a_run_resumes_to_the_same_bits(stop, tmp_path):
    whole, first, second = prepared(), prepared(), prepared(seed=0)
    small.run(whole, tmp_path / "whole")
    small.run(first, tmp_path / "cut", max_steps=stop)
    small.run(second, tmp_path / "cut", resume=True)
    a, b = state.collect(whole), state.collect(second)
    assert a[0].keys() == b[0].keys() and a[1] == b[1]
    for path, value in a[0].items():
        assert torch.equal(value, b[0][path]), path


def test_a_dry_run_computes_nothing():
    rows: dict[str, Any] = walk(Replay(), dataclasses.replace(small.given(), rng=Rng()))
    assert {r["step"] for r in rows["steps"]} == {"insert", "learn"} and rows["bytes"]["store"] > 0


def test_a_loop_of_ones_own_goes_on_where_it_stopped():
    """Without an engine: tensors copied, the key given again."""
    def advance(s, i):
        s.rng.at(3, 0, "learn", i)
        _, index, p = s.draw(4)
        s.write(index, p + 0.1 * index)
        return index

    a, b = store(), store()
    fill(a, torch.arange(1, 9))
    drawn = [advance(a, i) for i in range(3)]
    for name in ("images", "leaves", "sums", "born", "hist"):
        getattr(b, name).copy_(getattr(a, name))
    b.fill, b.written = a.fill, a.written
    assert torch.equal(advance(a, 3), advance(b, 3)) and torch.equal(a.leaves, b.leaves)
    assert len({tuple(d.tolist()) for d in drawn}) == 3, "each step draws anew"


def test_two_draws_of_a_step_differ_and_names_are_streams():
    s = store()
    fill(s, torch.ones(8))
    one, two = s.draw(64).i, s.draw(64).i
    s.rng.at(0, 0, "draw", 0)
    other = s.draw(64, name="other").i
    assert torch.equal(s.draw(64).i, one) and not torch.equal(one, two) and not torch.equal(one, other)


# Ranks ------------------------------------------------------------------------------------------------------------------------


def history(world):
    s, gen = store(12), torch.Generator().manual_seed(5)
    out = []
    for i in range(4):
        x, p = torch.rand(4, *SHAPE, generator=gen), torch.rand(4, generator=gen)
        label = torch.randint(0, 3, (4,), generator=gen)
        s.add(ranks.local(x), ranks.local(p), label=ranks.local(label))
        s.rng.at(1, 0, "learn", i)
        rows, index, p = s.draw(6)
        assert len(index) == 6 // world and torch.equal(rows.index, index)
        s.write(index, p * 3 + index, duplicates="last")
        out.append(ranks.gather(index))
    return [*out, s.images, s.leaves, s.sums, s.born, s.hist]


def worker(rank, world, folder):
    torch.set_num_threads(1)
    expected = history(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for a, b in zip(history(world), expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="cannot be dealt"):
        fill(s := store(4), [1.0])
        s.draw(3)
    small.end_of_rank()


def test_two_ranks_draw_write_and_evict_as_one(tmp_path):
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)
