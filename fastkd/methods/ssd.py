"""SSD-KD: FastDFKD with a small buffer that is balanced by a modulating function and partly replaced, and from which images are drawn by
how far the student is from the teacher on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.memory import Prioritised, Rows
from fastkd.memory.evict import entering, lowest
from fastkd.method import Count, Rate, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._pool import Call
from fastkd.methods.fast import Fast
from fastkd.nn import Trace

CARD = Card(
    paper="Liu et al., Small Scale Data-Free Knowledge Distillation",
    venue="CVPR",
    year=2024,
    basis="reconstructed",
    source="abstract, third-party notes and recalled equations, on top of FastDFKD; exponents, schedule and eviction rule are ours",
    needs=("bn",),
    terms=("bn", "oh", "adv", "kl"),
)


class LowestPhi(Prioritised):
    """A buffer whose rows of the smallest phi leave; `phi` [capacity] is written before rows come in."""

    def __init__(self, *args: Any, **kw: Any):
        super().__init__(*args, **kw)
        self.phi = torch.ones_like(self.leaves)

    def leaving(self, n: int) -> Tensor:
        return lowest(self.phi[: self.fill], n)


class TopPriority(Prioritised):
    """A buffer in which the highest priorities of stored and new rows stay; without priorities all new rows come in."""

    def put(self, images: Tensor, priority: Tensor | None = None, **columns: Tensor) -> Tensor:
        if priority is None:
            return super().put(images, **columns)
        at = entering(self._leaf(priority), self.leaves[: self.fill], self.capacity)
        return super().put(images[at.to(images.device)], priority[at], **{k: v[at] for k, v in columns.items()})


@dataclass
class Ssd(Fast):
    """Defaults: the CIFAR setting, 5,000 images (a tenth of the real set) on the host settings of ResNet-34 → ResNet-18.

    The buffer's `label` is the class that the teacher names, not the one that was asked for. With dense logits [B, C, H, W] phi and the
    divergences are taken per pixel and averaged over the map; an image counts as the class that most of its pixels are named.
    """

    capacity: Count = 5000
    """images in the buffer (N); the source sets it as a share of the real training set"""
    gamma: Weight = 2.0
    """exponent of the difficulty in phi"""
    beta: Weight = 0.4
    """exponent of the importance weights"""
    beta_schedule: Literal["fixed", "linear"] = "fixed"
    """linear: from beta to 1 over the epochs after warm-up"""
    eps: Rate = 1e-6
    """added to a priority, so that every image can be drawn"""
    phi_diversity: bool = True
    """phi is small for classes that the buffer has many images of; off: that factor is 1"""
    phi_difficulty: bool = True
    """phi is small for images that the teacher is sure of; off: that factor is 1"""
    phi_grad: bool = False
    """gradient through the teacher's confidence in phi"""
    phi_n: Literal["fill", "capacity"] = "fill"
    """what class counts are divided by"""
    task_label: Literal["sampled", "teacher"] = "sampled"
    """the classes of the one-hot loss: drawn for the call, or those that the teacher names"""
    adv_mask: Literal["agree", "none"] = "agree"
    """the adversarial loss of images on which student and teacher agree (the host's), or of all (the paper's)"""
    adv_start: int | None = None
    """1-based call from which the adversary takes part; none: the first call after warm-up"""
    insert_priority: Literal["fresh", "max"] = "fresh"
    """priority of new images: their divergence now, or the highest that is stored"""
    evict: Literal["frequent", "fifo", "lowest", "phi"] = "frequent"
    """who leaves a full buffer: the lowest priority of the most frequent class, the oldest, the lowest priority, the lowest phi"""
    replace: Literal["all", "top"] = "all"
    """all: new images come in and stored ones leave; top: the highest priorities of both stay, whatever `evict` says"""
    w_in_delta: Literal["previous", "current", "off"] = "previous"
    """the importance weight that multiplies the divergence in a priority"""
    w_in_loss: bool = True
    """the importance weight multiplies the divergence in the student's loss"""
    w_norm: Literal["max", "none"] = "max"
    """weights of the loss are divided by the largest of the batch; those that are stored never are"""
    delta_refresh: Literal["drawn", "epoch"] = "drawn"
    """which priorities are renewed: those of drawn images; epoch: before the student steps also all others"""
    delta_tau: Rate = 1.0
    """temperature of the divergence in a priority"""
    delta_view: Literal["augmented", "plain"] = "augmented"
    """the divergence of a drawn image: on the view that the student learns from, or un-augmented and with the student in eval mode"""
    sampler: Literal["prioritised", "uniform", "shuffle"] = "prioritised"
    """how images are drawn; uniform: each as likely, with replacement; shuffle: whole passes, as the host. Weights are 1 in both"""

    def check(self) -> None:
        super().check()
        if self.capacity < self.batch:
            raise ConfigError(f"method.capacity is {self.capacity}; expected at least batch (nearest: {self.batch}).")
        if self.phi_grad and 0 < self.gamma < 1:
            raise ConfigError(f"method.gamma is {self.gamma}; with phi_grad expected 0, or at least 1 for a finite gradient (nearest: 1).")

    def build(self) -> None:
        super().build()
        self.exponent = torch.full((), self.beta, dtype=self.replay.leaves.dtype, device=self.device)

    def new_pool(self, capacity: int, shape: tuple[int, int, int], dtype: torch.dtype, **kw: Any) -> Prioritised:
        kind: Any = TopPriority if self.replace == "top" else LowestPhi if self.evict == "phi" else Prioritised
        rule = "lowest" if kind is not Prioritised else self.evict
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        columns = {"confidence": wide, "w": wide}
        return kind(self.rng, min(self.capacity, capacity), shape, dtype, classes=self.classes, rule=rule, eps=self.eps, **columns, **kw)

    def epoch(self, e: int) -> Iterator[Step]:
        if e == 0:
            yield from self.synthesis(0, self.calls(0))
        for made in range(self.calls(e), self.calls(e + 1), self.loops):
            yield from self.synthesis(made, made + self.loops)  # each call ends with the partial update, `remember`
            if self.trains_student(e):
                yield self.anneal, e - self.warmup
                if self.sampler == "shuffle":
                    yield self.deal
                if self.delta_refresh == "epoch":
                    yield self.refresh
                for _ in range(self.kd_steps // self.rounds):
                    yield self.learn

    # Inversion ------------------------------------------------------------------------------------------------------

    def first_adversary(self) -> int:
        return self.calls(self.warmup) + 1 if self.adv_start is None else self.adv_start

    def one_hot(self, t: Trace, call: Call) -> Tensor:
        if not (self.phi_diversity or self.phi_difficulty):
            return super().one_hot(t, call)
        confidence = losses.confidence(t.logits)
        phi = self.phi(t.logits.argmax(1), confidence if self.phi_grad else confidence.detach())
        self.tell(phi=phi.mean())
        return (phi * losses.cross_entropy_rows(t.logits, self.wanted(t, call))).mean()

    def phi(self, named: Tensor, confidence: Tensor) -> Tensor:
        """The modulating function of images or pixels that the teacher names so, with that confidence; the shape of both."""
        counts = self.replay.hist if self.phi_diversity else torch.zeros_like(self.replay.hist)
        n = self.capacity if self.phi_n == "capacity" else self.replay.stored.clamp_min(1)
        return losses.modulation((counts / n)[named], confidence, self.gamma if self.phi_difficulty else 0.0)

    def wanted(self, t: Trace, call: Call) -> Tensor:
        return t.logits.detach().argmax(1) if self.task_label == "teacher" else super().wanted(t, call)

    def adversarial(self, t: Trace, s: Trace) -> Tensor:
        return losses.adv_kl(t.logits, s.logits) if self.adv_mask == "none" else super().adversarial(t, s)

    # Partial update -------------------------------------------------------------------------------------------------

    @property
    def replay(self) -> Prioritised:
        """The buffer."""
        assert isinstance(self.pool, Prioritised)
        return self.pool

    def keep(self, call: Call) -> None:
        """End of a call: its kept batch comes into the buffer, and as many images leave as do not fit."""
        call.ema.update()
        x = self.view(self.replay.as_stored(call.image), "none")
        t = self.answers(x)
        confidence = losses.per_image(losses.confidence(t))
        delta = self.finite(self.divergence(x, t), 0.0) if self.insert_priority == "fresh" else None
        if isinstance(self.pool, LowestPhi):
            stored = self.pool.columns
            self.pool.phi.copy_(self.phi(stored["label"].long(), stored["confidence"]))
        self.replay.add(call.image, delta, label=losses.majority(t), confidence=confidence, w=torch.ones_like(confidence))

    def answers(self, x: Tensor) -> Tensor:
        """The teacher's logits, without a gradient."""
        with torch.no_grad():
            return self.teacher(x).logits  # type: ignore[no-any-return]

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """KL(teacher ‖ student) of images as the networks see them, [b]; the student is in eval mode, and nothing has a gradient."""
        with torch.no_grad(), self.evaluating(self.student):
            return losses.per_image(losses.kl_rows(t, self.student(x), self.delta_tau))

    @staticmethod
    def finite(delta: Tensor, otherwise: Tensor | float) -> Tensor:
        """Priorities as they are stored: of a student that is not finite (its steps are skipped) nothing is taken."""
        return torch.where(delta.isfinite(), delta, otherwise)

    # Distillation ---------------------------------------------------------------------------------------------------

    @step("distillation", eager=True)
    def anneal(self, k: int) -> None:
        super().anneal(k)
        done = k / max(1, self.epochs - self.warmup - 1) if self.beta_schedule == "linear" else 0.0
        self.exponent.fill_(self.beta + (1 - self.beta) * done)

    @step("memory", eager=True)
    def refresh(self) -> None:
        """The priorities of all stored images for the student as it is."""
        last = len(self.replay) - 1
        for start in range(0, last + 1, self.kd_batch):
            rows = self.replay.rows((start + self.rows(self.kd_batch)).clamp_max(last))
            self.write_back(rows, self.plain(rows), rows.column("w"))

    def draw(self) -> tuple[Rows, Tensor]:
        """Rows of a student step and their importance weights (N P)^-beta, [b]; they are 1 where all rows are as likely."""
        if self.sampler == "shuffle":
            rows = self.replay.next(self.kd_batch)
            return rows, torch.ones_like(rows.column("w"))
        rows, _, p = self.replay.draw(self.kd_batch, uniform=self.sampler == "uniform")
        return rows, losses.importance(p, self.replay.stored, self.exponent) if self.sampler == "prioritised" else torch.ones_like(p)

    @step("distillation")
    def learn(self) -> None:
        rows, w = self.draw()
        x = self.view(rows, self.kd_aug, name="kd", scale=self.kd_scale)
        plain = self.plain(rows) if self.delta_view == "plain" else None  # before the forward that moves the student's running statistics
        t, s = self.answers(x), self.student(x)
        now = losses.per_image(losses.kl_rows(t, s.detach(), self.delta_tau)) if plain is None else plain
        kl = losses.per_image(losses.kl_rows(t, s, self.tau))
        self.minimise({"kl": self.tau**2 * (self.loss_weight(w) * kl).mean()}, self.opt_s)
        self.write_back(rows, now, w)

    def plain(self, rows: Rows) -> Tensor:
        """The divergence of stored images, un-augmented, [b]."""
        x = self.view(rows, "none", name="plain")
        return self.divergence(x, self.answers(x))

    def loss_weight(self, w: Tensor) -> Tensor:
        """What the raw weights [b] are in the student's loss."""
        w = w if self.w_in_loss else torch.ones_like(w)
        w = losses.to_batch_max(w) if self.w_norm == "max" else w
        self.tell(w=w.mean())
        return w

    def write_back(self, rows: Rows, kl: Tensor, w: Tensor) -> None:
        """delta = w_previous · kl, then w, both raw; a row that was drawn more than once gets the mean of its priorities."""
        factor = {"previous": rows.column("w"), "current": w, "off": torch.ones_like(w)}[self.w_in_delta]
        self.replay.write(rows.index, self.finite(factor * kl, self.replay.leaves[rows.index]), duplicates="mean", w=w)
