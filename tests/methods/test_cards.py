"""What `fastkd methods` says of each method is what its code does."""

from __future__ import annotations

import pytest
import torch

from fastkd import methods
from fastkd.method import Method, steps
from fastkd.methods._card import BASES, NEEDS, TERMS
from tests import small


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, float]]:
    """Method → the terms that it minimises in any of its variants → the largest gradient that each has for what its step updates."""
    found: dict[str, dict[str, float]] = {}
    with pytest.MonkeyPatch.context() as patch:
        whole = Method._valued  # what `minimise` and `minimise_parts` begin with

        def valued(self, terms, params, *rest):
            for term, value in terms.items():
                grads = torch.autograd.grad(value, params, allow_unused=True, retain_graph=True) if value.requires_grad else ()
                largest = max((g.abs().max().item() for g in grads if g is not None), default=0.0)
                found.setdefault(name, {})[term] = max(largest, found.get(name, {}).get(term, 0.0))
            return whole(self, terms, params, *rest)

        patch.setattr(Method, "_valued", valued)
        for name, over in small.VARIANTS:
            method = small.prepared(name, over)
            for e in range(method.epochs):
                once = {(fn.__name__, args): (fn, args, n) for _, fn, args, n in reversed(list(steps(method, e)))}
                for fn, args, n in reversed(once.values()):  # every kind of step, in order
                    method.rng.at(0, e, fn.__name__, n)
                    fn(*args)
                    method.step_ends()
    return found


@pytest.mark.parametrize("name", methods.names())
def test_the_declared_terms_are_those_that_are_minimised(name: str, seen: dict[str, dict[str, float]]) -> None:
    _, card = methods.card(name)
    assert card is not None, f"{name} declares no CARD"
    assert set(card.meanings) == set(seen[name])
    assert len(card.terms) == len(card.meanings) and all(card.meanings.values())


@pytest.mark.parametrize("name", methods.names())
def test_every_term_moves_what_its_step_updates(name: str, seen: dict[str, dict[str, float]]) -> None:
    assert min(seen[name].values()) > 1e-9, f"a term without a gradient: {seen[name]}"


@pytest.mark.parametrize("name", methods.names())
def test_what_it_needs_and_rests_on(name: str) -> None:
    about, card = methods.card(name)
    cls = methods.method_class(name)
    assert card is not None and set(card.needs) == cls.needs and set(card.needs) <= set(NEEDS)
    assert card.basis in BASES and card.source and about.endswith(".")
    assert (card.year is None) == (card.paper == "") and (card.year is None or 2015 <= card.year <= 2030)


def test_a_term_of_several_methods_is_explained_once() -> None:
    own = [term for name in methods.names() for term in methods.card(name)[1].terms if ": " in term]
    assert len(own) == len({term.partition(": ")[0] + term for term in own}), "two methods explain one term in the same words"
    assert not {term.partition(": ")[0] for term in own} - {"oh"} & set(TERMS), "a shared term is explained anew"
