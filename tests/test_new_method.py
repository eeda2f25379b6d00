"""The method of docs/new-method.md: the page's own file and line make a method that everything in fastkd takes for one of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fastkd import assemble, config, methods
from tests.cli.conftest import cli  # noqa: F401
from tests.methods import test_cards as cards
from tests.methods import test_contract as contract

PAGE = (Path(__file__).parents[1] / "docs" / "new-method.md").read_text(encoding="utf-8")
VARIANT = ("sketch", {})


def block(kind: str) -> str:
    return re.search(rf"^```{kind}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1]


@pytest.fixture(autouse=True)
def sketch(tmp_path, monkeypatch):
    """The file stands beside the other methods, the line in their table."""
    (tmp_path / "sketch.py").write_text(block("python"))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    ((name, target),) = re.findall(r'^ +"(\w+)": "(fastkd\.[\w.:]+)",$', PAGE, flags=re.MULTILINE)
    monkeypatch.setitem(methods.METHODS, name, target)
    yield
    sys.modules.pop("fastkd.methods.sketch", None)


def test_it_is_short():
    code = [line for line in block("python").splitlines() if line.strip() and not line.lstrip().startswith(('"""', "from ", "import "))]
    assert len(code) <= 40


@pytest.mark.parametrize(
    "inherited",
    [
        contract.test_walking_an_epoch_changes_nothing,
        contract.test_no_host_synchronisation_in_a_capturable_step_and_no_foreign_draw_in_any,
        contract.test_recorded_and_replayed_steps_equal_eager_ones,
        contract.test_teacher_is_frozen_and_terms_are_named_and_finite,
        contract.test_attributes_are_sealed_after_build,
        contract.test_arguments_select_a_variant_and_are_not_data,
        contract.test_it_walks_on_tensors_without_values,
    ],
    ids=lambda f: f.__name__,
)
def test_it_passes_what_every_method_inherits(inherited):
    inherited(VARIANT)


def test_it_is_killed_and_resumed_with_the_same_bits(tmp_path):
    contract.test_killed_at_random_steps_and_resumed_is_bit_identical(VARIANT, tmp_path)


def test_its_card_is_what_it_does():
    cards.test_what_it_needs_and_rests_on("sketch")
    assert list(methods.card("sketch")[1].meanings) == ["oh", "balance", "adv", "kl"]


def test_it_is_described(cli):  # noqa: F811
    said = cli("methods", "sketch").stdout
    assert "generator steps an epoch" in said and "weight of the adversarial loss" in said and "student and teacher apart" in said
    assert re.search(r"^ *sketch ", cli("methods").stdout, flags=re.MULTILINE)


def test_it_learns_digits(tmp_path):
    recipe = tmp_path / "sketch-digits.toml"
    recipe.write_text(block("toml"))
    short = ["method.epochs=4", "method.warmup=1", "method.g_steps=20", "method.kd_steps=40", "method.kd_batch=64"]
    outcome = assemble.distil(config.resolve(str(recipe), {"device": "cpu"}, short), tmp_path / "run")
    assert outcome.code == 0 and outcome.summary["student"]["top1"] > 0.25  # seeds 0, 1, 2: 44, 39 and 45 %; chance is 10 %
