"""Writes docs/performance.md from the records under benches/results/: `python -m benches.render [--check | --show DIR]`.

No figure of the page is typed by hand; a test renders it again and compares.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import BENCHES, targets, verdicts
from .verdicts import LABELS, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benches" / "results", ROOT / "docs" / "performance.md"
HEAD = """# Performance

Written by `python -m benches.render` from the records under `benches/results/`: no figure here is typed by hand.
`fastkd bench` measures the same on your machine.

- A figure is a median of interleaved rounds, taken after outputs and gradients were compared with the definition in fp64. What is wrong
  has no ratio; what could not run has its reason.
- *eager* is the published methods' own way in plain torch, *compile* the fastest of `torch.compile`'s forms of the same computation, a
  *peer* another library. Ratios are taken within one run; a row shows its worst case, and after *to* its best.
- A gain is credited to the neighbouring rung of a ladder: what freezing, memory layout, the upsampling identity and bf16 give is the
  engine's and not the kernels'. So is memory: where a record says "freed memory kept", what a call
  frees stays with the process, for every provider, as `fastkd run` has it on a CPU. Left to the C library, fresh pages are a part of every
  figure, and the larger part of a quick one; what a run gains stands in [methods](methods.md), *freeing*.
- Single BatchNorms against `torch.compile` mislead: with its input as a graph input the compiler stores a mask that it does not store
  inside a network. Those rows are held to eager only; the whole teacher is held to both.
"""
ENGINE = ("freezing", "channels_last", "identity", "bf16")
"""Rungs that any code base could take; the others are kernels of ours."""
Records = dict[str, dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.render", description="Write docs/performance.md from the records.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not what the records say")
    parser.add_argument("--show", type=Path, metavar="DIR", help="write nothing; print the tables of the records in this folder")
    options = parser.parse_args(argv)
    if options.show is not None:
        print(section(options.show.resolve().name, records(options.show)))
        return 0
    made = page(RESULTS)
    if options.check:
        if made != PAGE.read_text(encoding="utf-8"):
            print(f"{PAGE.relative_to(ROOT)} is not what the records say: run python -m benches.render")
            return 1
        return 0
    PAGE.write_text(made, encoding="utf-8")
    return 0


def page(results: Path) -> str:
    """The page for the records of every folder of `results`."""
    found = {folder.name: records(folder) for folder in sorted(results.iterdir()) if folder.is_dir()}
    found = {name: own for name, own in found.items() if own}
    measured = {device_type(own) for own in found.values()}
    parts = [HEAD]
    for name, own in found.items():
        parts += [section(name, own, notes(results / name)), *earlier(results / name)]
    for kind, title in (("cpu", "CPU"), ("cuda", "GPU")):
        if kind not in measured:
            head, lines, _ = verdicts.table(targets.of(kind), {})
            rows = [line[:3] for line in lines]
            parts.append(f"## {title}: not measured yet\n\nNo record is committed. What it will be held to:\n\n{table(head[:3], rows)}")
    return "\n".join(parts)


def records(folder: Path) -> Records:
    """The records of one device's folder, in the order of the benches. Other files there are left alone.

    Raises:
      ValueError: a record with toy sizes.
    """
    own = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(record, dict) and "bench" in record):
            continue
        if record["facts"]["settings"]["quick"]:
            raise ValueError(f"'{path}' was made with --quick: its times mean nothing and cannot be published")
        own[record["bench"]] = record
    return {name: own[name] for name in BENCHES if name in own}


def device_type(own: Records) -> str:
    return str(next(iter(own.values()))["facts"]["type"])


def notes(folder: Path) -> str:
    """What is to be known of a folder's records: its README.md, where it has one."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def section(name: str, own: Records, said: str = "") -> str:
    """All tables of one device. Targets of benches without a record are named in a line."""
    wanted = targets.of(device_type(own))
    head, lines, _ = verdicts.table([t for t in wanted if t.bench in own], own)
    absent = [bench for bench in BENCHES if bench not in own and any(t.bench == bench for t in wanted)]
    left = [f"\nNo record here: {', '.join(absent)}.\n"] if absent else []
    parts = [f"## {name}\n", *machine(own), said, "\n### Targets\n", table(head, lines), *left]
    if "generator" in own:
        parts += ["\n### A generator step, rung by rung\n", *ladder(own["generator"])]
    for bench, record in own.items():
        if bench not in ("generator", "engine", "step") and (rows := list(cases(record["rows"]))):
            parts += [f"\n### Kernels: {bench}\n", table(CASES, rows)]
            if alone := list(in_graphs(record["rows"])):
                parts += [f"\n### Kernels without their launches (replayed from CUDA graphs): {bench}\n", table(GRAPHS, alone)]
    if "engine" in own and any("ms" in r for r in own["engine"]["rows"]):
        parts += ["\n### Steps of a run, rung by rung\n", *taken(own["engine"])]
    if "step" in own:
        parts += ["\n### Steps of the methods\n", *steps(own["step"])]
    return "\n".join(parts) + "\n"


def earlier(folder: Path) -> list[str]:
    """The table of `kernels.json`, where a folder has one: kernels of an earlier revision, timed one by one."""
    if not (folder / "kernels.json").is_file():
        return []
    found = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    f = found["facts"]
    said = f"{f['device']}, torch {f['torch']}; a copy moves {f['copy_gbps']} GB/s; revision {f['revision']}; {found['kernels']}.\n"
    body = []
    for r in found["rows"]:
        rate = [f"{r['gbps']:.0f}", share(r["gbps"] / f["copy_gbps"])] if "gbps" in r else ["", ""]
        body.append([r["op"], r["case"], r["provider"], f"{r['graph_ms']:.4g}", f"{r['ms']:.4g}", f"{r['host_ms']:.3g}", *rate])
    head = ["op", "case", "provider", "ms in a graph", "ms a call", "ms of the host", "GB/s", "of a copy"]
    return ["### Kernels one by one, of an earlier revision\n", said, table(head, body)]


def taken(record: dict[str, Any]) -> Iterator[str]:
    """A run's steps as the engine takes them."""
    yield "ResNet-34 teacher, ResNet-18 student, 32², batches of 256; all that a run does for a step is in the time.\n"
    body = []
    for r in record["rows"]:
        if "ms" not in r:
            body.append([r["method"], "", r["provider"], r.get("rung", ""), str(r["reason"]), "", "", "", "", ""])
            continue
        numbers = [f"{r['ms']:.4g}", f"{r['host_ms']:.3g}", f"{r['images_s']}", f"{r.get('peak_mib', '')}"]
        body.append([r["method"], r["step"], r["provider"], r.get("rung", ""), *numbers, ratio(r.get("x_rung")), ratio(r.get("x_eager"))])
    head = ["method", "step", "as", "what it adds", "ms", "ms of the host", "images/s", "peak MiB", "over the one before", "over the first"]
    yield table(head, body)


def machine(own: Records) -> Iterator[str]:
    """What was measured where, once for each set of facts."""
    groups: dict[str, list[str]] = {}
    for bench, record in own.items():
        f = record["facts"]
        where = f["device"] if f["type"] == "cuda" else f"{f['host']['cpu']}, {f['host']['cores']} cores"
        with_flags = f" ({', '.join(f['flags'])})" if f["type"] == "cpu" else f", driver {f['driver']}, CUDA {f['cuda']}"
        copied = f"a copy moves {f['copy_gbps']:.0f} GB/s" if f.get("copy_gbps") else "copy not measured"
        kept = "; freed memory kept" if f.get("memory_kept") else ""
        said = f"{where}{with_flags}; torch {f['torch']}, Python {f['python']}; {copied}{kept}; revision {f['revision']}"
        groups.setdefault(said, []).append(bench)
    yield from (f"{', '.join(names)}: {said}.\n" for said, names in groups.items())


def ladder(record: dict[str, Any]) -> Iterator[str]:
    """The rungs with the compiled forms beside them, then each source's product."""
    rows = record["rows"]
    for count in counts(rows):
        own = [r for r in rows if r.get("threads") == count]
        yield f"{count} thread{'' if count == 1 else 's'}:\n" if count else ""
        body = [
            [r["provider"], r.get("rung", "(instead)"), r.get("dtype", ""), time_of(r), ratio(r.get("x_rung")), ratio(r.get("x_eager"))]
            for r in own
        ]
        yield table(["rung", "earned by", "dtype", "ms", "over the rung before", "over the published way"], body)
        products: dict[str, float] = {}
        for r in own:
            if "x_rung" in r:
                products[r["rung"]] = products.get(r["rung"], 1.0) * r["x_rung"]
        engine = math.prod(v for k, v in products.items() if k in ENGINE)
        kernels = math.prod(v for k, v in products.items() if k not in ENGINE)
        parts = ", ".join(f"{k} {v:.2f}x" for k, v in products.items())
        if products:
            yield f"\nEngine {engine:.2f}x, kernels {kernels:.2f}x ({parts}).\n"


CASES = ["case", "threads", "eager ms", "compile ms", "ours ms", "over eager", "over compile", "of a copy", "peers"]


def cases(rows: Sequence[Row]) -> Iterator[list[str]]:
    """One line a case and thread count."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        if "kind" in r:  # the row of what had no time has none
            groups.setdefault((*(r.get(k) for k in LABELS), r.get("threads")), []).append(r)
    for key, own in groups.items():
        mine = fastest(r for r in own if r["kind"] == "ours" and not r["provider"].startswith("definition"))
        if mine is None:
            continue
        eager = next((r for r in own if r["kind"] == "eager" and "x_eager" in r and r["x_eager"] == 1), None)
        best = fastest(r for r in own if r["kind"] == "compile")
        peers = [f"{r['provider']} {r['ms'] / mine['ms']:.1f}x" for r in own if r["kind"] == "peer" and "ms" in r]
        name = " ".join(str(v) for v in key[:-1] if v)
        times = [time_of(eager), time_of(best), f"{time_of(mine)} ({mine['provider'].removeprefix('ours: ')})"]
        gains = [ratio(mine.get("x_eager")), ratio(mine.get("x_compile")), share(mine.get("of_copy"))]
        yield [name, str(key[-1] or ""), *times, *gains, ", ".join(peers)]


GRAPHS = ["case", "eager ms", "compile ms", "CUDA ms", "Triton ms", "CUDA over Triton", "GB/s", "of a copy"]


def in_graphs(rows: Sequence[Row]) -> Iterator[list[str]]:
    """One line a case that has times from CUDA graphs and kernels of ours; rates are those of the faster kernel."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        if "graph_ms" in r and r.get("ok") is not False:
            groups.setdefault(tuple(r.get(k) for k in LABELS), []).append(r)
    for key, own in groups.items():
        by = {r["provider"]: r for r in own}
        pair = [by[name] for name in ("ours: cuda", "ours: triton") if name in by]
        if not pair:
            continue
        eager = next((r for r in own if r["kind"] == "eager" and r.get("x_eager") == 1), None)
        best = min((r for r in own if r["kind"] == "compile"), key=lambda r: float(r["graph_ms"]), default=None)
        times = [f"{r['graph_ms']:.4g}" if r else "" for r in (eager, best, by.get("ours: cuda"), by.get("ours: triton"))]
        mine = min(pair, key=lambda r: float(r["graph_ms"]))
        rates = [f"{mine['graph_gbps']:.0f}" if "graph_gbps" in mine else "", share(mine.get("graph_of_copy"))]
        yield [" ".join(str(v) for v in key if v), *times, ratio(pair[0].get("graph_x_triton")), *rates]


def steps(record: dict[str, Any]) -> Iterator[str]:
    """Where an epoch's time goes, by phase, with the definitions and with ours."""
    rows = [r for r in record["rows"] if str(r.get("step", "")).startswith("all of ")]
    body = [[r["method"], r["phase"], r["provider"], time_of(r), ratio(r.get("x_eager"))] for r in rows]
    yield table(["method", "phase", "ops", "ms an epoch", "over the definitions"], body)


def fastest(rows: Iterable[Row]) -> Row | None:
    return min((r for r in rows if "ms" in r and r.get("ok") is not False), key=lambda r: float(r["ms"]), default=None)


def counts(rows: Sequence[Row]) -> list[int | None]:
    return list(dict.fromkeys(r.get("threads") for r in rows)) or [None]


def time_of(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['ms']:.4g}" if "ms" in row else str(row.get("reason", ""))


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
