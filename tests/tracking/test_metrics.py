"""What a run tells: the log file's format, and lines without a terminal."""

import datetime
import math
import re
import types

import numpy as np
import pytest

from rwkv_jax.tracking import progress
from rwkv_jax.tracking.progress import LossWatch, ProgressLine
from rwkv_jax.tracking.train_log import MiniepochLoss, TrainLog


def test_train_log_has_the_official_format(tmp_path):
    """The reference curve's first two values, at its rates."""
    before = datetime.datetime.now()
    TrainLog(tmp_path, 0, begin=0).add(0, 4.875856, 0.00059977)
    TrainLog(tmp_path, 12, begin=9).add(12, 4.0286206, 6e-5)
    first, second = (tmp_path / "train_log.txt").read_text(encoding="utf-8").splitlines()
    head, date, time, of_run = first.rsplit(" ", 3)
    assert head == f"0 4.875856 {math.exp(4.875856):.4f} 0.00059977"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date) and of_run == "0"
    written = datetime.datetime.fromisoformat(f"{date} {time}")
    assert before <= written <= datetime.datetime.now()
    assert second.startswith("12 4.028621 56.1834 0.00006000 ") and second.endswith(" 3")
    # as a program that plots the file reads it
    assert [len(line.split(" ")) for line in (first, second)] == [7, 7]


def test_a_mean_loss_beyond_float64_can_be_logged(tmp_path):
    TrainLog(tmp_path, 0, begin=0).add(0, 1e6, 1e-3)
    assert (tmp_path / "train_log.txt").read_text().startswith("0 1000000.000000 1014")


def test_a_spike_is_noticed_and_noise_is_not():
    rng, watch = np.random.default_rng(0), LossWatch()
    assert not any(watch.add(3 + 0.1 * noise) for noise in rng.standard_normal(1000))
    assert watch.add(9.0).startswith("loss 9.0000 after a mean of ")
    assert not watch.add(3.0)
    falling = LossWatch()
    assert not any(falling.add(11.0 - step / 100) for step in range(800))


def test_mean_loss_of_a_miniepoch():
    loss = MiniepochLoss()
    assert loss.mean == 0.0
    for value in (4.0, 3.0, 2.0):
        loss.add(value)
    assert (loss.mean, loss.steps) == (3.0, 3)
    loss.reset()
    loss.add(1.5)
    assert loss.mean == 1.5


def test_mfu_is_shown_where_the_peak_is_known(capsys, clock):
    """8,192 tokens a second of the 32,768 that the devices' arithmetic would be enough for."""
    progress = ProgressLine(0, 2, 4096, bar=False, peak=32768.0)
    for step in range(2):
        clock.seconds += 0.5
        progress.show(step, 5.0, 4.5, 6e-4, 0.5)
    assert capsys.readouterr().out.splitlines()[-1].endswith(" MFU 25.0%")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until told."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_lines_without_a_terminal(capsys, clock):
    """Two steps a second of 4096 tokens: a line for the first step, every ten seconds, the last."""
    progress = ProgressLine(0, 100, 4096, bar=None)
    speeds = []
    for step in range(100):
        clock.seconds += 0.5
        speeds.append(progress.show(step, 5 - step / 100, 4.5, 6e-4, 0.5))
    progress.print_line("wrote rwkv-final.pth")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("compiling")
    assert lines[-1] == "wrote rwkv-final.pth"
    assert [line.split()[1] for line in lines[1:-1]] == [
        "1/100", "21/100", "41/100", "61/100", "81/100", "100/100",
    ]  # fmt: skip
    assert lines[1].endswith("norm 0.50")  # one step says nothing about speed
    assert lines[2] == (
        "step 21/100 loss 4.8000 running 4.5000 lr 6.00e-04 norm 0.50 2.00 it/s 8.19 Kt/s "
        "left 0:00:40"
    )
    assert "\x1b" not in "".join(lines)  # no control characters in a log file
    assert speeds[0] == 0.0 and speeds[1:] == pytest.approx([8192.0] * 99)


def test_what_is_shown_is_of_the_last_minute_and_what_is_logged_of_the_step(clock, capsys):
    """Ten slow steps, then fast ones: after more than a minute the slow ones no longer count."""
    progress = ProgressLine(0, 720, 1000, bar=False)
    seconds = [10.0] * 10 + [0.1] * 710
    speeds = []
    for step, took in enumerate(seconds):
        clock.seconds += took
        speeds.append(progress.show(step, 1.0, 1.0, 1e-3, 0.5))
    assert speeds[0] == 0.0
    assert speeds[1:] == pytest.approx([1000 / took for took in seconds[1:]])
    shown = re.findall(r"([\d.]+) Kt/s", capsys.readouterr().out)
    assert shown[8:10] == ["0.10", "2.10"] and shown[-1] == "10.00"  # 105 steps in 50 s


def test_steps_slower_than_a_minute_still_have_a_speed(clock, capsys):
    progress = ProgressLine(7, 10, 1000, bar=False)
    for step in (7, 8, 9):
        clock.seconds += 100.0
        speed = progress.show(step, 1.0, 1.0, 1e-3, 0.5)
    assert speed == pytest.approx(10.0)
    assert "left 0:01:40" in capsys.readouterr().out


def test_bar_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    progress = ProgressLine(0, 4, 64, bar=True)
    progress.show(0, 6.25, 6.25, 1e-3, 0.5)
    progress.print_line("a checkpoint [with brackets]")
    progress.show(3, 6.0, 6.1, 1e-3, 0.5)
    progress.close()
    out = capsys.readouterr().out
    assert re.search(r"norm 0\.50 .* Kt/s left 0:00:00", out)  # nothing is cut off
    assert "a checkpoint [with brackets]" in out and "step 4/4 loss 6.0000" in out
