"""`fastkd run` with several ranks: the process that launches them, and what one of them does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.cli import exits
from fastkd.cli.common import emit, say
from fastkd.cli.follow import Follower
from fastkd.engine import launch
from fastkd.errors import STOPPED, CheckpointError, ConfigError, FastkdError, exit_code

if TYPE_CHECKING:
    from fastkd.config import RunConfig

GRACE = 120
"""Seconds that ranks have for their checkpoint after a stop signal."""


class EndedByAnotherError(FastkdError):
    """What broke here is a consequence: another rank has ended the run, with the code and the reason of `status` (status.json)."""

    def __init__(self, status: dict[str, Any]):
        super().__init__(f"another rank has ended the run: {status.get('reason')}")
        self.exit_code = int(status["code"])


def on_gpu(config: RunConfig) -> bool:
    """Whether the ranks of this run have a GPU each."""
    import torch

    return config.device != "cpu" and torch.cuda.is_available()


def launched(config: RunConfig, gpus: int, words: list[str], out: Path, resume: str, max_restarts: int, as_json: bool) -> int:
    """Start the ranks, draw what they do, and say how it ended.

    Args:
      words: the options that decide the run, as every rank gets them.
    Raises:
      ConfigError: fewer GPUs than asked for, or one named; another run owns the folder. CheckpointError: nothing to resume.
    """
    from fastkd.assemble.execute import nothing_to_resume
    from fastkd.cli import summary, terminal
    from fastkd.engine import events, folder

    refuse_missing_gpus(config, gpus)
    if resume == "must" and not any((out / "checkpoints").glob("step-*")):
        raise CheckpointError(nothing_to_resume(out))
    folder.prepare(out, resume=resume != "no")
    folder.refuse_owned(out)
    # A crash that is not a mistake has its traceback in the log of its rank.
    command = ["run", "--debug", "--out", str(out.resolve()), f"--resume={'must' if resume == 'must' else 'auto'}", *words]
    with terminal.listener(out) as show, Follower(out, show):
        code = launch.launch(gpus, command, out, max_restarts=max_restarts, grace=GRACE)
    status = events.final(out) or {}
    if status.get("state") == "fatal":
        say(f"fastkd: {status.get('reason')}")
    ended = [e for e in events.read(out / "events.jsonl") if e["kind"] in ("done", "stopped")] if (out / "events.jsonl").exists() else []
    if ended and code in (0, STOPPED):
        emit({"code": code, "out": str(out), **ended[-1]["summary"]}) if as_json else summary.show(ended[-1]["summary"], out, code)
    return code


def refuse_missing_gpus(config: RunConfig, gpus: int) -> None:
    """Refuse ranks that would have no GPU, unless the CPU is asked for; then say so."""
    import torch

    if config.device == "cpu":
        say(f"{gpus} ranks on the CPU, talking through gloo")
        return
    if config.device not in ("auto", "cuda"):
        raise ConfigError(f"--gpus {gpus} gives each rank a GPU of its own, and --device {config.device} names one; leave out one of them.")
    found = torch.cuda.device_count()
    if found < gpus:
        raise ConfigError(
            f"--gpus {gpus} was asked for and torch {torch.__version__} sees {found}; expected at most {found}."
            if found
            else f"--gpus {gpus} was asked for and torch {torch.__version__} sees none; add --device cpu to run {gpus} ranks on the CPU."
        )


def one_of_them(config: RunConfig, out: Path, work: Callable[[], int]) -> int:
    """Be a rank. Under our own launcher a rank that must end the run writes why and leaves with 0: restarts are for crashes."""
    from fastkd.engine import events

    ours, began = bool(os.environ.get(launch.OURS)), time.time()
    if ours and events.final(out):
        return 0  # a rank of the attempt before said so

    def said() -> int:
        try:
            return work()
        except Exception as e:
            known, status = exit_code(e) != exits.UNEXPECTED, events.final(out)
            # As a rule a connection that was closed. What an earlier start has left explains nothing.
            if status and status["state"] == "fatal" and status.get("time", 0.0) >= began and not known:
                raise EndedByAnotherError(status) from e
            # While the group still stands: when it falls, the others see in status.json that theirs is no crash.
            if ours and known and status is None:
                events.Events(out).status("fatal", code=exit_code(e), reason=str(e))
            raise

    with launch.joined(on_gpu(config)) as own:
        code = exits.attempted(said)
        if code not in (0, STOPPED):
            code = 0 if ours and events.final(out) else code
            if own:
                launch.leave(code)
    code = 0 if code == STOPPED and launch.elastic() else code  # torchrun would start a stopped run again
    if own:  # gloo's threads may outlive their group, and then end the interpreter's own way out with SIGABRT
        launch.leave(code)
    return code
