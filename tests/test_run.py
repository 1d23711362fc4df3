"""Signals, in a process of their own; what is said of a checkpoint that was not written."""

import signal
import subprocess
import sys
import time

import pytest

from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.run import ONE_PRESS_SECONDS, Saver

WAITING = """
import time
from rwkv_jax.run import Stop
try:
    with Stop(None) as stop:
        print("ready", flush=True)
        while not stop:
            time.sleep(0.01)
        print(stop.reason, flush=True)
        for _ in range(6000):  # a signal just ahead of a long sleep would be seen after it
            time.sleep(0.01)
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
        process.send_signal(signal.SIGINT)  # so soon, it is the first one sent twice
        time.sleep(2 * ONE_PRESS_SECONDS)
        process.send_signal(signal.SIGTERM)  # a second of those changes nothing
        time.sleep(ONE_PRESS_SECONDS)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err.split("\n") == ["", "stopping after this step; Ctrl-C again stops at once", "", ""]


def test_a_signal_counts_though_nobody_reads():
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        time.sleep(2 * ONE_PRESS_SECONDS)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


COMPILING = """
import hashlib
from rwkv_jax.run import Stop
with Stop(None):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)  # as XLA does, for minutes, and asks no one
"""


def test_the_second_interrupt_does_not_wait_for_what_python_waits_for():
    with subprocess.Popen(
        [sys.executable, "-c", COMPILING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "\n"
            assert process.stderr.readline().startswith("stopping after this step")
            time.sleep(2 * ONE_PRESS_SECONDS)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        finally:
            process.kill()


class Failing:
    """Checkpoints of which the save before failed while it was written, and the next may, too."""

    def __init__(self, also_next: bool):
        self.also_next, self.saved = also_next, []
        self.failed = True

    def close(self):
        if self.failed:
            self.failed = False
            raise UserError("5.partial: cannot be written")

    def save(self, step, state, about):
        if self.also_next:
            raise UserError("no space")
        self.saved.append(step)


@pytest.mark.parametrize("also_next", [False, True])
def test_saved_is_said_only_of_what_was(also_next):
    said: list[str] = []
    checkpoints = Failing(also_next)
    saver = Saver(checkpoints, TrainConfig(), said.append)
    saver.save(6, None, None)
    assert checkpoints.saved == ([] if also_next else [6])
    assert saver.finish() is not also_next
    assert len(said) == 1 + also_next and "5.partial" in said[0]
