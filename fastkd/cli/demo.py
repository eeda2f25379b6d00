"""`fastkd demo`: a run on the embedded digits teacher, and beside it what the same budget gives on pure noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastkd.cli.common import emit, method_names, say, stored, verb
from fastkd.cli.options import WALK, set_option, taking
from fastkd.cli.words import duration, percent
from fastkd.errors import ConfigError

if TYPE_CHECKING:
    from fastkd.config import RunConfig

KINDS = ("uniform", "gaussian")


@verb("demo")
@click.option("--method", metavar="NAME", shell_complete=method_names, help="Default: muse.")
@taking([set_option("Any configuration key. May be repeated."), WALK["seed"], WALK["device"]])
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the runs. Default: the next runs/demo-001.")
def command(method: str | None, sets: tuple[str, ...], seed: int | None, device: str | None, out: Path | None, as_json: bool) -> int:
    """Distil the embedded digits teacher, then twice more with noise for images and the same student steps: the floor to beat."""
    from fastkd.cli import run
    from fastkd.cli.common import out_folder, table
    from fastkd.engine.folder import refuse

    options = table(run.KEYS, {"method": method, "seed": seed, "device": device})
    config = run.configuration(None, options, sets, None, "no")
    out = out or out_folder("demo")
    refuse(out, resume=True)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out '{out}' is not empty; expected a new or empty folder for the three runs of the demo.")
    rows: list[dict[str, Any]] = []
    name = str(config.method.get("name", "muse"))
    code, summary = walked(config, out / name)
    rows.append({"run": name, **summary})
    for kind in KINDS if not code else ():
        code, summary = walked(floor(stored(out / name, None), kind, summary_images(rows[0])), out / f"noise-{kind}")
        rows.append({"run": f"noise, {kind}", **summary})
        if code:
            break
    if code:
        return code
    write(out / "comparison.json", rows)
    if as_json:
        emit({"out": str(out), "runs": rows})
    else:
        compare(rows, out)
    return 0


def walked(config: RunConfig, out: Path) -> tuple[int, dict[str, Any]]:
    """One run, shown as it goes on: exit code and summary."""
    from fastkd import assemble
    from fastkd.cli import run, terminal

    how = run.again(config, out)
    with terminal.listener(out) as show:
        try:
            outcome = assemble.distil(config, out, listeners=[show])
        except BaseException as e:
            run.tell_how_to_continue(e, how, out)
            raise
    if outcome.code:
        say(f"stopped with a checkpoint; continue this run with: {how}")
    return outcome.code, outcome.summary


def summary_images(row: dict[str, Any]) -> int:
    """Images that a run made and stored: as many noise images stand against them."""
    if not row.get("images"):
        raise ConfigError(f"method '{row['run']}' stores no images, so there is no noise run of equal budget; use `fastkd run` for it.")
    return int(row["images"])


def floor(values: dict[str, Any], kind: str, images: int) -> RunConfig:
    """The noise run of equal budget: the same networks, data, student phase and seed; as many images, no warm-up.

    Args:
      values: the resolved configuration of the run it is compared with. images: what that run made.
    """
    from dataclasses import fields

    from fastkd.config import build
    from fastkd.methods import method_class

    was: dict[str, Any] = values["method"]
    shared = {f.name: was[f.name] for f in fields(method_class("noise")) if f.name in was}
    epochs = was["epochs"] - was.get("warmup", 0)
    noise = {**shared, "name": "noise", "kind": kind, "n_images": images, "epochs": epochs, "warmup": 0}
    return build({**values, "method": noise}, "the noise run")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The comparison beside the runs; without it the runs stand all the same."""
    try:
        path.write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")
    except OSError as e:
        say(f"warning: '{path}' could not be written: {e.strerror}")


def compare(rows: list[dict[str, Any]], out: Path) -> None:
    """The table of all runs; accuracies are those of the last epoch."""
    from fastkd.cli import summary
    from fastkd.methods import method_class

    teacher, student = rows[0].get("teacher") or {}, rows[0].get("student") or {}
    lines = [("teacher", f"{teacher.get('spec')}", f"{teacher.get('parameters', 0):,}", percent(teacher.get("top1")), "", "", "")]
    for row in rows:
        net = row.get("student") or {}
        scores = percent(net.get("top1")), percent(net.get("last10"))
        made, wall = f"{row.get('images') or 0:,.0f}", duration(row.get("wall"))
        lines.append((row["run"], f"{net.get('spec')}", f"{net.get('parameters', 0):,}", *scores, made, wall))
    summary.print_table(("run", "network", ">parameters", ">top-1, last", ">mean of last 10", ">images", ">time"), lines)
    trained = "on real training images" if "data" in method_class(str(rows[0].get("method"))).needs else "without one real image"
    summary.print_facts([("student", f"{student.get('spec')}, trained {trained}; the test data are looked at to measure only"),
                         ("folder", str(out)), ("next", summary.evaluation(rows[0], out / str(rows[0]["run"])))])  # fmt: skip
