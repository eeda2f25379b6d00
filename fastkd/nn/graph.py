"""A network as a torch.fx graph: where its feature, its last map and its resolution stages are.

Nothing here changes what a network computes; `fuse.py` does the rewriting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from .frozen_bn import FrozenBN, is_norm

_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
_LEAVES = (_BatchNorm, _ConvNd, nn.Linear, *_POOLS)
_ACTS = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "silu", "gelu", "elu", "hardtanh", "hardswish", "hardsigmoid", "selu"),
    *("sigmoid", "tanh", "softmax", "log_softmax", "clamp", "softplus", "prelu", "mish"),
}
_RESHAPES = {
    *("flatten", "view", "reshape", "squeeze", "contiguous", "to", "float", "type"),
    *("dropout", "dropout2d", "alpha_dropout", "feature_dropout"),
}


class Entry(nn.Module):
    """The network behind a forward with one argument, so that optional arguments of its own keep their defaults."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Tracer(fx.Tracer):
    """Traces through everything but torch's layers, their subclasses and modules that set `fx_leaf = True`."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return getattr(m, "fx_leaf", False) or isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


class Untraceable(Exception):
    """The network has no graph; the message is one sentence without its full stop."""


def trace(entry: Entry) -> fx.Graph:
    """The graph of `entry.net`, with module targets relative to `entry`.

    Raises:
      Untraceable: control flow that depends on tensors, or an output that is not one tensor.
    """
    try:
        graph = Tracer().trace(entry)
    except Exception as error:  # whatever the network's own code raises when it meets a symbolic tensor
        said = (str(error).splitlines() or [""])[0]
        raise Untraceable(f"torch.fx cannot trace the network ({type(error).__name__}: {said})") from error
    reader = Reader(entry, graph)
    drop(reader, lambda node: isinstance(reader.module(node), nn.Identity))  # in both modes: stages of teacher and student stay alike
    result = _output(graph).args[0]
    if not isinstance(result, fx.Node):
        raise Untraceable(f"the network returns a {type(result).__name__}")
    return graph


@dataclass
class Taps:
    """Where things are in a graph, before any rewriting.

    head: the last linear layer (Linear or 1x1 convolution). feature: the node that enters it; `flat`: the feature is that node
    flattened ([B, d, 1, 1] before a 1x1 convolution); `mean`: it is the spatial mean of `map`, because the head works on maps.
    exact: logits == head(mean over space of map), as far as the graph says; None: if the pooling window covers the map.
    """

    head: nn.Module | None = None
    feature: fx.Node | None = None
    map: fx.Node | None = None
    flat: bool = False
    mean: bool = False
    exact: bool | None = False
    reason: str = "the network does not end in a linear layer"
    groups: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)

    def forget_nodes(self) -> Taps:
        """What is worth keeping once the graph has been rewritten."""
        return replace(self, feature=None, map=None, groups=[], norms=[])


class Reader:
    """Reads one graph: what a node is, where its input comes from."""

    def __init__(self, root: nn.Module, graph: fx.Graph):
        self.graph = graph
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.at = {node: i for i, node in enumerate(graph.nodes)}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def scope(self, node: fx.Node) -> str:
        """The parent of a module in the network as it was given."""
        m = self.module(node)
        return (f"net.{m.name}" if isinstance(m, FrozenBN) else str(node.target)).rpartition(".")[0]

    def name(self, node: fx.Node) -> str:
        """Name of a function or method call, else ''."""
        if node.op == "call_method":
            return str(node.target)
        return getattr(node.target, "__name__", "") if node.op == "call_function" else ""

    def source(self, node: fx.Node) -> fx.Node | None:
        first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        return first if isinstance(first, fx.Node) else None

    def only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def is_norm(self, node: fx.Node) -> bool:
        m = self.module(node)
        return m is not None and is_norm(m)

    def is_act(self, node: fx.Node) -> bool:
        m = self.module(node)
        return self.name(node) in _ACTS if m is None else type(m).__module__ == "torch.nn.modules.activation"

    def is_add(self, node: fx.Node) -> bool:
        """A sum of two tensors of the graph."""
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        return self.name(node) in ("add", "add_", "iadd") and len(node.args) == len(tensors) == 2 and not node.kwargs

    def is_reshape(self, node: fx.Node) -> bool:
        m = self.module(node)
        return self.name(node) in _RESHAPES if m is None else isinstance(m, nn.Flatten | nn.Unflatten | nn.Identity | _DropoutNd)

    def is_scalar(self, node: fx.Node) -> bool:
        """mul, div, add … of one tensor and a number."""
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        return self.name(node) in ("mul", "truediv", "div", "add", "sub") and len(tensors) == 1 and tensors[0] is node.args[0]

    def is_conv(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), nn.Conv2d)

    def pool(self, node: fx.Node) -> str | None:
        """ "global": the mean over the whole map; "window": an average that may be one; "other": another pooling; None: no pooling."""
        m, name = self.module(node), self.name(node)
        if isinstance(m, nn.AdaptiveAvgPool2d):
            return "global" if m.output_size in (1, (1, 1)) else "other"
        if isinstance(m, nn.AvgPool2d):
            return "window"
        if isinstance(m, nn.MaxPool2d | nn.AdaptiveMaxPool2d):
            return "other"
        if name == "adaptive_avg_pool2d":
            return "global" if _argument(node, 1, "output_size") in (1, (1, 1), [1, 1]) else "other"
        if name == "avg_pool2d":
            return "window"
        if name in ("max_pool2d", "adaptive_max_pool2d"):
            return "other"
        return "global" if name == "mean" and self._spatial(node) else None

    def _spatial(self, node: fx.Node) -> bool:
        dims = _argument(node, 1, "dim")
        if isinstance(dims, list | tuple):
            return sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]
        before = self.source(node)  # x.mean(3).mean(2)
        return dims in (2, -1) and before is not None and self.name(before) == "mean" and _argument(before, 1, "dim") in (3, -1)

    def pool_input(self, node: fx.Node) -> fx.Node | None:
        source = self.source(node)
        if source is not None and self.name(node) == "mean" and not isinstance(_argument(node, 1, "dim"), list | tuple):
            return self.source(source)
        return source

    def stride(self, node: fx.Node) -> int:
        """How much a node shrinks its map; 1 for whatever does not, and for pooling to a fixed size."""
        m, name = self.module(node), self.name(node)
        value: Any = 1
        if m is not None and not isinstance(m, nn.ConvTranspose2d):
            value = getattr(m, "stride", 1)
        elif name in ("max_pool2d", "avg_pool2d"):
            value = _argument(node, 2, "stride") or _argument(node, 1, "kernel_size")
        elif name == "conv2d":
            value = _argument(node, 3, "stride") or 1
        value = value if isinstance(value, list | tuple) else (value,)
        return max([v for v in value if isinstance(v, int)], default=1)


def drop(r: Reader, idle: Callable[[fx.Node], bool]) -> None:
    """Take nodes out of a graph that only hand on their first argument."""
    for node in list(r.graph.nodes):
        source = r.source(node)
        if source is not None and idle(node):
            node.replace_all_uses_with(source)
            r.graph.erase_node(node)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _output(graph: fx.Graph) -> fx.Node:
    return cast(fx.Node, next(n for n in reversed(graph.nodes) if n.op == "output"))


def discover(root: nn.Module, graph: fx.Graph) -> Taps:
    """Walk back from the logits: head, feature, map; then the resolution stages and the BatchNorm calls in order."""
    r, taps = Reader(root, graph), Taps()
    node = _output(graph).args[0]
    assert isinstance(node, fx.Node)
    clean, pooled = True, False
    while True:  # logits back to the last linear layer
        m = r.module(node)
        conv_head = isinstance(m, nn.Conv2d) and set(m.kernel_size) == {1} and m.groups == 1
        if isinstance(m, nn.Linear) or conv_head:
            break
        clean = clean and r.is_reshape(node)
        pool = r.pool(node)
        if pool is not None or r.name(node) == "interpolate":  # class maps, averaged or enlarged
            pooled = True
        elif not (r.is_reshape(node) or r.is_act(node) or r.is_scalar(node)):
            break
        before = r.pool_input(node) if pool else r.source(node)
        if before is None:
            break
        node = before
    m = r.module(node)
    if isinstance(m, nn.Linear) or conv_head:
        _feature(r, taps, node, clean, pooled)
    taps.norms = [n for n in graph.nodes if r.is_norm(n)]
    taps.groups = group_nodes(r, taps.map)
    return taps


def _feature(r: Reader, taps: Taps, head: fx.Node, clean: bool, pooled: bool) -> None:
    taps.head, taps.feature = r.module(head), r.source(head)
    convolution = isinstance(taps.head, nn.Conv2d)
    node, straight = taps.feature, True
    while node is not None and (r.is_reshape(node) or r.is_act(node)):  # feature back to the pooling
        straight = straight and not r.is_act(node)
        node = r.source(node)
    pool = r.pool(node) if node is not None and not pooled else None
    if node is None or pool is None:
        taps.reason = "no pooling feeds the last linear layer directly"
        if convolution:  # a classifier on maps (SqueezeNet, dense prediction)
            taps.map, taps.mean = taps.feature, True
            taps.reason = "the last linear layer is a 1x1 convolution on a map, not a linear layer behind a global pooling"
        return
    taps.map, taps.flat = r.pool_input(node), convolution
    if not clean:
        taps.reason = "something more than the last linear layer makes the logits"
    elif not straight:
        taps.reason = "an activation stands between the pooling and the last linear layer"
    elif pool == "other":
        taps.reason = "the pooling before the last linear layer is not an average over the whole map"
    else:
        taps.exact, taps.reason = (True if pool == "global" else None), ""


def group_nodes(r: Reader, last: fx.Node | None) -> list[fx.Node]:
    """The maps after the stem and after each resolution stage, in order.

    stem: the first convolution with the BatchNorm (of the same parent module) and activation that follow it, and the pooling after
    those where the convolution is strided (ImageNet ResNets). A stage ends where a convolution or pooling with a stride takes its
    input: the earliest such input at that resolution; the last stage ends at the map that enters the global pooling (`last`). Where
    a stage ends in `activation(BatchNorm(sum))`, as in pre-activation networks, its map is the sum.
    """
    nodes = [n for n in r.graph.nodes if last is None or r.at[n] <= r.at[last]]
    first = next((n for n in nodes if r.is_conv(n)), None)
    if first is None:
        return []
    stem = _stem(r, first)
    scale: dict[fx.Node, int] = {}
    ends: dict[int, fx.Node] = {}
    for node in nodes:
        inputs = [n for n in node.all_input_nodes if n in scale]
        scale[node] = max([scale[n] for n in inputs], default=1)
        source, stride = r.source(node), r.stride(node)
        if stride > 1 and source is not None and source in scale:
            level = scale[source]
            scale[node] = level * stride
            if source.op != "placeholder" and (level not in ends or r.at[source] < r.at[ends[level]]):
                ends[level] = source
    found = {stem, *(_before_preactivation(r, n) for n in ends.values())}
    if last is not None:
        found.add(_before_preactivation(r, last))
    return sorted((n for n in found if r.at[n] >= r.at[stem]), key=r.at.__getitem__)


def _stem(r: Reader, first: fx.Node) -> fx.Node:
    end = first
    while (user := r.only_user(end)) is not None:
        norm = r.is_norm(user) and r.scope(user) == r.scope(first)
        pool = r.stride(first) > 1 and r.pool(user) is not None and r.stride(user) > 1
        if not (norm or r.is_act(user) or pool):
            break
        end = user
        if pool:
            break
    return end


def _before_preactivation(r: Reader, node: fx.Node) -> fx.Node:
    norm = r.source(node) if r.is_act(node) else node  # some BatchNorms hold their activation
    total = r.source(norm) if norm is not None and r.is_norm(norm) else None
    return total if total is not None and r.is_add(total) else node


def attach(graph: fx.Graph, taps: Taps, norm_inputs: bool = False) -> None:
    """Make the graph return (logits, feature, map, groups, norm inputs)."""
    out = _output(graph)
    inputs = tuple(n.args[0] for n in taps.norms) if norm_inputs else ()
    out.args = ((out.args[0], taps.feature, taps.map, tuple(taps.groups), inputs),)


def variant(root: nn.Module, graph: fx.Graph, groups: bool, norm_inputs: bool = False) -> fx.GraphModule:
    """A runnable copy of an attached graph that keeps only the asked outputs alive; it shares the modules of `root`."""
    graph = copy.deepcopy(graph)
    out = _output(graph)
    logits, feature, last, maps, inputs = cast(tuple[Any, ...], out.args[0])
    out.args = ((logits, feature, last, maps if groups else (), inputs if norm_inputs else ()),)
    graph.lint()
    return fx.GraphModule(root, graph)


def pooled_feature(feature: Tensor | None, last: Tensor | None, flat: bool, mean: bool) -> Tensor | None:
    """The feature vector [B, d] from what stands in the graph; see `Taps`."""
    if mean and last is not None:
        return last.mean((2, 3))
    return feature.flatten(1) if flat and feature is not None else feature


Head = tuple[Tensor, Tensor | None]


def head_weights(weight: Tensor, bias: Tensor | None) -> Head:
    """[C, K] and [C] or None of a Linear or 1x1 convolution, without gradient."""
    return weight.detach().flatten(1), None if bias is None else bias.detach()


@torch.no_grad()
def agrees(head: Head, logits: Tensor, last: Tensor | None) -> bool:
    """Whether logits == linear(mean over space of the map), to rounding; waits for the device."""
    weight, bias = head
    if last is None or last.dim() != 4 or last.shape[1] != weight.shape[1] or logits.dim() != 2:
        return False
    wide = torch.promote_types(logits.dtype, torch.float32)
    mine = last.to(wide).mean((2, 3)) @ weight.to(wide).T
    mine = mine if bias is None else mine + bias.to(wide)
    slack = 1e-4 if torch.finfo(logits.dtype).bits >= 32 else 3e-2
    return bool((mine - logits).abs().max() <= slack * (1 + logits.abs().max()))
