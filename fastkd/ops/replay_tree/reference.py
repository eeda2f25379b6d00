"""Definitions of prioritised sampling in plain torch: the specification of every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE, BLOCK = 64, 1024
"""Leaves that one sum of the lowest and of the middle level covers."""
_WORD = 0xFFFFFFFF
_ROUNDS, _MULTIPLY, _WEYL = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox_ref(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four words of a counter and two of a key, all int64 in 0..2^32-1, give four words."""
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        low, high = a * _MULTIPLY[0], c * _MULTIPLY[1]  # modulo 2^64, which int64 and uint64 share
        a, b, c, d = (high >> 32 & _WORD) ^ b ^ k, high & _WORD, (low >> 32 & _WORD) ^ d ^ m, low & _WORD
        k, m = (k + _WEYL[0]) & _WORD, (m + _WEYL[1]) & _WORD
    return a, b, c, d


def philox_uniform_ref(key: Tensor, n: int) -> Tensor:
    """[n] fp64 in [0, 1); see the public function."""
    seed, at = key[0], key[1] + torch.arange(n, device=key.device)
    zero = torch.zeros_like(at)
    a, b, _, _ = philox_ref((at & _WORD, at >> 32 & _WORD, zero, zero), (seed & _WORD, seed >> 32 & _WORD))
    return (a << 21 | b >> 11).to(torch.float64) * 2.0**-53


def size(leaves: int) -> int:
    """Columns of the sums of so many leaves: of each block 16 pieces, the block itself, and the end of the block."""
    return -(-leaves // BLOCK) * (BLOCK // PIECE + 2)


def replay_sums_ref(leaves: Tensor) -> Tensor:
    """[2, size] fp64; see the public function."""
    valid = (leaves >= 0) & (leaves < torch.inf)
    q = torch.where(valid, leaves.to(torch.float64), torch.nan)
    pieces = F.pad(q, (0, -leaves.numel() % BLOCK)).view(-1, BLOCK // PIECE, PIECE)
    least = torch.where(pieces > 0, pieces, torch.inf).amin(-1)
    sums = pieces.sum(-1)
    block, low = sums.sum(-1), least.amin(-1)
    return torch.stack((torch.cat((sums.flatten(), block, block.cumsum(0))), torch.cat((least.flatten(), low, low.cummin(0).values))))


def replay_sample_ref(leaves: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index [B] int64, probability [B], least []); see the public function."""
    ends = leaves.to(torch.float64).cumsum(0)
    total = ends[-1:]
    # The first leaf whose prefix sum exceeds the target; at and beyond the total the last leaf that is not zero.
    index = torch.minimum(torch.searchsorted(ends, u.to(torch.float64) * total, right=True), torch.searchsorted(ends, total))
    probability = (leaves[index].to(torch.float64) / total).to(leaves.dtype)
    return index, probability, torch.where(leaves > 0, leaves, torch.inf).amin()


def settle(leaves: Tensor, index: Tensor, value: Tensor, duplicates: str) -> tuple[Tensor, Tensor, Tensor]:
    """What each entry of an update writes: (row inside the leaves, value, entry is refused). Entries of one row agree.

    A value that is negative or not finite and a row outside the leaves are refused; a row with refused entries only keeps its leaf.
    """
    valid = (value >= 0) & (value < torch.inf) & (index >= 0) & (index < leaves.numel())
    row = index.clamp(0, leaves.numel() - 1)
    run = torch.searchsorted(row.sort().values, row)  # one number for all entries of a row
    if duplicates == "last":
        entry = torch.where(valid, torch.arange(len(row), device=row.device), -1)
        last = torch.full_like(entry, -1).scatter_reduce(0, run, entry, "amax")[run]
        taken, found = value[last.clamp_min(0)], last >= 0
    elif duplicates == "max":
        most = torch.full_like(value, -1.0).scatter_reduce(0, run, torch.where(valid, value, -1.0), "amax")[run]
        taken, found = most, most >= 0
    else:
        zero = torch.zeros(len(row), dtype=torch.float64, device=row.device)
        count = zero.scatter_add(0, run, valid.to(torch.float64))[run]
        total = zero.scatter_add(0, run, torch.where(valid, value, 0.0).to(torch.float64))[run]
        taken, found = (total / count).to(leaves.dtype), count > 0
    return row, torch.where(found, taken, leaves[row]), ~valid


def replay_update_ref(leaves: Tensor, sums: Tensor, index: Tensor, value: Tensor, duplicates: str) -> Tensor:
    """Writes leaves and sums; [] int64, how many entries were refused; see the public function."""
    row, taken, refused = settle(leaves, index, value, duplicates)
    leaves.index_put_((row,), taken)
    sums.copy_(replay_sums_ref(leaves))
    return refused.sum()
