"""Plants a fault inside a step of a rank, where its gradients are taken.

at: [epoch, name, occurrence] of the step; do: "nan" (its terms), "nan-from" (also of all later steps of that name), "no-memory", "sleep"
(value seconds), "stop" (the process is frozen), or "parts" (nothing fails, all of the run's steps are taken in `value` parts);
attempt: which start of the ranks, None: each. timeout: seconds of the process group, in every rank.
"""

import os
import signal
import time
from datetime import timedelta


def plant(do, at=(0, "", 0), rank=0, attempt=0, value=None, timeout=None):
    if "RANK" not in os.environ:
        return
    from fastkd.engine import launch
    from fastkd.method import Method

    if timeout is not None:
        launch.TIMEOUT = timedelta(seconds=timeout)
    if do == "parts":
        seal = Method.seal

        def sealed(method):
            method.pace.parts = value
            seal(method)

        Method.seal = sealed
        return
    now = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if int(os.environ["RANK"]) != rank or (attempt is not None and attempt != now):
        return
    original, (epoch, name, occurrence) = Method._valued, at

    def valued(method, terms, params, share=1.0):
        _, e, step, n = method.rng._key
        here = (e, step, n) == (epoch, name, occurrence)
        if do == "nan-from" and step == name and (e, n) >= (epoch, occurrence):
            terms = {k: v * float("nan") for k, v in terms.items()}
        if here and do == "nan":
            terms = {k: v * float("nan") for k, v in terms.items()}
        elif here and do == "no-memory":
            raise MemoryError("planted")
        elif here and do == "sleep":
            time.sleep(value)
        elif here and do == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(method, terms, params, share)

    Method._valued = valued
