"""The store: bit-exact reads, order of a phase, ring, growth; and the best batch of a call."""

from __future__ import annotations

import pytest
import torch

from fastkd.memory import Best, Rows, Store
from fastkd.rng import Rng


def store(capacity=10, shape=(3, 4, 5), **kw):
    rng = Rng()
    rng.at(0, 0, "deal", 0)
    return Store(rng, capacity, shape, label=torch.int16, **kw)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quant", ["floor", "round"])
def test_what_is_written_is_read_back_after_quantisation(channels, quant):
    s, x = store(shape=(channels, 4, 5), quant=quant), torch.rand(4, channels, 4, 5) * 1.4 - 0.2
    s.add(x, label=torch.arange(4))
    scaled = x.clamp(0, 1) * 255
    expected = (scaled.floor() if quant == "floor" else scaled.round()).to(torch.uint8)
    assert torch.equal(s.images[:4], expected.permute(0, 2, 3, 1)) and len(s) == 4
    assert torch.equal(s.as_stored(x), s.read(torch.arange(4)))
    torch.testing.assert_close(s.read(torch.tensor([3, 0])), expected[[3, 0]].float() / 255)
    assert s.columns["label"][:4].tolist() == [0, 1, 2, 3] and s.columns["label"].dtype == torch.int16


def test_normalised_space_is_stored_as_it_is():
    rng = Rng()
    s, x = Store(rng, 3, (1, 2, 2), torch.float16), torch.randn(3, 1, 2, 2).half() * 5
    s.add(x)
    assert torch.equal(s.read(torch.arange(3)), x.float()) and torch.equal(s.as_stored(x), x.float())


def test_a_dealt_phase_is_whole_passes_without_replacement():
    s = store()
    s.add(torch.rand(7, 3, 4, 5), label=torch.arange(7))
    s.reserve(20)
    s.deal()
    assert sorted(s.order[:7].tolist()) == sorted(s.order[7:14].tolist()) == list(range(7))
    assert len(set(s.order[14:].tolist())) == 6
    drawn = torch.cat([s.next(4).index for _ in range(5)])
    assert torch.equal(drawn, s.order)
    rows = Rows(s, drawn[:4])
    assert rows.column("label").tolist() == drawn[:4].tolist()


def test_dealing_again_with_another_key_changes_the_order():
    s = store()
    s.add(torch.rand(10, 3, 4, 5), label=torch.arange(10))
    s.reserve(10)
    s.deal()
    first = s.order.clone()
    s.rng.at(0, 1, "deal", 0)
    s.deal()
    assert not torch.equal(first, s.order)


def test_full_store_refuses_and_ring_overwrites_the_oldest():
    s = store(capacity=5)
    s.add(torch.zeros(4, 3, 4, 5), label=torch.arange(4))
    with pytest.raises(ValueError, match="holds 5 images; 4 are written and 2 more do not fit"):
        s.add(torch.zeros(2, 3, 4, 5), label=torch.arange(2))
    ring = store(capacity=5, ring=True)
    for i in range(3):
        ring.add(torch.zeros(3, 3, 4, 5), label=torch.full((3,), i))
    assert len(ring) == 5 and ring.columns["label"].tolist() == [1, 2, 2, 2, 1] and ring.newest(3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="holds 5 images; 6 at once do not fit"):
        ring.add(torch.zeros(6, 3, 4, 5), label=torch.arange(6))


def test_wrong_columns_and_empty_store_are_refused():
    s = store()
    with pytest.raises(ValueError, match=r"columns \['label'\], got \[\]"):
        s.add(torch.zeros(1, 3, 4, 5))
    s.reserve(4)
    with pytest.raises(ValueError, match="nothing is stored"):
        s.deal()


def test_best_keeps_the_lowest_total_and_never_a_nan():
    best = Best(x=torch.zeros(2))
    for total, value in [(3.0, 1.0), (float("nan"), 2.0), (1.0, 3.0), (2.0, 4.0)]:
        best.offer(torch.tensor(total), x=torch.full((2,), value))
    assert best.rows["x"].tolist() == [3.0, 3.0] and best.total == 1.0
    best.reset()
    best.offer(torch.tensor(9.0), x=torch.full((2,), 5.0))
    assert best.rows["x"].tolist() == [5.0, 5.0]
    best.offer(torch.tensor(99.0), always=True, x=torch.full((2,), 6.0))
    assert best.rows["x"].tolist() == [6.0, 6.0]


def test_rows_that_every_rank_holds_are_appended_in_the_stores_own_form():
    x = torch.randint(256, (3, 4, 5, 3), dtype=torch.uint8)
    s = store()
    s.add(torch.zeros(2, 3, 4, 5), label=torch.zeros(2))
    s.put(x, label=torch.tensor([7, -1, 2]))
    assert torch.equal(s.images[2:5], x) and s.columns["label"][2:5].tolist() == [7, -1, 2] and len(s) == s.written == 5
    floating = Store(s.rng, 3, (3, 4, 5), torch.float16)
    floating.put(x)
    torch.testing.assert_close(floating.images.float(), x / 255, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="1 more do not fit"):
        floating.put(x[:1])
