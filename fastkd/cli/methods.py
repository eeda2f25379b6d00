"""`fastkd methods`: the methods, and all that is known of one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import types
import typing
from pathlib import Path
from typing import Any

import click

from fastkd.cli.common import emit, method_names, verb

if typing.TYPE_CHECKING:
    from fastkd.methods import Card


@verb("methods")
@click.argument("name", required=False, shell_complete=method_names)
def command(name: str | None, as_json: bool) -> int:
    """List the methods, or show one: paper, what it needs and rests on, loss terms, published settings and figures, every parameter."""
    return one(name, as_json) if name else every(as_json)


def every(as_json: bool) -> int:
    """All methods, read from the sources: torch is not loaded."""
    from fastkd import methods, recipes
    from fastkd.cli import summary

    cards = {name: methods.card(name) for name in methods.names()}
    if as_json:
        emit({name: {**declared(about, card), "figures": len(recipes.published(method=name))} for name, (about, card) in cards.items()})
        return 0
    rows = [(name, *(cells(card) if card else ("",) * 4), first_sentence(about)) for name, (about, card) in cards.items()]
    summary.print_table(("method", "paper", "needs", "from", "terms", "what it is"), rows)
    used = {need for _, card in cards.values() if card for need in card.needs}
    summary.print_facts(
        [
            *((f"needs {need}", said) for need, said in methods.NEEDS.items() if need in used),
            *((f"from {basis}", said) for basis, said in methods.BASES.items()),
        ]
    )
    summary.console().print("`fastkd methods NAME` shows the terms, published figures and parameters of one.")
    return 0


def one(name: str, as_json: bool) -> int:
    """One method: its card, its published settings and figures, its fields."""
    from fastkd import methods, recipes
    from fastkd.cli import summary
    from fastkd.cli.published import show_figures, show_settings

    cls = methods.method_class(name)
    about, card = methods.card(name)
    rows, settings, figures = fields(cls), recipes.pairs(name), recipes.published(method=name)
    if as_json:
        emit({
            "name": name, **declared(about, card), "needs": sorted(cls.needs), "defaults": inspect.getdoc(cls), "module": cls.__module__,
            "recipes": settings, "figures": [dataclasses.asdict(f) for f in figures], "fields": rows,
        })  # fmt: skip
        return 0
    summary.print_facts([
        ("method", name),
        ("what", about),
        *(described(card) if card else []),
        ("settings", " ".join((inspect.getdoc(cls) or "").split())),
        ("needs", "; ".join(methods.NEEDS.get(need, need) for need in sorted(cls.needs)) or "nothing but a teacher"),
        *([("", card.also)] if card and card.also else []),
        ("set with", f"fastkd run --method {name} --set method.KEY=VALUE"),
    ])  # fmt: skip
    if card:
        summary.print_table(("term", "what"), list(card.meanings.items()))
    show_settings(settings)
    show_figures(figures)
    summary.print_table(("method.", "default", "values", "what"), [(r["name"], shown(r["default"]), r["type"], r["what"]) for r in rows])
    return 0


def cells(card: Card) -> tuple[str, ...]:
    """A card in the list of all."""
    return card.published, ", ".join(card.needs) or "–", card.basis, " ".join(card.meanings)


def first_sentence(about: str) -> str:
    return about.partition(". ")[0].rstrip(".;")


def declared(about: str, card: Card | None) -> dict[str, Any]:
    """What a method's file says of it, for JSON."""
    if card is None:
        return {"about": about}
    return {"about": about, **dataclasses.asdict(card), "terms": card.meanings}


def described(card: Card) -> list[tuple[str, object]]:
    """Paper, and what the code rests on."""
    from fastkd.methods import BASES

    paper = f"{card.paper}, {card.published}" if card.paper else "none"
    return [("paper", paper), ("from", f"{card.basis} ({BASES[card.basis]}): {card.source}")]


def fields(cls: type) -> list[dict[str, Any]]:
    """Every field of a method: name, default, admitted values, the line that stands under it in its class or in a base."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            meanings.update(field_docs(base))
    hints = typing.get_type_hints(cls)
    return [
        {"name": f.name, "default": default(f), "type": readable(hints[f.name]), "what": meanings.get(f.name, "")}
        for f in dataclasses.fields(cls)
    ]  # fmt: skip


def default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def shown(value: Any) -> str:
    """A default as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(str, value)) + "]"
    return "none" if value is None else str(value)


def readable(hint: Any) -> str:
    """`Literal["a", "b"] | None` → `a | b | none`."""
    if hint is type(None):
        return "none"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(readable, inner))
    return str(hint) if origin else getattr(hint, "__name__", str(hint))


def field_docs(cls: type) -> dict[str, str]:
    """The string literals that stand under the fields of a class in its source."""
    try:
        tree = ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__), [])
    found = {}
    for field, after in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        ):  # fmt: skip
            found[field.target.id] = " ".join(after.value.value.split())
    return found
