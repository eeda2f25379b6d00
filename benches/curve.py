"""The learning curve of runs as committed figures: `python -m benches.curve RUN... --json FILE --svg FILE`.

From each run folder: its command, its machine, and accuracy on test images against minutes (the sum of its epochs' wall times).
`--published RECIPE` adds what was published for a recipe of `fastkd run --recipe`, as dashed lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from fastkd import recipes
from fastkd.engine.events import curve, read

from .facts import cpuinfo, revision

COLOURS = ("#1664c0", "#2a8a3e", "#c06a16", "#7a3fb0", "#b33333", "#16898c")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 48, 12, 12, 36
COLUMN = 130
"""Width of a column of names beside the curves."""
DASHES = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 3"')
"""The second and third time that the colours are used."""
MARGIN = 1.0
"""Percentage points kept free above and below the curves."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.curve", description="Learning curves of run folders as JSON and SVG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; a name may be given as NAME=RUN")
    parser.add_argument("--command", action="append", default=[], metavar="TEXT", help="the command of each run, in the same order")
    parser.add_argument("--commit", default=revision(), metavar="HASH", help="the revision that ran; default: that of this code")
    parser.add_argument("--load", default="nothing else ran", metavar="TEXT", help="what else the machine did meanwhile")
    parser.add_argument("--published", action="append", default=[], metavar="RECIPE", help="figures published for RECIPE, as dashed lines")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    records = []
    for i, word in enumerate(args.runs):
        name, _, folder = word.rpartition("=")
        command = args.command[i] if i < len(args.command) else None
        records.append({"name": name or Path(folder).name, "command": command, **measured(Path(folder))})
    about = {"what": "top-1 (%) on test images against wall minutes", "commit": args.commit, "cpu": cpuinfo("model name")}
    figures = [dataclasses.asdict(f) for name in args.published for f in recipes.published(recipe=name)]
    out = {**about, "load": args.load, "runs": records, **({"published": figures} if figures else {})}
    args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    if args.svg:
        args.svg.write_text(draw(records, published=figures), encoding="utf-8")
    return 0


def measured(run: Path) -> dict[str, Any]:
    """What a run folder holds of one run: networks, accuracy, seconds by phase, and [minutes, top-1 %] of every training epoch."""
    environment = json.loads((run / "environment.json").read_bytes())
    summary = next(e for e in reversed(list(read(run / "events.jsonl"))) if e["kind"] == "done")["summary"]
    minutes, points = 0.0, []
    for e in curve(run / "events.jsonl"):
        minutes += e["wall"] / 60
        if e["trained"] and "top1" in e:
            points.append([round(minutes, 3), round(100 * e["top1"], 2)])
    kept = ("method", "teacher", "student", "epochs", "steps", "seconds", "precision", "seed")
    machine = {k: environment[k] for k in ("torch", "python", "threads")}
    return {**{k: summary[k] for k in kept}, **machine, "minutes": round(minutes, 3), "minutes_top1": points}


def draw(
    records: list[dict[str, Any]],
    key: str = "minutes_top1",
    label: str = "wall minutes",
    *,
    published: Sequence[dict[str, Any]] = (),
    beside: bool = False,
) -> str:
    """The curves as one SVG, the teachers' accuracies and the published figures as dashed lines.

    Args:
      key: where a record has its [time, top-1 %] points. label: what the time is.
      beside: names in a column of their own at the right, for more curves than fit inside.
    """
    points = [p for r in records for p in r[key]]
    width = WIDTH + (COLUMN if beside else 0)
    dashed = [(100 * r["teacher"]["top1"], "teacher", "#b33") for r in records if r["teacher"].get("top1")]
    dashed += [(f["value"], f"{f['label']}, published ({f['which']})", "#666") for f in published]
    shown = [p[1] for p in points] + [value for value, _, _ in dashed]
    low, high = min(shown) - MARGIN, min(100.0, max(shown) + MARGIN)
    last = max(p[0] for p in points) or 1e-3

    def x(minutes: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * minutes / last, 1)

    def y(top1: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - top1) / (high - low), 1)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>'
    ]
    for tick in ticks(low, high):
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}" stroke="#ddd"/>')
        lines.append(text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    lines += [text(x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle") for tick in ticks(0, last)]
    for top1, words, colour in sorted(set(dashed)):
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(top1)}" y2="{y(top1)}" stroke="{colour}" stroke-dasharray="5 4"/>')
        lines.append(text(WIDTH - RIGHT - 2, y(top1) - 5, f"{words} {top1:.2f} %", "end", colour))
    for i, record in enumerate(records):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        path = " ".join(f"{x(m)},{y(t)}" for m, t in record[key])
        stroke = f'fill="none" stroke="{colour}" stroke-width="2"{dash}'
        lines.append(f'<polyline {stroke} points="{path}"/>')
        if beside:
            at = TOP + 8 + 16 * i
            lines.append(f'<line {stroke} x1="{WIDTH}" x2="{WIDTH + 24}" y1="{at}" y2="{at}"/>')
            lines.append(text(WIDTH + 30, at + 4, record["name"], "start", colour))
        else:
            lines.append(text(WIDTH - RIGHT - 2, HEIGHT - BOTTOM - 8 - 16 * i, record["name"], "end", colour))
    lines.append(text((LEFT + WIDTH) / 2, HEIGHT - 6, label, "middle"))
    middle = f'x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle" fill="#444"'
    turned = f"<text {middle}>top-1 %, test images</text>"
    return "\n".join([*lines, turned, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str, colour: str = "#444") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, four to ten of them."""
    step = next(s * 10.0**e for e in range(-2, 4) for s in (1, 2, 5) if (high - low) / (s * 10.0**e) <= 9)
    first = -(-low // step)
    return [round(step * (first + i), 6) for i in range(int((high - first * step) // step) + 1)]


if __name__ == "__main__":
    sys.exit(main())
