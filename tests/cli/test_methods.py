"""`fastkd methods`."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from fastkd import config, methods
from fastkd.assemble.job import make_method
from fastkd.cli.methods import readable, shown


def test_lists_every_method_with_what_it_is(cli) -> None:
    listed = json.loads(cli("methods", "--json").stdout)
    assert list(listed) == methods.names() and all(len(row["about"]) > 30 for row in listed.values())
    said = cli("methods").stdout
    assert all(name in said for name in methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_every_field_with_default_values_and_meaning(cli, name: str) -> None:
    done = cli("methods", name, "--json")
    assert done.exit_code == 0, done.stderr
    card = json.loads(done.stdout)
    cls = methods.method_class(name)
    assert [f["name"] for f in card["fields"]] == [f.name for f in dataclasses.fields(cls)]
    assert not [f["name"] for f in card["fields"] if not f["what"]], "a field has a line under it that says what it is"
    assert not [f["name"] for f in card["fields"] if re.search("Literal|Union|typing", f["type"])]
    assert set(card["needs"]) == cls.needs


@pytest.mark.parametrize("name", methods.names())
def test_every_default_can_be_set_as_it_is_shown(name: str) -> None:
    for f in dataclasses.fields(methods.method_class(name)):
        value = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
        again = make_method({"name": name, f.name: config.parse_value(shown(value))})
        assert getattr(again, f.name) == value, f.name


def test_what_people_read(cli) -> None:
    said = cli("methods", "muse").stdout
    assert "a_cam" in said and "weight of the CAM term" in said and "best | last" in said and "--set method." in said


def test_types_in_plain_words() -> None:
    from typing import Literal

    assert readable(Literal["a", "b"] | None) == "a | b | none"
    assert readable(float) == "float" and readable(tuple[int, ...]) == "tuple[int, ...]"
