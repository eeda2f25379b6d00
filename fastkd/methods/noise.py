"""Noise: the floor that every method must beat. The student learns the teacher's answers to pure noise, with the steps of another run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastkd.memory import Rows, Store
from fastkd.method import Count, Step
from fastkd.methods._card import Card
from fastkd.methods._student import Distance, StudentPhase, distance

CARD = Card(
    paper="",
    venue="",
    year=None,
    basis="own",
    source="DAFL and DFAD print such rows without saying which noise it was",
    needs=(),
    terms=("kl", "gap"),
)


@dataclass
class Noise(StudentPhase):
    """All fields but `kind` and `n_images` are those of the run it is compared with; there is no warm-up."""

    needs: ClassVar[frozenset[str]] = frozenset(CARD.needs)
    per_pixel: ClassVar[bool] = True
    epochs: Count = 200
    warmup: int = 0
    kind: Literal["gaussian", "uniform"] = "gaussian"
    """gaussian: N(0, 1) in the teacher's normalised space; uniform: U[0, 1], augmented like the compared run's images"""
    n_images: Count = 50_000
    """the compared run's pool at its end"""
    loss: Distance = "kl"
    """the compared run's student loss: temperature-scaled KL, or L1 of the logits"""

    @property
    def space(self) -> Literal["unit", "normalised"]:  # type: ignore[override]
        return "normalised" if self.kind == "gaussian" else "unit"

    def build(self) -> None:
        self.build_student()
        gaussian = self.kind == "gaussian"
        self.pool = Store(self.rng, self.n_images, self.shape, torch.float16 if gaussian else torch.uint8)
        self.pool.reserve(self.kd_steps * self.kd_batch)
        draw, chunk, source = torch.randn if gaussian else torch.rand, 16 * self.kd_batch, self.rng.whole("noise")
        for start in range(0, self.n_images, chunk):  # drawn whole by all, so that any number of images can be dealt
            size = (min(chunk, self.n_images - start), *self.shape)
            self.pool.put(self.pool.encode(draw(size, generator=source, device=self.device, dtype=self.rng.dtype)))

    def stores(self) -> list[Store]:
        return [self.pool]

    def student_terms(self, x: Tensor, t: Tensor, rows: Rows) -> dict[str, Tensor]:
        # A teacher may give nearly all noise one label: its confidence, and the share of the class it names most, are logged.
        p = t.detach().softmax(1).movedim(1, -1).flatten(0, -2)  # of images, or of the pixels of dense predictions
        named = (p.argmax(1, keepdim=True) == torch.arange(self.classes, device=p.device)).to(p.dtype).mean(0)
        self.tell(confidence=p.amax(1).mean(), top_class=named.amax())
        return distance(self.loss, t, self.student(x), self.tau)

    def epoch(self, e: int) -> Iterator[Step]:
        yield from self.student_epoch(e)
