"""Prioritised sampling: draw 256 rows and write their priorities back. The cases run with `bench_replay`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd import ops

from . import peers
from ._case import Call, Case, Plan, Provider, compiled, ours, provider

OP = "replay_sample"
SIZES = [(50_000, 256), (1_000_000, 256)]
"""Priorities, rows of a batch."""
TINY = [(3_000, 16)]
TURNS = 64
"""Different batches: the same rows in every call would sit in the cache."""


def cases(plan: Plan) -> Iterator[Case]:
    for size in TINY if plan.quick else SIZES:
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
