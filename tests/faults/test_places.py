"""Places that are full, read-only or failing, and logs that cannot be written: T13, T14; two runs at once: T8; clocks: T28."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastkd.engine import checkpoint, events
from tests.cli.conftest import STUDENT, environment, one_sentence, sets
from tests.faults import forked
from tests.faults.conftest import PLANTED

pytestmark = pytest.mark.faults

NOISE = ["run", "--method", "noise", *sets(*STUDENT, "poll=1", "checkpoint.every_steps=2")]
"""A run of 10 steps, none of them in its first epoch."""


def planted(plant: dict[str, Any] | None = None) -> dict[str, str]:
    """The environment of a child with a fault in it."""
    env = environment(PLANT=json.dumps({"rank": -1, **plant})) if plant else environment()
    return {**env, "PYTHONPATH": os.pathsep.join([str(PLANTED), env["PYTHONPATH"]])}


def fastkd(*words: Any, plant: dict[str, Any] | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastkd", *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run(command, env=planted(plant), text=True, timeout=300, check=False, **streams)


def warned(out: Path) -> list[str]:
    return [e["text"] for e in events.read(out / "events.jsonl") if e["kind"] == "warning"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert fastkd(*NOISE, "--out", out).returncode == 0
    return out


def same(out: Path, undisturbed: Path) -> bool:
    return (out / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()


# A full disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here (it needs root): {done.stderr.strip()}")
        return place

    yield make
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def bytes_of(folder: Path) -> int:
    """Room that a folder takes on a disk of pages."""
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())


@pytest.mark.fault("T13")
def test_room_for_one_checkpoint_more_is_enough(undisturbed, disk):
    """Two are kept and the third has no room beside them: the older goes, the save is repeated, the run ends well."""
    one = bytes_of(checkpoint.listed(undisturbed / "checkpoints")[0])
    rest = bytes_of(undisturbed) - 2 * one
    out = disk(int(2.5 * one) + rest + 65536) / "run"
    done = fastkd(*NOISE, "--out", out)
    assert done.returncode == 0, done.stderr
    assert same(out, undisturbed) and not warned(out)


@pytest.mark.fault("T13")
def test_a_full_disk_ends_a_run_after_the_third_save_and_the_old_checkpoint_is_whole(undisturbed, disk):
    one = bytes_of(checkpoint.listed(undisturbed / "checkpoints")[0])
    out = disk(int(1.5 * one) + 65536) / "run"
    done = fastkd(*NOISE, "--out", out)
    assert done.returncode == 5, done.stderr
    said = one_sentence(done.stderr.rpartition("continue from")[0])
    assert "three checkpoints in a row" in said and "disk is full" in said
    (left,) = checkpoint.listed(out / "checkpoints")
    checkpoint.verify(left)
    assert not list((out / "checkpoints").glob(".tmp*"))
    roomy = shutil.copytree(out, out.parents[1] / "roomy")
    assert fastkd("run", "--resume", "--out", roomy).returncode == 0
    assert same(roomy, undisturbed)


@pytest.mark.fault("T13")
def test_files_that_may_not_grow(undisturbed, tmp_path):
    """The portable form: from step 3 on no file above 40 kB can be written."""
    done = fastkd(*NOISE, "--out", tmp_path / "run", plant={"do": "no-room", "step": 3, "value": 40_000})
    assert done.returncode == 5, done.stderr
    assert len(warned(tmp_path / "run")) == 3 and all("intact" in text for text in warned(tmp_path / "run"))
    newest = checkpoint.listed(tmp_path / "run" / "checkpoints")[0]
    checkpoint.verify(newest)
    assert newest.name == checkpoint.name_of(2)
    assert fastkd("run", "--resume", "--out", tmp_path / "run").returncode == 0 and same(tmp_path / "run", undisturbed)


@pytest.mark.fault("T13")
@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_full_disk_behind_a_stream_ends_nothing(undisturbed, tmp_path, stream):
    with open("/dev/full", "w") as full:
        done = fastkd(*NOISE, "--out", tmp_path / "run", **{stream: full})
    assert done.returncode == (0 if stream == "stderr" else 3)  # 3: what was asked for on stdout is not there
    assert same(tmp_path / "run", undisturbed)
    if stream == "stdout":
        assert "no space left on device: where the output goes" in one_sentence(done.stderr)


@pytest.mark.fault("T13")
def test_a_reader_of_the_progress_that_goes_away_ends_nothing(undisturbed, tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = fastkd(*NOISE, "--out", tmp_path / "run", stderr=write)
    os.close(write)
    assert done.returncode == 0 and same(tmp_path / "run", undisturbed)


@pytest.mark.fault("T13")
def test_a_log_that_cannot_be_written_ends_nothing(undisturbed, tmp_path):
    (tmp_path / "run" / "events.jsonl").mkdir(parents=True)
    done = fastkd(*NOISE, "--out", tmp_path / "run", "--resume=auto", "--json")
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "run", undisturbed) and json.loads(done.stdout)["epochs"] == 3


# A folder that cannot be written -----------------------------------------------------------------------------------------


@pytest.mark.fault("T14")
def test_a_folder_without_permission(tmp_path):
    """Root may write anywhere, so this child has given that right up."""
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    give_up: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("this is root, and there is no setpriv to be less")
        give_up = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-dac_override,-dac_read_search"]
    for out in (place, place / "below"):
        command = [*give_up, sys.executable, "-m", "fastkd", *NOISE, "--out", str(out)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 3 and "permission is denied" in one_sentence(done.stderr), done.stderr
    assert not list(place.iterdir())


@pytest.mark.fault("T14")
def test_a_read_only_disk(undisturbed, disk):
    place = disk(1 << 20)
    done = subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(done.stderr.strip())
    done = fastkd(*NOISE, "--out", place / "run")
    assert done.returncode == 3 and "it is read-only" in one_sentence(done.stderr), done.stderr


@pytest.mark.fault("T14")
def test_a_disk_that_becomes_read_only(undisturbed, disk, tmp_path):
    """A run is stopped on it and continued there: the probe says so before the first step, and a copy goes on."""
    place = disk(16 << 20)
    assert fastkd(*NOISE, "--out", place / "run", "--time-limit", "0.01s").returncode == 75
    subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True, check=True)
    done = fastkd("run", "--resume", "--out", place / "run")
    said, _, how = done.stderr.partition("continue from")
    assert done.returncode == 3 and "it is read-only" in one_sentence(said) and "fastkd run --resume" in how, done.stderr
    shutil.copytree(place / "run", tmp_path / "run")
    assert fastkd("run", "--resume", "--out", tmp_path / "run").returncode == 0 and same(tmp_path / "run", undisturbed)


@pytest.mark.fault("T14")
def test_errors_of_the_disk_before_the_first_step(tmp_path):
    code = (
        "import errno, os, sys\ndef fsync(fd): raise OSError(errno.EIO, os.strerror(errno.EIO))\n"
        "from fastkd.cli import main\nos.fsync = fsync\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *NOISE, "--out", str(tmp_path / "run")], env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "Input/output error" in one_sentence(done.stderr), done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.fault("T14")
def test_errors_of_the_disk_in_a_later_save(undisturbed, tmp_path):
    done = fastkd(*NOISE, "--out", tmp_path / "run", plant={"do": "io-error", "step": 5})
    assert done.returncode == 5 and "Input/output error" in done.stderr, done.stderr
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", []).manifest["step"] == 4
    assert fastkd("run", "--resume", "--out", tmp_path / "run").returncode == 0 and same(tmp_path / "run", undisturbed)


# Two runs at once -----------------------------------------------------------------------------------------------------


@pytest.mark.fault("T8")
def test_two_in_one_folder(undisturbed, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastkd", *NOISE, "--out", str(out)]
    first = subprocess.Popen(command, env=planted({"do": "sleep", "step": 4, "value": 600}), stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        while not checkpoint.listed(out / "checkpoints") and time.monotonic() < end:
            time.sleep(0.1)
        for words in (["--resume=auto"], ["--resume"]):
            done = fastkd(*NOISE, "--out", out, *words)
            owner = f"in use by process {first.pid} on {os.uname().nodename}"
            assert done.returncode == 2 and owner in one_sentence(done.stderr), done.stderr
    finally:
        first.kill()
        first.communicate()
    assert json.loads((out / "lock").read_text())["pid"] == first.pid
    assert fastkd("run", "--resume", "--out", out).returncode == 0, "the lock of a dead process is taken over"
    assert same(out, undisturbed)


@pytest.mark.fault("T8")
def test_two_launchers_at_once_on_one_host(ranks, undisturbed):
    names = ["beside-1", "beside-2"]
    both = [subprocess.Popen(ranks.command(n), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for n in names]
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert ranks.student(names[0]) == ranks.student(names[1])


# Clocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("T28")
def test_clocks_that_jump(tmp_path):
    """Years back and forth at every look; then the files' times are those of the last century. Retention and resume go by step."""
    code = (
        "import os, random, sys, time\nreal, jump = time.time, random.Random(1)\ntime.time = lambda: real() + jump.uniform(-1e9, 1e8)\n"
        "os.environ['TZ'] = 'Pacific/Kiritimati'; time.tzset()\nfrom fastkd.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "run"
    words = [*NOISE, "--out", str(out)]

    def run(*more: str, tz: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *words, *more], env=environment(TZ=tz), capture_output=True, text=True, timeout=300, check=False
        )

    first = run("--time-limit", "0.01s", tz="America/Los_Angeles")
    assert first.returncode == 75, first.stderr
    for i, path in enumerate(sorted(out.rglob("*"))):
        os.utime(path, (1e6 * (100 - i), 1e6 * (100 - i)))
    done = run("--resume", "--json", tz="Pacific/Pago_Pago")
    assert done.returncode == 0 and "continued from step-00000000" in done.stderr, done.stderr
    told = list(events.read(out / "events.jsonl"))
    epochs = [e for e in told if e["kind"] == "epoch"]
    assert epochs and all(v >= 0 for e in epochs for v in (*e["seconds"].values(), e["wall"])) and json.loads(done.stdout)["wall"] >= 0
    assert "ETA -" not in done.stderr
    assert [int(p.name[5:]) for p in checkpoint.listed(out / "checkpoints")] == [10, 8]


@pytest.mark.fault("T28")
def test_retention_goes_by_step_whatever_the_files_say(tmp_path):
    codes = forked.run(tmp_path / "run", plant={"do": "kill", "rank": 0, "step": 12}, every_steps=2, keep=3)
    assert codes == [-signal.SIGKILL]
    for i, path in enumerate(checkpoint.listed(tmp_path / "run" / "checkpoints")):
        os.utime(path, (1e9 + i, 1e9 + i))  # the newest is the oldest
    assert forked.run(tmp_path / "run", every_steps=2, keep=3) == [0]
    numbers = [int(p.name[5:]) for p in checkpoint.listed(tmp_path / "run" / "checkpoints")]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 3 and numbers[0] > 12
