"""A generator's doubling convolutions and BatchNorms with their activations, as one call each: module surgery, guided by a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from .generator_layers import ACTIVATED, ActivatedBatchNorm2d, UpConv, UpsampleAct
from .graph import Reader, Tracer, drop

Net = TypeVar("Net", bound=nn.Module)
Pair = tuple[nn.Module, nn.Module]
Kind = Callable[[nn.Module], Any]


def fuse_generator(net: Net) -> Net:
    """Join the layers of a generator that can be computed in one, in place.

      Upsample(2, nearest) → Conv2d(3x3, padding 1)    becomes UpConv: no doubled image, 2.25 times fewer multiplications
      BatchNorm2d → ReLU, ReLU6 or LeakyReLU           becomes ActivatedBatchNorm2d: one pass instead of two, mask recomputed
      BatchNorm2d alone                                becomes ActivatedBatchNorm2d without activation
      Upsample(2, nearest) → Tanh or Sigmoid           becomes UpsampleAct, in either order

    Modules stay where they are and what they are to `isinstance`; of a pair, one becomes Identity. Parameters and buffers remain the
    same objects under the same names, so optimisers made before, state dicts, `copy_` and `globalise` (before or after) go on working.
    Images, gradients and buffers are equal to rounding, in train and in eval mode.

    A pair is joined only where torch.fx shows, in both modes, that nobody else reads what lies between; where the network itself
    cannot be traced, its parts are. A module that is shared, hooked or subclassed stays. Functions that a forward calls
    (`F.interpolate`, `F.leaky_relu`) stay too.

    Gradients: first order; for higher ones `ops.use("reference")`, or do not fuse.

    Returns:
      `net` itself; `net.report` says what was joined, a line each.
    """
    calls = _Calls()
    lines = calls.read(net)
    net.report = [*lines, *_Site(net, calls).rewrite()]  # type: ignore[assignment]
    return net


class _Tracer(Tracer):
    """Does not look into modules that hold nothing to join, or whose hooks read what they return."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or not _holds(m) or _hooked(m)


def _holds(m: nn.Module) -> bool:
    return any(isinstance(inner, nn.Upsample | nn.UpsamplingNearest2d | nn.BatchNorm2d) for inner in m.modules())


@dataclass
class _Calls:
    """Which module's result is read by which, and by nobody else; and how often each module is called in one forward."""

    pairs: list[Pair] = field(default_factory=list)
    times: Counter[int] = field(default_factory=Counter)

    def read(self, net: nn.Module, name: str = "") -> list[str]:
        """Trace `net` in both modes, or its children where that fails; returns sentences for the report."""
        graphs = []
        before = [(m, m.training) for m in net.modules()]
        try:
            for mode in (True, False):
                net.train(mode)
                graphs.append(_Tracer().trace(net))
        except Exception as error:  # whatever the network's own code raises when it meets a symbolic tensor
            said = (str(error).splitlines() or [""])[0]
            what = f"'{name}'" if name else "the network"
            lines = [f"torch.fx cannot trace {what} ({type(error).__name__}: {said}); its parts are looked at one by one"]
            for child, part in net.named_children():
                if _holds(part):
                    lines += self.read(part, f"{name}.{child}" if name else child)
                # The code that cannot be followed may call it, too.
                self.times.update(map(id, [part] if _holds(part) else part.modules()))
            return lines
        finally:
            for m, flag in before:
                m.training = flag
        found = [_neighbours(Reader(net, graph)) for graph in graphs]
        (training, often), (evaluating, too) = found
        self.pairs += [pair for pair in training if pair in evaluating]
        self.times += often | too
        return [] if name else ["torch.fx traced the network"]


def _neighbours(reader: Reader) -> tuple[list[Pair], Counter[int]]:
    drop(reader, lambda node: isinstance(reader.module(node), nn.Identity))
    pairs: list[Pair] = []
    times: Counter[int] = Counter()
    for node in reader.graph.nodes:
        m = reader.module(node)
        if m is None:
            continue
        times.update(map(id, m.modules()))  # what a module that is not looked into calls, it calls at least once
        user = reader.only_user(node)
        other = reader.module(user) if user is not None else None
        if user is not None and other is not None and user.all_input_nodes == [node]:
            pairs.append((m, other))
    return pairs, times


class _Site:
    """The network while it is being rewritten."""

    def __init__(self, net: nn.Module, calls: _Calls):
        self.calls, self.joined = calls, set[int]()
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}  # module → (parent, attribute), for each of its names
        self.names: dict[int, str] = {}
        for prefix, parent in net.named_modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self.places.setdefault(id(child), []).append((parent, name))
                    self.names.setdefault(id(child), f"{prefix}.{name}" if prefix else name)
        self.modules = [m for m in net.modules() if id(m) in self.names]

    def join(self, first: Kind, second: Kind, kept: int) -> list[Pair]:
        """Pairs that can become one: the kept one is called here and nowhere else, the other one only in front of or behind such."""
        pairs = [p for p in self.calls.pairs if first(p[0]) and second(p[1]) and self._free(p[kept]) and not _hooked(p[1 - kept])]
        often = Counter(id(p[1 - kept]) for p in pairs)
        pairs = [p for p in pairs if often[id(p[1 - kept])] == self.calls.times[id(p[1 - kept])] and not {*map(id, p)} & self.joined]
        for p in pairs:
            self.joined |= {*map(id, p)}
        return pairs

    def _free(self, m: nn.Module) -> bool:
        return self.calls.times[id(m)] == 1 and len(self.places[id(m)]) == 1 and not _hooked(m)

    def put(self, old: nn.Module, new: nn.Module) -> None:
        for parent, name in self.places[id(old)]:
            parent._modules[name] = new.train(old.training)

    def rewrite(self) -> Iterator[str]:
        """Do all there is to do; says what was done and what stays."""
        doublings = [m for m in self.modules if _doubling(m)]
        layers = [m for m in self.modules if type(m) in ACTIVATED]
        already = sum(isinstance(m, UpConv) for m in self.modules)
        convolutions = self.join(_doubling, _plain_conv, kept=1)
        for up, conv in convolutions:
            conv.__class__ = UpConv
            self.put(up, nn.Identity())
        images = self.join(_doubling, _squash, kept=0) + [(b, a) for a, b in self.join(_squash, _doubling, kept=1)]
        for up, act in images:
            self.put(up, UpsampleAct("tanh" if isinstance(act, nn.Tanh) else "sigmoid"))
            self.put(act, nn.Identity())
        activated = {id(norm): act for norm, act in self.join(lambda m: type(m) in ACTIVATED, _activation, kept=0)}
        for act in activated.values():
            self.put(act, nn.Identity())
        for norm in layers:
            kind: Any = norm
            kind.__class__ = ACTIVATED[type(norm)]
            kind.act, kind.slope = (_activation(activated[id(norm)]) if id(norm) in activated else None) or ("none", 0.0)
        yield from _counted(len(convolutions), "doubling", "joined with the convolution behind")
        yield from _counted(already, "doubling convolution", "as before")
        yield from _counted(len(images), "doubling", "joined with tanh or sigmoid")
        yield from _counted(len(activated), "BatchNorm", "joined with the activation behind")
        yield from _counted(len(layers) - len(activated), "BatchNorm", "alone")
        for m in doublings:
            if id(m) not in self.joined:
                yield f"'{self.names[id(m)]}' stays: {'it has hooks' if _hooked(m) else 'no plain 3x3 convolution alone reads it'}"
        for m in self.modules:
            if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) and not isinstance(m, ActivatedBatchNorm2d):
                yield f"'{self.names[id(m)]}' stays: it is a {type(m).__name__}, not a plain BatchNorm2d"


def _counted(n: int, what: str, how: str) -> Iterator[str]:
    if n:
        yield f"{n} {what}{'s' * (n > 1)} {how}"


def _hooked(m: nn.Module) -> bool:
    return any(getattr(m, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def _doubling(m: nn.Module) -> bool:
    nearest = isinstance(m, nn.Upsample) and type(m).forward is nn.Upsample.forward and m.mode in ("nearest", "nearest-exact")
    return nearest and m.size is None and m.scale_factor in (2, (2, 2))


def _plain_conv(m: nn.Module) -> bool:
    if type(m) is not nn.Conv2d or m.padding not in ("same", (1, 1)):
        return False
    return (m.kernel_size, m.stride, m.dilation, m.groups, m.padding_mode) == ((3, 3), (1, 1), (1, 1), 1, "zeros")


def _squash(m: nn.Module) -> bool:
    return type(m) in (nn.Tanh, nn.Sigmoid)


def _activation(m: nn.Module) -> tuple[str, float] | None:
    """(name, slope) of an activation that the fused op knows."""
    if type(m) is nn.LeakyReLU:
        return "leaky_relu", m.negative_slope
    name = {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(m))
    return None if name is None else (name, 0.0)
