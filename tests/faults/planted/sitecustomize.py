"""Plants a fault in a process, at an exact moment; Python imports this file at start where the tests put its folder on the path.

PLANT is JSON, the arguments of `plant`. Tests that start their processes in another way call it themselves.
"""

import contextlib
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time


def act(do, value):
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "kill-launcher":
        os.kill(os.getppid(), signal.SIGKILL)
    elif do == "signal-launcher":
        os.kill(os.getppid(), value)
    elif do == "signal":
        os.kill(os.getpid(), value)
    elif do == "signal-launcher-twice":
        os.kill(os.getppid(), value)
        time.sleep(1.5)
        os.kill(os.getppid(), value)
        time.sleep(600)
    elif do == "signal-twice":
        os.kill(os.getpid(), value)
        time.sleep(1.5)
        os.kill(os.getpid(), value)
        time.sleep(600)
    elif do == "no-memory":
        raise MemoryError("planted")
    elif do == "sleep":
        time.sleep(value)
    elif do == "raise":
        raise RuntimeError("planted")
    elif do == "exit":
        os._exit(value)
    elif do == "no-room":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (value, resource.RLIM_INFINITY))
    elif do == "io-error":

        def fsync(fd):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        os.fsync = fsync
    else:
        raise ValueError(do)


def plant(do, rank, step=1, at="step", attempt=0, value=None, late=0.0):
    """Do something in one rank (-1: a process that is none) of one start of the ranks, or of some, the `step`-th time that it is `at` a
    place; the process begins `late` seconds late."""
    env = os.environ
    attempts = attempt if isinstance(attempt, list) else [attempt]
    if int(env.get("RANK", "-1")) != rank or int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) not in attempts:
        return
    time.sleep(late)
    seen = [0]

    def here():
        seen[0] += 1
        if seen[0] == step:
            print(f"planted: {at}", file=sys.stderr, flush=True)
            act(do, value)

    PLACES[at](here)


def before(owner, name, here):
    """Be at the place whenever a function is about to be called."""
    original = getattr(owner, name)

    def wrapped(*args, **kw):
        here()
        return original(*args, **kw)

    setattr(owner, name, wrapped)


def after_step(here):
    from fastkd.method import Method

    original = Method.step_ends

    def step_ends(self):
        original(self)
        here()

    Method.step_ends = step_ends


def in_step(here):
    """In a step, when the gradients are there and nothing has moved: of the generator's or of the student's."""
    from fastkd.method import Method

    before(Method, "_step", here)


def in_evaluation(here):
    from fastkd.engine import loop

    before(loop, "evaluate", here)


def measuring_the_teacher(here):
    """Between two batches of the teacher's evaluation, before the first step."""
    from fastkd.engine import evaluation

    execute = importlib.import_module("fastkd.assemble.execute")  # whose name in the package is its function's
    original, measured = evaluation.batches, execute._measured

    def batches(*args, **kw):
        for batch in original(*args, **kw):
            here()
            yield batch

    def within(job, stop):
        evaluation.batches = batches
        try:
            return measured(job, stop)
        finally:
            evaluation.batches = original

    execute._measured = within


def before_write(here):
    """Between two files of a checkpoint."""
    from fastkd.engine import checkpoint

    before(checkpoint, "write_file", here)


def half_written(here):
    """In a file of a checkpoint, half of which is on the disk."""
    from fastkd.engine import checkpoint

    original = checkpoint.write_file

    def write_file(path, data):
        path.write_bytes(data[: len(data) // 2])
        here()
        return original(path, data)

    checkpoint.write_file = write_file


def before_rename(here):
    """When a checkpoint has its manifest and not yet its name; or between the two renames that replace one."""
    before(os, "rename", here)


def before_latest(here):
    """When a checkpoint has its name and LATEST leads to the one before."""
    from fastkd.engine import checkpoint

    before(checkpoint, "write_atomic", here)


def while_pruned(here):
    """When half of an old checkpoint is gone."""
    from fastkd.engine import checkpoint

    original = shutil.rmtree

    def rmtree(path, *args, **kw):
        if os.path.basename(path).startswith("step-"):
            with contextlib.suppress(FileNotFoundError):  # half of it went when the process died here before
                os.remove(os.path.join(path, "state.json"))
            here()
        return original(path, *args, **kw)

    checkpoint.shutil.rmtree = rmtree


def joined(here):
    """When the ranks have met."""
    from fastkd.engine import launch

    original = launch.joined

    @contextlib.contextmanager
    def wrapped(on_gpu):
        with original(on_gpu) as own:
            here()
            yield own

    launch.joined = wrapped


PLACES = {
    "step": after_step, "update": in_step, "evaluation": in_evaluation, "teacher": measuring_the_teacher, "write": before_write,
    "half-write": half_written, "rename": before_rename, "latest": before_latest, "prune": while_pruned, "joined": joined,
}  # fmt: skip


if "PLANT" in os.environ:
    plant(**json.loads(os.environ["PLANT"]))
if "PLANT_INSIDE" in os.environ:
    import inside

    inside.plant(**json.loads(os.environ["PLANT_INSIDE"]))
