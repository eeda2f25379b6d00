"""Mistakes of a method's author, planted one by one: the contract's tests, or the engine before the first step, find each."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fastkd import methods
from fastkd.engine import attributes, dry, state
from fastkd.engine.guards.snapshot import Snapshot, optimisers
from fastkd.errors import MethodError
from fastkd.method import step
from fastkd.methods.noise import Noise
from tests import small
from tests.methods import test_contract as contract

VARIANT: tuple[str, dict[str, Any]] = ("planted", {"epochs": 2})


@dataclass
class Extended(Noise):
    """Noise with one step more an epoch, `extra`."""

    def epoch(self, e):
        yield from super().epoch(e)
        yield self.extra

    @step("memory", eager=True)
    def extra(self):
        pass


@dataclass
class Private(Extended):
    """A network, its optimiser and a counter under private names."""

    def build(self):
        super().build()
        self._head = self.place(nn.Linear(3, 2))
        self._opt = self.sgd(self._head.parameters(), lr=0.1)
        self._seen = {"n": 0}

    @step("memory", eager=True)
    def extra(self):
        self._seen["n"] += 1
        self.minimise({"head": self._head(torch.ones(4, 3)).square().mean()}, self._opt)


@dataclass
class NumberOfAModule(Extended):
    """A host number of a module, which is neither parameter nor buffer."""

    def build(self):
        super().build()
        self.net = nn.Linear(2, 2)
        self.net.seen = 0

    @step("memory", eager=True)
    def extra(self):
        self.net.seen += 1


@dataclass
class Cached(Extended):
    """A network that is made when it is first asked for."""

    @functools.cached_property
    def late(self):
        return {"net": nn.Linear(2, 2)}


@dataclass
class Taken(Extended):
    """A name of the toolbox's own."""

    def build(self):
        super().build()
        self._bad = torch.zeros(3)


@dataclass
class Given(Extended):
    """A name of what the run gives, which is not saved."""

    def build(self):
        super().build()
        self.embeddings = torch.zeros(3)


@dataclass
class Part:
    net: nn.Module
    opt: torch.optim.Optimizer


@dataclass
class Inside(Extended):
    """A network with BatchNorm in an object of the method's own."""

    def build(self):
        super().build()
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.parts = {"one": [Part(net, self.sgd(net.parameters(), lr=0.1))]}


@dataclass
class Impure(Extended):
    """An epoch that looks at what the run has done."""

    def build(self):
        super().build()
        self.count = [0]

    def epoch(self, e):
        yield from super().epoch(e)
        if self.count[0] > 1:
            yield self.more

    @step("memory", eager=True)
    def extra(self):
        self.count[0] += 1

    @step("memory", eager=True)
    def more(self):
        pass


@dataclass
class DataAsArgument(Extended):
    """The number of the epoch as an argument of a step that may be captured."""

    def epoch(self, e):
        yield from super().epoch(e)
        yield self.extra, True, e

    @step("synthesis")
    def extra(self, *args):
        pass


@dataclass
class ReadInAnEagerStep(Extended):
    @step("memory", eager=True)
    def extra(self):
        self.pool.cursor.item()


@dataclass
class MaskInAnEagerStep(Extended):
    @step("memory", eager=True)
    def extra(self):
        self.pool.order[self.pool.order > 3]


@dataclass
class Global(Extended):
    """Draws of torch's own generator in an eager step: the same for the rows of every rank."""

    @step("memory", eager=True)
    def extra(self):
        torch.rand(3)


@dataclass
class Copied(Extended):
    """A copy from or to the host in a step that may be captured."""

    how: str = ""

    @step("synthesis")
    def extra(self):
        total = self.pool.cursor
        {
            "cpu": lambda: total.cpu(),
            "tolist": lambda: total.tolist(),
            "numpy": lambda: total.numpy(),
            "tensor": lambda: torch.tensor(1.0),
            "index": lambda: self.pool.order[self.pool.order > 3],
        }[self.how]()


@pytest.fixture
def plant(monkeypatch):
    """Put a class into the table of methods, as `planted`."""
    return lambda cls: monkeypatch.setitem(methods.METHODS, "planted", f"{__name__}:{cls.__name__}")


def test_the_same_method_without_a_mistake_passes(plant, tmp_path):
    plant(Extended)
    contract.test_killed_at_random_steps_and_resumed_is_bit_identical(VARIANT, tmp_path)
    contract.test_no_host_synchronisation_in_a_capturable_step_and_no_foreign_draw_in_any(VARIANT)
    contract.test_arguments_select_a_variant_and_are_not_data(VARIANT)
    contract.test_it_walks_on_tensors_without_values(VARIANT)


def test_private_names_are_state_as_others_are(plant, tmp_path):
    plant(Private)
    contract.test_killed_at_random_steps_and_resumed_is_bit_identical(VARIANT, tmp_path)
    method = small.prepared(*VARIANT)
    tensors, numbers = state.collect(method)
    assert {"_head.weight", "_opt.0.0.momentum_buffer"} <= set(tensors) and numbers["_seen.n"] == 0
    assert not {name for name in {**tensors, **numbers} if name.split(".")[0] in ("_life", "_bad", "_touched", "_rows")}
    assert method._opt in optimisers(method)
    made = small.small(*VARIANT)
    assert dry.walk(made, small.given_to(made))["bytes"]["_head"] == 4 * (3 * 2 + 2)


@pytest.mark.parametrize("forgotten", ["_head", "_opt", "_seen"])
def test_what_a_checkpoint_forgets_is_seen_by_the_contract(plant, tmp_path, monkeypatch, forgotten):
    plant(Private)
    nodes = attributes.nodes
    monkeypatch.setattr(state, "nodes", lambda method, *skip: nodes(method, forgotten, *skip))
    with pytest.raises(AssertionError, match="killed after step"):
        contract.test_killed_at_random_steps_and_resumed_is_bit_identical(VARIANT, tmp_path)


def test_a_host_number_of_a_module_is_not_saved_and_the_contract_says_so(plant, tmp_path):
    plant(NumberOfAModule)
    with pytest.raises(AssertionError, match="killed after step"):
        contract.test_killed_at_random_steps_and_resumed_is_bit_identical(VARIANT, tmp_path)


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Cached, "late.net is a Linear in a cached property, which a checkpoint does not hold"),
        (Taken, "Taken._bad is the toolbox's own and is not set by a method"),
        (Given, "Given.embeddings is given by the run and is not set by a method"),
    ],
)
def test_names_that_would_not_be_saved_are_refused_before_the_first_step(plant, cls, said):
    plant(cls)
    with pytest.raises(MethodError, match=said):
        small.prepared(*VARIANT)


def test_a_network_inside_an_object_is_globalised_saved_and_guarded_as_any_other(plant):
    plant(Inside)
    method = small.prepared(*VARIANT)
    (part,) = method.parts["one"]
    assert type(part.net[1]).__name__ == "GlobalBatchNorm1d" and part.net in attributes.hanging(method, nn.Module)
    assert {"parts.one.0.net.1.running_mean", "parts.one.0.opt.0.0.momentum_buffer"} <= set(state.collect(method)[0])
    assert part.opt in optimisers(method)
    guarded = {t.data_ptr() for group, _, _ in Snapshot(method).buffers.groups for t in group}
    assert part.net[1].running_mean.data_ptr() in guarded
    made = small.small(*VARIANT)
    held = dry.walk(made, small.given_to(made))["bytes"]["parts"]
    assert held == 4 * (24 + 24 + 8) + 8  # parameters, momenta, statistics and their counter


def test_an_epoch_that_looks_at_what_the_run_has_done_is_found(plant, tmp_path):
    plant(Impure)
    with pytest.raises(AssertionError, match="what an epoch yields depends on what the run has done"):
        contract.test_killed_at_random_steps_and_resumed_is_bit_identical(VARIANT, tmp_path)


def test_an_argument_that_is_data_is_found(plant):
    plant(DataAsArgument)
    with pytest.raises(AssertionError, match="a longer run has more variants"):
        contract.test_arguments_select_a_variant_and_are_not_data(VARIANT)


@pytest.mark.parametrize(("cls", "read"), [(ReadInAnEagerStep, "_local_scalar_dense"), (MaskInAnEagerStep, "nonzero")])
def test_a_dry_run_says_that_a_step_reads_on_the_host(plant, cls, read):
    plant(cls)
    said = rf"step 'extra' of epoch 0 reads values of a tensor on the host \(aten\.{read}"
    with pytest.raises(MethodError, match=said) as caught:
        contract.test_it_walks_on_tensors_without_values(VARIANT)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("how", ["cpu", "tolist", "numpy", "tensor", "index"])
def test_a_copy_between_host_and_device_is_found(plant, how):
    plant(Copied)
    with pytest.raises(AssertionError, match=f"Tensor.{how}|lift_fresh|aten::index"):
        contract.test_no_host_synchronisation_in_a_capturable_step_and_no_foreign_draw_in_any(("planted", {**VARIANT[1], "how": how}))


def test_a_draw_of_torchs_own_generator_in_an_eager_step_is_found(plant):
    plant(Global)
    with pytest.raises(AssertionError, match="a draw outside of the run's streams"):
        contract.test_no_host_synchronisation_in_a_capturable_step_and_no_foreign_draw_in_any(VARIANT)
