"""Published settings and figures of a method, as tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastkd.cli import summary

if TYPE_CHECKING:
    from fastkd.recipes import Figure


def show_settings(settings: dict[str, dict[str, list[str]]]) -> None:
    """The recipes of a method as `recipes.pairs` gives them: the files, then the pairs of each by data set."""
    from fastkd import recipes

    summary.print_facts([("recipes", ", ".join(settings) or "none")])
    rows = [(recipes.name(stem, data, "…"), ", ".join(found)) for stem, sets in settings.items() for data, found in sets.items() if found]
    if rows:
        summary.print_table(("recipe of a pair", "… is one of"), rows)


def show_figures(figures: Sequence[Figure]) -> None:
    """One table a source, data set and kind of figure: a column a pair, the networks on their own first."""
    for title, group in itertools.groupby(figures, key=heading):
        found = list(group)
        pairs = list(dict.fromkeys(pair(f) for f in found))
        summary.console().print(title)
        summary.print_table(("%", *(f">{p}" for p in pairs)), list(rows(found, pairs)))


def heading(f: Figure) -> str:
    """What the figures of one table have in common."""
    metric = "" if f.metric == "top-1" else f"{f.metric}, "
    which = {"best": "best epoch on test data", "last": "last epoch", "mean": "mean ± spread over epochs"}.get(f.which, "epoch not stated")
    return f"{f.data}, {metric}{which}: {f.source} [{f.evidence}]{f'; {f.note}' if f.note else ''}"


def pair(f: Figure) -> str:
    return f"{f.teacher}\n→ {f.student}" if f.teacher else "pair not named"


def rows(figures: Sequence[Figure], pairs: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Teachers, and students on real data, where they are known, then a row a label; what was not printed is empty."""
    known = {
        "teacher": {pair(f): f"{f.teacher_value:g}" for f in figures if f.teacher_value is not None},
        "student, real data": {pair(f): f"{f.student_value:g}" for f in figures if f.student_value is not None},
    }
    for label in dict.fromkeys(f.label for f in figures):
        known[label] = {pair(f): f"{f.value:g}" + (f" ± {f.spread:g}" if f.spread is not None else "") for f in figures if f.label == label}
    yield from ((label, *(found.get(p, "") for p in pairs)) for label, found in known.items() if found)
