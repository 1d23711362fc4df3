"""The signals' own process: what a second Ctrl-C does."""

import signal
import subprocess
import sys

import pytest

WAITING = """
import time
from rwkv_jax.run import Stop
try:
    with Stop(None) as stop:
        print("ready", flush=True)
        while not stop:
            time.sleep(0.01)
        print(stop.reason, flush=True)
        time.sleep(60)
finally:
    print("cleaned up")
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_interrupt_leaves_at_once(first):
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == f"{first.name}\n"
        process.send_signal(signal.SIGTERM)  # a second of those changes nothing
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err.split("\n") == ["", "stopping after this step; Ctrl-C again stops at once", "", ""]
