"""What a bench describes: a plan, cases, and the providers that compute a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkd import ops
from fastkd.ops import _registry

from . import check

Call = Callable[[], Sequence[Tensor]]


class CannotRun(Exception):
    """Why a provider has no time."""


@dataclass
class Plan:
    """What is asked of a run. `wrong`: (op, provider) → what the gate found."""

    device: torch.device
    quick: bool = False
    swap: bool = False
    compile: bool = True
    graphs: bool = True
    copy_gbps: float | None = None
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16] if self.cuda else [torch.float32]


@dataclass
class Provider:
    """One way to compute a case. `kind`: eager, compile, ours or peer. Without a `call`, `reason` says why."""

    name: str
    kind: str
    call: Call | None = None
    reason: str = ""
    backend: str = "auto"
    checked: bool = True


@dataclass
class Case:
    """One row group: providers of the same numbers.

    Attributes:
      op: name in the op table. labels: columns that name the case. truth: outputs of the definition in fp64.
      tolerance: see `check.verdict`. bytes, flops: least traffic and work of one call, for the rate columns.
      baseline: provider that "x eager" divides by. seconds: what its rounds may take, once the least number is done.
    """

    op: str
    labels: dict[str, str]
    providers: list[Provider]
    truth: Call
    baseline: str
    tolerance: float | None = None
    bytes: int | None = None
    flops: int | None = None
    seconds: float = 60.0

    def title(self) -> str:
        return " ".join(self.labels.values())


def provider(name: str, kind: str, make: Callable[[], Call], *, backend: str = "auto", checked: bool = True) -> Provider:
    """A provider, or the row that says why it cannot be made."""
    try:
        return Provider(name, kind, make(), backend=backend, checked=checked)
    except CannotRun as why:
        return Provider(name, kind, reason=str(why), backend=backend)
    except Exception as error:
        return Provider(name, kind, reason=check.one_line(error), backend=backend)


def compiled(plan: Plan, fn: Callable[..., Any]) -> Callable[..., Any]:
    if not plan.compile:
        raise CannotRun("not compiled in this run (--quick or --no-compile)")
    return torch.compile(fn, dynamic=False)  # automatic dynamic shapes have crashed on the second shape of a process


def backends(op: str, plan: Plan) -> list[tuple[str, str, str]]:
    """(row name, name for `ops.use`, reason or "") of each backend of an op on the plan's device, the definition first."""
    for name, device, _, reasons in ops.table():
        if name == op and device == plan.device.type:
            out = []
            for b in sorted(reasons, key=lambda b: b != "reference"):
                reason = "" if reasons[b] == "ok" else reasons[b]
                if b == "triton" and not plan.cuda and _registry.interpreting():
                    reason = "interpreted on the CPU: for tests, not for times"
                out.append((f"ours: {b}" if b != "reference" else "definition", "auto" if b == "fold" else b, reason))
            return out
    return []


def ours(op: str, plan: Plan, call: Call, *, definition: bool = True) -> list[Provider]:
    """The public function under each backend that the op table lists; without `definition`, "reference" is left out."""
    found = [b for b in backends(op, plan) if definition or b[1] != "reference"]
    return [Provider(name, "ours", None if reason else call, reason, use) for name, use, reason in found]
