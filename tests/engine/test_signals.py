"""Stop signals in a process of its own: what a second one does, wherever the process stands."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from tests.cli.conftest import environment

SENDER = """
    import ctypes, os, signal, sys, threading, time
    from fastkd.engine.signals import watched

    def send():
        for number, pause in {signals}:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    def stuck():
        lock, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)

    with watched() as stop:
        thread = threading.Thread(target=send)
        thread.start()
        {main}
    sys.exit(0 if stop.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 1)
"""


def child(signals: list[tuple[int, float]], main: str) -> int:
    code = textwrap.dedent(SENDER).format(signals=[(int(n), pause) for n, pause in signals], main=main)
    return subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=False).returncode


@pytest.mark.fault("T5")
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_even_where_no_handler_can_run(second):
    assert child([(signal.SIGTERM, 1.3), (second, 0.0)], "stuck()") == 128 + second


def test_the_same_stop_come_by_two_ways_is_one():
    assert child([(signal.SIGTERM, 0.2), (signal.SIGTERM, 0.0)], "thread.join()") == 0
