"""`fastkd methods`: the methods, and every parameter of one."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import types
import typing
from pathlib import Path
from typing import Any

import click

from fastkd.cli.common import emit, method_names, verb


@verb("methods")
@click.argument("name", required=False, shell_complete=method_names)
def command(name: str | None, as_json: bool) -> int:
    """List the methods, or show one: its paper, what it needs, every parameter with default, type and meaning."""
    return one(name, as_json) if name else every(as_json)


def every(as_json: bool) -> int:
    """All methods, read from the sources: torch is not loaded."""
    from fastkd.cli import summary
    from fastkd.methods import METHODS

    rows = {name: about(source_of(target.partition(":")[0])) for name, target in METHODS.items()}
    if as_json:
        emit({name: {"about": said} for name, said in rows.items()})
    else:
        summary.print_table(("method", "what it is"), list(rows.items()))
        summary.console().print("`fastkd methods NAME` shows the parameters of one.")
    return 0


def one(name: str, as_json: bool) -> int:
    """One method with its fields."""
    from fastkd.cli import summary
    from fastkd.methods import method_class

    cls = method_class(name)
    said, needs = about(Path(inspect.getfile(cls))), sorted(cls.needs)
    rows = fields(cls)
    if as_json:
        emit({"name": name, "about": said, "defaults": inspect.getdoc(cls), "needs": needs, "module": cls.__module__, "fields": rows})
        return 0
    summary.print_facts([
        ("method", name),
        ("what", said),
        ("settings", " ".join((inspect.getdoc(cls) or "").split())),
        ("needs", ", ".join(needs) or "nothing but a teacher"),
        ("set with", f"fastkd run --method {name} --set method.KEY=VALUE"),
    ])  # fmt: skip
    summary.print_table(("method.", "default", "values", "what"), [(r["name"], shown(r["default"]), r["type"], r["what"]) for r in rows])
    return 0


def source_of(module: str) -> Path:
    """The file of a module, which is not executed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module named {module}")
    return Path(spec.origin)


def about(source: Path) -> str:
    """The docstring of a source file as one paragraph: paper, year, what it rests on."""
    return " ".join((ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split())


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
