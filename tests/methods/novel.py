"""What the tests of methods without stored images share."""

from __future__ import annotations

import dataclasses
import typing

import torch

from fastkd import assemble, config
from fastkd.assemble.job import make_method
from fastkd.method import steps
from fastkd.methods import method_class
from tests import small


def names(method, e=0):
    """The steps of an epoch, by name."""
    return [fn.__name__ for _, fn, _, _ in steps(method, e)]


def take(method, fn, *args, e=0, n=0):
    """One step as the engine takes it; gradients stay until `method.step_ends()`."""
    method.rng.at(method.seed, e, fn.__name__, n)
    method.log.prefix = fn.__name__
    fn(*args)


def bits(net):
    """A copy of parameters and buffers."""
    return {k: v.clone() for k, v in net.state_dict().items()}


def moved(net, before):
    """Names of what is not as it was; parameters and buffers apart."""
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    weights = {k for k, _ in net.named_parameters()}
    return changed & weights, changed - weights


def images(method, requires_grad=True):
    """A batch as the networks see it."""
    return torch.randn(method.batch, *method.shape, generator=torch.Generator().manual_seed(3)).requires_grad_(requires_grad)


def grads(value, tensors):
    """Gradients of a term, None where it does not depend on a tensor."""
    return torch.autograd.grad(value, list(tensors), allow_unused=True, retain_graph=True)


def reaches(value, tensors):
    """Whether a term has a gradient that is not zero for any of these."""
    return any(g is not None and g.abs().max() > 0 for g in grads(value, tensors))


def spied_terms(method, monkeypatch):
    """A list that fills with the terms of each update; the update itself does not happen."""
    seen = []
    spy = lambda self, terms, *opts, **kw: seen.append((terms, opts, kw))  # noqa: E731
    monkeypatch.setattr(type(method), "minimise", spy)
    whole = lambda self, terms, rows, *opts, **kw: spy(self, terms(slice(0, rows)), *opts, **kw)  # noqa: E731
    monkeypatch.setattr(type(method), "minimise_parts", whole)
    return seen


def check_settings(name, **table):
    """Every value that the method lists can be set, and a dry run walks every step of its digits recipe."""
    cls, chosen = method_class(name, table), {k: v for k, v in table.items() if k in ("variant", "host")}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for value in typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ():
            said = config.parse_sets([f"{field.name}={value}"])
            assert getattr(make_method({"name": name, **chosen, **said}), field.name) == value
    planned = assemble.dry_run(config.resolve(None, {"method": {"name": name, **table}}))
    made = small.small(name, table)
    assert {row["step"] for row in planned["steps"]} == {n for e in range(made.epochs) for n in names(made, e)}


def top1(recipe):
    """Accuracy of the student of a recipe at the end of its run, seed 0."""
    outcome = assemble.distil(config.resolve(recipe, {"seed": 0, "device": "cpu"}), None)
    assert outcome.code == 0
    return outcome.summary["student"]["top1"]
