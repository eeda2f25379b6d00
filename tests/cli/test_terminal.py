"""What a run shows, from events alone."""

from __future__ import annotations

import io

import pytest

from fastkd.cli.board import Board
from fastkd.cli.terminal import Lines, Show, interactive, listener

START = {
    "kind": "start",
    "method": "muse",
    "teacher": {"spec": "resnet56", "parameters": 853018, "top1": 0.934},
    "student": {"spec": "resnet20", "parameters": 269722},
    "data": "cifar10",
    "device": "cpu",
    "precision": "fp32",
    "epochs": 4,
    "notes": ["a note"],
}


class Clock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.t = 100.0

    def __call__(self) -> float:
        return self.t


def epoch(e: int, *, top1: float | None = 0.5, trained: bool = True, step: int | None = None) -> dict:
    scores = {} if top1 is None else {"top1": top1, "top5": 1.0}
    return {
        "kind": "epoch",
        "epoch": e,
        "step": 10 * (e + 1) if step is None else step,
        "steps": 40,
        "trained": trained,
        "terms": {"learn.kl": 0.25, "learn.skipped": 0.0},
        "seconds": {},
        "wall": 1.0,
        **scores,
    }


def poll(step: int, speed: float = 2.0, terms=dict) -> dict:
    return {
        "kind": "poll",
        "epoch": 0,
        "epochs": 4,
        "step": step,
        "steps": 40,
        "phase": "synthesis",
        "terms": terms,
        "steps_per_second": speed,
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_live_view_only_on_a_terminal_that_wants_one() -> None:
    assert interactive(Terminal(), {"TERM": "xterm"})
    for told in ({"CI": "true"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert not interactive(Terminal(), told)
    assert not interactive(io.StringIO(), {"TERM": "xterm"})


def test_a_pipe_gets_lines() -> None:
    assert isinstance(listener(None, io.StringIO()), Lines)


def test_lines_at_most_every_two_seconds_and_the_last_always() -> None:
    out, clock = io.StringIO(), Clock()
    with Lines(out, clock) as show:
        show({**START, "notes": []})
        for e, at in enumerate([100.0, 100.5, 103.0, 103.1]):
            clock.t = at
            show(epoch(e, top1=0.1 * (e + 1)))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["1/4", "3/4", "4/4"]
    assert "top-1 40.00 %" in lines[-1] and "teacher 93.40 %" in lines[-1] and "kl 0.25" in lines[-1] and "skipped" not in lines[-1]


def test_a_run_that_stops_early_shows_its_last_epoch() -> None:
    out, clock = io.StringIO(), Clock()
    with Lines(out, clock) as show:
        show(START)
        show(epoch(0, top1=0.1))
        clock.t += 0.1
        show(epoch(1, top1=0.2))
    assert "top-1 20.00 %" in out.getvalue().splitlines()[-1]


def test_a_long_epoch_gives_a_sign_of_life() -> None:
    out, clock = io.StringIO(), Clock()
    show = Lines(out, clock)
    show(START)
    for step in range(1, 9):
        clock.t += 20
        show(poll(step, terms=lambda: {"invert.bn": 7.0}))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 2 and "bn 7" in lines[0] and "ETA" in lines[0]


def test_terms_are_read_at_most_once_a_second() -> None:
    clock, reads = Clock(), []
    show = Show(io.StringIO(), clock)
    for step in range(30):
        show(poll(step, terms=lambda: reads.append(1) or {}))
        clock.t += 0.1
    assert 3 <= len(reads) <= 4


@pytest.mark.parametrize(("step", "speed", "left"), [(10, 2.0, 15.0), (40, 2.0, 0.0), (55, 2.0, 0.0), (10, 0.0, None)])
def test_time_left_is_never_negative(step: int, speed: float, left: float | None) -> None:
    show = Show(io.StringIO())
    show(poll(step, speed))
    assert show.eta() == left


def test_no_time_left_before_anything_is_known() -> None:
    assert Show(io.StringIO()).eta() is None


def test_without_data_the_agreement_is_shown() -> None:
    out, clock = io.StringIO(), Clock()
    with Lines(out, clock) as show:
        show({**START, "data": None, "teacher": {"spec": "t", "top1": None}})
        show({**epoch(0, top1=None), "agreement": 0.75, "confidence": 0.9, "balance": 0.99})
    assert "agrees with teacher 75.00 %" in out.getvalue() and "top-1" not in out.getvalue()


def test_segmentation_is_shown_by_its_miou() -> None:
    out, clock = io.StringIO(), Clock()
    with Lines(out, clock) as show:
        show({**START, "teacher": {"spec": "t", "miou": 0.5}})
        show({**epoch(0, top1=None), "miou": 0.375, "pixel_accuracy": 0.8})
    assert "mIoU 37.50 % (teacher 50.00 %)" in out.getvalue() and "top-1" not in out.getvalue()


def test_epochs_without_training_are_not_scores() -> None:
    show = Show(io.StringIO())
    show.line = lambda text: None  # type: ignore[method-assign]
    show(START)
    show(epoch(0, top1=0.1, trained=False))
    show(epoch(1, top1=0.6))
    assert show.scores == [0.6]


def test_skipped_steps_are_said() -> None:
    show = Show(io.StringIO())
    show.terms = {"learn.kl": 0.5, "learn.skipped": 0.25}
    assert show.losses() == ["kl 0.5", "learn: 25.0 % of steps not finite, skipped"]


def test_warnings_notes_and_resume_are_lines() -> None:
    out = io.StringIO()
    show = Lines(out)
    show(START)
    show({"kind": "warning", "text": "the disk is full"})
    show({"kind": "resumed", "epoch": 3, "step": 70, "checkpoint": "step-00000070"})
    show({"kind": "never heard of"})
    said = out.getvalue()
    assert "warning: the disk is full" in said and "a note" in said and "step-00000070" in said


def board() -> tuple[Board, io.StringIO, Clock]:
    from rich.console import Console

    out, clock = io.StringIO(), Clock()
    return Board(out, clock, Console(file=out, force_terminal=True, width=120, color_system=None)), out, clock


def test_board_shows_bar_speed_accuracy_and_curve() -> None:
    show, out, clock = board()
    with show:
        show({**START, "notes": ["[bold]no markup[/bold]"]})
        for step in (1, 5, 9):
            clock.t += 1
            show(poll(step, terms=lambda: {"invert.bn": 7.5}))
        for e in range(3):
            clock.t += 1
            show(epoch(e, top1=0.2 * (e + 1)))
        clock.t += 1
        show({**poll(35), "epoch": 3})
    said = out.getvalue()
    assert "[bold]no markup[/bold]" in said, "text of users is not markup"
    for word in (
        "bn 7.5",
        "2.0 steps/s",
        "ETA 2.5 s",
        "35/40",
        "epoch 4/4",
        "top-1 60.00 % (teacher 93.40 %)",
        "selected on test data",
        "▁",
        "█",
    ):
        assert word in said, word


def test_board_draws_at_most_five_times_a_second() -> None:
    show, out, clock = board()
    with show:
        show(START)
        for step in range(100):
            clock.t += 0.01
            show(poll(step))
        assert out.getvalue().count("ETA") <= 6


def test_board_can_be_closed_twice_and_told_more() -> None:
    show, _, _ = board()
    show.close()
    show.close()
    show(poll(3))
