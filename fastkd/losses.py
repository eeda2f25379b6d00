"""The field's losses as plain functions.

A term is a scalar whose mean over ranks is the term of the global batch: a mean over samples is right as written; whatever
couples samples or stands before a clamp, hinge, log or norm goes through `ranks`. Everything is computed in at least fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import ranks


def _wide(x: Tensor) -> Tensor:
    """Half precisions are computed in fp32; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hard labels: the one-hot loss of inversion methods.

    Args:
      logits: [B, C] or dense [B, C, *S].
      labels: int64 [B] or [B, *S], 0 … C - 1.
    """
    return F.cross_entropy(_wide(logits), labels)


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore: int, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over those pixels of the global batch whose label is not `ignore`; 0 where there are none.

    Args:
      logits: [B, C, H, W]. labels: int64 [B, H, W], 0 … C - 1 or `ignore`.
      smoothing: share of the target that is spread over all classes.
    """
    loss = F.cross_entropy(_wide(logits), labels, ignore_index=ignore, label_smoothing=smoothing, reduction="sum")
    return loss / ranks.mean((labels != ignore).sum().to(loss.dtype)).clamp_min(1)


def cross_entropy_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """`cross_entropy` of each row: logits [B, C] or [B, C, *S], int64 labels [B] or [B, *S] → [B] or [B, *S]."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def confidence(logits: Tensor) -> Tensor:
    """max_c softmax(logits)_c, in [1/C, 1]: logits [B, C] or [B, C, *S] → [B] or [B, *S], at least fp32."""
    return F.softmax(_wide(logits), 1).amax(1)


def modulation(share: Tensor, confidence: Tensor, gamma: float) -> Tensor:
    """(1 - share) (1 - confidence)^gamma, in [0, 1]: small for classes that are frequent already and for images that the teacher is sure
    of (SSD-KD's phi, Liu et al. 2024).

    Args:
      share: n_c / N of the class that the teacher names, any shape. confidence: its probability, same shape.
      gamma: strength of the second factor, 0 or more; 0: it is 1, at confidence 1 too.
    """
    return (1 - share) * (1 - confidence) ** gamma


def importance(probability: Tensor, rows: Tensor, beta: Tensor) -> Tensor:
    """(N P)^-beta: weights of rows [b] that were drawn with probability P from N; 1 where all are as likely (Schaul et al. 2016)."""
    return (rows * probability) ** -beta


def to_batch_max(weight: Tensor) -> Tensor:
    """Weights [b] over their maximum in the global batch: at most 1."""
    return weight / ranks.max(weight.amax())


def per_image(x: Tensor) -> Tensor:
    """Mean over all axes but the first, [B, *S] → [B]; [B] is returned with the same values."""
    return x.reshape(len(x), -1).mean(1)


def majority(logits: Tensor) -> Tensor:
    """The class that most places of a map are named, int64 [B]: logits [B, C, *S]; of [B, C] the argmax. Of equals the first."""
    named = logits.argmax(1).reshape(len(logits), -1)
    count = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    return count.scatter_add_(1, named, torch.ones_like(named)).argmax(1)


def kl_rows(teacher: Tensor, student: Tensor, tau: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of softmax(logits / tau), one value a row, not scaled by tau².

    Args:
      teacher, student: logits [B, C] (class axis 1; further axes are kept).
    Returns:
      [B] (or [B, *S]).
    """
    log_t, log_s = F.log_softmax(_wide(teacher) / tau, 1), F.log_softmax(_wide(student) / tau, 1)
    return (log_t.exp() * (log_t - log_s)).sum(1)


def kl_tau(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """Distillation loss tau² · mean_b KL(teacher ‖ student) at temperature tau (Hinton et al. 2015, "batchmean")."""
    return tau**2 * kl_rows(teacher, student, tau).mean()


def l1_logit(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean absolute difference of logits over batch and classes (DFAD, Fang et al. 2019)."""
    return (_wide(student) - _wide(teacher)).abs().mean()


def agreement(teacher: Tensor, student: Tensor) -> Tensor:
    """1 where both networks name the same class, else 0: [B], dtype of the logits, no gradient."""
    return (teacher.argmax(1) == student.argmax(1)).to(_wide(teacher).dtype)


def adv_masked_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """-(1/B) Σ_b 1[argmax s_b = argmax t_b] KL(t_b ‖ s_b): images on which the student disagrees, where it still names the same class.

    The mean is over the whole batch, not over the mask (CMI, Fang et al. 2021); gradient flows through both networks' logits.
    """
    return -(agreement(teacher, student) * kl_rows(teacher, student)).mean()


def gaussian_mask(height: int, width: int, sigma: float, *, like: Tensor) -> Tensor:
    """exp(-((i - ci)² + (j - cj)²) / (2 sigma²)) on an h × w grid around its centre, sigma in cells: [h, w] in (0, 1]."""
    i = torch.arange(height, device=like.device, dtype=like.dtype) - (height - 1) / 2
    j = torch.arange(width, device=like.device, dtype=like.dtype) - (width - 1) / 2
    return torch.exp(-(i[:, None] ** 2 + j[None, :] ** 2) / (2 * sigma**2))


def cam_to_mask(cam: Tensor, mask: Tensor) -> Tensor:
    """Mean squared distance of normalised class activation maps [B, h, w] from a target mask [h, w] (MUSE, L_cam)."""
    return (_wide(cam) - mask).square().mean()


def embedding_distance(projected: Tensor, embedding: Tensor) -> Tensor:
    """Mean squared error of each row over the embedding axis: [B, d], [B, d] → [B]."""
    return (_wide(projected) - embedding).square().mean(1)


def hinge_batch(distance: Tensor, radius: float) -> Tensor:
    """relu(mean_b distance - radius): no pull inside `radius`; the mean is over the global batch, before the hinge (LANDER).

    Args:
      distance: [B], one value a sample.
    """
    return F.relu(ranks.batch_mean(distance) - radius)


def adv_embedding(distance: Tensor, mask: Tensor | None, cap: float | None) -> Tensor:
    """-(1/B) Σ_b mask_b · min(distance_b, cap): images far from their class's embedding (MUSE, L_aed). At least -cap where set.

    Args:
      distance: [B]; mask: [B] of 0 and 1, or None for all; cap: upper bound of a distance, or None.
    """
    m = distance if cap is None else distance.clamp(max=cap)
    return -(m if mask is None else mask * m).mean()


def kl_elem(teacher: Tensor, student: Tensor, tau: float = 1.0) -> Tensor:
    """Mean over batch **and classes** of the KL summands: KL(teacher ‖ student) / C, not scaled by tau² (ZSKT, Micaelli & Storkey 2019)."""
    return kl_rows(teacher, student, tau).mean() / teacher.shape[1]


def adv_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """-mean_b KL(teacher ‖ student), every row (DFQ, Choi et al. 2020); gradient flows through both networks' logits."""
    return -kl_tau(teacher, student, 1.0)


def adv_l1(teacher: Tensor, student: Tensor) -> Tensor:
    """-`l1_logit` (DFAD); gradient flows through both networks' logits."""
    return -l1_logit(teacher, student)


def adv_log_l1(teacher: Tensor, student: Tensor) -> Tensor:
    """-log(D + 1), D the `l1_logit` of the global batch: for dense prediction (DFAD). Its gradient is 1 / (D + 1) of `adv_l1`'s."""
    return -torch.log1p(ranks.mean(l1_logit(teacher, student)))


def pseudo_label(teacher: Tensor) -> Tensor:
    """Cross-entropy of the class that the teacher itself names, argmax over axis 1: low for confident images (DAFL's one-hot loss)."""
    return cross_entropy(teacher, teacher.detach().argmax(1))


def act(feature: Tensor) -> Tensor:
    """-mean |feature| over batch and channels of the penultimate feature [B, d]: strong activations (DAFL, Chen et al. 2019)."""
    return -_wide(feature).abs().mean()


def balance_ln(logits: Tensor) -> Tensor:
    """Σ_c p̄_c ln p̄_c, p̄ the mean of softmax(logits) over the global batch (and space): negative entropy, -ln C where classes are even.

    Args:
      logits: [B, C] or [B, C, *S].
    """
    p = F.softmax(_wide(logits), 1)
    p = ranks.batch_mean(p, 0, *range(2, p.dim()))
    return (p * (p + 1e-12).log()).sum()


def balance_log10(logits: Tensor) -> Tensor:
    """`balance_ln` with the logarithm to base 10: -log10 C where classes are even (DAFL, PRE-DFKD)."""
    return balance_ln(logits) / math.log(10)


def h_inst(logits: Tensor) -> Tensor:
    """Mean entropy of softmax(logits) of each sample, in nats, 0 … ln C: low for confident images (DFQ)."""
    log_p = F.log_softmax(_wide(logits), 1)
    return -(log_p.exp() * log_p).sum(1).mean()


def attention(features: Tensor) -> Tensor:
    """Attention vector of a map: the channel mean of squared activations, flattened and of unit length (Zagoruyko & Komodakis 2017).

    Args:
      features: [B, K, h, w].
    Returns:
      [B, h·w] ≥ 0, at least fp32; zeros where the map is zero.
    """
    squares: Tensor = _SquaredLength.apply(_wide(features)) / features.shape[1]
    return F.normalize(squares.flatten(1), dim=1)


class _SquaredLength(torch.autograd.Function):
    """Σ_k x_k² over axis 1, [B, K, h, w] → [B, h, w]: one pass over the map each way, no squares of it in memory; any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # A norm over channels that are not next to each other is not vectorised on a CPU.
        return torch.linalg.vector_norm(x.contiguous(memory_format=torch.channels_last), dim=1).square_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return x * (2 * grad)[:, None]


def at(teacher: Tensor, student: Tensor) -> Tensor:
    """Attention transfer as ZSKT's code has it: mean over batch and space of the squared difference of two attentions [B, n]."""
    return (student - teacher).square().mean()


def at_norm(teacher: Tensor, student: Tensor) -> Tensor:
    """Attention transfer as ZSKT's paper has it: mean over the batch of the length of the difference of two attentions [B, n]."""
    return torch.linalg.vector_norm(student - teacher, dim=1).mean()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of two tensors of one shape: pixels, features."""
    return (_wide(x) - _wide(y)).abs().mean()


def _steps(x: Tensor) -> tuple[Tensor, ...]:
    """Differences of neighbouring pixels along the horizontal, the vertical and both diagonals."""
    x = _wide(x)
    right, down = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
    return right, down, x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]


def _batch_norm(x: Tensor) -> Tensor:
    """Frobenius norm of a tensor whose rows are spread over the ranks; where it is 0 its gradient is 0."""
    squares = ranks.total(x.square().sum())
    return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)


def tv1(x: Tensor) -> Tensor:
    """Total variation Σ_k mean |d_k| over the four directions d_k of neighbours (DeepInversion's TV-l1, Yin et al. 2020).

    Args:
      x: images [B, C, H, W], H and W at least 2.
    """
    return torch.stack([d.abs().mean() for d in _steps(x)]).sum()


def tv2(x: Tensor) -> Tensor:
    """Total variation Σ_k ‖d_k‖ over the four directions, each the Frobenius norm over the whole batch (DeepInversion's TV-l2).

    Args:
      x: images [B, C, H, W]. A constant image has value 0 and gradient 0.
    """
    return torch.stack([_batch_norm(d) for d in _steps(x)]).sum()


def l2_batch(x: Tensor) -> Tensor:
    """Frobenius norm of the whole batch, not squared (DeepInversion on CIFAR)."""
    return _batch_norm(_wide(x))


def l2_image(x: Tensor) -> Tensor:
    """Mean over images of the norm of each, [B, …], not squared (DeepInversion on ImageNet)."""
    return torch.linalg.vector_norm(_wide(x).flatten(1), dim=1).mean()


def jsd(teacher: Tensor, student: Tensor, tau: float = 3.0, form: Literal["coded", "textbook"] = "coded") -> Tensor:
    """Jensen-Shannon divergence of softmax(logits / tau), mean over the batch of the sum over classes (DeepInversion, Yin et al. 2020).

    coded:    ½ KL(M ‖ P) + ½ KL(M ‖ Q) with M = (P + Q) / 2, then P, Q and M clamped to [.01, .99], as the released code has it: the
              reverse of the textbook's, without a gradient to classes below 1 %.
    textbook: ½ KL(P ‖ M) + ½ KL(Q ‖ M), nothing clamped; at most ln 2.

    Args:
      teacher, student: logits [B, C].
    Returns:
      [] of this rank's rows; symmetric in its arguments, gradient to both.
    """
    log_p, log_q = F.log_softmax(_wide(teacher) / tau, 1), F.log_softmax(_wide(student) / tau, 1)
    if form == "textbook":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1).mean()
    p, q = log_p.exp(), log_q.exp()
    m = ((p + q) / 2).clamp(0.01, 0.99)
    return 0.5 * (m * (2 * m.log() - p.clamp(0.01, 0.99).log() - q.clamp(0.01, 0.99).log())).sum(1).mean()


def adv_jsd_elem(teacher: Tensor, student: Tensor, tau: float = 3.0, form: Literal["coded", "textbook"] = "coded") -> Tensor:
    """1 - clamp(J, 0, 1), J the `jsd` of the global batch averaged over the classes too: low where the networks disagree (PRE-DFKD).

    The mean over classes makes it C times weaker than `adv_compete`. As released, no gradient reaches the teacher's logits.

    Args:
      teacher, student: logits [B, C].
    """
    return 1 - (ranks.mean(jsd(teacher.detach(), student, tau, form)) / teacher.shape[1]).clamp(0, 1)


def latent_prior(z: Tensor) -> Tensor:
    """mean_d (var_d - 1)² + mean_d mean_d² of latents [B, d], mean and unbiased variance over the global batch; 0 at N(0, 1) (PRE-DFKD)."""
    z = _wide(z)
    n = z.shape[0] * ranks.world()
    mean = ranks.batch_mean(z)
    var = ranks.batch_mean((z - mean).square()) * (n / (n - 1))
    return (var - 1).square().mean() + mean.square().mean()


def kl_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """mean_b -½ Σ_d (1 + logvar - mean² - exp(logvar)): KL(N(mean, exp logvar) ‖ N(0, 1)) of a variational encoder's [B, d]."""
    mean, logvar = _wide(mean), _wide(logvar)
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean()


def adv_compete(teacher: Tensor, student: Tensor, tau: float = 3.0, form: Literal["coded", "textbook"] = "coded") -> Tensor:
    """1 - clip(J, 0, 1), J the `jsd` of the global batch: low where the networks disagree (Adaptive DeepInversion's R_compete)."""
    return 1 - ranks.mean(jsd(teacher, student, tau, form)).clamp(0, 1)


def contrast(local: Tensor, view: Tensor, old_local: Tensor, old_view: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """Instance discrimination of a batch among itself and stored rows: each image's local row must find its global one (CMI, L_cr).

    A = [local; old_local] · stopgrad([view; old_view])ᵀ / temperature, cross-entropy of each row with its own column as target; the
    mean over the batch plus the mean over the stored rows, so that many of these do not dilute the batch's gradient.

    Args:
      local, view: [b, d] rows of unit length of this rank's images; columns are those of the global batch.
      old_local, old_view: [n, d] stored rows, the same on all ranks.
      stored: bool [n], False for places that are not filled yet: they are neither rows nor columns.
    """
    local, old_local = _wide(local), _wide(old_local)
    now = ranks.gather(_wide(view).detach())
    columns = torch.cat([now, _wide(old_view).detach()])
    closed = torch.cat([torch.zeros(len(now), dtype=torch.bool, device=stored.device), ~stored])

    def among(rows: Tensor, own: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            a = rows @ columns.T / temperature
        return F.cross_entropy(a.masked_fill(closed, -torch.inf), own, reduction="none")

    mine = ranks.rows(len(now))
    batch = among(local, torch.arange(mine.start, mine.stop, mine.step, device=local.device)).mean()
    old = among(old_local, len(now) + torch.arange(len(stored), device=local.device))
    return batch + torch.where(stored, old, 0.0).sum() / stored.sum().clamp_min(1)


def gan_real(logit: Tensor) -> Tensor:
    """-mean log sigmoid(logit): what is to be taken for real; also the non-saturating loss of a generator (Goodfellow et al. 2014)."""
    return F.softplus(-_wide(logit)).mean()


def gan_fake(logit: Tensor) -> Tensor:
    """-mean log(1 - sigmoid(logit)): what is to be taken for fake."""
    return F.softplus(_wide(logit)).mean()


def mean_match(real: Tensor, synthetic: Tensor) -> Tensor:
    """Σ_c ‖mean_b real_cb - mean_b synthetic_cb‖² of features, summed over classes and dimensions (DM, Zhao and Bilen 2023).

    Args:
      real: [C, n, d], this rank's images of each class. synthetic: [C, m, d], all of them, equal on all ranks.
    """
    return (ranks.mean(_wide(real).mean(1)) - _wide(synthetic).mean(1)).square().sum()


def gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Σ over layers and output units of 1 - cosine of two gradients; 1-D parameters do not count (DC, Zhao et al. 2021).

    Args:
      real, synthetic: one gradient a parameter, in one order; a row is what flows into one output unit.
    """
    rows = [(_wide(r).flatten(1), _wide(s).flatten(1)) for r, s in zip(real, synthetic, strict=True) if r.dim() > 1]
    parts = [1 - (r * s).sum(1) / (torch.linalg.vector_norm(r, dim=1) * torch.linalg.vector_norm(s, dim=1) + 1e-6) for r, s in rows]
    return torch.cat(parts).sum()
