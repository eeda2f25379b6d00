"""Teachers and students that are hostile or will not do, through the command line: T16, T17, T18."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import save as save_dcp

from fastkd import models
from tests.cli.conftest import STUDENT, environment, one_sentence, sets

CONSTANTS = ("--mean", "0.5", "--std", "0.5", "--input-size", "16", "--channels", "1", "--classes", "10", "--data", "none")
NOISE = ("run", "--method", "noise", "--student", "resnet8", *CONSTANTS, *sets(*STUDENT))


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {k: v.contiguous() for k, v in models.build("resnet8", classes=10, channels=1, input_size=16).state_dict().items()}


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Nested(Hostile):
    """The same in bytes that torch's own helper opens."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (pickle.dumps(Hostile(self.mark)),)


def hostile(kind: str, folder: Path, mark: Path) -> Path:
    """A file or folder that would run something, or take all memory."""
    path = folder / "teacher.pth"
    if kind == "raw pickle":
        path.write_bytes(pickle.dumps({"state_dict": Hostile(mark)}))
    elif kind == "zipped pickle":
        torch.save({"state_dict": state(), "optimizer": Hostile(mark)}, path)
    elif kind == "nested bytes":
        torch.save({"state_dict": Nested(mark)}, path)
    elif kind == "long header":
        path.write_bytes((1 << 40).to_bytes(8, "little") + b'{"a": 1}')
    elif kind == "lying shape":
        save_file(state(), path)
        told = path.read_bytes()
        assert told.count(b'"shape":[10,64]') == 1
        path.write_bytes(told.replace(b'"shape":[10,64]', b'"shape":[10,99]'))
    elif kind == "DCP folder":
        path = folder / "teacher"
        save_dcp(state(), checkpoint_id=path, no_dist=True)
        (path / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    return path


HOSTILE = ["raw pickle", "zipped pickle", "nested bytes", "long header", "lying shape", "DCP folder"]
MEASURED = """
import resource, sys
from fastkd.cli import main
import fastkd.assemble, fastkd.models.weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[2:])
open(sys.argv[1], "w").write(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024))
sys.exit(code)
"""


@pytest.mark.faults
@pytest.mark.fault("T18")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_teacher_runs_nothing_and_takes_no_memory(tmp_path, kind):
    mark, measured = tmp_path / "executed", tmp_path / "measured"
    path = hostile(kind, tmp_path, mark)
    words = [*NOISE, "--teacher", "resnet8", "--teacher-weights", path, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(measured), *map(str, words)], env=environment(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    one_sentence(done.stderr)
    assert not mark.exists() and not (tmp_path / "out").exists()
    assert int(measured.read_text()) < 200


@pytest.mark.fault("T18")
def test_the_hostile_metadata_of_dcp_would_run_in_torchs_own_reader(tmp_path):
    """What the refusal of DCP folders is for; and that these files are hostile at all."""
    mark = tmp_path / "executed"
    with pytest.raises(Exception):  # noqa: B017 (what it reads is no metadata)
        FileSystemReader(hostile("DCP folder", tmp_path, mark)).read_metadata().state_dict_metadata
    if not mark.exists():
        pytest.skip("this torch does not run what .metadata holds any more: DCP could be read")


@pytest.mark.fault("T18")
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--model", "resnet8", "--data", "digits", "--model-weights"],
        ["models", "resnet8", "--save", "x.safetensors", "--teacher-weights"],
        [*NOISE, "--teacher", "resnet8", "--student-weights"],
        [*NOISE, "--set", "embeddings.source=FILE"],
    ],
    ids=lambda words: words[-1],
)
def test_every_door_is_the_same(cli, tmp_path, monkeypatch, kind, words):
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "executed"
    path = hostile(kind, tmp_path, mark)
    if words[-1].startswith("--"):
        given = [*words, path]
    else:
        given = [*words[:-1], words[-1].replace("FILE", str(path)), "--method", "nayer"]
    if words[0] == "run":
        save_file(state(), "good.safetensors")
        given += ["--teacher", "resnet8", "--teacher-weights", "good.safetensors"]
    done = cli(*given)
    assert done.exit_code in (2, 4), done.stderr
    one_sentence(done.stderr)
    assert not mark.exists() and not Path("x.safetensors").exists()


@pytest.mark.fault("T16")
def test_another_teacher_under_the_same_name_is_refused(cli, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    save_file(state(0), weights)
    words = [*NOISE, "--teacher", "resnet8", "--teacher-weights", weights, "--out", tmp_path / "run"]
    assert cli(*words, "--time-limit", "0.01s", "--set", "poll=1").exit_code == 75
    save_file(state(1), weights)
    done = cli("run", "--resume", "--out", tmp_path / "run")
    assert done.exit_code == 2 and "another teacher: it was " in one_sentence(done.stderr), done.stderr
    save_file(state(0), weights)
    assert cli("run", "--resume", "--out", tmp_path / "run").exit_code == 0


NETWORK = """
from torch import nn

def make(classes, **_):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""


@pytest.mark.fault("T17")
@pytest.mark.parametrize(("method", "code"), [("muse", 2), ("fast", 2), ("nayer", 2), ("cmi", 2), ("deepinversion", 2), ("noise", 0)])
def test_a_teacher_without_batchnorm(cli, tmp_path, method, code):
    (tmp_path / "net.py").write_text(NETWORK)
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    models.save_weights(tmp_path / "teacher.safetensors", scope["make"](10).state_dict())
    teacher = ("--teacher", f"py:{tmp_path / 'net.py'}:make", "--teacher-weights", tmp_path / "teacher.safetensors")
    short = sets(*STUDENT) if method == "noise" else ()
    done = cli("run", "--method", method, "--student", "resnet8", *CONSTANTS, *teacher, *short, "--out", tmp_path / "run")
    assert done.exit_code == code, done.stderr
    if code:
        said = one_sentence(done.stderr)
        assert f"'{method}' needs a teacher with BatchNorm" in said and "noise" in said and not (tmp_path / "run").exists()
