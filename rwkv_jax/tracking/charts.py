"""Loss curves as an HTML page, an SVG and a PNG."""

import html
import importlib.util
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_jax.errors import UserError
from rwkv_jax.files import cache_folder, written_whole
from rwkv_jax.text.binidx import append_suffix
from rwkv_jax.tracking.curves import Curve, read_run

POINTS = 800  # maximum points of a drawn curve
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LEFT, RIGHT = 56, 16  # margins of the plot, which is 960 wide
GREY = "#808080"


def _thin(values: np.ndarray) -> np.ndarray:
    """Averages neighbouring points, down to at most POINTS. [points] → [fewer]"""
    edges = np.linspace(0, values.size, min(POINTS, values.size) + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _limits(curves: Sequence[Curve]) -> tuple[float, float, float]:
    """Largest x, lowest and highest y; the highest 2 % of a curve may be cut off at the top."""
    right = max(float(curve.tokens[-1]) for curve in curves)
    low = min(float(curve.trend.min()) for curve in curves)
    high = max(float(np.quantile(_thin(curve.loss), 0.98)) for curve in curves)
    room = 0.04 * (high - low) or 0.1
    return right, low - room, high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten.

    >>> _ticks(0.7, 11.2, about=6)
    [2.0, 4.0, 6.0, 8.0, 10.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= about)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _unit(tokens: float) -> tuple[float, str]:
    return next(
        u for u in ((1e9, "G"), (1e6, "M"), (1e3, "K"), (1.0, "")) if tokens >= u[0] or u[1] == ""
    )


def draw_svg(curves: Sequence[Curve]) -> str:
    """The plot as SVG: axes, each run's losses (faint) and trend, and the reference."""
    width, height, left, right, top, bottom = 960, 480, LEFT, RIGHT, 12, 34
    x_end, y_low, y_high = _limits(curves)
    scale, unit = _unit(x_end)

    def x(tokens):
        return left + tokens / x_end * (width - left - right)

    def y(loss):
        return height - bottom - (loss - y_low) / (y_high - y_low) * (height - top - bottom)

    def path(tokens: np.ndarray, loss: np.ndarray, style: str) -> str:
        points = " ".join(
            f"{a:.1f},{b:.1f}" for a, b in zip(x(_thin(tokens)), y(_thin(loss)), strict=True)
        )
        return f'<polyline points="{points}" fill="none" clip-path="url(#inside)" {style}/>'

    parts = [
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13">',
        f'<clipPath id="inside"><rect x="{left}" y="{top}" width="{width - left - right}" '
        f'height="{height - top - bottom}"/></clipPath>',
    ]
    for tick in _ticks(y_low, y_high, 7):
        parts.append(
            f'<path class="grid" d="M{left} {y(tick):.1f}H{width - right}"/>'
            f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.10g}</text>'
        )
    for tick in _ticks(0, x_end / scale, 9):
        parts.append(
            f'<path class="grid" d="M{x(tick * scale):.1f} {top}V{height - bottom}"/>'
            f'<text x="{x(tick * scale):.1f}" y="{height - bottom + 24}" text-anchor="middle">'
            f"{tick:.10g}{unit if tick else ''}</text>"
        )
    parts.append(
        f'<text x="{width - right - 8}" y="{top + 24}" text-anchor="end">loss over tokens</text>'
    )
    for curve, colour in zip(curves, _colours(curves), strict=True):
        if curve.by_step:
            parts.append(path(curve.tokens, curve.loss, f'stroke="{colour}" stroke-opacity=".3"'))
        dashes = ' stroke-dasharray="6 4"' if curve.reference else ""
        parts.append(path(curve.tokens, curve.trend, f'stroke="{colour}" stroke-width="2"{dashes}'))
        if not curve.by_step:
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}" '
                'clip-path="url(#inside)"/>'
                for a, b in zip(x(_thin(curve.tokens)), y(_thin(curve.loss)), strict=True)
            ]
    parts.append(f'<path id="cursor" d="M0 {top}V{height - bottom}" visibility="hidden"/></svg>')
    return "\n".join(parts)


def _colours(curves: Sequence[Curve]) -> list[str]:
    own = [curve for curve in curves if not curve.reference]
    return [
        GREY if curve.reference else COLOURS[own.index(curve) % len(COLOURS)] for curve in curves
    ]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --line: #ddd; --paper: #fff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ddd; --line: #3a3a3a; --paper: #161616; }} }}
body {{ font: 15px system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1000px; margin: 1.5em auto; padding: 0 1em; }}
svg {{ width: 100%; height: auto; }}
@media (max-width: 600px) {{ svg text {{ font-size: 22px; }} }}
svg text {{ fill: var(--ink); }} .grid {{ stroke: var(--line); }} #cursor {{ stroke: var(--ink); }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25em 1em .25em 0; text-align: right; font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ font-weight: normal; border-bottom: 1px solid var(--line); }}
b {{ display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em; }}
</style></head><body>
{svg}
<table><tr><th>run<th>tokens<th>loss<th>perplexity<th>lowest<th id="where"></tr>
{rows}
</table>
<p>{note}</p>
<script>
const curves = {data}, end = {end}, svg = document.querySelector("svg");
const cursor = document.getElementById("cursor"), where = document.getElementById("where");
const cells = [...document.querySelectorAll("td.at")];
svg.addEventListener("pointermove", event => {{
  const point = new DOMPoint(event.clientX, event.clientY)
    .matrixTransform(svg.getScreenCTM().inverse());
  const tokens = (point.x - {left}) / {inner} * end;
  if (tokens < 0 || tokens > end) return;
  cursor.setAttribute("transform", `translate(${{point.x}})`);
  cursor.setAttribute("visibility", "visible");
  where.textContent = `at ${{(tokens / {scale}).toPrecision(3)}}{unit}`;
  curves.forEach(([x, y], n) => {{
    let i = x.findIndex(value => value >= tokens);
    cells[n].textContent = i < 0 ? "" : y[i].toFixed(4);
  }});
}});
</script></body></html>
"""


def draw_page(curves: Sequence[Curve], live: bool = False) -> str:
    """The HTML page: the plot, a table of the runs, and the values at the cursor.

    Args:
        live: the run is in progress, so the page reloads every 30 seconds.
    """
    end = max(float(curve.tokens[-1]) for curve in curves)
    scale, unit = _unit(end)
    rows = []
    for curve, colour in zip(curves, _colours(curves), strict=True):
        last = float(curve.trend[-1])
        rows.append(
            f'<tr><td><b style="background:{colour}"></b>{html.escape(curve.name)}'
            f"<td>{curve.tokens[-1] / scale:.4g}{unit}<td>{last:.4f}<td>{math.exp(last):.2f}"
            f'<td>{curve.trend.min():.4f}<td class="at"></tr>'
        )
    data = [
        [_thin(curve.tokens).round().tolist(), _thin(curve.trend).round(4).tolist()]
        for curve in curves
    ]
    smoothed = "Bold: moving average; faint: single steps. "
    means = "Dots: means of miniepochs of 40320 samples. "
    return PAGE.format(
        refresh='<meta http-equiv="refresh" content="30">' if live else "",
        title=html.escape(f"loss: {', '.join(curve.name for curve in curves)}"),
        svg=draw_svg(curves),
        rows="\n".join(rows),
        note=(smoothed if any(curve.by_step for curve in curves) else "")
        + (means if not all(curve.by_step for curve in curves) else "")
        + ("The run is in progress; this page reloads every 30 seconds." if live else ""),
        data=json.dumps(data, separators=(",", ":")),
        end=end,
        scale=scale,
        unit=unit,
        left=LEFT,
        inner=960 - LEFT - RIGHT,
    )


def draw_png(curves: Sequence[Curve], path: Path) -> None:
    """Draws the same plot with matplotlib, whose font list is stored in our cache."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    x_end, y_low, y_high = _limits(curves)
    scale, unit = _unit(x_end)
    for curve, colour in zip(curves, _colours(curves), strict=True):
        x = _thin(curve.tokens) / scale
        if curve.by_step:
            axes.plot(x, _thin(curve.loss), color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(
            x,
            _thin(curve.trend),
            color=colour,
            linestyle="--" if curve.reference else "-",
            marker="" if curve.by_step else "o",
            markersize=4,
            label=f"{curve.name}: {curve.trend[-1]:.4f}",
        )
    axes.set(
        xlabel=f"tokens, {unit}" if unit else "tokens",
        ylabel="loss",
        xlim=(0, x_end / scale),
        ylim=(y_low, y_high),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def write_plots(curves: Sequence[Curve], prefix: Path, live: bool = False) -> list[Path]:
    """Writes prefix.html atomically, and prefix.png if matplotlib is installed; returns them."""
    page, picture = output_paths(prefix)
    try:
        with written_whole(page) as temporary:
            temporary.write_text(draw_page(curves, live), "utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            return [page]
        with written_whole(picture) as temporary:
            draw_png(curves, temporary)
    except OSError as error:
        raise UserError(f"{prefix}: {error.strerror}; give another --output") from None
    return [page, picture]


def output_paths(prefix: Path) -> list[Path]:
    return [append_suffix(prefix, ending) for ending in (".html", ".png")]


class LivePlot:
    """The tracker of `train --plot 1`: draws loss.html and loss.png during a run.

    It reads step_log.tsv, so a resumed run is drawn from its beginning. It draws every 30 seconds;
    less often, but at least every five minutes, if drawing takes more than 5 % of the time.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._next = 0.0

    def log(self, step: int, values: dict[str, float]) -> None:
        if time.monotonic() >= self._next:
            self._draw(live=True)

    def close(self) -> None:
        self._draw(live=False)

    def _draw(self, live: bool) -> None:
        began = time.monotonic()
        try:
            write_plots([read_run(self._folder)], self._folder / "loss", live)
        except UserError:  # no loss yet, or no space: a plot does not stop training
            pass
        now = time.monotonic()
        self._next = now + min(max(30.0, 20 * (now - began)), 300.0)
