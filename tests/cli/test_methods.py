"""`fastkd methods`."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from fastkd import config, methods
from fastkd.assemble.job import make_method
from fastkd.cli.methods import readable, shown
from tests.cli.conftest import one_sentence


def test_lists_every_method_with_what_is_declared_of_it(cli) -> None:
    listed = json.loads(cli("methods", "--json").stdout)
    assert list(listed) == methods.names() and all(len(row["about"]) > 30 for row in listed.values())
    assert (
        listed["nayer"]["year"] == 2024 and listed["nayer"]["needs"] == ["bn", "embeddings"] and listed["muse"]["basis"] == "reconstructed"
    )
    assert listed["fast"]["figures"] > 30 and listed["muse"]["figures"] == 0
    said = cli("methods").stdout
    assert all(re.search(rf"^ *{name} ", said, flags=re.MULTILINE) for name in methods.names())
    assert "CVPR 2024" in said and "re-implementation" in said and "bn oh adv kl" in said


def test_the_list_needs_no_torch() -> None:
    code = "import sys; from fastkd.cli.app import app; app(['methods'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "muse" in done.stdout, done.stderr


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
    assert {f["method"] for f in card["figures"]} <= {name}


@pytest.mark.parametrize("name", methods.names())
def test_every_default_can_be_set_as_it_is_shown(name: str) -> None:
    for f in dataclasses.fields(methods.method_class(name)):
        value = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
        again = make_method({"name": name, f.name: config.parse_value(shown(value))})
        assert getattr(again, f.name) == value, f.name


def test_what_people_read(cli) -> None:
    said = cli("methods", "muse").stdout
    assert "embeddings of stored images close to their label's" in said and "muse-100-cifar100-…" in said and "arXiv 2411.17046" in said
    assert "a_cam" in said and "weight of the CAM term" in said and "best | last" in said and "--set method." in said


def test_published_figures_stand_in_columns_of_pairs(cli) -> None:
    said = cli("methods", "zskt").stdout
    assert re.search(r"^ *ZSKT +82.44 ± 0.21 +79.93 ± 1.11 +83.69 ± 0.58 +86.6 ± 0.56 +89.71 ± 0.1 +86.6 ± 1.79", said, flags=re.MULTILINE)
    assert re.search(r"^ *teacher +93.97 +93.18 +94.73", said, flags=re.MULTILINE)
    assert re.search(r"^ *student, real data +91.04 +91.04 +91.04 +93.97", said, flags=re.MULTILINE)
    assert "svhn, last epoch: ZSKT (Micaelli & Storkey, NeurIPS 2019) [paper]" in said
    assert "nyuv2, mIoU, best epoch on test data" in cli("methods", "dfad").stdout


def test_a_method_without_a_card_is_listed(cli, monkeypatch, tmp_path) -> None:
    (tmp_path / "plain_method.py").write_text('"""Plain: says nothing more of itself. And this."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.METHODS, "plain", "plain_method:Plain")
    assert "Plain: says nothing more of itself " in cli("methods").stdout
    assert json.loads(cli("methods", "--json").stdout)["plain"] == {"about": "Plain: says nothing more of itself. And this.", "figures": 0}


@pytest.mark.parametrize("field, word", [("terms", "adverse"), ("needs", "labels"), ("basis", "hearsay")])
def test_a_wrong_word_in_a_card_is_one_sentence(cli, monkeypatch, tmp_path, field: str, word: str) -> None:
    card = {"paper": "", "venue": "", "year": None, "basis": "own", "source": "x", "needs": (), "terms": ("oh",)}
    card[field] = word if field == "basis" else (word,)
    (tmp_path / "plain_method.py").write_text(f'"""Plain."""\nCARD = Card({", ".join(f"{k}={v!r}" for k, v in card.items())})\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.METHODS, "plain", "plain_method:Plain")
    done = cli("methods")
    assert done.exit_code == 2 and all(said in one_sentence(done.stderr) for said in (word, "plain_method.py", "CARD"))


def test_types_in_plain_words() -> None:
    from typing import Literal

    assert readable(Literal["a", "b"] | None) == "a | b | none"
    assert readable(float) == "float" and readable(tuple[int, ...]) == "tuple[int, ...]"
