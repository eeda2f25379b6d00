"""Several ranks: started by torch's elastic launcher, or joined where torchrun, Kubernetes, Ray or srun has started them.

`launch` runs in the process that the user started and owns the exit code; `joined` is what each rank does first. The protocol
between them is status.json: a rank that must end the run for good writes why and leaves with 0, so that restarts are spent on
crashes alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from fastkd.errors import ConfigError

LAUNCHERS = ("auto", "torchrun", "slurm", "none")
OURS = "FASTKD_LAUNCHED"
"""Set by `launch` for its ranks to its process id and its start (monotonic seconds): exit codes are then the launcher's business."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
TIMEOUT = timedelta(minutes=10)
_PR_SET_PDEATHSIG = 1


def is_rank(launcher: str) -> bool:
    """Whether this process is one of several ranks that something has started already.

    Args:
      launcher: "auto" looks for the variables of torchrun and its like, "torchrun" insists on them, "slurm" reads srun's,
        "none" never joins.
    Raises:
      ConfigError: an unknown launcher, or one whose variables are not there.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError(f"unknown launcher '{launcher}'; expected one of {', '.join(LAUNCHERS)}.")
    if launcher == "slurm":
        _from_slurm(os.environ)
    found = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if launcher == "torchrun" and not found:
        raise ConfigError("--launcher torchrun was given, but RANK and WORLD_SIZE are not set; start it as `torchrun ... -m fastkd run`.")
    return found and launcher != "none"


def _from_slurm(env: Any) -> None:
    """Translate srun's variables into torchrun's, where those are not set."""
    missing = [k for k in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID") if k not in env]
    if missing:
        raise ConfigError(f"--launcher slurm was given, but {missing[0]} is not set; start it with srun, one task a GPU.")
    env.setdefault("RANK", env["SLURM_PROCID"])
    env.setdefault("WORLD_SIZE", env["SLURM_NTASKS"])
    env.setdefault("LOCAL_RANK", env["SLURM_LOCALID"])
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost"
    env.setdefault("MASTER_ADDR", first_host(hosts))
    step = env.get("SLURM_STEP_ID", "0")  # steps of a job may run side by side; ports from 32768 on are the system's
    env.setdefault("MASTER_PORT", str(20000 + (int(env.get("SLURM_JOB_ID", "0")) + int(step if step.isdigit() else 0)) % 12000))


def first_host(hosts: str) -> str:
    """The first name of a SLURM host list: `gpu[07-09,12],b1` → `gpu07`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", hosts)
    return hosts if found is None else found[1] + (found[2] or "")


# A rank ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(on_gpu: bool) -> Iterator[bool]:
    """Be a rank for the duration: process group, own GPU, and a signal if the launcher dies. Yields whether the process is ours to end.

    Where a process group is up (Ray Train), its owner has chosen the GPU and ends the process. It may have no way between CPUs (Ray's is
    NCCL alone), and another timeout: a group of the same ranks beside it has what is needed here.

    Raises:
      ConfigError: the variables of the rendezvous are not there.
    """
    import torch
    import torch.distributed as dist

    from fastkd import ranks

    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if dist.is_initialized():
        beside = dist.new_group(backend=backend, timeout=TIMEOUT)
        with ranks.within(beside):
            yield False
        dist.destroy_process_group(beside)
        return
    if on_gpu:  # a scheduler that gives each rank a GPU of its own shows it nothing else
        torch.cuda.set_device(0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", "0")))
    if elastic():
        _die_with_parent()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=_store(dist), rank=rank, world_size=world, timeout=TIMEOUT)
    yield True
    dist.destroy_process_group()  # all ranks are here; one that came alone, after an error, would wait for the others (NCCL)


def leave(code: int) -> NoReturn:
    """End a rank at once, its process group with it: others may wait in a collective, and the launcher only sees a process that is gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(code)


def elastic() -> bool:
    """Whether torch's elastic launcher, ours or the user's, has started this rank; it starts all ranks again when one leaves with another
    code than 0."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts_left() -> bool:
    """Whether an elastic launcher would start all ranks again after this one has failed."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def time_left(limit: float | None) -> float | None:
    """What is left of a time limit in seconds: under our launcher it counts from the launcher's start, over all restarts."""
    if limit is None or OURS not in os.environ:
        return limit
    return limit - (time.monotonic() - float(os.environ[OURS].split()[1]))


def _store(dist: Any) -> Any:
    """The rendezvous of this attempt. torchrun's agent keeps its store over restarts and its keys carry no attempt number, so a
    restarted rank could read the address of a dead one; a prefix for each attempt keeps them apart."""
    env = os.environ
    missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in env]
    if missing:
        raise ConfigError(f"RANK and WORLD_SIZE are set and {missing[0]} is not; set it, or give --launcher none to run alone.")
    address, port, first = env["MASTER_ADDR"], int(env["MASTER_PORT"]), env["RANK"] == "0"
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
        return dist.PrefixStore(f"fastkd/attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return dist.TCPStore(address, port, int(env["WORLD_SIZE"]), first, TIMEOUT)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the launcher is gone, however it went: no rank is orphaned (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if OURS in os.environ and os.getppid() != int(os.environ[OURS].split()[0]):  # it died while this process was starting
        os.kill(os.getpid(), signal.SIGTERM)


# The launcher ---------------------------------------------------------------------------------------------------------


def launch(ranks: int, argv: Sequence[str], out: Path, *, max_restarts: int, grace: int) -> int:
    """Start `ranks` processes of `python -m fastkd ARGV` on this machine and wait for them.

    Args:
      argv: the command of a rank; each gets the same.
      out: run folder; the output of rank r lies in out/logs.
      max_restarts: how often all ranks are started again after a crash of one. grace: seconds between a stop signal and SIGKILL.
    Returns:
      The run's exit code: that of status.json where the ranks ended it, 1 where they left no word, 128 + n after a signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # a job may have a share of them
    variables = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpus // ranks))),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # each attempt hosts a store of its own, see `_store`
        OURS: f"{os.getpid()} {time.monotonic()}",
    }
    (out / "status.json").unlink(missing_ok=True)  # of an earlier start
    code = 1  # unless the ranks say how it ended
    try:
        with _lent(variables):
            # torchrun's own parser makes the configuration, so that PET_* variables keep working. Port 0: two runs never collide.
            words = ["--nnodes=1", f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}", "--rdzv-backend=c10d"]
            words += ["--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4().hex}", "-m", "fastkd"]
            config, _, _ = config_from_args(get_args_parser().parse_args(words))
            config.signals_to_handle = SIGNALS
            if hasattr(config, "shutdown_timeout"):  # see `grace_of_torch`
                config.shutdown_timeout = grace
            config.logs_specs = DefaultLogsSpecs(log_dir=str(out / "logs"), redirects=Std.ALL, tee=Std.NONE)
            elastic_launch(config, sys.executable)("-u", "-m", "fastkd", *argv)
    except ChildFailedError as e:
        sys.stderr.write(first_failure(e, out))
    except SignalException as e:
        code = 128 + int(e.sigval)
    return code_of(out, code)


def grace_of_torch() -> int | None:
    """Seconds between a stop signal and SIGKILL that this torch's launcher insists on (torch 2.11: 30); None: `launch` decides.

    Raises:
      ImportError: this torch was built without torch.distributed.
    """
    from torch.distributed.elastic.multiprocessing import PContext
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in inspect.signature(LaunchConfig).parameters:
        return None
    return int(inspect.signature(PContext.close).parameters["timeout"].default)


@contextlib.contextmanager
def _lent(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the ranks; afterwards this process has its own environment and signal handlers again."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in SIGNALS.split(","))}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def first_failure(error: Any, out: Path) -> str:
    """Which rank failed first, how, and the end of its log; the other ranks' failures are its consequence."""
    from fastkd.engine import heartbeat

    rank, failure = first_of(error.failures, {rank: _log(out, rank) for rank in error.failures})
    how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    log = _log(out, rank)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:] if log else []
    where = f" (its log: {log})" if log else ""
    said = [f"rank {rank} failed first, with {how}{where}:", *(f"  {line}" for line in lines)]
    return "\n".join([*said, *waited_for(rank, heartbeat.read(out)), ""])


def waited_for(rank: int, beats: list[dict[str, Any]]) -> list[str]:
    """For whom the rank that failed was waiting when it did, in words: it ran into the timeout of another one's silence."""
    from fastkd.engine import heartbeat

    if not any(b["rank"] == rank and b["waiting"] for b in beats):
        return []
    return [f"it waited for others: {heartbeat.sentence(b)}" for b in heartbeat.suspects(beats) if b["rank"] != rank]


def first_of(failures: Mapping[int, Any], logs: Mapping[int, Path | None]) -> tuple[int, Any]:
    """(rank, failure) that the others follow from. torch's times are whole seconds, and a lost peer is noticed within one.

    Within a second, what no peer can cause comes first (SIGKILL, SIGSEGV, …), then exits and aborts (NCCL's watchdog aborts) in the
    order of the logs' last words, then SIGTERM, with which the launcher ends the rest.
    """
    earliest = min(f.timestamp for f in failures.values())

    def order(rank: int) -> tuple[bool, int, int]:
        f, log = failures[rank], logs[rank]
        kind = 2 if f.exitcode == -signal.SIGTERM else 0 if f.exitcode < 0 and f.exitcode != -signal.SIGABRT else 1
        return f.timestamp > earliest + 1, kind, log.stat().st_mtime_ns if log else 0

    rank = min(failures, key=order)
    return rank, failures[rank]


def _log(out: Path, rank: int) -> Path | None:
    """What a rank last wrote to stderr."""
    logs = (out / "logs").glob(f"**/{rank}/stderr.log")
    return max(logs, key=lambda p: p.stat().st_mtime, default=None)


def code_of(out: Path, otherwise: int) -> int:
    """The exit code that the ranks left in status.json; `otherwise` where they left none but that of a crash."""
    try:
        code = int(json.loads((out / "status.json").read_bytes())["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise
    return otherwise if code == 1 else code
