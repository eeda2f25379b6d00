"""Writes docs/methods.md and its figures from the records under benches/results/: `python -m benches.render_methods [--check]`.

No figure of the page is typed by hand; a test renders it again and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ablations, curve, imagenet, methods, phases
from .render import RESULTS, ROOT, table

PAGE = ROOT / "docs" / "methods.md"
HEAD = """# The methods, measured

Written by `python -m benches.render_methods` from the records under `benches/results/`: no figure here is typed by hand.
What each method is and needs: `fastkd methods`, `fastkd methods NAME`.

Budgets and costs are CPU seconds (user + system) of the process, whatever else the machine did meanwhile. One run a row unless seeds are
named: differences of a few points between rows may be the seed's.
"""
Record = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.render_methods", description="Write docs/methods.md from the records.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not what the records say")
    options = parser.parse_args(argv)
    made = files(RESULTS)
    if options.check:
        stale = [p for p, text in made.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the records say: run python -m benches.render_methods")
        return int(bool(stale))
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return 0


def files(results: Path) -> dict[Path, str]:
    """The page and its figures for the records of every folder of `results`."""
    out: dict[Path, str] = {}
    parts = [HEAD]
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        for record in filter(None, [read(folder / "methods.json")]):
            figure = PAGE.with_name(f"methods-digits-{folder.name}.svg")
            out[figure] = methods.picture(methods.ranked(record["rows"]))
            parts += [f"## Digits, equal CPU time: {folder.name}\n", *digits(record, figure.name)]
        runs = [r for r in map(read, sorted(folder.glob("pretrained-*.json"))) if r]
        if runs:
            runs.sort(key=lambda r: -r["top1"])
            figure = PAGE.with_name(f"methods-cifar10-{folder.name}.svg")
            out[figure] = curve.draw(runs, "seconds_top1", "CPU seconds")
            parts += [f"## A teacher that nobody here trained, CIFAR-10: {folder.name}\n", *pretrained(runs, figure.name)]
        for record in filter(None, map(read, sorted(folder.glob("imagenet-*.json")))):
            parts += [f"## ImageNet networks, {record['teacher']}: {folder.name}\n", *low_resolution(record)]
        for record in filter(None, [read(folder / "ablations.json")]):
            parts += [f"## Parts switched off: {folder.name}\n", *parts_off(record)]
        for record in filter(None, [read(folder / "phases.json")]):
            parts += [f"## What a step costs beside its networks: {folder.name}\n", *costs(record)]
    return {PAGE: "\n".join(parts), **out}


def read(path: Path) -> Record | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def machine(record: Record) -> str:
    threads = f"{record['threads']} thread{'' if record['threads'] == 1 else 's'}"
    return f"Machine: {record['cpu']}, torch {record['torch']}, {threads}; beside it: {record['load'] or 'nothing'}."


def digits(record: Record, figure: str) -> Iterator[str]:
    """Every method on the embedded teacher."""
    budget, rows = record["budget"], record["rows"]
    teacher = next(100 * r["teacher"]["top1"] for r in rows if "teacher" in r)
    yield (
        f"`python -m benches.methods --out DIR --seconds {budget:g}`: the embedded digits teacher ({teacher:.2f} % on 500 test images) → "
        "`wrn10_1`. Each method runs its recipe NAME-digits, shrunk or stretched along its epochs to what the budget holds; import and "
        "teacher are part of it. The recipes were made for runs of minutes, some for much longer ones than this.\n"
    )
    marks = [budget / 4, budget / 2, budget]
    head = ["method", *(f"top-1 % at {m:g} s" for m in marks[:-1]), "last epoch", "best (selected on test data)", "epochs", "CPU s"]
    body = []
    for r in methods.ranked(rows):
        early = [methods.at(r, m) for m in marks[:-1]]
        name = f"{r['method']} (real images)" if r["data"] else r["method"]
        cells = ["" if v is None else f"{v:.1f}" for v in early]
        body.append([name, *cells, f"{r['top1']:.1f}", f"{r['best']:.1f}", str(r["epochs"]), f"{r['cpu_seconds']:.1f}"])
    yield table(head, body)
    yield from (f"`{r['method']}`: not run; {r['reason']}.\n" for r in rows if "reason" in r)
    yield f"![accuracy against CPU seconds]({figure})\n"
    yield f"{machine(record)} Seed {record['seed']}. Revision {revisions(rows)}.\n"


def pretrained(runs: list[Record], figure: str) -> Iterator[str]:
    """Runs with the downloaded CIFAR-10 teacher."""
    first = runs[0]
    teacher, budget = first["teacher"], first["budget"] / 60
    yield (
        f"`python -m benches.pretrained --data DIR --method NAME --cpu-minutes {budget:g} --out DIR`: `{teacher['spec']}` "
        f"({100 * teacher['top1']:.2f} % on the 10,000 test images, {teacher['parameters']:,} parameters) → `{first['student']}` from "
        f"scratch. Each run's budget was {budget:g} CPU minutes, evaluation on all test images after each epoch included.\n"
    )
    marks = [first["budget"] * k / 4 for k in (1, 2, 3)]
    early = [f"top-1 % at {m / 60:g} min" for m in marks]
    head = ["method", *early, "last epoch", "epochs", "student steps", "CPU min", "of it evaluation"]
    body = []
    for r in runs:
        cells = ["" if (v := methods.at(r, m)) is None or m > r["cpu_seconds"] else f"{v:.1f}" for m in marks]
        spent = [f"{r['cpu_seconds'] / 60:.1f}", f"{r['evaluation_seconds'] / 60:.1f}"]
        name = r["name"] if r["code"] == 0 else f"{r['name']} (stopped before the end of its schedule)"
        body.append([name, *cells, f"{r['top1']:.2f}", str(r["epochs"]), f"{r['student_steps']:,}", *spent])
    yield table(head, body)
    yield f"![accuracy against CPU seconds]({figure})\n"
    yield "The runs (DIR is the folder of the data):\n"
    yield "```\n" + "\n".join(r["command"] for r in runs) + "\n```\n"
    yield f"{machine(first)} {first['precision']}, seed {first['seed']}. Revision {revisions(runs)}.\n"


def low_resolution(record: Record) -> Iterator[str]:
    """MUSE at low resolutions beside NAYER at the nominal one."""
    rows, photographs = record["rows"], record["photographs"]
    yield (
        f"`python -m benches.imagenet --data DIR --teacher {record['teacher']} --out DIR`: as many generated pixels with both methods, "
        f"batch {record['batch']}, {record['g_steps']} generator steps a loop, no adversary, label embeddings of the class names; as in "
        "FastDFKD's ImageNet form the last images of a loop are stored. *Named as meant*: stored images that the teacher gives the label, "
        "of 1,000, that they were made for. *Photographs*: how many of 1,000 real ones, resized to that size, it names rightly. *bn*: "
        f"weight of the BN-statistics term, {imagenet.LIKE_IMAGENET:g} over the sum of the norms of the teacher's stored statistics unless "
        "given by `--bn`. Published is 10, for CIFAR, where that sum is 405 in a ResNet-20; in MobileNet v1 ×0.75 it is 6,504, in "
        "EfficientNet-Lite0 21,397, and with 10 the class is less than a thousandth of the loss. Few images: a share of 8 is in eighths.\n"
    )
    yield table(imagenet.HEAD, [imagenet.cells(r, photographs) for r in rows])
    if not any(r["named"] for r in rows):
        yield "No image was named as meant: runs this short say what a step costs, and nothing about the images.\n"
    yield f"{machine(record)} {record['precision']}. Revision {revisions(rows)}.\n"


def parts_off(record: Record) -> Iterator[str]:
    """The ablations."""
    found = ablations.rows(record["runs"])
    yield (
        "`python -m benches.ablations --out DIR`: a host as it is and with one switch, same steps and seeds, on its digits recipe cut "
        "short as its setting says. Accuracy is the mean over the epochs that train the student; the mean was chosen when four seeds "
        "were there, the settings before any (but for two seeds of the CAM term). Each paper reports a lower accuracy without its part; "
        "the last column says whether these runs show it: a change of more than two standard errors. They take seconds where the papers' "
        "take hours. "
        "*±*: standard deviation over the seeds, of the change its standard error.\n"
    )
    yield table(ablations.HEAD, [ablations.cells(r) for r in found])
    yield "The settings, on top of the recipe `METHOD-digits`, and why they are these:\n"
    yield "\n".join(f"- {r['part']}: `{' '.join(r['setting'])}`; {r['why']}." for r in found) + "\n"
    earlier = ablations.rows(record["runs"], ablations.EARLIER)
    if earlier:
        yield "What was run before, the recipes cut short with two seeds or one, and the inversion of pixels:\n"
        yield table(ablations.HEAD, [ablations.cells(r) for r in earlier])
    yield f"{machine(record)} Revision {revisions(record['runs'])}.\n"


def costs(record: Record) -> Iterator[str]:
    """Steps beside their networks' passes."""
    yield (
        f"`python -m benches.phases --out DIR`: a step as the engine runs it over the passes of its networks alone (the same networks and "
        f"inputs, forward and backward, and the optimisers' steps), batch {record['batch']}, 3 × 32 × 32, `resnet20` → `wrn10_1`. *ratio*: "
        "the teacher gives logits only; *with statistics*: it also gives the BN statistics that the step asks for. "
        f"Held to {phases.TARGET:.2f}. Steps that call no network (a learning rate, new latents) are not in it; the record lists them. "
        "Where a step differentiates through a gradient (`lra`), so does the pass.\n"
    )
    rows = [r for r in record["rows"] if "ms" in r]
    head = ["method", "phase", "steps", "ms", "passes ms", "ratio", "with statistics", f"≤ {phases.TARGET:.2f}", "freeing ms"]
    body = []
    for r in rows:
        held = "yes" if r["ratio"] <= phases.TARGET else "with statistics" if r["ratio_with_statistics"] <= phases.TARGET else "no"
        times = [f"{r['ms']:.0f}", f"{r['passes_ms']:.0f}", f"{r['ratio']:.2f}", f"{r['ratio_with_statistics']:.2f}"]
        body.append([r["method"], r["phase"], " ".join(r["steps"]), *times, held, f"{r['freeing_ms']:.0f}" if "freeing_ms" in r else ""])
    yield table(head, body)
    yield from (f"`{r['method']}`: not run; {r['reason']}.\n" for r in record["rows"] if "reason" in r)
    yield f"{machine(record)} Revision {revisions(rows)}.\n"


def revisions(rows: list[Record]) -> str:
    """Those that measured the rows."""
    return ", ".join(sorted({str(r["commit"])[:7] for r in rows if r.get("commit")}))


if __name__ == "__main__":
    sys.exit(main())
