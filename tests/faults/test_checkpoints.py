"""Damaged, missing and left-over files of a run folder, as every command meets them: T9 to T12, T30, T31."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.cli.app import app
from fastkd.engine import checkpoint, events
from tests.cli.conftest import STUDENT, one_sentence, sets

pytestmark = pytest.mark.faults

FILES = ["state.safetensors", "state.json", "student.safetensors", "manifest.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    out = tmp_path_factory.mktemp("finished") / "run"
    words = ["run", "--method", "noise", *sets(*STUDENT, "checkpoint.every_steps=4"), "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def newest(out: Path) -> Path:
    return checkpoint.listed(out / "checkpoints")[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.fault("T9")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [lambda n: 0, lambda n: 1, lambda n: n // 2, lambda n: n - 1], ids=["0", "1", "half", "all-but-one"])
def test_a_cut_file_is_named_with_the_reason_and_the_older_checkpoint_used(cli, copied, name, keep):
    path, old = newest(copied) / name, checkpoint.listed(copied / "checkpoints")[1]
    path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])
    done = cli("run", "--resume", "--out", copied)
    assert done.exit_code == 0, done.stderr
    warned = next(line for line in done.stderr.splitlines() if line.startswith("warning"))
    assert path.parent.name in warned and name in warned and f"continued from {old.name}" in done.stderr
    assert (path.parent.with_name(f"damaged-{path.parent.name}")).is_dir()
    assert (copied / "student.safetensors").read_bytes()


@pytest.fixture(scope="module")
def flipped(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("flipped") / "run"))


@pytest.mark.fault("T10")
@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_flipped_anywhere_is_noticed(flipped, name, where, bit):
    path = newest(flipped) / name
    whole = path.read_bytes()
    data = bytearray(whole)
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        with pytest.raises(ValueError):
            checkpoint.verify(path.parent)
    finally:
        path.write_bytes(whole)
    checkpoint.verify(path.parent)


def without_latest(folder: Path) -> None:
    (folder / "LATEST").unlink()


def latest_to_nowhere(folder: Path) -> None:
    (folder / "LATEST").write_text("step-99999999\n")


def latest_to_the_older(folder: Path) -> None:
    (folder / "LATEST").write_text(f"{checkpoint.listed(folder)[1].name}\n")


def latest_torn(folder: Path) -> None:
    (folder / "LATEST").write_bytes(b"\0" * 14)


def left_over(folder: Path) -> None:
    """What saves leave that died: one of a later step by this very process number, whole but for its name, and a file of LATEST."""
    shutil.copytree(checkpoint.listed(folder)[0], folder / f".tmp-step-99999999-{os.getpid()}")
    (folder / ".tmp-step-00000008-1").mkdir()
    (folder / ".tmp-LATEST").write_text("step-")


@pytest.mark.fault("T11")
@pytest.mark.parametrize("harm", [without_latest, latest_to_nowhere, latest_to_the_older, latest_torn, left_over], ids=lambda f: f.__name__)
def test_only_whole_folders_count_not_what_points_at_them(cli, copied, harm):
    name = newest(copied).name
    harm(copied / "checkpoints")
    done = cli("run", "--resume", "--out", copied)
    assert done.exit_code == 0 and "the run was already done" in done.stderr, done.stderr
    assert [e["checkpoint"] for e in events.read(copied / "events.jsonl") if e["kind"] == "resumed"] == [name]
    assert not list((copied / "checkpoints").glob(".tmp*"))
    assert (copied / "checkpoints" / "LATEST").read_text() == f"{newest(copied).name}\n"


@pytest.mark.fault("T11")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [Path.unlink, lambda p: (p.unlink(), p.mkdir())], ids=["deleted", "a folder in its place"])
def test_a_file_that_is_gone(cli, copied, name, harm):
    path, old = newest(copied) / name, checkpoint.listed(copied / "checkpoints")[1]
    harm(path)
    done = cli("run", "--resume", "--out", copied)
    assert done.exit_code == 0 and f"continued from {old.name}" in done.stderr and name in done.stderr, done.stderr


@pytest.mark.fault("T12")
@pytest.mark.parametrize("harm", ["cut", "emptied", "removed"])
def test_no_checkpoint_left(cli, copied, harm):
    for path in checkpoint.listed(copied / "checkpoints"):
        if harm == "removed":
            shutil.rmtree(path)
        elif harm == "emptied":
            shutil.rmtree(path)
            path.mkdir()
        else:
            (path / "student.safetensors").write_bytes(b"")
    must = Path(shutil.copytree(copied, copied.with_name("must")))
    done = cli("run", "--resume", "--out", must)
    sentence = one_sentence(done.stderr)
    assert done.exit_code == 5 and "checkpoint" in sentence, done.stderr
    if harm != "removed":
        assert sentence.count("step-") == 2 and ("manifest.json is missing" if harm == "emptied" else "student.safetensors") in sentence
    done = cli("run", "--resume=auto", "--out", copied)
    assert done.exit_code == 0 and ("starts anew" in done.stderr or harm == "removed"), done.stderr
    assert "continued from" not in done.stderr


# What other commands make of it -----------------------------------------------------------------------------------------

HARMS: dict[str, Callable[[Path], Any]] = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "empty": lambda p: p.write_bytes(b""),
    "gone": Path.unlink,
    "a web page": lambda p: p.write_text("<!doctype html><html>"),
    "a long header": lambda p: p.write_bytes((1 << 40).to_bytes(8, "little") + p.read_bytes()[8:]),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.fault("T30")
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("place", ["the run's", "a checkpoint's"])
def test_a_damaged_student_is_refused_by_all_who_read_it(cli, copied, tmp_path, place, harm):
    file = copied / "student.safetensors" if place == "the run's" else newest(copied) / "student.safetensors"
    HARMS[harm](file)
    before = snapshot(copied)
    source = copied if place == "the run's" else newest(copied)
    constants = ("--mean", "0.3", "--std", "0.4", "--input-size", "8", "--channels", "1", "--classes", "10")
    for words in (
        ("eval", file, "--data", "digits"),
        ("models", "--model-weights", file, "--save", tmp_path / "new.safetensors"),
        ("run", "--student", f"ckpt:{source}", "--out", tmp_path / "new", *sets(*STUDENT), "--method", "noise"),
        ("run", "--teacher", "resnet8", "--teacher-weights", file, *constants, "--student", "resnet8", "--out", tmp_path / "new"),
    ):
        done = cli(*words)
        assert done.exit_code in (4, 5), (words, done.exit_code, done.stderr)
        one_sentence(done.stderr)
    assert snapshot(copied) == before and not [p for p in os.listdir(tmp_path) if p != "run"]


# The log --------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("T31")
@pytest.mark.parametrize("torn", [b'{"kind": "epoch", "epo', b"\0" * 4096, b'\xff\xfe{"', b'{"kind": "epoch"}'])
def test_what_follows_a_torn_line_is_not_lost_with_it(cli, copied, torn):
    shutil.rmtree(newest(copied))
    whole = [e["epoch"] for e in events.curve(copied / "events.jsonl")]
    path = copied / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    at = max(i for i, line in enumerate(lines) if b'"kind": "epoch"' in line)
    path.write_bytes(b"".join(lines[:at]) + torn)  # the process died while it wrote its last epoch
    done = cli("run", "--resume", "--out", copied, "--json")
    assert done.exit_code == 0, done.stderr
    assert [e["epoch"] for e in events.curve(path)] == whole and json.loads(done.stdout)["epochs"] == len(whole)
    assert "resumed" in [e["kind"] for e in events.read(path)], "the first event after the torn line"


@pytest.mark.fault("T31")
def test_a_log_of_a_gigabyte_with_a_torn_end_is_read_and_appended_to(cli, copied):
    path = copied / "events.jsonl"
    whole = events.curve(path)
    line = (json.dumps({"kind": "epoch", **{k: v for k, v in whole[-1].items() if k != "kind"}, "padding": "x" * 16000}) + "\n").encode()
    block = line * (1 + (1 << 24) // len(line))
    with open(path, "ab") as f:
        while f.tell() < 1 << 30:
            f.write(block)
        f.write(line[: len(line) // 2])
    done = cli("run", "--resume", "--out", copied, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["epochs"] == len(whole)
    kinds = [e["kind"] for e in events.read(path)]
    assert kinds[-1] == "done" and "resumed" in kinds
    path.unlink()
