"""Users' mistakes: an exit code that says the kind, one sentence that says what was found and expected, never a traceback."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastkd import models
from tests.cli.conftest import STUDENT, TINY, environment, one_sentence, sets

OWN = ("--student", "resnet8", "--data", "none", "--mean", "0.5", "--std", "0.5", "--input-size", "16", "--channels", "1")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a resnet8 for 10 classes of 16 x 16 grey images, without metadata."""
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    save_file({k: v.contiguous() for k, v in models.build("resnet8", classes=10, channels=1, input_size=16).state_dict().items()}, path)
    return path


@pytest.mark.fault("T15")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--method", "mues"], 2, ["unknown method 'mues'", "did you mean 'muse'"]),
        (["--recipe", "muse-digit"], 2, ["unknown recipe 'muse-digit'", "muse-digits"]),
        (["--recipe", "gone.toml"], 2, ["gone.toml", "not there"]),
        (["--student", "resnt20"], 2, ["unknown model 'resnt20'", "resnet20"]),
        (["--student", "microsoft/resnet-18"], 2, ["microsoft/resnet-18", "prefix"]),
        (["--student", "tim:resnet18"], 2, ["tim", "timm"]),
        (["--student", "py:gone.py:make"], 2, ["gone.py"]),
        (["--student", "ckpt:nope"], 4, ["there is no 'nope'", "run folder"]),
        (["--set", "method.epoch=3"], 2, ["method.epoch", "method.epochs"]),
        (["--set", "epochs=3"], 2, ["unknown key 'epochs'", "did you mean 'method.epochs'"]),
        (["--set", "method.epochs=many"], 2, ["method.epochs is 'many'", "integer"]),
        (["--set", "method.epochs=0"], 2, ["method.epochs", "1"]),
        (["--set", "method.lr=nan"], 2, ["method.lr is nan", "finite"]),
        (["--set", "method.pool_select=bset"], 2, ["method.pool_select", "best"]),
        (["--set", "method.warmup=500"], 2, ["method.warmup is 500 of", "--set method.epochs=501"]),
        (["--set", "method.warmup=4", "--set", "method.epochs=2"], 2, ["method.warmup is 4 of 2", "--set method.warmup=1"]),
        (["--set", "sead=1"], 2, ["unknown key 'sead'", "seed"]),
        (["--set", "seed"], 2, ["--set seed", "KEY=VALUE"]),
        (["--set", "seed=-1"], 2, ["seed is -1"]),
        (["--set", "teacher=3"], 2, ["teacher"]),
        (["--set", "ops.backend=cdua"], 2, ["cdua", "cuda"]),
        (["--device", "tpu"], 2, ["tpu", "cuda"]),
        (["--teacher", "resnet8"], 2, ["weights"]),
        (["--data", "cifr10", "--teacher", "resnet8"], 2, ["unknown data set 'cifr10'", "did you mean 'cifar10'"]),
        (["--data", "digit"], 2, ["unknown data set 'digit'", "did you mean 'digits'"]),
        (["--set", "data=digit"], 2, ["unknown data set 'digit'", "did you mean 'digits'"]),
        (["--data", "svhn:there"], 2, ["teacher of its own"]),
        (["--classes", "7"], 4, ["has 10 classes", "found --classes 7"]),
        (["--recipe", "cde-digits", "--set", "real=digits"], 2, ["both condensed", "--set condensed=none"]),
        (["--mean", "0.5,0.5", "--std", "0.5,0.5"], 2, ["2", "1"]),
        (["--class-names", "gone.txt"], 4, ["gone.txt"]),
        (["--resume"], 2, ["--out"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_run(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("run", *words)
    sentence = one_sentence(done.stderr)
    assert done.exit_code == code, done.stderr
    assert all(word in sentence for word in said), sentence
    assert not list(tmp_path.iterdir()), "nothing is made before everything has been checked"


@pytest.mark.fault("T15")
@pytest.mark.parametrize(
    "words",
    [
        *(["--precision", "fp8"], ["--seed", "many"], ["--mean", "a,b"], ["--mean", "nan"], ["--time-limit", "0s"]),
        *(["--resume=maybe"], ["--nonsense"], ["extra"]),
    ],
    ids=" ".join,
)
def test_what_click_refuses_is_one_sentence_too(cli, words: list[str]) -> None:
    done = cli("run", *words)
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1
    assert words[0].split("=")[0] in one_sentence(done.stderr)


@pytest.mark.skipif(torch.cuda.device_count() > 90, reason="this machine has that many GPUs")
def test_a_gpu_that_is_not_there(cli) -> None:
    done = cli("run", "--device", "cuda:90")
    assert done.exit_code == 3 and "cuda:90" in one_sentence(done.stderr)


# Model files ----------------------------------------------------------------------------------------------------------


class Marker:
    """Unpickling it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def damaged(kind: str, good: Path, folder: Path) -> Path:
    """A file that is not what its name says."""
    path = folder / f"{kind}{'.pth' if kind in ('html', 'code', 'pickle', 'zip-pickle') else '.safetensors'}"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "header":
        path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    elif kind == "code":
        path.write_text("import torch\nfrom torch import nn\n\n\ndef small(classes, **_):\n    return nn.Linear(64, classes)\n")
    elif kind == "html":
        path.write_text("<!doctype html><html>404 not found</html>")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Marker(folder / "executed")))
    elif kind == "zip-pickle":
        torch.save(Marker(folder / "executed"), path)
    elif kind == "nan":
        net = models.build("resnet8", classes=10, channels=1, input_size=16)
        state = {k: v.contiguous() for k, v in net.state_dict().items()}
        next(v for v in state.values() if v.is_floating_point()).fill_(float("nan"))
        save_file(state, path)
    return path


@pytest.mark.fault("T17")
@pytest.mark.parametrize("kind", ["gone", "directory", "empty", "truncated", "header", "html", "code", "pickle", "zip-pickle", "nan"])
def test_weights_that_are_none(cli, tmp_path: Path, weights: Path, kind: str) -> None:
    path = damaged(kind, weights, tmp_path)
    done = cli("run", "--teacher", "resnet8", "--teacher-weights", path, "--classes", 10, *OWN, "--out", tmp_path / "out")
    assert done.exit_code == 4, done.stderr
    one_sentence(done.stderr)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


@pytest.mark.fault("T17")
@pytest.mark.parametrize(
    ("words", "said"), [(["--classes", "7"], ["7", "10"]), (["--teacher", "resnet20", "--classes", "10"], ["teacher"])]
)
def test_weights_of_another_network(cli, tmp_path: Path, weights: Path, words: list[str], said: list[str]) -> None:
    done = cli("run", "--teacher", "resnet8", "--teacher-weights", weights, *OWN, *words, "--out", tmp_path / "out")
    sentence = one_sentence(done.stderr)
    assert done.exit_code == 4 and all(word in sentence for word in said), done.stderr


@pytest.mark.parametrize(("left_out", "option"), [("--mean", "--mean"), ("--std", "--std"), ("--student", "--student")])
def test_what_is_not_known_is_asked_for_not_guessed(cli, tmp_path: Path, weights: Path, left_out: str, option: str) -> None:
    at = OWN.index(left_out)
    done = cli("run", "--teacher", "resnet8", "--teacher-weights", weights, *OWN[:at], *OWN[at + 2 :], "--out", tmp_path / "out")
    assert done.exit_code == 2 and option in one_sentence(done.stderr), done.stderr


def test_data_of_another_number_of_classes(cli, tmp_path: Path, shared_data: Path) -> None:
    done = cli("run", "--data", f"cifar100:{shared_data / 'cifar100'}", "--recipe", "muse-digits", "--out", tmp_path / "out")
    assert done.exit_code == 4 and "100" in one_sentence(done.stderr), done.stderr


@pytest.mark.fault("T17", "T30")
@pytest.mark.parametrize("command", [["eval", "--data", "digits"], ["models", "--save", "x.safetensors"]])
def test_other_commands_with_a_file_that_is_none(
    cli, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("gone", "directory", "truncated"):
        done = cli(*command, "--model-weights", damaged(kind, weights, tmp_path))
        assert done.exit_code == 4, (kind, done.stderr)
        one_sentence(done.stderr)
    assert not (tmp_path / "x.safetensors").exists()


# Places ---------------------------------------------------------------------------------------------------------------


def test_out_that_is_a_file(cli, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    done = cli("run", *sets(*TINY), "--out", tmp_path / "a")
    assert done.exit_code == 3 and "is a file" in one_sentence(done.stderr)


@pytest.mark.fault("T14")
@pytest.mark.parametrize("place", ["file/below", "/proc/fastkd"])
def test_out_that_cannot_be_written(cli, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    done = cli("run", *sets(*TINY), "--out", tmp_path / place)
    assert done.exit_code == 3 and "cannot be written" in one_sentence(done.stderr), done.stderr


def test_out_with_something_in_it(cli, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("x")
    done = cli("run", *sets(*TINY), "--out", tmp_path / "a")
    assert done.exit_code == 2 and "not empty" in one_sentence(done.stderr)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["thesis.txt"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from fastkd.cli import main
sys.exit(main(sys.argv[2:]))
"""


def limited(limit: int, *words: Any) -> subprocess.CompletedProcess[str]:
    """A command line in a process that cannot write files above `limit` bytes, as on a full disk."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.fault("T13")
def test_no_room_for_anything(tmp_path: Path) -> None:
    done = limited(1000, "run", *sets(*TINY), "--out", tmp_path / "a")
    assert done.returncode == 3 and "cannot be written" in one_sentence(done.stderr)


@pytest.mark.fault("T13")
def test_no_room_for_checkpoints(tmp_path: Path) -> None:
    done = limited(30_000, "run", *sets(*TINY, "checkpoint.every_steps=2"), "--out", tmp_path / "a")
    assert done.returncode == 5, done.stderr
    assert "three checkpoints in a row" in one_sentence(done.stderr) and "--resume" in done.stderr


@pytest.mark.fault("T13")
def test_no_room_for_the_student(tmp_path: Path) -> None:
    done = limited(30_000, "run", *sets(*TINY), "--out", tmp_path / "a")
    assert done.returncode in (3, 5), done.stderr
    one_sentence(done.stderr)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    from click.testing import CliRunner

    from fastkd.cli.app import app

    out = tmp_path_factory.mktemp("finished") / "run"
    words = ["run", "--method", "noise", *sets(*STUDENT, "checkpoint.every_steps=4"), "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(list((out / "checkpoints").glob("step-*"))) == 2
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


@pytest.mark.fault("T9")
@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json", "state.json"])
def test_a_newest_checkpoint_cut_in_half_costs_its_steps_only(cli, copied: Path, name: str) -> None:
    cut(checkpoints(copied)[-1] / name)
    done = cli("run", "--resume", "--out", copied)
    assert done.exit_code == 0, done.stderr
    assert "damaged" in done.stderr and checkpoints(copied)[-1].name in done.stderr


@pytest.mark.fault("T12")
def test_all_checkpoints_cut_in_half(cli, copied: Path) -> None:
    for path in checkpoints(copied):
        cut(path / "state.safetensors")
    done = cli("run", "--resume", "--out", copied)
    assert done.exit_code == 5, done.stderr
    sentence = one_sentence(done.stderr)
    assert "state.safetensors" in sentence and "--out" in sentence
    aside = sorted(p.name for p in (copied / "checkpoints").glob("damaged-step-*"))
    again = cli("run", "--resume", "--out", copied)
    assert again.exit_code == 5 and ", ".join(aside) in one_sentence(again.stderr) and len(aside) == 2
    told = cli("info", "--run", copied)
    assert told.exit_code == 5 and "no checkpoint is left" in told.stdout and all(name in told.stdout for name in aside)
    anew = cli("run", "--resume=auto", "--out", copied, "--json")
    assert anew.exit_code == 0 and "the run starts anew" in anew.stderr and ", ".join(aside) in anew.stderr, anew.stderr
    result = json.loads(anew.stdout)
    assert result["epochs"] == 3 and sum(result["seconds"].values()) <= result["wall"]


def test_a_finished_run_has_nothing_to_continue(cli, copied: Path) -> None:
    done = cli("run", "--resume", "--out", copied, "--json")
    assert done.exit_code == 0 and "the run was already done" in done.stderr, done.stderr
    result = json.loads(done.stdout)
    assert result["epochs"] == 3 and not result["seconds"]


def test_info_finds_the_damage(cli, copied: Path) -> None:
    cut(checkpoints(copied)[-1] / "state.safetensors")
    found = json.loads(cli("info", "--run", copied, "--json").stdout)
    assert [c["good"] for c in found["checkpoints"]] == [False, True]
    assert "state.safetensors" in found["checkpoints"][0]["why"]


@pytest.mark.fault("T15")
@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', '{"method": 3}', '{"sead": 1}'])
def test_a_damaged_configuration(cli, copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    done = cli("run", "--resume", "--out", copied)
    assert done.exit_code in (2, 5) and "config.json" in one_sentence(done.stderr), done.stderr


@pytest.mark.fault("T12")
@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")], ids=["gone", "empty", "file"])
def test_nothing_to_continue(cli, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "a")
    done = cli("run", "--resume", "--out", tmp_path / "a")
    assert done.exit_code == 5 and "no run to continue" in one_sentence(done.stderr), done.stderr


@pytest.mark.fault("T8")
def test_the_lock_of_a_living_run(cli, copied: Path) -> None:
    (copied / "lock").write_text(json.dumps({"pid": os.getppid(), "host": os.uname().nodename}))
    done = cli("run", "--resume", "--out", copied)
    assert done.exit_code == 2 and "in use" in one_sentence(done.stderr)


@pytest.mark.fault("T8")
def test_the_lock_of_a_dead_run(cli, copied: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    (copied / "lock").write_text(json.dumps({"pid": int(dead.stdout), "host": os.uname().nodename}))
    assert cli("run", "--resume", "--out", copied).exit_code == 0


def test_a_teach_run_is_not_continued_by_run(cli, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({"task": "teach", **config}))
    done = cli("run", "--resume", "--out", copied)
    assert done.exit_code == 2 and "fastkd teach" in one_sentence(done.stderr)
