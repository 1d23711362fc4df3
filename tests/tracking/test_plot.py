"""`python -m rwkv_jax.plot` and `train --plot 1`: what is read, what is drawn, and when."""

import json
import re
import struct
import subprocess
import sys
import types
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax import plot
from rwkv_jax.errors import UserError
from rwkv_jax.tracking import charts, curves
from rwkv_jax.tracking.charts import LivePlot, draw_page, draw_svg, write_plots
from rwkv_jax.tracking.curves import read_run, reference
from rwkv_jax.tracking.step_log import StepLog

# The lines of the official trainer, as published with its reference curve.
OFFICIAL = """\
0 4.875856 131.0863 0.00059975 2025-04-24 02:23:42.481256 0
1 4.028621 56.1834 0.00059899 2025-04-24 02:28:16.674463 1
2 3.801625 44.7739 0.00059773 2025-04-24 02:32:51.059568 2
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of 500 steps of 8192 tokens whose loss is 3 + 8/√(step + 1); one is no number."""
    folder = tmp_path / "run <a> [6e-4]"
    folder.mkdir()
    log = StepLog(folder, 0)
    for step in range(500):
        loss = float("nan") if step == 7 else 3 + 8 / (step + 1) ** 0.5
        tokens = (step + 1) * 8192 / 1e9
        log.log(
            step,
            dict.fromkeys(("lr", "kt/s", "grad_norm"), 1.0) | {"loss": loss, "Gtokens": tokens},
        )
    log.close()
    return folder


def test_a_run_by_steps(run):
    curve = read_run(run)
    steps = np.delete(np.arange(500), 7)
    np.testing.assert_allclose(curve.tokens, (steps + 1) * 8192, rtol=1e-6)
    np.testing.assert_allclose(curve.loss, 3 + 8 / np.sqrt(steps + 1), rtol=1e-6)
    assert curve.by_step and curve.trend.shape == curve.loss.shape
    np.testing.assert_allclose(curve.trend[20:], curve.loss[20:], rtol=0.01)  # no lag in the fall
    (run / "train_log.txt").write_text(OFFICIAL)
    assert read_run(run).by_step  # the finer of the two


def test_trend_is_a_mean_of_neighbours():
    noise = np.random.default_rng(0).normal(size=2000)
    trend = curves._moving_average(noise)
    assert trend[1000] == pytest.approx(noise[950:1051].mean())
    assert trend[0] == noise[0] and trend[-1] == pytest.approx(noise[-51:].mean())


def test_a_run_by_miniepochs_and_the_reference(tmp_path):
    (tmp_path / "train_log.txt").write_text(OFFICIAL)
    official, published = read_run(tmp_path), reference()
    np.testing.assert_array_equal(official.loss, published.loss[:3])
    np.testing.assert_array_equal(official.tokens, published.tokens[:3])
    assert official.tokens.tolist() == [(n + 0.5) * 40320 * 512 for n in range(3)]
    assert read_run(tmp_path, ctx_len=4096).tokens[0] == official.tokens[0] * 8
    assert published.loss[-1] == 3.295895 and published.loss.size == 12
    (tmp_path / "train_log.txt").write_text(
        f"NEW RUN 2025-04-24-02-18-58\n{{'n_layer': 12}}\n{{'zero_optimization': {{}}}}\n{OFFICIAL}"
    )
    np.testing.assert_array_equal(read_run(tmp_path).loss, official.loss)
    # A line ends at \n alone: what looks like a miniepoch in a folder's name is none.
    (tmp_path / "train_log.txt").write_text(
        "{'proj_dir': 'a\r7 1.0 b\u20288 1.0 c\x0c9 1.0 d'}\n" + OFFICIAL, "utf-8"
    )
    np.testing.assert_array_equal(read_run(tmp_path).loss, official.loss)
    # A run that went on after a crash writes a miniepoch again: the later line counts.
    (tmp_path / "train_log.txt").write_text(OFFICIAL + "2 3.5 33.1 0.0005 2025-04-25 1:00 2\n")
    assert read_run(tmp_path / "train_log.txt").loss.tolist() == [4.875856, 4.028621, 3.5]


@pytest.mark.parametrize(
    ("changed", "at_most", "agrees"),
    [({}, "0.0000", True), ({1: 0.0099}, "0.0099", True), ({2: -0.0101}, "0.0101", False),
     ({1: float("nan")}, "nan", False)],
)  # fmt: skip
def test_the_verdict_beside_the_reference(tmp_path, changed, at_most, agrees):
    rows = {number: curves.REFERENCE[number] + changed.get(number, 0) for number in range(3)}
    lines = [f"{number} {loss:.6f} 1 0.0006 2025-04-24 02:23:42 0" for number, loss in rows.items()]
    (tmp_path / "train_log.txt").write_text("\n".join([*lines, "40 3.0 1 0.0006 x y 0"]) + "\n")
    text = curves.verdict(tmp_path)
    assert (
        f"largest difference {at_most}: {'agrees' if agrees else 'does not agree'} with it" in text
    )
    assert "within 0.01" in text and len(text.splitlines()) == 6
    for number, change in changed.items():
        assert text.splitlines()[2 + number].split()[-1] == f"{change:+.4f}"
    (tmp_path / "train_log.txt").write_text("40 3.0 1 0.0006 x y 0\n")
    with pytest.raises(UserError, match="has none of the miniepochs 0 to 11"):
        curves.verdict(tmp_path)


def test_the_lines_are_where_the_losses_are(run):
    """The picture, read back: axis labels give the scale, the points give the losses."""
    curve = read_run(run)
    picture = xml.etree.ElementTree.fromstring(draw_svg([curve, reference()]))
    space = "{http://www.w3.org/2000/svg}"
    labels = [
        (float(text.get("x")), float(text.get("y")), text.get("text-anchor"), text.text)
        for text in picture.iter(f"{space}text")
    ]
    up = [
        (y - 4, float(text))
        for _, y, anchor, text in labels
        if anchor == "end" and text != "loss over tokens"
    ]
    across = [
        (x, float(text.removesuffix("M")) * 1e6)
        for x, _, anchor, text in labels
        if anchor == "middle"
    ]
    lines = [
        np.array([point.split(",") for point in line.get("points").split()], float)
        for line in picture.iter(f"{space}polyline")
    ]
    assert len(lines) == 3  # steps and trend of the run; the reference
    for line, tokens, loss in (
        (lines[0], curve.tokens, curve.loss),
        (lines[1], curve.tokens, curve.trend),
        (lines[2], reference().tokens, reference().loss),
    ):
        (x, y), across_by, up_by = line.T, np.array(across).T, np.array(up).T
        np.testing.assert_allclose(np.polyval(np.polyfit(*across_by, 1), x), tokens, atol=2e5)
        np.testing.assert_allclose(np.polyval(np.polyfit(*up_by, 1), y), loss, atol=6e-3)


def test_the_page_is_in_one_piece(run):
    page = draw_page([read_run(run), reference()])
    assert not re.search(r"(src|href)\s*=|url\((?!#)|@import|fetch\(", page)
    assert "run &lt;a&gt; [6e-4]" in page and "run <a>" not in page
    assert "http-equiv" not in page and "http-equiv" in draw_page([reference()], live=True)
    data = json.loads(re.search(r"const curves = (.*?), end", page)[1])
    assert data[1][1] == pytest.approx(reference().loss, abs=1e-4)
    assert page.count('<td class="at">') == 2 and "3.2959<td>27.00" in page


def test_many_steps_make_a_small_page():
    tokens = np.arange(1, 200_001) * 8192.0
    loss = 3 + 8 / np.sqrt(tokens / 8192)
    assert len(draw_page([curves.Curve("long", tokens, loss, loss, True)])) < 60_000


def test_one_step_can_be_drawn():
    one = np.array([11.0])
    for curve in (
        curves.Curve("run", one * 512, one, one, True),
        curves.Curve("x", one, one, one, False),
    ):
        assert "polyline" in draw_page([curve])


def test_files_appear_whole(run, tmp_path):
    page, picture = write_plots([read_run(run)], tmp_path / "a.b")
    assert (page.name, picture.name) == ("a.b.html", "a.b.png")
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == (960, 480)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        page.name,
        picture.name,
    ]
    with pytest.raises(UserError, match="give another --output"):
        write_plots([read_run(run)], tmp_path / "missing" / "loss")


def test_without_matplotlib_the_page_is_drawn(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["plot", str(run), "--output", str(tmp_path / "loss")])
    plot.main()
    assert (tmp_path / "loss.html").exists() and not (tmp_path / "loss.png").exists()
    assert "pip install matplotlib" in capsys.readouterr().out


def test_the_command(run, tmp_path):
    arguments = [str(run), "--reference", "--output", str(tmp_path / "both")]
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_jax.plot", *arguments],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{run}: 4,096,000 tokens, loss 3.3" in done.stdout
    assert "not compared: " in done.stdout  # there is not a train_log.txt
    assert "official 0.1b on MiniPile" in (tmp_path / "both.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; give a run's folder"),
        ("", "has no loss yet"),
        ("step loss\n1 2\n", "is not a train_log.txt"),
        ("0 nan nan\n", "has no loss yet"),
        ("0\n", "is not a train_log.txt"),
    ],
)
def test_what_is_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "train_log.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["--reference", "--ctx_len", "0"]])
def test_wrong_command_lines(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot", *arguments])
    with pytest.raises(UserError):
        plot.main()


def test_a_live_plot_follows_the_run(run, monkeypatch):
    clock = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(charts.time, "monotonic", lambda: clock.seconds)
    drawn = []
    monkeypatch.setattr(charts, "write_plots", lambda *given: drawn.append((clock.seconds, given)))
    live = LivePlot(run)
    for step in range(100):
        live.log(step, {})
        clock.seconds += 1.0
    live.close()
    assert [when for when, _ in drawn] == [1000, 1030, 1060, 1090, 1100]
    assert {given[1] for _, given in drawn} == {run / "loss"}
    assert [given[2] for _, given in drawn] == [True] * 4 + [False]


@pytest.mark.parametrize(("cost", "pause"), [(0.1, 30), (3, 60), (40, 300)])
def test_a_slow_plot_is_drawn_less_often(run, monkeypatch, cost, pause):
    clock = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(charts.time, "monotonic", lambda: clock.seconds)
    drawn = []

    def draw(*_):
        drawn.append(clock.seconds)
        clock.seconds += cost

    monkeypatch.setattr(charts, "write_plots", draw)
    live = LivePlot(run)
    while len(drawn) < 2:
        live.log(0, {})
        clock.seconds += 0.5
    assert drawn[1] - drawn[0] - cost == pytest.approx(pause, abs=0.6)


def test_a_picture_never_stops_a_run(tmp_path):
    live = LivePlot(tmp_path / "missing")
    live.log(0, {})
    live.close()


def test_a_last_line_that_was_cut(tmp_path):
    log = tmp_path / "train_log.txt"
    log.write_text("0 4.875856 131.0 0.0006 t 0\n1 4.0")
    assert curves.read_run(log).loss.tolist() == [4.875856]
    log.write_text("0 4.875856 131.0 0.0006 t 0\n1 4.028621 56.")
    assert curves.read_run(log).loss.tolist() == [4.875856, 4.028621]


@pytest.mark.parametrize(
    "junk", [b"\0" * 100, b"\0\0\n", b"\xff\xfe\n", b"1 4.0\0\0\n", b"1\n"], ids=range(5)
)
def test_what_a_crash_left_is_passed_over(tmp_path, junk):
    log = tmp_path / "train_log.txt"
    for content in (
        b"0 4.5 90.0 0.0006 t 0\n" + junk,
        junk.rstrip(b"\n") + b"\n0 4.5 90.0 0 t 0\n",
    ):
        log.write_bytes(content)
        assert curves.read_run(log).loss.tolist() == [4.5]
