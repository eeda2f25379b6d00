"""How a method updates parameters: gradients of exactly those of an optimiser, one all-reduce, no step with what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd import optim, ranks
from fastkd.log import Log

LARGE = 1 << 14
"""Elements of a tensor from which its extremes are quicker than its norm, on a CPU."""


@dataclass
class Pace:
    """How the engine has steps done; state of the run.

    Attributes:
      parts: micro-batches of a step that can be split (`minimise_parts`); raised when memory runs out.
      rate: factor of every learning rate; lowered when a run is rolled back. rolled_back: whether it was.
    """

    parts: int = 1
    rate: float = 1.0
    rolled_back: bool = False


class Updates:
    """The doors for updates of a `Method`. What is counted of the running step is forgotten when it ends."""

    log: Log
    pace: Pace
    _touched: list[Tensor]
    _bad: Tensor
    _rows: int

    def minimise(self, terms: dict[str, Tensor], *opts: torch.optim.Optimizer, clip: float = 0.0) -> Tensor:
        """One step of `opts` on the sum of `terms`.

        Gradients are taken with respect to exactly the parameters of `opts`, reduced over ranks in one flat all-reduce together
        with the term values, clipped to global norm `clip` (0: not), and applied. A step that is not finite is skipped on the
        device and counted. The gradients can be had until the step ends (`applied`).

        Args:
          terms: name → [] tensor, already weighted; each one's mean over ranks is the term of the global batch.
        Returns:
          [] the total of the global batch, equal on all ranks, detached.
        """
        params = optim.parameters(*opts)
        values, grads = self._valued(terms, params)
        return self._update(list(terms), values, params, grads, opts, clip)

    def minimise_parts(
        self, terms: Callable[[slice], dict[str, Tensor]], rows: int, *opts: torch.optim.Optimizer, clip: float = 0.0
    ) -> Tensor:
        """As `minimise`, of terms that are means over samples: where memory is short they are taken in micro-batches and added up.

        One part is all rows, and then this is `minimise`. In more parts the gradient is the same to rounding, but for what couples
        samples inside the networks: BatchNorm in training sees a part (of all ranks) at a time. Terms that couple samples
        themselves (balance, contrast, a hinge over the batch) belong into `minimise`.

        Args:
          terms: called with the slice of this rank's rows that a part holds; name → [] tensor, each a mean over those rows.
          rows: how many rows this rank has.
        Returns:
          [] the total of the global batch, equal on all ranks, detached.
        """
        params = optim.parameters(*opts)
        object.__setattr__(self, "_rows", rows)
        names: list[str] = []
        values, grads = torch.zeros(()), list[Tensor]()
        for part in _cut(rows, self.pace.parts):
            found = terms(part)
            share = 1.0 if part == slice(0, rows) else (part.stop - part.start) / rows
            v, g = self._valued(found, params, share)
            names, values = list(found), v if not grads else values + v
            if grads:
                torch._foreach_add_(grads, g)
            else:
                grads = g
        return self._update(names, values, params, grads, opts, clip)

    def _valued(self, terms: dict[str, Tensor], params: list[Tensor], share: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        """This rank's term values [n] and gradients of their sum, times `share`."""
        scaled = list(terms.values()) if share == 1.0 else [share * t for t in terms.values()]
        total = torch.stack([t.reshape(()) for t in scaled]).sum()
        grads = self._grads(total, params)
        return torch.stack([t.detach().reshape(()).to(total.dtype) for t in scaled]), grads

    def _update(
        self,
        names: list[str],
        values: Tensor,
        params: list[Tensor],
        grads: list[Tensor],
        opts: tuple[torch.optim.Optimizer, ...],
        clip: float,
    ) -> Tensor:
        """Reduce over ranks, clip, step, log; returns the global total."""
        values, finite = self._reduce(values, params, grads)
        if clip:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_mul_(grads, torch.clamp(clip / (norm + 1e-6), max=1.0))
        self._step(opts, params, grads, finite)
        self.log.add(**dict(zip(names, values, strict=True)))
        return values.sum()

    def apply(self, opt: torch.optim.Optimizer, grads: list[Tensor]) -> None:
        """A step of `opt` with gradients of one's own (meta updates); they are global already and are not reduced."""
        params = optim.parameters(opt)
        self._step((opt,), params, grads, self._finite(grads))

    def gradients(self, loss: Tensor, params: list[Tensor], create_graph: bool = False, retain_graph: bool | None = None) -> list[Tensor]:
        """Gradients of a local loss for `params`, without a step (latent tuning, inner steps); differentiable with `create_graph`.

        Those of shared parameters are reduced over ranks, in one flat all-reduce.
        """
        grads = self._grads(loss, params, create_graph, retain_graph)
        shared = [g for p, g in zip(params, grads, strict=True) if not _own_rows(p)]
        if ranks.world() == 1 or not shared:
            return grads
        flat = ranks.total(torch.cat([g.reshape(-1) for g in shared]))
        pieces = iter(flat.split([g.numel() for g in shared]))
        return [g if _own_rows(p) else next(pieces).view_as(g).to(g.dtype) for p, g in zip(params, grads, strict=True)]

    @staticmethod
    def _grads(loss: Tensor, params: list[Tensor], create_graph: bool = False, retain_graph: bool | None = None) -> list[Tensor]:
        found = torch.autograd.grad(loss / ranks.world(), params, allow_unused=True, create_graph=create_graph, retain_graph=retain_graph)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]

    @staticmethod
    def _finite(tensors: list[Tensor]) -> Tensor:
        full = [t for t in tensors if t.numel()]
        if not full:
            return torch.tensor(True)
        # On a CPU the infinity norm is not vectorised: twenty times slower than the extremes, which cost more calls.
        large = [t for t in full if t.device.type == "cpu" and t.numel() >= LARGE]
        found = [v for t in large for v in t.aminmax()]
        small = [t for t in full if t.device.type != "cpu" or t.numel() < LARGE]
        found += torch._foreach_norm(small, torch.inf) if small else []
        return torch.stack([v.to(torch.float64) for v in found] if len({v.dtype for v in found}) > 1 else found).isfinite().all()

    def _reduce(self, values: Tensor, params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """All-reduce shared gradients and term values in place; returns global values and whether everything is finite everywhere."""
        finite = self._finite([*grads, values])
        if ranks.world() == 1:
            return values, finite
        shared = [g for p, g in zip(params, grads, strict=True) if not _own_rows(p)]
        flat = torch.cat([values / ranks.world(), (~finite).to(values.dtype)[None], *(g.reshape(-1).to(values.dtype) for g in shared)])
        flat = ranks.total(flat)
        n = values.numel()
        for g, piece in zip(shared, flat[n + 1 :].split([g.numel() for g in shared]), strict=True):
            g.copy_(piece.view_as(g))
        return flat[:n], flat[n] == 0

    def _step(self, opts: tuple[torch.optim.Optimizer, ...], params: list[Tensor], grads: list[Tensor], finite: Tensor) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p, memory_format=torch.preserve_format).copy_(g)
        skip = (~finite).to(torch.float32)
        for opt in opts:
            opt.found_inf = skip  # type: ignore[attr-defined]
            opt.step()
        self._touched.extend(params)
        self._bad.copy_(torch.maximum(self._bad, skip))
        self.log.add(skipped=skip)

    def applied(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Gradients that the running step's update has applied to `params`, of the global batch; zeros where it was skipped."""
        skipped = self._bad > 0
        return [torch.where(skipped, torch.zeros_like(p), p.grad) for p in params]  # type: ignore[arg-type]

    def updated(self) -> bool:
        """Whether the running step has updated anything yet."""
        return bool(self._touched)

    def rows_to_split(self) -> int:
        """How many rows of this rank the running step can take in parts; 0 where it cannot, or has not come so far."""
        return self._rows

    def not_finite(self) -> Tensor:
        """[] 1 where an update of the running step was skipped because it was not finite, else 0; on the device, the same on all ranks."""
        return self._bad

    def step_ends(self) -> None:
        """Called by the engine after each step: gradients do not outlive it."""
        for p in self._touched:
            p.grad = None
        if self._touched:
            self._bad.zero_()
        self._touched.clear()
        object.__setattr__(self, "_rows", 0)

    def tell(self, **values: Tensor) -> None:
        """Log [] values without optimising them; their mean over ranks is what is logged."""
        self.log.add(**{name: ranks.mean(value.detach()) for name, value in values.items()})


def _cut(rows: int, parts: int) -> list[slice]:
    """`rows` in at most `parts` pieces of equal size, the last perhaps smaller."""
    size = max(1, math.ceil(rows / parts))
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def _own_rows(p: Tensor) -> bool:
    return getattr(p, "per_sample", False)
