"""The configuration: recipes, overrides, and one clear sentence for whatever is wrong with them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fastkd import config, methods
from fastkd.errors import ConfigError

TOML_VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**31), 2**31),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12),
)


def write(folder: Path, text: str | bytes, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """What runs inside is refused with exit code 2, in one line that has all the words."""
    with pytest.raises(ConfigError) as caught:
        yield
    said = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in said
    assert all(w in said for w in words), f"{words} are not all in: {said}"


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", config.recipes())
def test_recipe_is_valid_and_names_known_things(name: str) -> None:
    values = config.read_recipe(name)
    built = config.build(values, name)
    assert built.method["name"] in methods.names()
    for part, table in values.items():
        assert part in config.RunConfig.model_fields
        if part != "method" and isinstance(table, dict):
            assert table == getattr(built, part).model_dump(mode="json", include=set(table)), (
                f"{name}: [{part}] does not come out as it stands there"
            )


@pytest.mark.parametrize("name", config.recipes())
def test_recipe_fields_are_fields_of_its_method(name: str) -> None:
    from dataclasses import fields

    table = config.build(config.read_recipe(name)).method
    known = {f.name for f in fields(methods.method_class(table["name"], table))} | {"name"}
    assert set(table) <= known, f"{name} sets {sorted(set(table) - known)}"


def test_no_options_mean_muse_on_the_embedded_teacher() -> None:
    built = config.resolve(None, {})
    assert built.method["name"] == "muse"
    assert built.data == "digits" and str(built.teacher.weights).startswith("embedded:") and built.student.spec


def test_an_option_alone_chooses_the_recipe_of_its_method() -> None:
    assert config.resolve(None, {"method": {"name": "noise"}}).method["name"] == "noise"


def test_order_recipe_then_options_then_sets(tmp_path: Path) -> None:
    recipe = write(tmp_path, 'seed = 1\npoll = 3\ndata = "a"\n[method]\nname = "fast"\nepochs = 7\n')
    built = config.resolve(recipe, {"seed": 2, "data": "b"}, ["data=c", "method.batch=9"])
    assert (built.poll, built.seed, built.data) == (3, 2, "c")
    assert built.method == {"name": "fast", "epochs": 7, "batch": 9}


@pytest.mark.fault("T15")
def test_bom_is_no_obstacle(tmp_path: Path) -> None:
    assert config.read_recipe(write(tmp_path, b"\xef\xbb\xbfseed = 5\n")) == {"seed": 5}


def test_unknown_recipe_names_the_nearest() -> None:
    with refused("unknown recipe 'muse-digit'", "muse-digits"):
        config.read_recipe("muse-digit")


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    with refused("not there", "gone.toml"):
        config.read_recipe(str(tmp_path / "gone.toml"))


def test_recipe_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with refused("is a directory"):
        config.read_recipe(str(tmp_path / "folder.toml"))


@pytest.mark.fault("T15")
@pytest.mark.parametrize("text", ["a = ", "[method\nname = 1", "method = {", "a = 1\na = 2", b"\xff\xfe\x00", b"a = '\x80'"])
def test_recipe_that_is_not_toml_names_the_file(tmp_path: Path, text: str | bytes) -> None:
    path = write(tmp_path, text)
    with refused(path, "not TOML"):
        config.read_recipe(path)


@pytest.mark.fault("T15")
def test_ten_megabytes_are_not_read(tmp_path: Path) -> None:
    with refused("10 MiB", "below 1 MiB"):
        config.read_recipe(write(tmp_path, b"# " + b"x" * (10 << 20)))


@pytest.mark.fault("T15")
@pytest.mark.parametrize("part", ["teacher", "student"])
def test_code_in_a_recipe_is_refused(tmp_path: Path, part: str) -> None:
    with refused("code", f"{part}.spec", "command line"):
        config.read_recipe(write(tmp_path, f'[{part}]\nspec = "py:net.py:make"\n'))


def test_code_on_the_command_line_is_taken() -> None:
    built = config.resolve(None, {"teacher": {"spec": "py:net.py:make", "weights": "w"}, "student": {"spec": "py:net.py:small"}})
    assert built.student.spec == "py:net.py:small"


def test_a_method_without_an_embedded_example_is_told_from_a_misspelt_one() -> None:
    known = [*methods.names(), "sketch"]
    with refused("method 'sketch' has no embedded example", "--teacher SPEC --teacher-weights FILE"):
        config.resolve(None, {"method": {"name": "sketch"}}, methods=known)
    with refused("unknown method 'sketh'", "did you mean 'sketch'"):
        config.resolve(None, {"method": {"name": "sketh"}}, methods=known)
    assert config.resolve(None, {"method": "sketch", "teacher": {"spec": "resnet8"}}, methods=known).method["name"] == "sketch"


def test_recipe_of_another_method_is_refused() -> None:
    with refused("is for method 'muse'", "'fast'"):
        config.resolve("muse-digits", {"method": {"name": "fast"}})


def test_other_data_need_another_teacher() -> None:
    with refused("cifar10", "--teacher"):
        config.resolve(None, {"data": "cifar10"})


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("T15")
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sead": 1}, ("unknown key 'sead'", "did you mean 'seed'")),
        ({"teacher": {"weight": "x"}}, ("unknown key 'teacher.weight'", "teacher.weights")),
        ({"checkpoint": {"evry_minutes": 2}}, ("checkpoint.evry_minutes", "checkpoint.every_minutes")),
        ({"qqqq": 1}, ("unknown key 'qqqq'", "Known")),
        ({"seed": "many"}, ("seed is 'many'", "integer")),
        ({"seed": -1}, ("seed is -1", "greater")),
        ({"poll": 0}, ("poll is 0", "greater")),
        ({"precision": "fp8"}, ("precision is 'fp8'", "fp32")),
        ({"ranks": {"bn": "all"}}, ("ranks.bn is 'all'", "global")),
        ({"teacher": {"std": [0.2, 0.0, 0.1]}}, ("teacher.std", "0.0", "greater than 0")),
        ({"teacher": {"classes": 1}}, ("teacher.classes is 1", "greater")),
        ({"teacher": 3}, ("teacher is 3",)),
        ({"checkpoint": {"every_minutes": math.nan}}, ("checkpoint.every_minutes is nan", "finite")),
        ({"checkpoint": {"every_minutes": math.inf}}, ("checkpoint.every_minutes is inf", "finite")),
        ({"embeddings": {"norm": -math.inf}}, ("embeddings.norm is -inf",)),
    ],
)
def test_wrong_values_in_one_sentence(values: dict, words: tuple[str, ...]) -> None:
    with refused(*words):
        config.build(values, "options")


@pytest.mark.fault("T15")
@pytest.mark.parametrize("text", ["nan", "-nan", "inf"])
def test_toml_nan_is_refused(tmp_path: Path, text: str) -> None:
    with refused("checkpoint.every_minutes", "finite"):
        config.resolve(write(tmp_path, f"[checkpoint]\nevery_minutes = {text}\n"), {})


@pytest.mark.parametrize("item", ["epochs", "=3", " = 3", ""])
def test_set_without_key_or_value(item: str) -> None:
    with refused("--set", "KEY=VALUE"):
        config.parse_sets([item])


@pytest.mark.parametrize("item", ["teacher=3", "teacher=x", "checkpoint=1", "student=[1]"])
def test_set_of_a_whole_section_is_refused(item: str) -> None:
    with refused(item.partition("=")[0]):
        config.resolve(None, {}, [item])


def test_sets_are_toml_where_they_are_and_text_where_not() -> None:
    found = config.parse_sets(["a=1", "b=1e-3", "c=true", "d=some text", "e=[1, 2]", "f=none", 'g="3"', "h.i.j=x=y", "k="])
    assert found == {"a": 1, "b": 1e-3, "c": True, "d": "some text", "e": [1, 2], "f": None, "g": "3", "h": {"i": {"j": "x=y"}}, "k": ""}


def test_built_configuration_does_not_change() -> None:
    built = config.build({})
    with pytest.raises(ValueError, match="frozen"):
        built.seed = 3  # type: ignore[misc]


def test_method_by_its_name_alone() -> None:
    assert config.build({"method": "fast"}).method == {"name": "fast"}


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", config.recipes())
def test_recipe_to_json_and_back(name: str) -> None:
    built = config.build(config.read_recipe(name))
    assert config.build(json.loads(json.dumps(built.model_dump(mode="json")))) == built


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    minutes=st.floats(1e-3, 1e6),
    mean=st.lists(st.floats(-10, 10), min_size=1, max_size=4),
    norm=st.none() | st.floats(1e-3, 1e3),
    method=st.dictionaries(st.sampled_from(["epochs", "lr_g", "meta", "sizes"]), TOML_VALUES | st.lists(st.integers(0, 9), max_size=3)),
)
def test_configuration_to_json_and_back(seed: int, minutes: float, mean: list[float], norm: float | None, method: dict) -> None:
    built = config.build(
        {
            "seed": seed,
            "checkpoint": {"every_minutes": minutes},
            "teacher": {"mean": mean},
            "embeddings": {"norm": norm},
            "method": {"name": "fast", **method},
        }
    )
    again = config.build(json.loads(json.dumps(built.model_dump(mode="json"))))
    assert again == built and again.seed == seed and again.embeddings.norm == norm


SECTIONS = st.fixed_dictionaries(
    {"method": st.fixed_dictionaries({"name": st.sampled_from(methods.names())}, optional={"lr": TOML_VALUES, "epochs": TOML_VALUES})},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "data": st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12),
        "precision": st.sampled_from(["fp32", "bf16"]),
        "poll": st.integers(1, 10**9),
        "channels_last": st.booleans(),
        "teacher": st.fixed_dictionaries({}, optional={"std": st.lists(st.floats(1e-9, 1e9), max_size=4), "classes": st.integers(2, 999)}),
        "embeddings": st.fixed_dictionaries({}, optional={"prompt": st.text(st.characters(codec="ascii", exclude_categories=["Cc"]))}),
        "checkpoint": st.fixed_dictionaries({}, optional={"every_steps": st.integers(1, 10**9), "every_minutes": st.floats(1e-9, 1e9)}),
        "ranks": st.fixed_dictionaries({}, optional={"bn": st.sampled_from(["global", "rank"])}),
    },
)


def toml(table: dict) -> str:
    """A table of tables as TOML; JSON's strings, numbers and lists are TOML's."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items()]
    for key in table.keys() - plain.keys():
        lines += [f"[{key}]", *(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in table[key].items())]
    return "\n".join(lines) + "\n"


@settings(max_examples=100, deadline=None)
@given(values=SECTIONS)
def test_recipe_to_configuration_to_config_json_and_back(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    recipe = write(tmp_path_factory.getbasetemp(), toml(values), "property.toml")
    assert config.read_recipe(recipe) == values
    built = config.resolve(recipe, {"teacher": {"spec": "resnet8"}})
    again = config.build(json.loads(json.dumps(built.model_dump(mode="json"))))
    assert again == built and again.model_dump(mode="json") == built.model_dump(mode="json")
    for part, table in values.items():
        kept = getattr(again, part)
        if isinstance(table, dict):
            kept = kept if part == "method" else kept.model_dump(mode="json", include=set(table))
        assert kept == table


@settings(max_examples=60, deadline=None)
@given(st.recursive(TOML_VALUES, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6), st.data())
def test_merge_changes_neither_side(value: object, data: st.DataObject) -> None:
    base, over = {"a": value, "b": {"c": 1}}, data.draw(st.dictionaries(st.sampled_from("abc"), TOML_VALUES))
    before = json.dumps([base, over])
    merged = config.merge(base, over)
    assert json.dumps([base, over]) == before
    assert all(merged[k] == v for k, v in over.items()) and set(merged) == set(base) | set(over)


@settings(max_examples=60, deadline=None)
@given(TOML_VALUES)
def test_parse_value_reads_what_toml_reads(value: object) -> None:
    text = json.dumps(value)
    assert config.parse_value(text) == tomllib.loads(f"value = {text}")["value"]


def test_configuration_needs_no_torch() -> None:
    code = "import sys; from fastkd import config; config.resolve(None, {}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Documentation --------------------------------------------------------------------------------------------------------


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object, str]]:
    """(key, default, description) of a section and of the sections in it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.get_default(call_default_factory=True), str(field.description)


def page(name: str) -> str:
    return (Path(__file__).parents[1] / "docs" / name).read_text(encoding="utf-8")


def documented(heading: str) -> dict[str, str]:
    """Key → its row, in the table under a heading of docs/configuration.md."""
    _, _, section = page("configuration.md").partition(f"\n## {heading}\n")
    rows = re.findall(r"^\| `([\w.*]+)` \|.*$", section.partition("\n## ")[0], flags=re.MULTILINE)
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert len(rows) == len(set(rows)) == len(lines)
    return dict(zip(rows, lines, strict=True))


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("Keys of a run", config.RunConfig),
        ("Keys of `fastkd teach`", config.TeachConfig),
        ("Keys of `fastkd condense`", config.CondenseConfig),
    ],
)
def test_documentation_has_the_keys_of_the_schema_section_by_section(heading: str, model: type[BaseModel]) -> None:
    expected = {}
    for key, default, description in keys_of(model):
        shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        expected[key] = f"| `{key}` | {shown} | {description} |"
    if model is config.RunConfig:
        del expected["method"]
        expected["method.name"] = "| `method.name` | muse | the method; its own fields stand beside it, see below |"
    else:
        expected = {key: row for key, row in expected.items() if not key.startswith("checkpoint.")}
        expected["checkpoint.*"] = "| `checkpoint.*` | | as above |"
    assert documented(heading) == expected


@pytest.mark.parametrize("name", ["configuration.md", "cli.md"])
def test_documentation_says_which_keys_may_differ_when_a_run_is_continued(name: str) -> None:
    found = re.findall(r"^When a run is continued, (.*) may differ; everything else must be as it was\.$", page(name), flags=re.MULTILINE)
    assert len(found) == 1
    every, said = [key for key, _, _ in keys_of(config.RunConfig)], re.findall(r"`([\w.*]+)`", found[0])
    named = {key for word in said for key in every if key == word or (word.endswith(".*") and key.startswith(word[:-1]))}
    assert named == config.SAFE_ON_RESUME and said == sorted(said)
