"""LRA, also KAKR: the student must still know the replayed images after a virtual step on the novel ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.method import Count, Weight
from fastkd.methods._card import Card
from fastkd.methods._prior import Prior
from fastkd.methods.mb import Mb
from fastkd.methods.pre import Pre

CARD = Card(
    paper="Patel et al., Learning to Retain while Acquiring: Combating Distribution-Shift in Adversarial Data-Free Knowledge Distillation",
    venue="CVPR",
    year=2023,
    basis="code",
    source="gaurav104/LRA; the second-order gradient is the paper's: the released one may not reach the student (meta_grad_to_theta)",
    needs=("second_order",),
    terms=(
        "oh",
        "ie",
        "act",
        "dis",
        "bn",
        "gap",
        "retain: student: the replayed images after a virtual step on the novel ones",
        "pixels",
        "logits",
        "feature",
        "kld",
        "leak",
    ),
    also="act: a teacher that ends in a linear layer; order=first: any student; match=prior+bn: a teacher with BatchNorm",
)


@dataclass
class Retain(Prior):
    """The student step of LRA, for any host that has replayed images."""

    needs: ClassVar[frozenset[str]] = frozenset(CARD.needs)

    batch: Count = 512
    iterations: Count = 72
    replay: Literal["bank", "vae"] = "bank"
    """where replayed images come from: MB-DFKD's ring or PRE-DFKD's VAE; the other fields are that method's"""
    order: Literal["second", "first", "none"] = "second"
    """of the meta gradient; first: without the Hessian; none: joint training, the student step of the host"""
    lr_inner: Weight = 0.9
    """learning rate of the virtual step, one plain SGD step"""
    weight_decay_inner: Weight = 5e-4
    """weight decay of the virtual step"""
    bn_in_inner: Literal["discard", "keep"] = "discard"
    """running statistics of the passes of virtual networks (BatchNorm uses the batch in both): thrown away, or the student's"""
    meta_grad_to_theta: bool = True
    """whether the loss after the virtual step has a gradient; false: it is only measured, as the release reads literally"""

    def check(self) -> None:
        super().check()
        if self.second_order:
            self.refuse_first_order()

    @property
    def second_order(self) -> bool:
        return self.order == "second" and self.meta_grad_to_theta

    def refuse_first_order(self) -> None:
        """Refuse a student that cannot be differentiated twice, by trying."""
        theta = {n: p.detach().requires_grad_() for n, p in self.student.named_parameters()}
        try:
            with self.evaluating(self.student):
                y = self.virtual(theta, torch.zeros(2, *self.shape, device=self.device))
            grads = torch.autograd.grad(y.square().sum(), list(theta.values()), create_graph=True, allow_unused=True)
            # Backward through everything: to ask for theta alone would pass by a node that refuses a second derivative.
            torch.stack([g.square().sum() for g in grads if g is not None]).sum().backward()
        except (RuntimeError, ValueError) as problem:
            raise ConfigError(
                f"the student cannot be differentiated twice, which method.order=second needs ({str(problem).splitlines()[0]}); "
                "use --set method.order=first, or a student of plain torch layers."
            ) from None

    def update(self, x: Tensor, old: Tensor | None) -> None:
        if old is None or self.order == "none":
            return super().update(x, old)
        with torch.no_grad():
            t = self.teacher(torch.cat([x, old])).logits
        t_new, t_old = t.split([len(x), len(old)])
        theta = dict(self.student.named_parameters())
        acquired = losses.l1_logit(t_new, self.virtual(theta, x))
        ahead = self.ahead(theta, acquired)
        retain = losses.l1_logit(t_old, self.virtual(ahead, old))
        joint = losses.l1_logit(t, self.student(torch.cat([x, old])))
        self.tell(acquire=acquired)
        self.minimise({"gap": joint, "retain": retain}, self.opt_s)

    def ahead(self, theta: dict[str, Any], loss: Tensor) -> dict[str, Tensor]:
        """The weights after one SGD step on `loss`, as a function of `theta`."""
        grads = self.gradients(loss, list(theta.values()), create_graph=self.second_order)
        moved = {n: p - self.lr_inner * (g + self.weight_decay_inner * p) for (n, p), g in zip(theta.items(), grads, strict=True)}
        return moved if self.meta_grad_to_theta else {n: p.detach() for n, p in moved.items()}

    def virtual(self, weights: dict[str, Any], x: Tensor) -> Tensor:
        """Logits of the student with other weights; what BatchNorm notes on the way goes where `bn_in_inner` says."""
        buffers = {n: b.clone() for n, b in self.student.named_buffers()} if self.bn_in_inner == "discard" else {}
        return functional_call(self.student, {**weights, **buffers}, (x,))  # type: ignore[no-any-return]


@dataclass
class Lra(Retain, Mb):
    """Defaults: Ours-1, ResNet-34 → ResNet-18 on CIFAR-100 [code]. Ours-2 is replay=vae."""


@dataclass
class LraVae(Retain, Pre):
    """Defaults: Ours-2, ResNet-34 → ResNet-18 on CIFAR-100 [code]. Ours-1 is replay=bank."""

    replay: Literal["bank", "vae"] = "vae"


def host(table: dict[str, Any]) -> type[Retain]:
    """The class for a table of fields."""
    return LraVae if table.get("replay") == "vae" else Lra
