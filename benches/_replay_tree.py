"""Prioritised sampling: draw 256 rows and write their priorities back. The cases run with `bench_replay`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import ops
from fastkd.ops.replay_tree.reference import philox_uniform_ref, replay_sample_ref, replay_sums_ref, replay_update_ref

from . import peers
from ._case import Call, Case, Plan, Provider, compiled, ours, provider

OP = "replay_sample"
SIZES = [(50_000, 256), (1_000_000, 256)]
"""Priorities, rows of a batch."""
TINY = [(3_000, 16)]
TURNS = 64
"""Different batches: the same rows in every call would sit in the cache."""


FULL = 1 << 26
"""Leaves whose sums fill a GPU."""


def cases(plan: Plan) -> Iterator[Case]:
    sizes = TINY if plan.quick else SIZES
    for size in reversed(sizes) if plan.cuda else sizes:
        yield case(plan, *size)


def definition(leaves: Tensor, u: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes in plain torch: prefix sums in fp64, a search, a scatter."""
    ends = leaves.double().cumsum(0)
    index = torch.searchsorted(ends, u * ends[-1], right=True)
    probability = leaves[index] / ends[-1]
    leaves[index] = value
    return index, probability


def case(plan: Plan, n: int, batch: int) -> Case:
    draw = torch.Generator().manual_seed(5)
    # Small integers, whose sums are exact: all draw the same rows. A row's own priority is written back, so turns repeat.
    leaves = torch.randint(1, 9, (n,), generator=draw).float()
    us = torch.rand((TURNS, batch), generator=draw, dtype=torch.float64)
    ends = leaves.double().cumsum(0)
    written = [v.to(plan.device) for v in leaves[torch.searchsorted(ends, us * ends[-1], right=True)]]
    leaves, us = leaves.to(plan.device), us.to(plan.device)

    def turns(sample: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Call:
        """A call of the next turn; each backend counts its own, anew for each number of threads: the first turn is what is checked."""
        seen: Counter[tuple[str, int]] = Counter()

        def call() -> tuple[Tensor, ...]:
            key = (ops.backend(), torch.get_num_threads())
            turn = seen[key] % TURNS
            seen[key] += 1
            index, probability = sample(us[turn], written[turn])
            return index.double(), probability

        return call

    def plain(fn: Any) -> Call:
        mine = leaves.clone()
        return turns(lambda u, value: fn(mine, u, value))

    own, sums = leaves.clone(), ops.replay_sums(leaves)

    def public(u: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        index, probability, _ = ops.replay_sample(own, sums, u=u)
        ops.replay_update(own, sums, index, value)
        return index, probability

    return Case(
        op=OP,
        labels={"case": f"{n} priorities", "shape": f"{batch} rows", "layout": "", "dtype": "sample + update"},
        providers=[
            Provider("cumsum + searchsorted", "eager", plain(definition)),
            provider("compile(cumsum + searchsorted)", "compile", lambda: plain(compiled(plan, definition))),
            *ours(OP, plan, turns(public), definition=False),
            provider("cpprb", "peer", lambda: peers.cpprb_prioritised(leaves, batch), checked=False),
            provider("torchrl", "peer", lambda: peers.torchrl_prioritised(leaves, batch), checked=False),
        ],
        truth=plain(definition),
        baseline="cumsum + searchsorted",
        tolerance=1e-6,
    )


def alone(plan: Plan) -> Iterator[Case]:
    """On a GPU: each op of the tree by itself, CUDA beside Triton."""
    n, batch = TINY[0] if plan.quick else SIZES[-1]
    for leaves in (n,) if plan.quick else (n, FULL):
        yield single(plan, "replay_sums", leaves, batch)
    for op in ("replay_sample", "replay_update", "philox_uniform"):
        yield single(plan, op, n, batch)


def single(plan: Plan, op: str, n: int, batch: int) -> Case:
    draw = torch.Generator(plan.device).manual_seed(7)
    leaves = torch.randint(1, 9, (n,), generator=draw, device=plan.device).float()
    u = torch.rand(batch, generator=draw, device=plan.device, dtype=torch.float64)
    index = torch.randperm(n, generator=draw, device=plan.device)[:batch]
    value, key = leaves[index] + 1, torch.tensor([5, 0], device=plan.device)
    sums = replay_sums_ref(leaves)
    states: dict[str, tuple[Tensor, Tensor]] = {}

    def update(fn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        state = states.setdefault(ops.backend(), (leaves.clone(), sums.clone()))
        fn(*state, index, value, duplicates="last")
        return state

    def finite(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [v.nan_to_num(posinf=0.0) for v in outputs]  # the least leaf of an empty piece is infinite

    calls: dict[str, tuple[Call, Call]] = {
        "replay_sums": (lambda: (replay_sums_ref(leaves),), lambda: (ops.replay_sums(leaves),)),
        "replay_sample": (
            lambda: tuple(v.double() for v in replay_sample_ref(leaves, u)[:2]),
            lambda: tuple(v.double() for v in ops.replay_sample(leaves, sums, u=u)[:2]),
        ),
        "replay_update": (lambda: update(replay_update_ref), lambda: update(ops.replay_update)),
        "philox_uniform": (lambda: (philox_uniform_ref(key, n),), lambda: (ops.philox_uniform(key, n),)),
    }
    definition, public = calls[op]
    shape = {"replay_sums": f"{n}", "philox_uniform": f"{n}"}.get(op, f"{batch} rows")
    moved = {"replay_sums": 4 * n + 8 * sums.numel(), "philox_uniform": 8 * n}.get(op)
    return Case(
        op=op,
        labels={"case": f"{n} {'numbers' if op == 'philox_uniform' else 'priorities'} alone{', full' if n == FULL else ''}",
                "shape": shape, "layout": "", "dtype": "float32"},
        providers=[Provider("definition", "eager", definition, backend="reference"), *ours(op, plan, public, definition=False)],
        truth=definition,
        baseline="definition",
        tolerance=1e-6,
        bytes=moved,
        compared=finite,
    )  # fmt: skip
