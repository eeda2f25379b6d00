"""What a run came to, as a table on stdout."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastkd.cli.words import SCORES, duration, judged_by, percent, seconds, size


def console() -> Console:
    """Stdout; lines are not folded where it is no terminal."""
    found = Console(highlight=False, markup=False, emoji=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, emoji=False, width=160)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """A table; columns whose name starts with '>' stand flush right."""
    table = Table(box=SIMPLE, title=title, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)


def print_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Name and value, one a line."""
    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        grid.add_row(Text(name), Text(str(value), overflow="fold"))
    console().print(grid)


def networks(summary: dict[str, Any]) -> list[list[str]]:
    """Rows (who, network, parameters, score, which) of teacher and student."""
    rows, score = [], judged_by(summary.get("student"))
    for who in ("teacher", "student"):
        net = summary.get(who) or {}
        if net.get("spec"):
            which = "last epoch" if who == "student" and net.get(score) is not None else ""
            name = "network" if who == "student" and not (summary.get("teacher") or {}).get("spec") else who
            rows.append([name, net["spec"], f"{net['parameters']:,}", percent(net.get(score)), which])
    best = (summary.get("student") or {}).get("best")
    if best is not None:
        rows.append(["", "", "", percent(best), "best epoch, selected on test data: do not quote it as a result"])
    return rows


def facts(summary: dict[str, Any], out: Path | None) -> list[tuple[str, str]]:
    """What stands under the table of networks."""
    rows: list[tuple[str, str]] = []
    teacher, student = (summary.get("teacher") or {}), (summary.get("student") or {})
    score = judged_by(student)
    if teacher.get(score) and student.get(score) is not None:
        gap, share = 100 * (student[score] - teacher[score]), student[score] / teacher[score]
        what = "accuracy" if score == "top1" else SCORES[score]
        smaller = f", with {student['parameters'] / teacher['parameters']:.0%} of its parameters" if teacher.get("parameters") else ""
        rows.append(("gap", f"{gap:+.2f} points; {share:.1%} of the teacher's {what}{smaller}"))
    if teacher.get("spec") and student.get("last10") is not None:
        rows.append(("last 10", f"{percent(student['last10'])} on average"))
    if summary.get("agreement") is not None:
        sure = f"teacher confidence {percent(summary.get('confidence'))}, class balance {percent(summary.get('balance'))}"
        rows.append(("no data", f"student and teacher agree on {percent(summary['agreement'])} of synthetic images; {sure}"))
    if summary.get("images"):
        held = f", {size(summary['replay_bytes'])} held for rehearsal" if summary.get("replay_bytes") else ""
        rows.append(("images", f"{summary['images']:,.0f} made{held}"))
    phases = "  ".join(f"{name} {duration(s)}" for name, s in (summary.get("seconds") or {}).items() if s)
    if summary.get("wall") is not None:
        rows.append(("time", f"{duration(summary['wall'])}{' (' + phases + ')' if phases else ''}"))
    where = f"{summary.get('device')}, {summary.get('precision')}"
    rows.append(("steps", f"{summary.get('steps', 0):,} in {summary.get('epochs', 0)} epochs, {where}"))
    if out is not None:
        rows.append(("folder", str(out)))
    return rows


def show(summary: dict[str, Any], out: Path | None, code: int, following: str | None = None) -> None:
    """Table of networks, facts, and the command to use next."""
    score = SCORES[judged_by(summary.get("student"))]
    print_table(("", "network", ">parameters", f">{score}", ""), networks(summary))
    rows = facts(summary, out)
    if code == 0 and (following or out is not None):
        rows.append(("next", following or evaluation(summary, out)))
    print_facts(rows)


def evaluation(summary: dict[str, Any], out: Path | None) -> str:
    """The command that measures the network of a run folder; code is named in it, because it runs only when it is typed."""
    spec = str((summary.get("student") or {}).get("spec"))
    words = ["fastkd", "eval", str(out), *(["--model", spec] if spec.startswith("py:") else [])]
    return shlex.join(words if summary.get("data") not in (None, "none") else [*words, "--data", "SPEC"])


def show_plan(planned: dict[str, Any]) -> None:
    """Steps and memory of a dry run, or of a plan, which has measured them as well."""
    several = planned.get("ranks", 1) > 1
    columns = ["step", "phase", "arguments", ">times"]
    columns += ([">sends"] if several else []) + ([">one takes", ">needs"] if "seconds" in planned["steps"][0] else [])
    rows: list[Sequence[object]] = [_step_row(s, s["step"], s["phase"], s["args"], f"{s['times']:,}", several) for s in planned["steps"]]
    if "evaluation" in planned:
        rows.append(_step_row(planned["evaluation"], "evaluate", "evaluation", "", f"{planned['epochs']:,}", several))
        rows.append(_step_row(planned["checkpoint"], "save", "checkpoint", "in host memory", "", several))
    print_table(columns, rows)
    held = "held for the whole run" + (f", on each of {planned['ranks']} ranks" if several else "")
    print_table(*_parts(held, planned["bytes"], planned.get("host") or {}))
    lines: list[tuple[str, object]] = [("epochs", planned["epochs"]), ("steps", f"{planned['total']:,}")]
    if several:
        lines.append(("wire", f"{size(planned['wire'])} sent by each rank in all steps"))
    if "device" in planned:
        lines.append(("device", f"{planned['device']}, {planned['precision']}"))
    lines += [*(_estimates(planned) if "memory" in planned else []), *(("note", note) for note in planned.get("notes", []))]
    print_facts(lines)
    console().print("nothing was written" if "memory" in planned else "nothing was run and nothing was written")


def _parts(title: str, own: dict[str, int], host: dict[str, int]) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
    """Columns and rows of what is held: by part, the largest first; host memory apart where some of it is there."""
    names = sorted(own.keys() | host.keys(), key=lambda name: -own.get(name, 0) - host.get(name, 0))
    if not host:
        return (title, ">memory"), [*((name, size(own[name])) for name in names), ("all", size(sum(own.values())))]
    shown = lambda table, name: size(table[name]) if name in table else ""  # noqa: E731
    rows = [(name, shown(own, name), shown(host, name)) for name in names]
    return (title, ">device", ">host"), [*rows, ("all", size(sum(own.values())), size(sum(host.values())))]


def _step_row(s: dict[str, Any], name: str, phase: str, args: str, times: str, several: bool) -> list[object]:
    sends = [size(s["wire"]) if "wire" in s else ""] if several else []
    return [name, phase, args, times, *sends, *([seconds(s["seconds"]), size(s["peak"])] if "seconds" in s else [])]


def _estimates(planned: dict[str, Any]) -> list[tuple[str, object]]:
    """Memory of a rank, hours, and whether it fits."""
    m, lines = planned["memory"], list[tuple[str, object]]()
    if "rank" in m:
        parts = f"{size(m['held'])} held + {size(m['guards'])} copies of the guards + {size(m['activations'])} of the hungriest step"
        lines.append(("memory", f"{size(m['rank'])} a rank: {parts}"))
    if planned["hours"] is not None:
        where = f"measured on {planned['measured_on']}, {planned['precision']}"
        where += "" if planned["measured_on"] == planned["device"] else f", which is not the {planned['device']} of the run"
        apart = "; communication not included" if planned.get("ranks", 1) > 1 else ""
        lines.append(("time", f"{duration(3600 * planned['hours'])} ({where}{apart})"))
    fits = {True: "yes", False: "no", None: "not known"}[planned["fits"]]
    host, room = m.get("host"), f"{size(m['machine'])} of {size(m['available'])} free"
    if host and host["machine"]:
        several = f", all {planned['ranks']} ranks together" if planned.get("ranks", 1) > 1 else ""
        parts = f"images {size(host['held'])}, a checkpoint's copy {size(host['checkpoint'])} a rank"
        lines.append(("host memory", f"{size(host['machine'])} of this machine's {size(host['available'])}{several}: {parts}"))
        room = f"on the device {room}"
    lines.append(("fits", f"{fits}: {room}; {planned['why']}"))
    return lines
