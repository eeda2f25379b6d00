"""Prioritised sampling: exact draws, sums, updates, random numbers; every backend against the definition, and the op contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd import ops
from fastkd.ops.replay_tree.reference import philox_ref, replay_sample_ref, replay_sums_ref, size

KEY = torch.tensor([-5, 2**40 + 3])
SIZES = [1, 2, 63, 64, 65, 1000, 1023, 1024, 1025, 5000, 70_001]
"""Below, at and beyond a piece, a block, several blocks, and not a multiple of any."""


def integers(n, seed=0, dtype=torch.float32):
    """Small-integer leaves, a third of them zero: every sum is exact."""
    q = torch.randint(-3, 7, (n,), generator=torch.Generator().manual_seed(seed)).clamp_min(0).to(dtype)
    q[n // 2] = 2
    return q


def reals(n, seed=0, dtype=torch.float32):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)).pow(4).to(dtype)


def uniform(n, seed=1):
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat((u, torch.tensor([0.0, 1.0, 1 - 2**-53, 0.5], dtype=torch.float64)))


# Random numbers ---------------------------------------------------------------------------------------------------------------

KNOWN = [  # the published vectors of Random123 for philox4x32, ten rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_vectors(counter, key, expected):
    got = philox_ref(tuple(torch.tensor(v) for v in counter), tuple(torch.tensor(v) for v in key))
    assert tuple(int(v) for v in got) == expected


def test_uniform_numbers_are_those_words(backend, device):
    words = KNOWN[0][2]
    u = ops.philox_uniform(torch.zeros(2, dtype=torch.int64, device=device), 1)
    assert float(u) == ((words[0] << 21) | (words[1] >> 11)) * 2.0**-53


@pytest.mark.parametrize("key", [(0, 0), (-1, -1), (2**63 - 1, 2**32 - 2), (-(2**63), -7)])
def test_uniform_numbers_depend_on_key_and_position_only(backend, device, key):
    here = torch.tensor(key, device=device)
    u = ops.philox_uniform(here, 5000)
    ops.use("reference")
    assert torch.equal(u.cpu(), ops.philox_uniform(torch.tensor(key), 5000)), "other bits than the definition"
    assert torch.equal(u[10:], ops.philox_uniform(here + torch.tensor([0, 10], device=device), 4990))
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.01


# Sums -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_sums(backend, device, n, dtype):
    for q in (integers(n, dtype=dtype), reals(n, dtype=dtype)):
        sums = ops.replay_sums(q.to(device)).cpu()
        torch.testing.assert_close(sums, replay_sums_ref(q), rtol=1e-14, atol=0)
        assert sums[0, -1] == pytest.approx(float(q.double().sum()), rel=1e-14) and sums[1, -1] == q[q > 0].min()
    assert torch.equal(ops.replay_sums(integers(n).to(device)).cpu(), replay_sums_ref(integers(n)))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_leaf_that_is_no_priority(backend, device, bad):
    q = integers(2000).to(device)
    q[1500] = bad
    if device == "cpu":
        with pytest.raises(ValueError, match="negative or not finite"):
            ops.replay_sums(q)
    else:
        sums = ops.replay_sums(q)
        index, probability, _ = ops.replay_sample(q, sums, u=torch.tensor([0.1, 0.9], device=device))
        assert sums[0, -1].isnan() and probability.isnan().all() and (index < 2000).all()


# Samples ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_the_same_u_draws_the_same_rows(backend, device, n, dtype):
    q, u = integers(n, dtype=dtype), uniform(400)
    index, probability, least = (v.cpu() for v in ops.replay_sample(q.to(device), ops.replay_sums(q.to(device)), u=u.to(device)))
    assert torch.equal(index, replay_sample_ref(q, u)[0]) and (q[index] > 0).all()
    assert torch.equal(probability, (q[index].double() / q.double().sum()).to(dtype)) and least == q[q > 0].min()


@pytest.mark.parametrize("n", SIZES)
def test_real_priorities_draw_a_neighbour_at_most_at_a_boundary(backend, device, n):
    q, u = reals(n), uniform(400)
    index = ops.replay_sample(q.to(device), ops.replay_sums(q.to(device)), u=u.to(device))[0].cpu()
    ends = q.double().cumsum(0)
    low, high, t = torch.where(index > 0, ends[index - 1], 0.0), ends[index], u * ends[-1]
    slack = 1e-13 * ends[-1]
    assert ((low - slack <= t) & (t <= high + slack)).all() and (q[index] > 0).all()


def test_by_key_is_by_philox(backend, device):
    q = integers(5000).to(device)
    sums, key = ops.replay_sums(q), KEY.to(device)
    for a, b in zip(ops.replay_sample(q, sums, key=key, n=300), ops.replay_sample(q, sums, u=ops.philox_uniform(key, 300)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("row", [0, 63, 64, 1023, 1024, 1999])
def test_one_positive_leaf_is_always_drawn(backend, device, row):
    q = torch.zeros(2000, device=device)
    q[row] = 3e-30
    index, probability, least = ops.replay_sample(q, ops.replay_sums(q), u=uniform(50).to(device))
    assert (index == row).all() and (probability == 1).all() and least == q[row]


def test_zero_leaves_at_the_ends_of_blocks_are_never_drawn(backend, device):
    q = torch.ones(4096)
    for edge in (0, 63, 64, 1023, 1024, 2047, 4095):
        q[edge] = 0
    q[2048:3072] = 0
    boundaries = q.double().cumsum(0) / q.double().sum()  # u exactly at, and beside, every boundary
    u = torch.cat((boundaries, (boundaries - 1e-17).clamp_min(0), (boundaries + 1e-16).clamp_max(1)))
    index = ops.replay_sample(q.to(device), ops.replay_sums(q.to(device)), u=u.to(device))[0].cpu()
    assert (q[index] == 1).all() and torch.equal(index, replay_sample_ref(q, u)[0])


def test_wide_ranges_draw_no_zero(backend, device):
    """Sums of leaves that differ by 2^60 are rounded: still no leaf of 0 comes."""
    gen = torch.Generator().manual_seed(3)
    q = torch.exp2(torch.randint(-30, 31, (5000,), generator=gen).float()) * torch.randint(0, 2, (5000,), generator=gen)
    index, probability, least = ops.replay_sample(q.to(device), ops.replay_sums(q.to(device)), u=uniform(4000).to(device))
    assert (q[index.cpu()] > 0).all() and probability.isfinite().all() and least == q[q > 0].min()


def test_no_positive_leaf(backend, device):
    q = torch.zeros(100, device=device)
    sums = ops.replay_sums(q)
    assert sums[1, -1] == torch.inf
    if device == "cpu":
        with pytest.raises(ValueError, match="no leaf is positive"):
            ops.replay_sample(q, sums, u=torch.zeros(1))
    else:
        index, probability, _ = ops.replay_sample(q, sums, u=torch.zeros(3, device=device))
        assert probability.isnan().all() and ((index >= 0) & (index < 100)).all()


def chi_squared(count, expected):
    """The statistic as a number of standard deviations from its mean."""
    degrees = len(expected) - 1
    return float(((count - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


def test_frequencies(backend, device):
    q = integers(300) + 1
    index = ops.replay_sample(q.to(device), ops.replay_sums(q.to(device)), key=KEY.to(device), n=1_000_000)[0].cpu()
    assert abs(chi_squared(torch.bincount(index, minlength=300), 1e6 * q.double() / q.double().sum())) < 4


def test_frequencies_of_two_to_the_24_leaves(backend, device):
    """Where 24 bits no longer tell leaves apart: bins of rows, and the low bits of the row numbers."""
    n, draws = 2**24 + 1027, 200_000
    q = torch.ones(n)
    q[::2] = 3
    index, probability, _ = ops.replay_sample(q.to(device), ops.replay_sums(q.to(device)), key=KEY.to(device), n=draws)
    index = index.cpu()
    assert index.max() >= 2**24 and torch.equal(probability.cpu(), (q[index].double() / q.double().sum()).float())
    width = -(-n // 1000)
    mass = torch.zeros(1000, dtype=torch.float64).index_add_(0, torch.arange(n) // width, q.double()) / q.double().sum()
    assert abs(chi_squared(torch.bincount(index // width, minlength=1000), draws * mass)) < 4
    low = torch.tensor([3, 1, 3, 1, 3, 1, 3, 1], dtype=torch.float64) / 16
    assert abs(chi_squared(torch.bincount(index % 8, minlength=8), draws * low)) < 4


# Updates ----------------------------------------------------------------------------------------------------------------------


def one_by_one(q, index, value, how):
    q, seen = q.clone(), {}
    for i, v in zip(index.tolist(), value.tolist(), strict=True):
        seen.setdefault(i, []).append(v)
    for i, v in seen.items():
        q[i] = v[-1] if how == "last" else max(v) if how == "max" else torch.tensor(v, dtype=torch.float64).sum() / len(v)
    return q


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["last", "max", "mean"])
@pytest.mark.parametrize("n", [1, 65, 1025, 5000])
def test_update(backend, device, n, how, dtype):
    gen = torch.Generator().manual_seed(n)
    q = integers(n, dtype=dtype)
    index, value = torch.randint(0, n, (500,), generator=gen), torch.randint(0, 50, (500,), generator=gen).to(dtype)
    here = q.to(device)
    sums = ops.replay_sums(here)
    assert ops.replay_update(here, sums, index.to(device), value.to(device), duplicates=how) == 0
    expected = one_by_one(q, index, value, how)
    assert torch.equal(here.cpu(), expected)
    torch.testing.assert_close(sums.cpu(), replay_sums_ref(expected), rtol=1e-14, atol=0)
    assert torch.equal(sums, ops.replay_sums(here)), "an update leaves the bits that a new start would"


@pytest.mark.parametrize(
    ("index", "value"), [([1, 7], [2.0, 3.0]), ([1, -1], [2.0, 3.0]), ([1, 2], [2.0, -3.0]), ([1, 1], [2.0, float("nan")])]
)
def test_refused_entries(backend, device, index, value):
    q = torch.arange(1.0, 6.0, device=device)
    sums, before = ops.replay_sums(q), q.clone()
    index, value = torch.tensor(index, device=device), torch.tensor(value, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"outside 0\.\.4|finite"):
            ops.replay_update(q, sums, index, value)
        assert torch.equal(q, before) and torch.equal(sums, ops.replay_sums(before))
    else:
        for how in ("mean", "max", "last"):
            assert ops.replay_update(q, sums, index, value, duplicates=how) == 1
            before[1] = 2
            assert torch.equal(q, before) and torch.equal(sums, ops.replay_sums(before))


def test_a_double_that_a_float_leaf_cannot_hold_is_refused(cpp):
    q = torch.ones(3)
    with pytest.raises(ValueError, match="finite"):
        ops.replay_update(q, ops.replay_sums(q), torch.tensor([0]), torch.tensor([1e300], dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sums_follow_any_updates_and_search_is_searchsorted(data):
    n = data.draw(st.integers(1, 2200))
    q = torch.zeros(n)
    q[data.draw(st.integers(0, n - 1))] = 1
    sums = ops.replay_sums(q)
    for _ in range(data.draw(st.integers(1, 4))):
        entries = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, 1000)), min_size=1, max_size=40))
        index, value = (torch.tensor(v) for v in zip(*entries, strict=True))
        how = data.draw(st.sampled_from(["last", "max", "mean"]))
        expected = one_by_one(q, index, value.float(), how)
        ops.replay_update(q, sums, index, value.float(), duplicates=how)
        assert torch.equal(q, expected) and torch.equal(sums, ops.replay_sums(q))
    if q.sum() > 0:
        u = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=20)), dtype=torch.float64)
        ends = q.double().cumsum(0)
        index = ops.replay_sample(q, sums, u=u)[0]
        first = torch.searchsorted(ends, u * ends[-1], right=True)
        inside = (first < n) & (torch.frac(q) == 0).all()
        assert torch.equal(index[inside], first[inside]) and (q[index] > 0).all()


# A library that does the same ---------------------------------------------------------------------------------------------------


def test_cpprb_agrees_on_probabilities_and_weights(cpp):
    cpprb = pytest.importorskip("cpprb", reason="cpprb is not installed")
    n, beta = 3000, 0.4
    q = integers(n) + 1
    theirs = cpprb.PrioritizedReplayBuffer(4096, {"row": {"dtype": "int64"}}, alpha=1.0, eps=0.0)
    theirs.add(row=torch.arange(n).numpy(), priorities=q.double().numpy())
    sums = ops.replay_sums(q)
    for _ in range(3):
        batch = theirs.sample(256, beta=beta)
        index = torch.from_numpy(batch["indexes"].astype("int64"))
        ours = (q[index] / sums[1, -1]).double() ** -beta  # relative to the rarest row, as theirs
        torch.testing.assert_close(torch.from_numpy(batch["weights"]).double().flatten(), ours, rtol=1e-5, atol=0)
        new = torch.randint(1, 9, (256,)).float()
        theirs.update_priorities(batch["indexes"], new.double().numpy())
        ops.replay_update(q, sums, index, new)
    count = torch.bincount(torch.from_numpy(theirs.sample(300_000, beta=beta)["indexes"].astype("int64")), minlength=n)
    own = torch.bincount(ops.replay_sample(q, sums, key=KEY, n=300_000)[0], minlength=n)
    expected = 3e5 * q.double() / q.double().sum()
    assert chi_squared(count, expected) < 4, "stratified by cpprb, so less spread out than independent draws"
    assert abs(chi_squared(own, expected)) < 4


# The contract -----------------------------------------------------------------------------------------------------------------


def samples():
    q = integers(1500)
    sums, u = ops.replay_sums(q), uniform(9)
    index = torch.tensor([3, 1400, 3])
    native = torch.ops.fastkd
    return [
        (native.philox_uniform, (KEY, 7)), (native.replay_sums, (q,)), (native.replay_sample, (q, sums, u, None, len(u))),
        (native.replay_sample, (q, sums, None, KEY, 5)), (native.replay_update, (q, sums, index, torch.rand(3), "last")),
        (native.replay_update, (q, sums, index, torch.rand(3), "mean")),
    ]  # fmt: skip


@pytest.mark.parametrize("which", range(6))
def test_opcheck(cpp, which):
    op, arguments = samples()[which]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(backend, device, dynamic):
    def steps(q, sums, index, value, key, u):
        refused = ops.replay_update(q, sums, index, value, duplicates="max")
        by_key = ops.replay_sample(q, sums, key=key, n=6)
        key[1] += 6
        return refused, *by_key, *ops.replay_sample(q, sums, u=u), ops.replay_sums(q), q, sums, key

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, k in ((1500, 5), (2100, 8)):
        gen, made = torch.Generator().manual_seed(0), []
        index, value = torch.randint(0, n, (k,), generator=gen), torch.rand(k, generator=gen)
        for fn in (steps, compiled):
            q = integers(n).to(device)
            made.append(fn(q, ops.replay_sums(q), index.to(device), value.to(device), KEY.to(device).clone(), uniform(k).to(device)))
        for a, b in zip(*made, strict=True):
            assert torch.equal(a, b)


def test_threads_and_instruction_sets_do_not_matter(cpp):
    from fastkd import _C

    q, u, threads = reals(3 * 2**18), uniform(2**15), torch.get_num_threads()
    index, value = torch.randint(0, len(q), (3000,)), torch.rand(3000)
    seen = []
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            for count in (1, 3):
                torch.set_num_threads(count)
                here = q.clone()
                sums = ops.replay_sums(here)
                ops.replay_update(here, sums, index, value, duplicates="mean")
                seen.append((here, sums, *ops.replay_sample(here, sums, u=u), ops.philox_uniform(KEY, 2**16)))
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(_C.isas()[-1])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_empty(backend, device):
    q = integers(100).to(device)
    sums, none = ops.replay_sums(q), torch.zeros(0, dtype=torch.int64, device=device)
    index, probability, least = ops.replay_sample(q, sums, u=torch.zeros(0, dtype=torch.float64, device=device))
    assert index.shape == probability.shape == (0,) and least == q[q > 0].min()
    before = q.clone()
    for how in ("last", "max", "mean"):
        assert ops.replay_update(q, sums, none, torch.zeros(0, device=device), duplicates=how) == 0
    assert torch.equal(q, before) and torch.equal(sums, ops.replay_sums(q)) and ops.philox_uniform(KEY.to(device), 0).shape == (0,)


def test_more_draws_and_entries_than_leaves_and_sliced_inputs(backend, device):
    q = integers(70).to(device)
    sums = ops.replay_sums(q)
    u, index = uniform(999).to(device)[::2], torch.arange(140, device=device)[::2].remainder(70)
    assert torch.equal(ops.replay_sample(q, sums, u=u)[0], ops.replay_sample(q, sums, u=u.contiguous())[0])
    ops.replay_update(q, sums, index, torch.arange(140.0, device=device)[::2])
    assert torch.equal(sums, ops.replay_sums(q)) and q[0] == 70


def test_no_grad_and_inference_mode(backend, device):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            q = integers(100).to(device)
            sums = ops.replay_sums(q)
            ops.replay_update(q, sums, torch.tensor([1], device=device), torch.ones(1, device=device, requires_grad=True))
            assert q[1] == 1 and ops.replay_sample(q, sums, key=KEY.to(device), n=3)[0].shape == (3,)


def test_refused(backend, device):
    q = integers(100).to(device)
    sums, u = ops.replay_sums(q), uniform(1).to(device)
    index, value, key = torch.tensor([1], device=device), torch.ones(1, device=device), KEY.to(device)
    with pytest.raises(ValueError, match="requires a gradient"):
        ops.replay_update(q, sums, index, value.clone().requires_grad_())
    with pytest.raises(ValueError, match="require a gradient"):
        ops.replay_sums(q.clone().requires_grad_())
    with pytest.raises(ValueError, match="no gradient"):
        ops.replay_sample(q, sums, u=u.requires_grad_())[1].sum().backward()
    for call, message in (
        (lambda: ops.replay_sums(q[::2]), "contiguous"), (lambda: ops.replay_sums(q.half()), "float16"),
        (lambda: ops.replay_sums(q[:0]), "N >= 1"), (lambda: ops.replay_sample(q, sums[:, :-1], u=u), "from replay_sums"),
        (lambda: ops.replay_sample(q, sums), "by u or by key"), (lambda: ops.replay_sample(q, sums, u=u, key=key, n=1), "by u or by key"),
        (lambda: ops.replay_sample(q, sums, u=index), "u must be"), (lambda: ops.replay_sample(q, sums, key=key.int(), n=1), "key must be"),
        (lambda: ops.replay_sample(q, sums, key=key, n=-1), "n must be"),
        (lambda: ops.replay_update(q, sums, index.int(), value), "index must"),
        (lambda: ops.replay_update(q, sums, index, index), "value must"),
        (lambda: ops.replay_update(q, sums, index, value, duplicates="first"), "expected one of last, max, mean"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_sums_have_the_documented_size():
    assert [size(n) for n in (1, 1024, 1025)] == [18, 18, 36]


@pytest.mark.large
def test_more_than_2_31_leaves(cpp):
    n = 2**31 + 70
    q = torch.zeros(n)
    sums = ops.replay_sums(q)
    ops.replay_update(q, sums, torch.tensor([n - 1, 5]), torch.tensor([3.0, 1.0]))
    assert ops.replay_sample(q, sums, u=torch.tensor([0.2, 0.3, 1.0]))[0].tolist() == [5, n - 1, n - 1]
