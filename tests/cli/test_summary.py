"""The table at the end of a run."""

from __future__ import annotations

from pathlib import Path

from fastkd.cli import summary

DONE = {
    "method": "muse",
    "teacher": {"spec": "resnet56", "parameters": 1000, "top1": 0.95},
    "student": {"spec": "resnet20", "parameters": 250, "top1": 0.90, "best": 0.912, "last10": 0.898},
    "data": "cifar10",
    "images": 12800.0,
    "replay_bytes": 39_300_000.0,
    "epochs": 20,
    "steps": 4000,
    "seconds": {"synthesis": 30.0, "distillation": 61.0, "memory": 0.0},
    "wall": 95.0,
    "device": "cpu",
    "precision": "fp32",
    "notes": [],
}


def test_says_both_networks_the_gap_and_where_it_lies(capsys) -> None:
    summary.show(DONE, Path("runs/a"), 0)
    said = capsys.readouterr().out
    networks = ("resnet56", "95.00 %", "resnet20", "250", "90.00 %", "last epoch")
    gap = ("-5.00 points", "94.7% of the teacher", "25% of its parameters")
    rest = ("12,800 made", "39.3 MB", "synthesis 30.0 s", "distillation 1:01", "4,000 in 20 epochs", "runs/a", "fastkd eval runs/a")
    for word in networks + gap + rest:
        assert word in said, word
    assert "memory 0" not in said


def test_the_best_epoch_is_labelled(capsys) -> None:
    summary.show(DONE, None, 0)
    line = next(line for line in capsys.readouterr().out.splitlines() if "91.20 %" in line)
    assert "selected on test data" in line


def test_segmentation_is_judged_by_miou(capsys) -> None:
    dense = {
        **DONE,
        "teacher": {"spec": "deeplabv3_resnet50", "parameters": 1000, "miou": 0.5},
        "student": {"spec": "deeplabv3_mobilenet_v2", "parameters": 250, "miou": 0.4, "best": 0.41, "last10": 0.39},
    }
    summary.show(dense, None, 0)
    said = capsys.readouterr().out
    for word in ("mIoU", "50.00 %", "40.00 %", "41.00 %", "-10.00 points", "80.0% of the teacher's mIoU"):
        assert word in said, word
    assert "top-1" not in said and "accuracy" not in said


def test_without_data_there_is_no_accuracy(capsys) -> None:
    blind = {
        **DONE,
        "data": None,
        "teacher": {"spec": "t", "parameters": 4, "top1": None},
        "student": {"spec": "s", "parameters": 2, "top1": None, "best": None},
        "agreement": 0.8,
        "confidence": 0.9,
        "balance": 0.99,
    }
    summary.show(blind, None, 0)
    said = capsys.readouterr().out
    assert "agree on 80.00 %" in said and "gap" not in said and "selected" not in said


def test_a_stopped_run_has_no_next_command(capsys) -> None:
    summary.show(DONE, Path("runs/a"), 75)
    assert "fastkd eval" not in capsys.readouterr().out


def test_names_are_not_markup(capsys) -> None:
    summary.print_table(("[b]column[/b]",), [("[red]cell[/red]",)])
    summary.print_facts([("[b]x[/b]", "[y]")])
    said = capsys.readouterr().out
    assert "[b]column[/b]" in said and "[red]cell[/red]" in said and "[y]" in said


def test_plan_names_steps_and_memory(capsys) -> None:
    summary.show_plan(
        {
            "steps": [{"step": "learn", "phase": "distillation", "args": "", "times": 4000}],
            "bytes": {"student": 10**6, "pool": 2 * 10**6},
            "epochs": 20,
            "total": 8000,
            "notes": ["a note"],
        }
    )
    said = capsys.readouterr().out
    assert all(words in said for words in ("learn", "4,000", "8,000", "3.0 MB", "a note"))
    assert said.index("pool") < said.index("student")
