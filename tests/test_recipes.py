"""The published settings and figures that come with fastkd: every pair resolves, every figure stands where it belongs."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd import config, data, methods, models, recipes
from fastkd.assemble.job import make_method
from fastkd.errors import ConfigError

WRN = "wrn40_2-wrn16_2"
NAMED = [recipes.name(stem, d, p) for m in methods.names() for stem, sets in recipes.pairs(m).items() for d in sets for p in sets[d]]
PAIRS = [config.build(recipes.read(name), name) for name in NAMED]


@pytest.mark.parametrize("name", recipes.names())
def test_every_value_of_a_recipe_is_valid(name: str) -> None:
    method = make_method(recipes.read(name)["method"])
    assert method.epochs > 0


@pytest.mark.parametrize("spec", sorted({str(s) for c in PAIRS for s in (c.teacher.spec, c.student.spec)}))
def test_every_network_of_a_pair_exists(spec: str) -> None:
    size = models.MODELS[spec].input_size
    with FakeTensorMode():
        net = models.build(spec, classes=10, input_size=size)
        assert net(torch.zeros(2, 3, size, size)).shape[:2] == (2, 10)


def test_every_pair_names_a_data_set() -> None:
    named = {c.data for c in PAIRS}
    wanted = {"cifar10", "cifar100", "tiny-imagenet", "imagenet", "fashion-mnist", "svhn", "nyuv2", "camvid", "caltech101"}
    assert wanted <= named <= set(data.DATASETS)


def test_names_are_unique_and_say_what_they_are() -> None:
    stems = [stem for method in methods.names() for stem in recipes.pairs(method)]
    assert sorted([*stems, *NAMED]) == recipes.names(), "two pairs have one name, or a recipe is of no method"
    assert recipes.read("fast-imagenet-r50-mbv2")["student"]["spec"] == "mobilenet_v2"
    assert recipes.read("deepinversion-official-cifar10-r34-r18")["student"]["spec"] == "cifar_resnet18"


def test_a_pair_is_its_file_with_what_differs() -> None:
    for steps, lr_g in ((2, 5e-3), (5, 3e-3), (10, 2e-3)):
        for pair, adv, oh in (("r34-r18", 1.33, 0.5), ("v11-r18", 1.0, 0.5), (WRN, 1.1, 0.4)):
            m = make_method(recipes.read(f"fast-{steps}-cifar100-{pair}")["method"])
            assert (m.g_steps, m.lr_g, m.adv, m.oh) == (steps, lr_g, adv, oh)
    tiny = make_method(recipes.read("nayer-200-tiny-imagenet-r34-r18")["method"])
    assert (tiny.epochs, tiny.g_steps, tiny.g_loops, tiny.kd_steps) == (220, 60, 4, 1000)
    assert recipes.read("dfq-cifar100-r34-r18")["method"]["lr"] == 0.05 and "lr" not in recipes.read("dfq-cifar10-r34-r18")["method"]


def test_a_pattern_that_is_for_no_pair_is_refused(tmp_path, monkeypatch) -> None:
    """Those that ship are checked when they are read, which every test here does."""
    for file in recipes.FOLDER.glob("*.toml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed = (tmp_path / "zskt.toml").read_text().replace('"svhn-*"', '"svnh-*"')
    (tmp_path / "zskt.toml").write_text(changed)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=r"recipe 'zskt': \[where\.\"svnh-\*\"\] matches none of its pairs: cifar10-.*, svhn-"):
        recipes._file.__wrapped__("zskt")


def test_what_is_read_is_the_readers_own() -> None:
    recipes.read("fast-5")["method"]["g_steps"] = 99
    assert "g_steps" not in recipes.read("fast-5")["method"]


def test_a_file_of_ones_own_has_no_pairs(tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "fast-5"\n')
    with pytest.raises(ConfigError, match="unknown key 'base'"):
        config.resolve(str(file), {"teacher": {"spec": "resnet8"}})


# Figures --------------------------------------------------------------------------------------------------------------


def test_every_figure_is_complete_and_reached_by_its_recipe() -> None:
    for f in recipes.published():
        where = f"{f.label}, {f.data}, {f.source}"
        assert 0 < f.value < 100 and f.which in ("best", "last", "mean", "not stated") and f.metric in ("top-1", "mIoU"), where
        assert f.evidence in ("readme", "paper", "code", "issue", "note") and len(f.source) > 10, where
        assert f.hours is None or f.hours_of, f"{where}: hours say what they cover"
        assert all(spec is None or spec in models.MODELS for spec in (f.teacher, f.student)), where
        if f.recipe:
            built = config.build(recipes.read(f.recipe), f.recipe)
            assert (built.method["name"], built.data) == (f.method, f.data), where
            assert (built.teacher.spec, built.student.spec) == (f.teacher, f.student), where


def test_figures_are_found_by_what_they_are_of() -> None:
    (fast,) = recipes.published(recipe="fast-10-cifar100-wrn40_2-wrn16_2")
    assert (fast.value, fast.teacher_value, fast.student_value, fast.hours, fast.which) == (65.12, 75.83, 73.56, 0.17, "best")
    assert {f.label for f in recipes.published(data="cifar100", teacher="wrn40_2", student="wrn16_2")} >= {"NAYER-100", "Fast-5", "DFQ"}
    replicated = recipes.published(method="zskt", teacher="wrn40_1", student="wrn16_2", which="not stated")
    assert [(f.value, f.spread) for f in replicated] == [(87.71, 0.71), (89.27, None)]
    (caltech,) = recipes.published(recipe="dfad-caltech101-resnet34-resnet18")
    assert (caltech.value, caltech.teacher_value) == (73.5, 76.6)
    with pytest.raises(ConfigError, match="did you mean 'fast-5-cifar10-r34-r18'"):
        recipes.published(recipe="fast-5-cifar10-r34-r19")


def test_figures_are_those_of_the_cards(shared_data) -> None:
    """The cells of the two benchmark tables as the cards print them: percent, and hours in brackets."""
    text = (shared_data.parent / "methods" / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| (CIFAR-10+) \| R34-R18 .*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    seen = 0
    for name, rows in tables:
        for row in rows.splitlines():
            label, *cells = (cell.strip() for cell in row.strip("|").split("|"))
            for cell, pair in zip(cells, ("r34-r18", "v11-r18", "wrn40_2-wrn16_1", "wrn40_2-wrn40_1", WRN), strict=False):
                printed = [float(v) for v in re.findall(r"[\d.]+", cell)]
                found = [[f.value] if f.hours is None else [f.value, f.hours] for f in recipes.published(label=label, data=LOWER[name])
                         if f.recipe and f.recipe.endswith(pair)]  # fmt: skip
                shown = label in ("DeepInv", "CMI") or printed in found  # CMI's README repeats these two rows of the other table
                assert shown, f"{name}, {label}, {pair}: {printed} is printed, {found} stands in the table"
                seen += 1
    assert seen == 2 * 8 * 5 + 5 * 5


LOWER = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
