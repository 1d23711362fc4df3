"""Draws docs/architecture.svg: the folders and what they import, read off the source.

    python docs/draw_architecture.py

An arrow that follows from others is omitted: a folder that imports `training` may also import what
`training` imports.
"""

import ast
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "architecture.svg"
WIDTH, HEIGHT, ROW = 960, 34, 78  # of the picture, of a box, between two levels
BASE, COMMANDS, THIN = "config, errors, files", "commands", "data/, convert/"

Graph = dict[str, set[str]]
Point = tuple[float, float]
STEPS = [step / 24 for step in range(1, 24)]  # along an arrow


@functools.cache
def rooms() -> frozenset[str]:
    return frozenset(path.parent.name for path in (ROOT / "rwkv_jax").glob("*/__init__.py"))


def box_of(module: str) -> str | None:
    """The box of a module; None: it is not the project's."""
    package, name = (module.split(".") + [""])[:2]
    if package == "pallas_kernels":
        return package
    if package in ("data", "convert"):
        return THIN
    if package != "rwkv_jax":
        return None
    if name in rooms():
        return name
    path = ROOT / "rwkv_jax" / f"{name}.py"
    return COMMANDS if path.exists() and "run_command(main)" in path.read_text("utf-8") else BASE


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph() -> Graph:
    """Box → the boxes that it imports."""
    found: Graph = {}
    for package in ("rwkv_jax", "pallas_kernels", "data", "convert"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] not in ("__init__", "__main__"):
                box = box_of(".".join(parts)) or ""
                used = {box_of(name) for name in imports(path)} - {None, box}
                found.setdefault(box, set()).update(str(name) for name in used)
    return found


def reduced(edges: Graph) -> Graph:
    """The same graph without the arrows that follow from others."""

    @functools.cache
    def reachable(box: str) -> frozenset[str]:
        return frozenset(edges[box]).union(*(reachable(to) for to in edges[box]))

    return {
        box: {to for to in used if not any(to in reachable(by) for by in used - {to})}
        for box, used in edges.items()
    }


def levels(edges: Graph) -> list[list[str]]:
    """The boxes from the lowest level up, each above all that it imports."""

    @functools.cache
    def level(box: str) -> int:
        return 1 + max(map(level, edges[box]), default=-1)

    boxes = sorted(edges, key=lambda box: (level(box), box))
    return [list(group) for _, group in itertools.groupby(boxes, level)]


def width(box: str) -> int:
    return 8 * len(box) + 24


def curve(start: Point, end: Point) -> list[Point]:
    """Points of an arrow: a cubic Bézier curve that leaves and arrives vertically."""
    (x1, y1), (x2, y2), middle = start, end, (start[1] + end[1]) / 2
    weights = [((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3) for t in STEPS]
    return [
        (a * x1 + b * x1 + c * x2 + d * x2, a * y1 + b * middle + c * middle + d * y2)
        for a, b, c, d in weights
    ]


def crossings(edges: Graph, centre: dict[str, Point]) -> float:
    """How often arrows run behind boxes; then, by a little, how far they go sideways."""
    count = 0.0
    for box, used in edges.items():
        for to in used:
            (x1, y1), (x2, y2) = centre[box], centre[to]
            count += abs(x1 - x2) / 1e5
            for x, y in curve((x1, y1 + HEIGHT / 2), (x2, y2 - HEIGHT / 2)):
                for other in centre.keys() - {box, to}:
                    near_x = abs(x - centre[other][0]) < width(other) / 2 + 6
                    count += near_x and abs(y - centre[other][1]) < HEIGHT / 2 + 4
    return count


def place(edges: Graph) -> dict[str, Point]:
    """The boxes' centres: in each level the order and the shift with the fewest crossings."""
    rows = levels(edges)
    centre: dict[str, Point] = {}

    def put(boxes: tuple[str, ...], height: int, shift: int) -> dict[str, Point]:
        y = (len(rows) - 1 - height) * ROW + ROW / 2
        gap = WIDTH / len(boxes)
        return {box: (gap * (n + 0.5) + shift, y) for n, box in enumerate(boxes)}

    for height, row in enumerate(rows):
        centre |= put(tuple(row), height, 0)
    for height, row in [*enumerate(rows)] * 2:
        choices = itertools.product(itertools.permutations(row), range(-150, 151, 50))
        fits = (put(boxes, height, shift) for boxes, shift in choices)
        inside = [
            found
            for found in fits
            if all(width(box) < 2 * x < 2 * WIDTH - width(box) for box, (x, _) in found.items())
        ]
        centre |= min(inside, key=lambda found: crossings(edges, centre | found))
    return centre


def draw(edges: Graph) -> str:
    shown = reduced(edges)
    centre, height = place(shown), len(levels(shown)) * ROW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="to" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#808080"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for box, used in sorted(shown.items()):
        for to in sorted(used):
            (x1, y1), (x2, y2) = centre[box], centre[to]
            y1, y2 = y1 + HEIGHT / 2, y2 - HEIGHT / 2
            middle = (y1 + y2) / 2
            lines.append(
                f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} '
                f'{x2:.0f} {y2:.0f}" fill="none" stroke="#808080" marker-end="url(#to)"/>'
            )
    for box, (x, y) in sorted(centre.items()):
        fill = "#e8f1fa" if box in rooms() else "#f6efe0"
        lines += [
            f'<rect x="{x - width(box) / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{width(box)}" '
            f'height="{HEIGHT}" rx="6" fill="{fill}" stroke="#505050"/>',
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{box}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    OUTPUT.write_text(draw(graph()), encoding="utf-8")
    print(f"wrote {OUTPUT}")
