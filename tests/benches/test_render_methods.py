"""docs/methods.md and its figures are what the committed records say, and records become tables."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

from benches import render_methods

COMMON = {"cpu": "a CPU", "torch": "2.13.0", "threads": 1, "load": "", "seed": 0}
POINTS = [[5.0, 40.0], [14.0, 55.5], [28.0, 61.25]]


def digits():
    ran = {"commit": "abcdef0123+", "code": 0, "cpu_seconds": 29.1, "epochs": 4, "teacher": {"top1": 0.992}, "best": 70.0}
    rows = [
        {"method": "noise", "data": False, "top1": 20.5, "seconds_top1": [[9.0, 15.0], [28.0, 20.5]], **ran},
        {"method": "vanilla_kd", "data": True, "top1": 61.25, "seconds_top1": POINTS, **ran},
        {"method": "cde", "reason": "needs a condensed set"},
    ]
    return {**COMMON, "budget": 30.0, "rows": rows}


def pretrained(name, top1):
    return {
        **COMMON,
        **{"name": name, "budget": 600.0, "teacher": {"spec": "resnet20", "top1": 0.9173, "parameters": 269722}, "student": "wrn10_1"},
        **{
            "top1": top1,
            "seconds_top1": [[100.0, 30.0], [500.0, top1]],
            "epochs": 9,
            "student_steps": 1350,
            "cpu_seconds": 594.0,
            "code": 0,
        },
        **{"code": 0, "evaluation_seconds": 12.0, "command": f"fastkd run --method {name}", "precision": "bf16", "commit": "abcdef0"},
    }


def put(folder, **records):
    folder.mkdir(parents=True)
    for name, record in records.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(record))


def test_the_committed_files_are_what_the_records_say():
    for path, text in render_methods.files(render_methods.RESULTS).items():
        assert path.read_text(encoding="utf-8") == text, "run python -m benches.render_methods"


def test_records_become_tables_and_figures(tmp_path):
    run = {"method": "deepinversion", "setting": ["epochs=3"]}
    both = (([], 80.0), (["bn=0"], 60.0))
    runs = [{**run, "seed": seed, "switch": s, "top1": t, "top1_by_epoch": [t]} for seed in (0, 1) for s, t in both]
    row = {"method": "fast", "phase": "synthesis", "steps": ["adapt"], "ms": 110.4, "passes_ms": 92.0, "passes_with_statistics_ms": 104.0}
    phases = {**COMMON, "batch": 128, "rows": [{**row, "commit": "abcdef0", "ratio": 1.2, "ratio_with_statistics": 1.062}]}
    put(
        tmp_path / "cpu-2-cores",
        **{"methods": digits(), "pretrained_fast": pretrained("fast", 50.25), "pretrained_noise": pretrained("noise", 10.5)},
        **{"ablations": {**COMMON, "runs": runs}, "phases": phases, "other": {"what": "not for this page"}},
    )
    made = render_methods.files(tmp_path)
    page = made.pop(render_methods.PAGE)
    assert page.index("| vanilla_kd (real images) | 40.0 | 55.5 | 61.2 |") < page.index("| noise |  | 15.0 | 20.5 |")
    assert "`cde`: not run; needs a condensed set." in page
    assert page.index("| fast | 30.0 | 30.0 | 30.0 | 50.25 | 9 | 1,350 | 9.9 | 0.2 |") < page.index("| noise | 30.0 |")
    assert "| BN-statistics term | deepinversion | bn=0 | 80.0 ± 0.0 | 60.0 ± 0.0 | -20.00 ± 0.00 | 2 of 2 | -20.00 | yes |" in page
    assert "| fast | synthesis | adapt | 110 | 92 | 1.20 | 1.06 | with statistics |" in page
    assert {p.name for p in made} == {"methods-digits-cpu-2-cores.svg", "methods-cifar10-cpu-2-cores.svg"}
    assert all(f"({p.name})" in page and ET.fromstring(text) is not None for p, text in made.items())
    assert "not for this page" not in page


def test_an_image_net_run_without_a_hit_claims_nothing(tmp_path):
    row = {"method": "muse", "size": 64, "steps": 100, "step_seconds": 0.5, "cpu_seconds": 50.0, "images": 40, "megapixels": 0.16}
    row |= {"bn": 0.01, "commit": "abcdef0"}
    about = {**COMMON, "teacher": "efficientnet_lite0", "batch": 8, "g_steps": 20, "precision": "bf16", "photographs": {"64": 0.191}}
    for named, claim in ((0.0, True), (0.25, False)):
        put(tmp_path / str(named) / "cpu", **{"imagenet_x": {**about, "rows": [{**row, "named": named}]}})
        page = render_methods.files(tmp_path / str(named))[render_methods.PAGE]
        assert f"| muse | 64 | 0.01 | 100 | 0.500 | 50 | 40 | 0.16 | {100 * named:.1f} % | 19.1 % |" in page
        assert ("nothing about the images" in page) == claim


def test_without_records_the_page_has_its_head_only(tmp_path):
    assert render_methods.files(tmp_path) == {render_methods.PAGE: render_methods.HEAD}


def test_a_stale_page_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render_methods, "ROOT", tmp_path)
    monkeypatch.setattr(render_methods, "RESULTS", tmp_path)
    monkeypatch.setattr(render_methods, "PAGE", tmp_path / "methods.md")
    assert render_methods.main(["--check"]) == 1 and "methods.md" in capsys.readouterr().out
    assert render_methods.main([]) == 0 and render_methods.main(["--check"]) == 0
