"""torch.optim's fused optimisers with every learning rate a tensor and all state made at once: nothing is allocated in a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Group = Iterable[Tensor] | dict[str, Any]


def _groups(groups: tuple[Group, ...], lr: float) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for group in groups:
        g: dict[str, Any] = dict(group) if isinstance(group, dict) else {"params": group}
        params: list[Tensor] = list(g["params"])
        if params:
            out.append({**g, "params": params, "lr": torch.tensor(float(g.get("lr", lr)), device=params[0].device)})
    return out


def adam(*groups: Group, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Adam:
    """Adam (Kingma & Ba 2015) over groups: an iterable of parameters, or a dict with `params` and its own `lr`."""
    made = _groups(groups, lr)
    device = made[0]["params"][0].device
    opt = torch.optim.Adam(made, lr=torch.tensor(lr, device=device), betas=betas, eps=eps, fused=True, capturable=device.type != "cpu")
    opt._warned_capturable_if_run_uncaptured = True  # the first calls of a step run eagerly, and nobody need be told
    for group in opt.param_groups:
        for p in group["params"]:
            opt.state[p] = {
                "step": torch.zeros((), dtype=torch.get_default_dtype() if device.type == "cpu" else torch.float32, device=device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }
    return opt


def sgd(*groups: Group, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False) -> torch.optim.SGD:
    """SGD with momentum; its buffers start at zero, which equals torch's first step (dampening 0)."""
    made = _groups(groups, lr)
    device = made[0]["params"][0].device
    opt = torch.optim.SGD(
        made, lr=torch.tensor(lr, device=device), momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
    )
    for group in opt.param_groups:
        for p in group["params"]:
            opt.state[p] = {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)} if momentum else {}
    return opt


def parameters(*opts: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that the optimisers update, in order."""
    return [p for opt in opts for group in opt.param_groups for p in group["params"]]


def reset(opt: torch.optim.Optimizer) -> None:
    """A fresh optimiser, in place: all state zero."""
    state = [t for s in opt.state.values() for t in s.values() if isinstance(t, Tensor)]
    if state:
        torch._foreach_zero_(state)


def set_lr(opt: torch.optim.Optimizer, *values: float) -> None:
    """Write the learning rate of each group (one value: of all groups) into its tensor."""
    for i, group in enumerate(opt.param_groups):
        group["lr"].fill_(values[i] if len(values) > 1 else values[0])
