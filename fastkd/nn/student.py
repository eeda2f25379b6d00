"""A student: the user's own network, with a forward that also returns feature, map and stages."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fastkd.errors import ConfigError, InputError
from fastkd.ops.bn_match.reference import bn_sums_ref

from . import graph as fxg
from .freeze import evaluating
from .recorder import Recorder
from .trace import Counts, Trace, check_ask, global_statistics, sample_means

Shape = tuple[int, int, int]


class Student(nn.Module):
    """The network to train. `student(x)` is `net(x)`; `student.trace(x, *ask)` runs the same modules and returns a `Trace`.

    Nothing is copied or replaced: `student.net` is the network itself, its parameters, buffers, modes and state-dict keys are its
    own. Everything is plain torch: it can be differentiated to any order.

    Args:
      net: classifier, images [B, C, H, W] → logits [B, classes].
      shape: (c, h, w) of an image. With it the network is run once (eval mode, no gradient, zeros), so that `feature_dim`,
        `classes` and `dense` (it answers for each pixel) are known for every network.
    Raises:
      InputError: a network that does not take images of `shape`.
    """

    def __init__(self, net: nn.Module, shape: Shape | None = None):
        super().__init__()
        self.net = net
        self._read: _Read | None = None
        head = self._reading.taps.head if self._reading.taps is not None else _last_linear(net)
        self.feature_dim = cast(int | None, getattr(head, "in_features", getattr(head, "in_channels", None)))
        self.classes = cast(int | None, getattr(head, "out_features", getattr(head, "out_channels", None)))
        self.dense = False
        if shape is not None:
            self._probe(shape)

    def _probe(self, shape: Shape) -> None:
        like = next((p for p in self.net.parameters()), torch.zeros(()))
        try:
            with evaluating(self.net), torch.no_grad():
                t = self.trace(torch.zeros((2, *shape), dtype=like.dtype, device=like.device))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise InputError(f"the student does not take images of shape {tuple(shape)} (channels, height, width): {first}") from error
        self.classes, self.dense = t.logits.shape[1], t.logits.dim() > 2
        self.feature_dim = None if t.feature is None else t.feature.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Logits; the network's own forward and nothing else."""
        return self.net(x)  # type: ignore[no-any-return]

    def trace(self, x: Tensor, *ask: str) -> Trace:
        """One forward that also returns feature and map; `ask` as in `Teacher.forward`.

        BatchNorm works as its mode says, and updates its running statistics once, as in `forward`.

        Raises:
          ConfigError: an unknown name in `ask`, or BN statistics of a network that cannot be traced.
        """
        check_ask(ask)
        read, groups, norms = self._reading, "groups" in ask, "bn" in ask or "moments" in ask
        if read.taps is None:
            if norms:
                raise ConfigError(f"BN statistics of the student need a network that can be traced, but {read.report}")
            with Recorder(x) as r:
                logits = self.net(x)
            return Trace(logits, r.feature, r.map, groups=r.groups if groups else None)
        logits, feature, last, maps, inputs = read.run(groups, norms)(x)
        feature = fxg.pooled_feature(feature, last, read.taps.flat, read.taps.mean)
        out = Trace(logits, feature, last, groups=tuple(maps) if groups else None)
        if "moments" in ask:
            out.moments = torch.cat([sample_means(v) for v in inputs], 1) if inputs else logits.new_zeros(len(x), 0)
        if "bn" in ask:
            out.bn = self._statistics(inputs)
        return out

    def _statistics(self, inputs: tuple[Tensor, ...]) -> Tensor:
        shift = self.target[0].clone()  # the running mean moves in place
        parts = [bn_sums_ref(v, s) for v, s in zip(inputs, shift.split([v.shape[1] for v in inputs]), strict=True)]
        return global_statistics(parts, [v.numel() // v.shape[1] for v in inputs], shift, self._reading.counts)

    @property
    def target(self) -> Tensor:
        """[2, sum C] the running statistics of the BatchNorm2d layers as they are now, in call order, at least fp32."""
        layers = self._reading.norms
        for m in layers:
            if m.running_mean is None:
                raise ConfigError("a BatchNorm2d of the student keeps no running statistics, so there is no target")
        if not layers:
            return torch.zeros(2, 0)
        stats = torch.cat([torch.stack([cast(Tensor, m.running_mean), cast(Tensor, m.running_var)]) for m in layers], 1).detach()
        return stats.to(torch.promote_types(stats.dtype, torch.float32))

    @property
    def split(self) -> tuple[int, ...]:
        """Offsets of the layers in `target`."""
        out = [0]
        for m in self._reading.norms:
            out.append(out[-1] + m.num_features)
        return tuple(out)

    @property
    def report(self) -> list[str]:
        """How `trace` reads the network, in one sentence."""
        return [self._reading.report]

    @property
    def _reading(self) -> _Read:
        if self._read is None:
            self._read = _Read(self.net)
        return self._read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None}  # a copy reads its own network


class _Read:
    """How one live network is read: a graph that shares its modules, or None where a graph would not be faithful."""

    def __init__(self, net: nn.Module):
        self.entry, self.counts = fxg.Entry(net), Counts()
        self.taps: fxg.Taps | None = None
        self.norms: list[nn.BatchNorm2d] = []
        self._runs: dict[tuple[bool, bool], fx.GraphModule] = {}
        try:
            self.graph = _live_graph(self.entry)
        except fxg.Untraceable as error:
            self.report = f"{error}: its feature and map are noted while it runs"
            return
        self.taps, self.report = fxg.discover(self.entry, self.graph), "torch.fx traced the network"
        modules = dict(self.entry.named_modules(remove_duplicate=False))
        self.norms = [cast(nn.BatchNorm2d, modules[str(n.target)]) for n in self.taps.norms]
        fxg.attach(self.graph, self.taps, norm_inputs=True)
        self.run(False, False)

    def run(self, groups: bool, norms: bool) -> fx.GraphModule:
        if (groups, norms) not in self._runs:
            self._runs[groups, norms] = fxg.variant(self.entry, self.graph, groups, norms)
        return self._runs[groups, norms]


def _live_graph(entry: fxg.Entry) -> fx.Graph:
    """The graph of a network that goes on living: the same in both modes, and all its tensors inside modules.

    Raises:
      Untraceable: also where a traced forward would freeze the mode or hold a tensor of its own.
    """
    modes = [(m, m.training) for m in entry.modules()]
    try:
        graphs = [fxg.trace(entry.train(mode)) for mode in (True, False)]
    finally:
        for m, flag in modes:
            m.training = flag
    if str(graphs[0]) != str(graphs[1]):
        raise fxg.Untraceable("the network's own code differs between train and eval mode (functional dropout, for example)")
    if any(n.op == "get_attr" for n in graphs[0].nodes):
        raise fxg.Untraceable("the network uses a parameter or constant outside of torch's layers")
    return graphs[1]


def _last_linear(net: nn.Module) -> nn.Module | None:
    return next((m for m in reversed(list(net.modules())) if isinstance(m, nn.Linear)), None)
