"""Copies that leave every address where it is, as resume and CUDA graphs need."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def copy_(to: nn.Module, from_: nn.Module) -> None:
    """Copy parameters and buffers of `from_` into those of `to`, in place and without a gradient.

    Raises:
      ValueError: the two modules do not have the same names and shapes; the message names the first difference.
    """
    target, source = _tensors(to), _tensors(from_)
    for name in [*target, *source]:
        if name not in target or name not in source:
            where = "source" if name not in source else "target"
            raise ValueError(f"copy_ needs two networks of one form, and '{name}' is missing in the {where}")
        if target[name].shape != source[name].shape:
            raise ValueError(f"copy_: '{name}' is {tuple(source[name].shape)}, expected {tuple(target[name].shape)}")
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for name, t in target.items():  # one dtype a list: mixed lists fall off the fused path
        pair = groups.setdefault((t.dtype, t.device), ([], []))
        pair[0].append(t)
        pair[1].append(source[name].detach())
    with torch.no_grad():
        for mine, theirs in groups.values():
            torch._foreach_copy_(mine, theirs)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
