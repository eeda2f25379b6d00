"""Plants a fault in a rank, at an exact step; Python imports this file at start where the tests put its folder on the path.

PLANT is JSON: rank, step (after which it happens), attempt (which start of the ranks), do (a name below), and a value.
"""

import json
import os
import signal
import time


def act(do, value):
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "kill-launcher":
        os.kill(os.getppid(), signal.SIGKILL)
    elif do == "signal-launcher":
        os.kill(os.getppid(), value)
    elif do == "signal-launcher-twice":
        os.kill(os.getppid(), value)
        time.sleep(1.5)
        os.kill(os.getppid(), value)
        time.sleep(600)
    elif do == "no-memory":
        raise MemoryError("planted")
    elif do == "sleep":
        time.sleep(value)
    elif do == "raise":
        raise RuntimeError("planted")
    else:
        raise ValueError(do)


def plant(rank, step, do, attempt=0, value=None):
    env = os.environ
    if "RANK" not in env or int(env["RANK"]) != rank or int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) != attempt:
        return
    from fastkd.method import Method

    original, seen = Method.step_ends, [0]

    def step_ends(self):
        original(self)
        seen[0] += 1
        if seen[0] == step:
            act(do, value)

    Method.step_ends = step_ends


if "PLANT" in os.environ:
    plant(**json.loads(os.environ["PLANT"]))
