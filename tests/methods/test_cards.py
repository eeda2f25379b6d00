"""What `fastkd methods` says of each method is what its code does."""

from __future__ import annotations

import pytest

from fastkd import methods
from fastkd.method import Method, steps
from fastkd.methods._card import BASES, NEEDS, TERMS
from tests import small


@pytest.fixture(scope="module")
def seen() -> dict[str, set[str]]:
    """Method → the terms that it minimises in any of its variants."""
    found: dict[str, set[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        whole = Method._update  # what `minimise` and `minimise_parts` end in

        def update(self, names, *rest):
            found.setdefault(name, set()).update(names)
            return whole(self, names, *rest)

        patch.setattr(Method, "_update", update)
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
def test_the_declared_terms_are_those_that_are_minimised(name: str, seen: dict[str, set[str]]) -> None:
    _, card = methods.card(name)
    assert card is not None, f"{name} declares no CARD"
    assert set(card.meanings) == seen[name]
    assert len(card.terms) == len(card.meanings) and all(card.meanings.values())


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
