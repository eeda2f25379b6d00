"""Which rows leave a full store. Plain functions of what is stored; nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def lowest(score: Tensor, n: int) -> Tensor:
    """The `n` rows with the lowest score [N], lowest first; of equals the one with the lower number. int64 [n]."""
    return score.argsort(stable=True)[:n]


def entering(new: Tensor, stored: Tensor, places: int) -> Tensor:
    """The new rows that are among the `places` highest of new [n] and stored [N] together, highest first; of equals the stored one stays.

    How many they are is read on the host, unless all have a place. Returns int64 [k].
    """
    free = places - len(stored)
    best = new.argsort(descending=True, stable=True)
    if free >= len(new):
        return best
    rivals = torch.cat((stored.new_full((free,), -torch.inf), stored.sort().values))[: len(new)]
    return best[: int((new[best] > rivals).sum())]  # one falls and the other rises, so those that win come first


def frequent(score: Tensor, label: Tensor, n: int) -> Tensor:
    """The rows that leave if `n` times the most frequent class then gives up its row of lowest score (SSD-KD's balance).

    Equivalent to one sort: a row's place in its class, counted from the highest score, is how many of its class stay if it leaves;
    the rows with the highest places leave, among equal places the lowest scores first.

    Args:
      score: [N], any order-preserving form of the priority. label: [N] integer.
    Returns:
      [n] int64.
    """
    order = score.argsort(descending=True, stable=True)
    order = order[label[order].argsort(stable=True)]  # class by class, best first
    classes = label[order]
    place = torch.arange(len(order), device=order.device) - torch.searchsorted(classes, classes)
    by_score = score[order].argsort(stable=True)
    first = by_score[place[by_score].argsort(descending=True, stable=True)]
    return order[first[:n]]


RULES: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "frequent": lambda leaves, label, born, n: frequent(leaves, label, n),
    "lowest": lambda leaves, label, born, n: lowest(leaves, n),
    "fifo": lambda leaves, label, born, n: lowest(born, n),
}
"""Name → (leaves, label, born, n) → rows that leave."""
