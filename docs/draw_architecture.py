"""Draws docs/architecture.svg: the folders and what they import, read off the source.

    python docs/draw_architecture.py

An arrow that follows from two others is left out: who imports `training` may import what it does.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "architecture.svg"
COMMANDS = ("train", "generate", "evaluate", "plan", "plot", "doctor")
WIDTH, BOX, ROW = 960, (118, 34), 78

Graph = dict[str, set[str]]


def node_of(module: str) -> str | None:
    """The box that a module belongs to: a room, the commands, or a top-level package."""
    parts = module.split(".")
    if parts[0] in ("data", "convert", "pallas_kernels"):
        return parts[0] if parts[0] == "pallas_kernels" else "data, convert"
    if parts[0] != "rwkv_jax":
        return None
    if len(parts) == 1 or parts[1] not in rooms() | {*COMMANDS, "cli", "__main__"}:
        return "config, errors, files"
    return parts[1] if parts[1] in rooms() else "commands"


@functools.cache
def rooms() -> frozenset[str]:
    return frozenset(path.parent.name for path in (ROOT / "rwkv_jax").glob("*/__init__.py"))


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
            if parts[-1] == "__init__":
                continue
            node = node_of(".".join(parts)) or ""
            used = {node_of(name) for name in imports(path)} - {None, node}
            found.setdefault(node, set()).update(str(name) for name in used)
    return found


def reachable(edges: Graph, start: str) -> set[str]:
    direct = edges.get(start, set())
    return direct.union(*(reachable(edges, node) for node in direct))


def reduced(edges: Graph) -> Graph:
    """The same graph without the arrows that follow from others."""
    return {
        node: {to for to in used if not any(to in reachable(edges, by) for by in used - {to})}
        for node, used in edges.items()
    }


def draw(edges: Graph) -> str:
    """The picture, each box above all that it imports."""

    @functools.cache
    def depth(node: str) -> int:
        return 1 + max(map(depth, edges.get(node, set())), default=-1)

    levels: dict[int, list[str]] = {}
    for node in sorted({*edges, *(to for used in edges.values() for to in used)}):
        levels.setdefault(depth(node), []).append(node)
    top, height = max(levels), (max(levels) + 1) * ROW
    centre: dict[str, tuple[float, float]] = {}

    def below(node: str) -> float:
        """The mean place of what a box imports; in this order fewer arrows cross."""
        places = [centre[to][0] for to in reduced(edges).get(node, set())]
        return sum(places) / len(places) if places else 0.0

    for level in sorted(levels):
        nodes = sorted(levels[level], key=below)
        for place, node in enumerate(nodes):
            x = WIDTH * (2 * place + 1) / (2 * len(nodes))
            centre[node] = x, (top - level) * ROW + ROW / 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="to" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#808080"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for node, used in sorted(reduced(edges).items()):
        for to in sorted(used):
            (x1, y1), (x2, y2) = centre[node], centre[to]
            y1, y2 = y1 + BOX[1] / 2, y2 - BOX[1] / 2
            middle = (y1 + y2) / 2
            lines.append(
                f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} '
                f'{x2:.0f} {y2:.0f}" fill="none" stroke="#808080" marker-end="url(#to)"/>'
            )
    for node, (x, y) in centre.items():
        width = max(BOX[0], 8 * len(node) + 16)
        fill = "#e8f1fa" if node in rooms() else "#f6efe0"
        lines += [
            f'<rect x="{x - width / 2:.0f}" y="{y - BOX[1] / 2:.0f}" width="{width}" '
            f'height="{BOX[1]}" rx="6" fill="{fill}" stroke="#505050"/>',
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{node}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    OUTPUT.write_text(draw(graph()), encoding="utf-8")
    print(f"wrote {OUTPUT}")
