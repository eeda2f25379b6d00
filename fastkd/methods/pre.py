"""PRE-DFKD: a VAE learns all synthetic images as they come, and the student rehearses its samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.method import Rate, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._prior import Prior, Replayed

CARD = Card(
    paper="Binici et al., Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative Pseudo Replay",
    venue="AAAI",
    year=2022,
    basis="code",
    source="kuluhan/PRE-DFKD; images of 64 px and more as gaurav104/LRA has them",
    needs=(),
    terms=("oh", "ie", "act", "dis", "gap", "pixels", "logits", "feature", "kld", "leak"),
    also="act: a teacher that ends in a linear layer",
)


def first_adam_step(g: Tensor, lr: float) -> Tensor:
    """What a fresh Adam subtracts in its first step on the gradient `g`: ±lr, 0 where the gradient is 0."""
    return lr * g / (g.abs() + 1e-8)


class _Known(torch.autograd.Function):
    """A value whose gradient is known: (value [], n gradients, the n tensors that they are for) → value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *found: Tensor) -> Tensor:
        ctx.save_for_backward(*found[: len(found) // 2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        known = ctx.saved_tensors
        return None, *([None] * len(known)), *(grad * g for g in known)


@dataclass
class Pre(Prior):
    """Defaults: ResNet-34 → ResNet-18 on CIFAR-10/100 [code]. The teacher sees images without augmentation, in its own constants."""

    replay_batch: Replayed = None
    """replayed images of a student or VAE step, over all ranks; none: an eighth of batch, 0: no replay"""
    vae_steps: Annotated[int, Field(ge=0)] = 4
    """the first student steps of an iteration that a VAE step follows"""
    lr_vae: Rate = 5e-4
    """learning rate of encoder and memory generator (Adam)"""
    lr_latent: Rate = 0.02
    """length of the one tuning step of a replay latent"""
    kld: Weight = 1e-5
    """weight of the VAE's Kullback-Leibler term"""
    feat_recon: bool = False
    """the VAE also matches the teacher's penultimate features; the release has the term and switches it off"""
    leak_latent_grad: bool = True
    """a VAE step also trains the memory generator on the tuning objective of its samples: the release does not clear that gradient"""
    latent_sharing: bool = False
    """a VAE step rehearses the replay batch of the student step before it; nothing is tuned there, so nothing leaks"""
    replay_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """precision to which the memory generator's weights are rounded when it replays"""

    def check(self) -> None:
        super().check()
        if self.replayed == 1:
            raise ConfigError(
                f"a replay batch has 1 image (batch is {self.batch}); expected none, or at least 2 for the variance of their latents; "
                "use --set method.replay_batch=2, or a batch of 16 and more."
            )

    def build(self) -> None:
        super().build()
        self.Gm = self.generator("g_mem", self.nz, **self.generator_options())
        self.Em = self.encoder("enc_pre", self.nz, small_start=self.small_start)
        self.Em.bn1.eps = self.Em.bn2.eps = self.bn_eps
        self.opt_vae = self.adam([*self.Gm.parameters(), *self.Em.parameters()], lr=self.lr_vae)
        self.old = self.buffer(self.replayed, *self.shape)  # the replay batch of the newest student step

    @property
    def replayed(self) -> int:
        return self.or_eighth(self.replay_batch)

    def on_features(self) -> dict[str, str]:
        return super().on_features() | ({"the VAE's feature loss": "feat_recon=false"} if self.feat_recon else {})

    def epoch(self, e: int) -> Iterator[Step]:
        yield self.anneal, e
        for it in range(self.iterations):
            for _ in range(self.g_steps):
                yield self.generate
            for d in range(self.s_steps):
                yield self.learn
                if d < self.vae_steps:
                    yield self.vae, (e, it) != (0, 0) and self.replayed > 0

    @step("distillation")
    def learn(self) -> None:
        if self.replayed:
            with self.evaluating(self.Gm):
                self.old.copy_(self.rehearsal()[0])
        self.update(self.fresh(), self.old if self.replayed else None)

    def rehearsal(self, leak: bool = False) -> tuple[Tensor, Tensor]:
        """Self-generated images [m, C, H, W], confident and class-balanced after one tuning step of their latents; no gradient.

        Also the objective before that step. With `leak` it is a term that teaches the memory generator, as the release's uncleared
        gradient does; that gradient is taken together with the latents'.
        """
        z = self.rng.normal(self.replayed, self.nz, name="replay").requires_grad_()
        objective = torch.stack(list(self.confident(self.teacher(self.decode(z))).values())).sum()
        weights: list[Tensor] = list(self.Gm.parameters()) if leak else []
        g, *found = self.gradients(objective + losses.latent_prior(z), [z, *weights])
        with torch.no_grad():
            old = self.decode(z - first_adam_step(g, self.lr_latent))
        return old, _Known.apply(objective.detach(), *found, *weights) if leak else objective.detach()

    def decode(self, z: Tensor) -> Tensor:
        """Images of the memory generator with its weights in `replay_dtype`."""
        if self.replay_dtype == "fp32":
            return self.Gm(z)  # type: ignore[no-any-return]
        half = torch.float16 if self.replay_dtype == "fp16" else torch.bfloat16
        return functional_call(self.Gm, {n: p.to(half).to(p.dtype) for n, p in self.Gm.named_parameters()}, (z,))  # type: ignore[no-any-return]

    @step("memory")
    def vae(self, rehearse: bool) -> None:
        x, leak = self.first(self.x, self.batch // 2), None
        if rehearse and self.latent_sharing:
            x = torch.cat([x, self.old])
        elif rehearse and self.leak_latent_grad:
            old, leak = self.rehearsal(leak=True)
            x = torch.cat([x, old])
        elif rehearse:
            with self.frozen(self.Gm):
                x = torch.cat([x, self.rehearsal()[0]])
        terms = self.vae_terms(x)
        self.minimise(terms if leak is None else terms | {"leak": leak}, self.opt_vae)

    def vae_terms(self, x: Tensor) -> dict[str, Tensor]:
        """L_VAE of images [b, C, H, W]: pixels and the teacher's answers are reconstructed."""
        mean, logvar = self.Em(x)
        rec = self.Gm(mean + (0.5 * logvar).exp() * self.rng.normal(x, self.nz, name="vae"))
        with torch.no_grad():
            t = self.teacher(x)
        r = self.teacher(rec)
        terms = {"pixels": losses.l1(rec, x), "logits": losses.l1(r.logits, t.logits), "kld": self.kld * losses.kl_normal(mean, logvar)}
        if self.feat_recon:
            terms["feature"] = losses.l1(r.feature, t.feature)
        return terms

    def report(self) -> dict[str, float]:
        return {"replay_bytes": float(sum(p.numel() * p.element_size() for p in [*self.Gm.parameters(), *self.Em.parameters()]))}
