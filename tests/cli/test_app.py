"""The program: help without torch, commands by name, the same behind `python -m fastkd`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benches import suite
from fastkd.cli import exits
from fastkd.cli.app import COMMANDS, app
from fastkd.cli.options import WALK
from fastkd.cli.run import KEYS
from fastkd.config import CondenseConfig, RunConfig, TeachConfig, WalkConfig
from fastkd.errors import STOPPED, FastkdError
from tests.cli.conftest import environment, one_sentence

WITHOUT_TORCH = """
import sys
from fastkd.cli import main
code = main(sys.argv[1:])
heavy = [m for m in ("torch", "numpy", "safetensors", "timm") if m in sys.modules]
sys.exit(f"loaded {heavy}" if heavy else code)
"""

COMPLETING = """
import atexit, sys
sys.argv = ["fastkd"]
atexit.register(lambda: print("torch" in sys.modules))
from fastkd.cli import main
main()
"""


@pytest.mark.fault("T32")
@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in COMMANDS),
        ["methods"],
        ["models"],
        ["methods", "--json"],
        ["completion", "bash"],
    ],
)
def test_needs_no_torch(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("words", [["run", "--meth"], ["run", "--method", "mu"], ["run", "--recipe", "muse"], ["models", "resnet2"], [""]])
def test_tab_needs_no_torch(words: list[str]) -> None:
    completing = {"_FASTKD_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["fastkd", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run([sys.executable, "-c", COMPLETING], env=environment(**completing), capture_output=True, text=True, check=False)
    *found, torch = done.stdout.split()
    assert torch == "False" and found, (done.stdout, done.stderr)
    assert all(words[-1] in f for f in found)


def test_every_command_is_in_help_with_a_line(cli) -> None:
    said = cli("--help").stdout
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in said.splitlines()), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_debug(cli, name: str) -> None:
    done = cli(name, "--help")
    assert done.exit_code == 0 and "--json" in done.stdout and "--debug" in done.stdout


@pytest.mark.parametrize(("typed", "meant"), [("rum", "run"), ("evaluate", "eval"), ("method", "methods")])
def test_unknown_command(cli, typed: str, meant: str) -> None:
    done = cli(typed)
    assert done.exit_code == 2 and f"did you mean '{meant}'" in one_sentence(done.stderr)


def test_unknown_option_names_the_nearest(cli) -> None:
    done = cli("run", "--metod", "muse")
    assert done.exit_code == 2 and "--method" in done.stderr and "Traceback" not in done.stderr


def test_module_is_the_same_program(shell) -> None:
    done = shell("--version")
    assert done.returncode == 0 and done.stdout.startswith("fastkd ")


def test_main_returns_the_exit_code(capsys) -> None:
    from fastkd.cli import main

    assert main(["methods", "--json"]) == 0
    assert "muse" in json.loads(capsys.readouterr().out)
    assert main(["methods", "mues"]) == 2
    assert "did you mean 'muse'" in capsys.readouterr().err


def test_options_write_keys_that_exist() -> None:
    sections = RunConfig.model_fields
    for key in KEYS.values():
        section, _, name = key.partition(".")
        if section == "method":
            continue
        assert section in sections
        assert not name or name in sections[section].annotation.model_fields, key


def test_options_of_tasks_write_keys_that_exist() -> None:
    from fastkd.cli.condense import KEYS as condense_keys
    from fastkd.cli.teach import KEYS as teach_keys

    assert set(teach_keys.values()) <= set(TeachConfig.model_fields)
    assert set(condense_keys.values()) <= set(CondenseConfig.model_fields)


def test_all_that_walk_steps_have_the_same_flags() -> None:
    assert WALK.keys() <= WalkConfig.model_fields.keys()
    for name in ("run", "plan", "teach", "condense"):
        assert WALK.keys() <= {p.name for p in app.get_command(None, name).params}, name


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_script_calls_the_program(cli, shell_name: str) -> None:
    done = cli("completion", shell_name)
    assert done.exit_code == 0 and f"_FASTKD_COMPLETE={shell_name}_complete" in done.stdout
    assert json.loads(cli("completion", shell_name, "--json").stdout)["script"].strip() == done.stdout.strip()


def test_documentation_names_every_command_and_exit_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"| `fastkd {name}" in text for name in COMMANDS)
    codes = {e.exit_code for e in FastkdError.__subclasses__()} | {0, FastkdError.exit_code, exits.OUT_OF_MEMORY, STOPPED}
    codes |= {suite.WRONG, suite.SLOWER, suite.LOST}
    assert all(f"| {code} |" in text for code in codes)
