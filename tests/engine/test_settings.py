"""Settings: each key of the configuration that the engine is to know arrives there, whichever command walks the steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastkd import assemble, config
from fastkd.config import CheckpointConfig, CondenseConfig, TeachConfig, WalkConfig
from fastkd.engine import loop, probe
from fastkd.engine.settings import Settings
from fastkd.tasks.condense import condense
from fastkd.tasks.plan import plan
from fastkd.tasks.teach import teach

OTHER = {
    "seed": 7,
    "device": "cpu",
    "precision": "bf16",
    "deterministic": True,
    "poll": 3,
    "graphs": "off",
    "checkpoint.every_minutes": 2.5,
    "checkpoint.every_steps": 11,
    "checkpoint.keep": 5,
}
"""Every key of `WalkConfig` with a value that is not its default."""
ARRIVED = {
    "seed": 7, "precision": "bf16", "deterministic": True, "poll": 3, "graphs": False, "every_minutes": 2.5, "every_steps": 11, "keep": 5,
}  # fmt: skip
"""What `Settings` then has; the device is `Given`'s."""
SMALL = {"name": "noise", "epochs": 1, "n_images": 64, "kd_steps": 1, "kd_batch": 16}


class ArrivedError(Exception):
    """Stops a command where the engine begins; its argument is the `Settings` that came."""


def stop(settings: Settings) -> None:
    raise ArrivedError(settings)


def run(values: dict[str, Any], out: Any) -> None:
    assemble.distil(config.resolve(None, {"method": SMALL, **values}), out)


def planned(values: dict[str, Any], out: Any) -> None:
    plan(config.resolve(None, {"method": SMALL, **values}))


def taught(values: dict[str, Any], out: Any) -> None:
    teach(TeachConfig(**{"model": "lenet5_half", "epochs": 1, "batch": 64, "input_size": 32, **values}), out)


def condensed(values: dict[str, Any], out: Any) -> None:
    condense(CondenseConfig(**{"ipc": 1, "epochs": 1, "iterations": 1, "eval_steps": 1, **values}), out)


def arrived(command: Any, values: dict[str, Any], out: Any, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that a command hands to the engine."""
    monkeypatch.setattr(loop, "run", lambda method, settings, *rest, **more: stop(settings))
    monkeypatch.setattr(probe, "probe", lambda method, given, settings, **more: stop(settings))
    with pytest.raises(ArrivedError) as caught:
        command(values, out)
    found = caught.value.args[0]
    assert isinstance(found, Settings)
    return found


def test_the_values_here_are_of_every_key_and_none_is_a_default() -> None:
    defaults = {key: value for key, value in WalkConfig().model_dump().items() if key != "checkpoint"}
    defaults |= {f"checkpoint.{key}": value for key, value in CheckpointConfig().model_dump().items()}
    assert defaults.keys() == OTHER.keys() and all(OTHER[key] != value for key, value in defaults.items())


@pytest.mark.parametrize("command", [run, planned, taught, condensed])
def test_every_key_arrives(command, tmp_path, monkeypatch) -> None:
    values: dict[str, Any] = {}
    for key, value in OTHER.items():
        values = config.merge(values, config.nested(key, value))
    found = arrived(command, values, tmp_path / "run", monkeypatch)
    assert {name: getattr(found, name) for name in ARRIVED} == ARRIVED
    assert found.global_bn and found.data is not None and found.data.images.device == torch.device("cpu")


@pytest.mark.parametrize("command", [run, planned])
def test_batchnorm_of_each_rank_arrives(command, tmp_path, monkeypatch) -> None:
    assert not arrived(command, {"ranks": {"bn": "rank"}, "device": "cpu"}, tmp_path / "run", monkeypatch).global_bn


def test_networks_are_prepared_as_the_settings_say(tmp_path, monkeypatch) -> None:
    seen, prepare = [], loop.prepare
    monkeypatch.setattr(loop, "prepare", lambda *a, global_bn, **k: seen.append(global_bn) or prepare(*a, global_bn=global_bn, **k))
    arrived(run, {"ranks": {"bn": "rank"}}, tmp_path / "run", monkeypatch)
    arrived(run, {}, None, monkeypatch)
    assert seen == [False, True]


def test_a_key_that_settings_do_not_have_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("fastkd.engine.settings.ELSEWHERE", frozenset({"graphs", "checkpoint"}))
    with pytest.raises(TypeError, match="'device'"):
        Settings.of(WalkConfig(), precision="fp32")
