"""A teacher: a frozen copy of a network whose one forward also yields BN statistics, moments and stage maps when asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastkd.errors import InputError

from . import graph as fxg
from .frozen_bn import Collector, FrozenBN, freeze_norms
from .fuse import fuse
from .recorder import Recorder
from .trace import Counts, Trace, check_ask, global_statistics

__all__ = ["Teacher", "Trace", "instrument"]

Shape = tuple[int, int, int]


def instrument(net: nn.Module, shape: Shape | None = None) -> Teacher:
    """A frozen copy of `net` that reports on its forward; the network itself is not touched and no hook is used.

    BatchNorm2d and SyncBatchNorm modules are replaced by one affine each; where torch.fx can trace the network they are fused with
    the residual and activation behind them. `Teacher.report` says what was done.

    Args:
      net: classifier, images [B, C, H, W] → logits [B, classes] (or [B, classes, *S]).
      shape: (c, h, w) of an image. With it the network is run once on two random images, so that the head is verified, `classes`
        is known for every network, and a network that cannot be traced has its BatchNorms in call order.
    Raises:
      InputError: a BatchNorm2d without running statistics, or a network that does not take images of `shape`.
    """
    return Teacher(net, shape)


class Teacher(nn.Module):
    """Frozen network made by `instrument`; always in eval mode, no parameter requires a gradient, gradients reach the input.

    Attributes:
      target: [2, sum C] running mean and variance of the BatchNorm2d layers in call order, at least fp32.
      split: L + 1 offsets of the layers in `target`; (0,) without BatchNorm2d.
      classes: number of classes, or None where only a forward can tell and none was made.
      dense: whether it answers for each pixel (logits [B, C, H, W]); False where no forward was made.
      report: what was fused, and what could not be.
    """

    net: nn.Module
    target: Tensor
    split: tuple[int, ...]

    def __init__(self, net: nn.Module, shape: Shape | None = None):
        super().__init__()
        net = copy.deepcopy(getattr(net, "_orig_mod", net)).eval().requires_grad_(False)
        self.collector, self.report = Collector(), cast(list[str], [])
        self._counts, self._seen = Counts(), cast(tuple[int, ...] | None, None)
        self._head_checked, self._wrong, self.dense = False, "", False
        layers = freeze_norms(net, self.collector)
        self.taps: fxg.Taps | None = None
        self._with_groups: nn.Module | None
        try:
            self._rewrite(fxg.Entry(net))
            layers = _in_call_order(self.net)
        except fxg.Untraceable as error:
            self.net, self._with_groups = net, None
            self.report.append(f"{error}: {len(layers)} BatchNorm layers report one by one, nothing is fused")
        self._recorded_head: tuple[Tensor, Tensor | None] | None = None
        self.classes = self._guess_classes()
        super().train(False)
        if shape is not None:
            layers = self._probe(shape, layers)
        self._number(layers)
        if shape is not None:
            _ = self.head

    def _rewrite(self, entry: fxg.Entry) -> None:
        graph = fxg.trace(entry)
        taps = fxg.discover(entry, graph)
        fxg.attach(graph, taps)
        lines = fuse(entry, graph)
        self.net = fxg.variant(entry, graph, groups=False)
        self._with_groups = fxg.variant(entry, graph, groups=True)
        self.report += ["torch.fx traced the network", *lines]
        self.taps = taps.forget_nodes()

    def _number(self, layers: list[FrozenBN]) -> None:
        """Give each layer its slot, and write down what the statistics are compared with."""
        self.split = (0,)
        for i, layer in enumerate(layers):
            layer.index = i
            self.split += (self.split[-1] + layer.scale.numel(),)
        stats = [torch.stack([layer.mean, layer.var]) for layer in layers]
        like = next((t for t in self.net.parameters() if t.is_floating_point()), torch.zeros(()))
        empty = torch.zeros(2, 0, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.register_buffer("target", torch.cat(stats, 1) if stats else empty)

    def _guess_classes(self) -> int | None:
        head = self.taps.head if self.taps is not None else None
        if head is None:
            head = next((m for m in reversed(list(self.net.modules())) if isinstance(m, nn.Linear)), None)
        width = getattr(head, "out_features", getattr(head, "out_channels", None))
        return width if isinstance(width, int) else None

    def _probe(self, shape: Shape, layers: list[FrozenBN]) -> list[FrozenBN]:
        """One forward on random images: class count, shapes, and the call order of a network without a graph."""
        self.collector.order = []
        try:
            with torch.no_grad():
                out = self._forward(self._image(shape), groups=False)
            order = self.collector.order
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise InputError(f"the teacher does not take images of shape {tuple(shape)} (channels, height, width): {first}") from error
        finally:
            self.collector.stop()
        self.classes, self.dense = out.logits.shape[1], out.logits.dim() > 2
        return layers if self.taps is not None else list(dict.fromkeys(order))

    def _image(self, shape: tuple[int, ...]) -> Tensor:
        like = next((t for t in [*self.net.parameters(), *self.net.buffers()] if t.is_floating_point()), torch.zeros(()))
        x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.promote_types(like.dtype, torch.float32))
        return x.to(like.device, like.dtype)

    def train(self, mode: bool = True) -> Teacher:
        """Does nothing: a teacher stays in eval mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Teacher:
        """Does nothing: a teacher stays frozen."""
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        kept = self.target
        super()._apply(fn, recurse)
        if self.target.dtype != kept.dtype and self.target.dtype not in (torch.float32, torch.float64):
            self.target = kept.to(self.target.device)  # statistics stay at least fp32 when the network goes to half precision
        return self

    def forward(self, x: Tensor, *ask: str) -> Trace:
        """One forward; what is not asked for is not computed.

        Args:
          x: [B, C, H, W].
          ask: any of "bn" (statistics of the global batch), "moments" (per-sample means of the BN inputs), "groups" (stage maps).
        Raises:
          ConfigError: an unknown name in `ask`. InputError: statistics of an empty batch, or of a layer called twice or not at all.
        """
        check_ask(ask)
        c = self.collector
        c.start(len(self.split) - 1, "bn" in ask, "moments" in ask)
        try:
            out = self._forward(x, "groups" in ask)
            if c.sums is not None:
                out.bn = global_statistics(self._full(c.sums), c.counts, self.target[0], self._counts)
            if c.moments is not None:
                parts = self._full(c.moments)
                out.moments = torch.cat(parts, 1) if parts else self.target.new_zeros(len(x), 0)
        finally:
            c.stop()
        return out

    def _forward(self, x: Tensor, groups: bool) -> Trace:
        if self.taps is None:
            with Recorder(x) as r:
                logits = self.net(x)
            if not isinstance(logits, Tensor):
                raise InputError(f"the teacher returns a {type(logits).__name__}; expected one tensor of logits")
            out = Trace(logits, r.feature, r.map, groups=r.groups if groups else None)
            if self._recorded_head is None and r.head is not None:
                self._recorded_head = r.head
        else:
            run = self._with_groups if groups else self.net
            assert run is not None
            logits, feature, last, maps, _ = run(x)
            feature = fxg.pooled_feature(feature, last, self.taps.flat, self.taps.mean)
            out = Trace(logits, feature, last, groups=tuple(maps) if groups else None)
        if self._seen is None:
            self._seen = tuple(x.shape[1:])
        return out

    def _full(self, slots: list[Tensor | None]) -> list[Tensor]:
        if any(s is None for s in slots):
            raise InputError(
                "a BatchNorm2d of the teacher was not called in this forward; with shape=(c, h, w), instrument counts only those called"
            )
        return cast(list[Tensor], slots)

    @property
    def head(self) -> fxg.Head | None:
        """(weight [C, K], bias [C] or None) where logits == linear(mean over space of `Trace.map`), else None; see `head_reason`.

        Verified once on random images as soon as an image shape is known (given to `instrument`, or seen in a forward); that one
        look waits for the device.
        """
        if not self.head_reason and self._weights is not None and self._seen is not None and not self._head_checked:
            with torch.no_grad(), torch.autocast(self.target.device.type, enabled=False):
                t = self._forward(self._image(self._seen), groups=False)
            self._head_checked, self._wrong = True, _mismatch(self._weights, t)
        return None if self.head_reason else self._weights

    @property
    def _weights(self) -> fxg.Head | None:
        if self.taps is None:
            return None if self._recorded_head is None else fxg.head_weights(*self._recorded_head)
        head = cast(Any, self.taps.head)
        return None if head is None else fxg.head_weights(head.weight, head.bias)

    @property
    def head_reason(self) -> str:
        """Why `head` is None, in one sentence; "" where it is not."""
        if self._head_checked:
            return self._wrong
        if self.taps is not None and self.taps.reason:
            return self.taps.reason
        if (self.taps is None or self.taps.exact is None) and self._seen is None:
            return "only an image can tell whether the pooling covers the whole map: pass shape=(c, h, w) to instrument"
        return "" if self._weights is not None else "the network does not end in a linear layer"


def _mismatch(head: fxg.Head, t: Trace) -> str:
    weight = head[0]
    if t.map is None:
        return "no global pooling was found"
    if t.map.shape[1] != weight.shape[1]:
        return f"the last linear layer takes {weight.shape[1]} features, but the map before the pooling has {t.map.shape[1]} channels"
    return "" if fxg.agrees(head, t.logits, t.map) else "logits are not the last linear layer of the mean of the map"


def _in_call_order(run: nn.Module) -> list[FrozenBN]:
    """The layers in the order of the graph; those inside a leaf module stand at its call."""
    modules, found = dict(run.named_modules(remove_duplicate=False)), []
    for node in cast(Any, run).graph.nodes:
        if node.op == "call_module":
            found += [m for m in modules[str(node.target)].modules() if isinstance(m, FrozenBN)]
    return list(dict.fromkeys(found))
