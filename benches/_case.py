"""What a bench describes: a plan, cases, and the providers that compute a case."""

from __future__ import annotations

import time
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
    """What is asked of a run.

    Attributes:
      threads: torch thread counts of a CPU run; every case is measured under each. wrong: (op, provider) → what the gate found.
      without: backends that are left out. deadline: `time.monotonic()` after which no further case begins.
      progress: is given the rows of each case as it ends.
    """

    device: torch.device
    quick: bool = False
    swap: bool = False
    compile: bool = True
    graphs: bool = True
    threads: tuple[int, ...] = ()
    copy_gbps: float | None = None
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    deadline: float | None = None
    progress: Callable[[list[dict[str, Any]]], None] | None = None

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16] if self.cuda else [torch.float32]


@dataclass
class Provider:
    """One way to compute a case. `kind`: eager, compile, ours or peer. Without a `call`, `reason` says why.

    Attributes:
      rung: in a ladder, what earns the gain over the rung before it: the rungs are the providers that have one, in their order.
      labels: columns in which this provider differs from its case. tolerance: instead of the case's.
      batches: how many of the case's batches one call makes; its time is divided by it.
    """

    name: str
    kind: str
    call: Call | None = None
    reason: str = ""
    backend: str = "auto"
    checked: bool = True
    rung: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    tolerance: float | Sequence[float] | Call | None = None
    batches: int = 1


@dataclass
class Case:
    """One row group: providers of the same numbers.

    Attributes:
      op: name in the op table. labels: columns that name the case. truth: outputs of the definition in fp64.
      tolerance: see `check.verdict`; or a call of plain torch in the same precision, of whose errors twice as much is allowed.
      bytes, flops: least traffic and work of one call, for the rate columns.
      baseline: provider that "x eager" divides by. compared: what of the outputs is compared with the truth; None: all.
      threads: instead of the plan's. seconds: what the rounds may take, once the least number of them is done.
    """

    op: str
    labels: dict[str, str]
    providers: list[Provider]
    truth: Call
    baseline: str
    tolerance: float | Sequence[float] | Call | None = None
    bytes: int | None = None
    flops: int | None = None
    compared: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None
    threads: tuple[int, ...] | None = None
    seconds: float = 60.0

    def title(self) -> str:
        return " ".join(self.labels.values())


def provider(name: str, kind: str, make: Callable[[], Call], **more: Any) -> Provider:
    """A provider, or the row that says why it cannot be made. `more`: further fields of `Provider`."""
    try:
        return Provider(name, kind, make(), **more)
    except CannotRun as why:
        return Provider(name, kind, reason=str(why), **more)
    except Exception as error:
        return Provider(name, kind, reason=check.one_line(error), **more)


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
                if b == "triton" and not plan.cuda and not plan.quick and _registry.interpreting():
                    reason = "interpreted on the CPU: for tests, not for times"
                if b in plan.without:
                    reason = "left out of this run (--without)"
                out.append((f"ours: {b}" if b != "reference" else "definition", "auto" if b == "fold" else b, reason))
            return out
    return []


def ours(op: str, plan: Plan, call: Call, *, definition: bool = True) -> list[Provider]:
    """The public function under each backend that the op table lists; without `definition`, "reference" is left out."""
    found = [b for b in backends(op, plan) if definition or b[1] != "reference"]
    return [Provider(name, "ours", None if reason else call, reason, use) for name, use, reason in found]
