"""Frozen BatchNorm with the residual and the activation that follow it, as one call each."""

from __future__ import annotations

import copy

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from .frozen_bn import FrozenBN
from .graph import Reader, drop


def fuse(root: nn.Module, graph: fx.Graph) -> list[str]:
    """Rewrite a graph whose BatchNorms are `FrozenBN`s, in place; each call site gets a layer of its own.

    BN → act and BN + residual (→ act) become one call where nobody else reads what lies between. The order of the BatchNorms
    stays: a sum joins the later of two BatchNorms, and only if no other one is called in between.

    Returns: what was done, one line each.
    """
    before = Reader(root, graph)
    drop(before, lambda node: _idle(before, node))
    _split_shared(root, graph)
    done = {"with an activation": 0, "with a residual and an activation": 0, "with a residual": 0}
    reader = Reader(root, graph)
    norms = [n for n in graph.nodes if reader.is_norm(n)]
    for node in norms:
        layer = reader.module(node)
        if not isinstance(layer, FrozenBN) or layer.inner is not None:
            continue
        user, residual = reader.only_user(node), False
        if user is not None and reader.is_add(user):
            joined = _join(reader, norms, node, user)
            if joined is None:
                continue
            node, residual = joined, True
            user = reader.only_user(node)
        act = _activation(reader, user) if user is not None else None
        if act is not None and user is not None:
            layer.act, layer.slope = act
            user.replace_all_uses_with(node)
            graph.erase_node(user)
        if residual:
            done["with a residual and an activation" if act else "with a residual"] += 1
        elif act:
            done["with an activation"] += 1
    alone = len(norms) - sum(done.values())
    parts = [f"{n} {how}" for how, n in done.items() if n] + ([f"{alone} alone"] if alone else [])
    return [f"{len(norms)} BatchNorm layers: {', '.join(parts)}"] if norms else ["no BatchNorm2d: no statistics"]


def _idle(reader: Reader, node: fx.Node) -> bool:
    """Dropout, as a module or a function: it does nothing in eval mode."""
    function = reader.name(node).endswith("dropout") and node.kwargs.get("training", True) is False
    return function or isinstance(reader.module(node), _DropoutNd)


def _split_shared(root: nn.Module, graph: fx.Graph) -> None:
    """A BatchNorm that is called twice becomes two, so that each call has its own statistics and its own fusion."""
    reader = Reader(root, graph)
    seen: set[int] = set()
    for node in list(graph.nodes):
        layer = reader.module(node)
        if not isinstance(layer, FrozenBN):
            continue
        if id(layer) in seen:
            collector = layer.collector
            layer = copy.copy(layer)  # shares the buffers
            layer._buffers = dict(layer._buffers)
            assert layer.collector is collector
            name = f"fastkd_bn_{len(seen)}"
            root.add_module(name, layer)
            node.target = name
        seen.add(id(layer))


def _join(reader: Reader, norms: list[fx.Node], node: fx.Node, total: fx.Node) -> fx.Node | None:
    """Replace `node` and the sum by one call at the place of the sum; None where that is not the same."""
    other = total.args[1] if total.args[0] is node else total.args[0]
    assert isinstance(other, fx.Node)
    between = [n for n in norms if reader.at[node] < reader.at.get(n, -1) < reader.at[total]]
    writes_other = reader.name(total) in ("iadd", "add_") and total.args[0] is other and len(other.users) > 1
    if other is node or between or writes_other:
        return None
    with reader.graph.inserting_before(total):
        call = reader.graph.call_module(str(node.target), (node.args[0], other))
    reader.at[call] = reader.at[total]
    total.replace_all_uses_with(call)
    reader.graph.erase_node(total)
    reader.graph.erase_node(node)
    return call


def _activation(reader: Reader, node: fx.Node) -> tuple[str, float] | None:
    """(name, slope) of an activation that the fused op knows."""
    m, name = reader.module(node), reader.name(node)
    if type(m) is nn.ReLU or name in ("relu", "relu_"):
        return "relu", 0.0
    if type(m) is nn.ReLU6 or name == "relu6":
        return "relu6", 0.0
    if type(m) is nn.LeakyReLU:
        return "leaky_relu", m.negative_slope
    if name in ("leaky_relu", "leaky_relu_"):
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return ("leaky_relu", slope) if isinstance(slope, float) else None
    return None
