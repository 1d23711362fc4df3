"""How commands end: by signals, with standard streams that are closed."""

import os
import signal
import sys

import pytest

from rwkv_jax.errors import UserError, run_command, suppress_stderr


def test_a_notebook_shows_the_line_alone(capsys):
    """IPython's `%run -m` shows the traceback of an exit that is not 0, or what this returns."""

    def main() -> None:
        raise UserError("x: is y")

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: x: is y\n"
    assert caught.value._render_traceback_() == []


@pytest.mark.parametrize(
    ("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130), (None, 0)]
)
def test_signals_run_the_clean_up(name, status):
    cleaned = []

    def main() -> None:
        try:
            if name:
                os.kill(os.getpid(), signal.Signals[name])
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == status and cleaned
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before


def test_nohup_stays(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert caught.value.code == 0


def test_what_is_held_back_may_have_no_place(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    before = os.dup(2)
    os.close(2)
    try:
        with suppress_stderr():
            held = True
    finally:
        os.dup2(before, 2)
        os.close(before)
    assert held


def test_closed_streams_are_empty_or_take_everything(monkeypatch, capfd):
    read = []

    def main() -> None:
        read.append(sys.stdin.read())
        print("x")
        print("y", file=sys.stderr)

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()
    assert (caught.value.code, read) == (0, [""])
