"""The correctness gate: an op is compared with its definition in fp64 before it is timed; a wrong one gets times but no ratios."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import ops

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 6e-3}
"""Relative L2 error that is allowed. Loose on purpose for gradients behind a ReLU, whose mask flips where rounding crosses the kink."""

TRUNCATED = 5e-2
"""What rounding to bf16 towards zero, as Triton's interpreter does, adds up to in a network."""


def verdict(found: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float | Sequence[float] | None = None) -> tuple[bool, str]:
    """Whether outputs equal the fp64 definition's.

    Args:
      found: outputs and gradients of a provider. truth: the same of the definition, fp64.
      tolerance: relative L2 error allowed for all, or for each; 0 asks for equal bits after rounding; None: by dtype (`TOLERANCE`).
    Returns:
      (right, sentence with the worst error).
    """
    if len(found) != len(truth):
        return False, f"{len(found)} outputs, expected {len(truth)}"
    worst = 0.0
    for i, (a, t) in enumerate(zip(found, truth)):
        if a.shape != t.shape:
            return False, f"output {i} is {tuple(a.shape)}, expected {tuple(t.shape)}"
        a, t = a.detach(), t.detach()
        if not bool(a.isfinite().all()):
            return False, f"output {i} is not finite"
        if tolerance == 0:
            if not torch.equal(a, t.to(a.dtype)):
                return False, f"output {i} differs by {float((a.double() - t.double()).abs().max()):.1e}, expected equal bits"
            continue
        error = _error(a, t)
        worst = max(worst, error)
        limit = TOLERANCE[a.dtype] if tolerance is None else tolerance[i] if isinstance(tolerance, Sequence) else tolerance
        if not error <= limit:
            return False, f"output {i} is off by {error:.1e} (relative L2), allowed {limit:.0e}"
    return True, "equal bits" if tolerance == 0 else f"off by at most {worst:.1e}"


def of_provider(case: Any, provider: Any, found: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[bool, str]:
    """`verdict` on what a case compares, by the tolerance of the provider or else of the case."""
    tolerance = case.tolerance if provider.tolerance is None else provider.tolerance
    whole = case.compared or (lambda outputs: outputs)
    found, truth = whole(found), whole(truth)
    return verdict(found, truth, twice(whole(tolerance()), truth) if callable(tolerance) else tolerance)


def twice(plain: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Twice the errors of plain torch in the same precision, output by output; not less than `TRUNCATED`."""
    return [max(TRUNCATED, 2 * _error(a.detach(), t.detach())) for a, t in zip(plain, truth)]


def _error(a: Tensor, t: Tensor) -> float:
    return float((a.double() - t.double()).norm() / t.double().norm().clamp_min(1e-300))


class DeviceLost(Exception):
    """A kernel broke the process's GPU context (an illegal address, a failed assertion): nothing more can be measured in it."""

    def __init__(self, backend: str, why: str):
        super().__init__(f"backend {backend}: {why}")
        self.backend = backend


def attempt(call: Callable[[], Sequence[Tensor]], backend: str) -> tuple[Sequence[Tensor] | None, str]:
    """Outputs of one call under a backend, or the reason why there are none. Convolutions round as fp32: TF32 is for the clock.

    Raises:
      DeviceLost: the GPU cannot be used any more.
    """
    try:
        ops.use(backend)
        with no_tf32():
            outputs = call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # what goes wrong on the GPU belongs to this call
            return outputs, ""
    except Exception as error:  # whatever keeps a provider from running is its row's reason
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except Exception:
                raise DeviceLost(backend, one_line(error)) from error
        return None, one_line(error)


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def gate(cases: Iterable[Any]) -> list[dict[str, Any]]:
    """Run our backends once on small cases: rows op, case, backend, ok (None where it cannot run), said."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        truth, failed = attempt(case.truth, "reference")
        ok: bool | None
        for provider in case.providers:
            if provider.kind != "ours":
                continue
            row = {"op": case.op, "case": case.title(), "backend": provider.backend, "provider": provider.name}
            found, reason = (None, provider.reason) if provider.call is None else attempt(provider.call, provider.backend)
            if truth is None:
                ok, said = False, f"the definition did not run: {failed}"
            elif found is None:
                # A backend that the op table promised and that raises is wrong, one that the table refuses is absent.
                ok, said = (None if provider.call is None or "cannot run" in reason else False), reason
            else:
                ok, said = of_provider(case, provider, found, truth)
            rows.append({**row, "ok": ok, "said": said})
    ops.use("auto")
    return rows


def wrong(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """(op, provider) → what is wrong, of the rows of `gate`."""
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["ok"] is False:
            found.setdefault((row["op"], row["provider"]), f"{row['case']}: {row['said']}")
    return found
