"""The discriminator of CDE: tells condensed from synthetic images by the teacher's feature and the class."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

Condition = Literal["proj", "acgan", "none"]
WIDTHS = (512, 256)


class FeatureDiscriminator(nn.Module):
    """d → 512 → 256, LeakyReLU(.2), every layer spectrally normalised (Miyato et al. 2018), no BatchNorm.

    Args:
      features: d. classes: number of classes.
      condition: how the class comes in. proj: D(f, y) = wᵀh + b + ⟨E[y], h⟩ (Miyato and Koyama 2018); acgan: a head that names the
        class (Odena et al. 2017); none: not at all.
    """

    def __init__(self, features: int, classes: int, condition: Condition = "proj"):
        super().__init__()
        self.condition = condition
        first, last = WIDTHS
        self.l0, self.l1 = spectral_norm(nn.Linear(features, first)), spectral_norm(nn.Linear(first, last))
        self.out = spectral_norm(nn.Linear(last, 1))
        if condition == "proj":
            self.embedding = spectral_norm(nn.Embedding(classes, last))
        elif condition == "acgan":
            self.head = spectral_norm(nn.Linear(last, classes))

    def forward(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [B, d] and classes int64 [B] → logits of "condensed" [B], and class logits [B, C] of acgan, else None."""
        h = self.hidden(f)
        logit = self.out(h).squeeze(1)
        if self.condition == "proj":
            logit = logit + (self.embedding(y) * h).sum(1)
        return logit, self.head(h) if self.condition == "acgan" else None

    def hidden(self, f: Tensor) -> Tensor:
        """h [B, 256]."""
        return F.leaky_relu(self.l1(F.leaky_relu(self.l0(f), 0.2)), 0.2)
