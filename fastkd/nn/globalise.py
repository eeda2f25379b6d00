"""BatchNorm and Dropout over the global batch, so that N ranks train the network that one rank trains."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastkd import ranks
from fastkd.errors import ConfigError


def globalise(module: nn.Module) -> nn.Module:
    """Make BatchNorm1d/2d/3d and SyncBatchNorm take their statistics over the batch of all ranks, and Dropout draw for it.

    In place: the modules stay the same objects with the same parameters, buffers and state-dict keys; only their class changes.
    With one rank they compute what they did before, bit for bit. With more, each rank must hold equally many rows, dealt like
    cards (`ranks.rows`), and torch's global generator must be seeded equally on all ranks; a layer costs one all-reduce in each
    direction and is differentiable to any order. Dropout called as a function cannot be found and stays local.

    Returns: `module` itself.
    Raises:
      ConfigError: a kind of BatchNorm or Dropout whose own forward cannot be carried over to ranks.
    """
    for name, m in module.named_modules():
        if isinstance(m, _Global):
            continue
        if isinstance(m, _BatchNorm):
            m.__class__ = _norm_class(type(m), name)
        elif isinstance(m, _DropoutNd):
            m.__class__ = _dropout_class(type(m), name)
    return module


class _Global:
    """Mark of a module that sees the global batch; traced as one piece."""

    fx_leaf = True


class _GlobalNorm(_Global):
    """Forward of a BatchNorm over all ranks. `tail`: what the original class does after normalising (timm's BatchNormAct2d)."""

    tail: ClassVar[tuple[str, ...]] = ()

    def forward(self: Any, x: Tensor) -> Tensor:
        if ranks.world() == 1 or not (self.training or self.running_mean is None):
            return self._alone(x)  # type: ignore[no-any-return]
        y = _global_batch_norm(self, x)
        for name in self.tail:
            y = getattr(self, name)(y)
        return y


class GlobalBatchNorm1d(_GlobalNorm, nn.BatchNorm1d):
    _alone = nn.BatchNorm1d.forward


class GlobalBatchNorm2d(_GlobalNorm, nn.BatchNorm2d):
    _alone = nn.BatchNorm2d.forward


class GlobalBatchNorm3d(_GlobalNorm, nn.BatchNorm3d):
    _alone = nn.BatchNorm3d.forward


class GlobalSyncBatchNorm(_GlobalNorm, nn.SyncBatchNorm):
    """SyncBatchNorm refuses the CPU; with one rank it is a plain BatchNorm everywhere."""

    def _check_input_dim(self, input: Tensor) -> None:
        self._check_non_zero_input_channels(input)

    _alone = _BatchNorm.forward


class _GlobalDropout(_Global):
    """The mask of the global batch, drawn as one process would draw it; this rank keeps its own rows."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if ranks.world() == 1 or not self.training:
            return self._alone(x)  # type: ignore[no-any-return]
        layout = torch.channels_last if x.dim() == 4 and _channels_last(x) else torch.contiguous_format
        ones = torch.ones((x.shape[0] * ranks.world(), *x.shape[1:]), dtype=x.dtype, device=x.device)
        mask = self._draw(ones.contiguous(memory_format=layout))
        return x * ranks.local(mask)


class GlobalDropout(_GlobalDropout, nn.Dropout):
    _alone = nn.Dropout.forward

    def _draw(self, ones: Tensor) -> Tensor:
        return F.dropout(ones, self.p, training=True)


class GlobalDropout1d(_GlobalDropout, nn.Dropout1d):
    _alone = nn.Dropout1d.forward

    def _draw(self, ones: Tensor) -> Tensor:
        return F.dropout1d(ones, self.p, training=True)


class GlobalDropout2d(_GlobalDropout, nn.Dropout2d):
    _alone = nn.Dropout2d.forward

    def _draw(self, ones: Tensor) -> Tensor:
        return F.dropout2d(ones, self.p, training=True)


class GlobalDropout3d(_GlobalDropout, nn.Dropout3d):
    _alone = nn.Dropout3d.forward

    def _draw(self, ones: Tensor) -> Tensor:
        return F.dropout3d(ones, self.p, training=True)


_NORMS: dict[Any, type] = {
    nn.BatchNorm1d: GlobalBatchNorm1d,
    nn.BatchNorm2d: GlobalBatchNorm2d,
    nn.BatchNorm3d: GlobalBatchNorm3d,
    nn.SyncBatchNorm: GlobalSyncBatchNorm,
}
_DROPOUTS: dict[type, type] = {
    nn.Dropout: GlobalDropout,
    nn.Dropout1d: GlobalDropout1d,
    nn.Dropout2d: GlobalDropout2d,
    nn.Dropout3d: GlobalDropout3d,
}


def _norm_class(kind: Any, name: str) -> type:
    if kind not in _NORMS:
        plain = next((k for k in kind.__mro__ if k in _NORMS), None)
        if plain is None or (not _same_forward(kind, plain) and kind.__name__ not in TAILS):
            raise ConfigError(
                f"'{name}' is a {kind.__name__}, whose statistics cannot be taken over all ranks; use nn.BatchNorm2d or ranks.bn=rank"
            )
        tail = () if _same_forward(kind, plain) else TAILS[kind.__name__]
        _NORMS[kind] = type(f"Global{kind.__name__}", (_GlobalNorm, kind), {"_alone": kind.forward, "tail": tail})
    return _NORMS[kind]


TAILS = {"BatchNormAct2d": ("drop", "act")}
"""Known subclasses that apply modules of their own after normalising (timm)."""


def _same_forward(kind: Any, plain: Any) -> bool:
    return bool(kind.forward is plain.forward)


def _dropout_class(kind: type, name: str) -> type:
    if kind not in _DROPOUTS:
        raise ConfigError(f"'{name}' is a {kind.__name__}, whose mask cannot be drawn for all ranks; use nn.Dropout or ranks.bn=rank")
    return _DROPOUTS[kind]


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _global_batch_norm(m: Any, x: Tensor) -> Tensor:
    """BatchNorm with the statistics of the batch of all ranks, and the update of the running ones.

    The sums are taken about the running mean, so that one pass and one all-reduce suffice without cancellation. The running
    variance takes the unbiased n/(n-1) of the global n. x: [n, C] or [n, C, *S].
    """
    m._check_input_dim(x)
    dims = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // x.shape[1] * ranks.world()
    if count <= 1 and m.training:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} on {ranks.world()} ranks")
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (1, -1, *([1] * (x.dim() - 2)))
    shift = x.new_zeros(x.shape[1], dtype=wide) if m.running_mean is None else m.running_mean.detach().to(wide, copy=True)
    d = x.to(wide) - shift.view(shape)
    first, second = ranks.total(torch.stack([d.sum(dims), (d * d).sum(dims)])).unbind()
    mean = first / count  # of d
    var = (second / count - mean * mean).clamp_min(0)
    if m.training:
        _move_running(m, mean.detach() + shift, var.detach() * (count / (count - 1)))
    scale = torch.rsqrt(var + m.eps)
    if m.weight is not None:
        scale = scale * m.weight.to(wide)
    bias = -mean * scale if m.bias is None else m.bias.to(wide) - mean * scale
    return (d * scale.view(shape) + bias.view(shape)).to(x.dtype)


@torch.no_grad()
def _move_running(m: Any, mean: Tensor, var: Tensor) -> None:
    """As torch's own: exponential with `momentum`, or the cumulative average where it is None."""
    if m.running_mean is None or not m.track_running_stats:
        return
    m.num_batches_tracked.add_(1)
    for running, now in ((m.running_mean, mean), (m.running_var, var)):
        now = now.to(running.dtype)
        if m.momentum is None:
            running.add_((now - running) / m.num_batches_tracked)
        else:
            running.lerp_(now, m.momentum)
