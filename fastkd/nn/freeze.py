"""Contexts for networks that a step does not train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def frozen(*nets: nn.Module) -> Iterator[None]:
    """The networks' parameters require no gradient, so no weight gradient is computed; gradients still pass to the input.

    Each parameter gets back exactly the flag that it had, also after an exception.
    """
    before = [(p, p.requires_grad) for net in nets for p in net.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextlib.contextmanager
def in_eval(*nets: nn.Module) -> Iterator[None]:
    """The networks in eval mode; each submodule gets back its own training flag, also after an exception."""
    before = [(m, m.training) for net in nets for m in net.modules()]
    try:
        if any(flag for _, flag in before):
            for net in nets:
                net.eval()
        yield
    finally:
        for m, flag in before:
            if m.training is not flag:
                m.training = flag


@contextlib.contextmanager
def evaluating(*nets: nn.Module) -> Iterator[None]:
    """As `frozen`, and in eval mode; see `in_eval`."""
    with frozen(*nets), in_eval(*nets):
        yield
