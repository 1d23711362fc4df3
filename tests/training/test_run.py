"""Signals, in a process of their own; what is said of a checkpoint that was not written."""

import contextlib
import signal
import socket
import subprocess
import sys

import pytest

from rwkv_jax.errors import UserError
from rwkv_jax.training import stopping
from rwkv_jax.training.identity import WEIGHTS, changes, resumed_weights, weights_fingerprint
from rwkv_jax.training.saver import CheckpointWriter

WAITING = """
import time
from rwkv_jax.training import stopping
stopping.ONE_PRESS_SECONDS = 0.0  # any later SIGINT is a second one
try:
    with stopping.Stop(None) as stop:
        print("ready", flush=True)
        while not stop:
            time.sleep(0.01)
        print(stop.reason, flush=True)
        while True:  # a signal just ahead of a long sleep would be seen after it
            time.sleep(0.01)
finally:
    print("cleaned up")
"""


FIRST_WORDS = ["\n", "stopping after this step; Ctrl-C again stops at once\n"]


def started(program: str) -> subprocess.Popen:
    """A process of that program, which has said "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_second_interrupt_leaves_at_once(first):
    with started(WAITING) as process:
        process.send_signal(first)
        assert process.stdout.readline() == f"{first.name}\n"
        assert [process.stderr.readline() for _ in range(2)] == FIRST_WORDS
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "\n")


class Left(Exception):
    """What `os._exit` raises in place of leaving."""


@pytest.mark.parametrize(
    "signals, said, leaves",
    [
        ([(signal.SIGINT, 0.0), (signal.SIGINT, 0.4)], 1, False),  # one press that came twice
        ([(signal.SIGTERM, 0.0), (signal.SIGTERM, 9.0)], 1, False),
        ([(signal.SIGINT, 0.0), (signal.SIGINT, 0.4), (signal.SIGINT, 0.6)], 2, True),
        ([(signal.SIGTERM, 0.0), (signal.SIGINT, 0.6)], 2, True),
        ([(signal.SIGWINCH, 0.0), (signal.SIGWINCH, 9.0)], 0, False),
    ],
)
def test_which_signals_are_a_second_one(signals, said, leaves, monkeypatch):
    """By a clock that the test sets."""
    times, words = iter([time for _, time in signals]), []

    def leave(status):
        raise Left(status)

    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(stopping.os, "_exit", leave)
    monkeypatch.setattr(stopping, "_write_error", words.append)
    sender, receiver = socket.socketpair()
    with sender:
        sender.sendall(bytes(number for number, _ in signals))
        sender.shutdown(socket.SHUT_WR)
        with pytest.raises(Left, match="130") if leaves else contextlib.nullcontext():
            stopping._answer(receiver)
    assert len(words) == said


def test_a_signal_counts_though_nobody_reads():
    with started(WAITING) as process:
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        while process.poll() is None:  # the first of these may come before its answer is written
            process.send_signal(signal.SIGINT)
        assert process.returncode == 130


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.Stop(None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


COMPILING = """
import hashlib
from rwkv_jax.training import stopping
stopping.ONE_PRESS_SECONDS = 0.0
with stopping.Stop(None):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)  # as XLA does, for minutes, and asks no one
"""


def test_the_second_interrupt_does_not_wait_for_what_python_waits_for():
    with started(COMPILING) as process:
        try:
            process.send_signal(signal.SIGINT)
            assert [process.stderr.readline() for _ in range(2)] == FIRST_WORDS
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
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
    saver = CheckpointWriter(checkpoints, 0, 0.0, said.append)
    saver.save(6, None, None)
    assert checkpoints.saved == ([] if also_next else [6])
    assert saver.finish() is not also_next
    assert len(said) == 1 + also_next and "5.partial" in said[0]


# What a run began with, what it is resumed with, whether that is refused, and what is kept.
RESUMED = {
    "the same": ("a", "a", False, "a"),
    "left out": ("a", "", False, "a"),
    "deleted": ("a", "missing", False, "a"),
    "another": ("a", "b", True, "b"),
    "begun with none": ("", "a", True, "a"),
    "begun with none, a wrong name": ("", "missing", True, "missing"),
    "of an earlier version": (None, "a", False, "a"),
    "of an earlier version, left out": (None, "", False, None),
    "of an earlier version, deleted": (None, "missing", False, None),
}


@pytest.mark.parametrize("case", RESUMED)
def test_weights_that_a_run_is_resumed_with(case):
    begun, given, refused, kept = RESUMED[case]
    for then in [{WEIGHTS: begun}] + [{"load_model": "/a/path"}] * (begun is None):
        another, changed = changes(then, {WEIGHTS: given})
        assert (bool(another), changed) == (refused, [])
        assert resumed_weights(then, {WEIGHTS: given}) == kept


def test_a_fingerprint_of_weights_is_of_their_content(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x" * 5000)
    (tmp_path / "b.pth").write_bytes(b"x" * 5000)
    (tmp_path / "c.pth").write_bytes(b"x" * 4999 + b"y")
    (tmp_path / "empty.pth").touch()
    a, b, c, empty = (weights_fingerprint(str(path)) for path in sorted(tmp_path.iterdir()))
    assert a == b and len({a, c, empty}) == 3
    assert weights_fingerprint("") == ""
    assert weights_fingerprint(str(tmp_path / "d.pth")) == "missing"
    assert weights_fingerprint(str(tmp_path)) == "missing"  # a folder without checkpoints
    for name, content in {"checkpoints/7/manifest": b"7", "checkpoints/31/manifest": b"31"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    newest = weights_fingerprint(str(tmp_path))
    assert newest == weights_fingerprint(str(tmp_path / "checkpoints" / "31")) != a
    assert newest != weights_fingerprint(str(tmp_path / "checkpoints" / "7"))
