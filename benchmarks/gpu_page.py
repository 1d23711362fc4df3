"""Generates docs/gpu.md from the GPU records in benchmarks/results.

    python -m benchmarks.gpu_page --output docs/gpu.md [--results benchmarks/results]

Records are the NAME_<card>.json that `make gpu-report` leaves, NAME one of `SECTIONS`. A record
with a missing key or a value of the wrong type is refused, as is one of a CPU, or of another card
than its file name says.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import command, machine
from rwkv_jax.errors import UserError, one_line, run_command
from rwkv_jax.files import reporting_os_errors, written_whole

ROOT = Path(__file__).parents[1]
NO_CARDS = ("cpu", "designs")  # wkv7_cpu.json, …: results of other scripts
LONGEST = 10  # kernels that are listed

HEAD = """\
# GPU results

<!-- Written by python -m benchmarks.gpu_page --output docs/gpu.md; do not edit. -->

"""

NOTHING = """\
**Nothing has been run on a GPU yet.** There is no record of one in `benchmarks/results`.

"""

HOW = """\
## How to make these figures

On a machine with an NVIDIA GPU, in a checkout:

```sh
make gpu-report
cp out/gpu/*_nvidia_*.json benchmarks/results/
python -m benchmarks.gpu_page --output docs/gpu.md
```

The first line runs, each under a limit, the kernels' suite, their benchmark, the training step and
its profile, in nine minutes, and leaves a record of each in `out/gpu`. The last line writes this
page.

`make gpu-report OUT=out/rivals ARGS="--stages page --rivals RWKV-LM"` names a checkout of RWKV-LM.
Its CUDA operator and its trainer's step are timed beside ours, on the same inputs, and so is
flash-linear-attention's operator if it is installed. This needs torch with CUDA, nvcc and ninja.
"""

MEANING = """\
- **Share of the floor**: the time in which the card could move the bytes that the operation has to
  read and write, at the bandwidth of a plain copy in the same run, over the time it took. There is
  none where a call is too short to tell kernels from their launch.
- **MFU**: the model's arithmetic, without what is recomputed, over what the data sheet promises
  ([planning](plan.md) says what is counted).
- **Times ours**: a rival's time over ours, of the same run and inputs; above 1 ours is faster. A
  rival whose results differ from ours has no time.

"""

RIVALS = """\
`fla` is flash-linear-attention's chunk_rwkv7, without the map from the raw logit to the decay that
ours includes; `official_cuda` and `official_trainer` are RWKV-LM's operator and its model's step,
the latter with torch's fused AdamW on float32 masters in place of DeepSpeed.

"""


class Record:
    """A file of results, of which each value is asked for by key and kind."""

    def __init__(self, path: Path):
        self.path = path
        with reporting_os_errors(path, "read"):
            text = path.read_text("utf-8")
        try:
            self.values = json.loads(text)
        except ValueError:
            raise UserError(f"{path}: is not JSON") from None
        name, card = self.path.stem[: -len(self.card) - 1], self.card
        if self.text("benchmark") != name:
            raise UserError(f"{path}: benchmark is {self.text('benchmark')}, not {name}")
        if machine.card(self.text("device_kind")) != card:
            raise UserError(f"{path}: device_kind is {self.text('device_kind')}, not {card}")
        if self.get("on_gpu", bool) is not True:
            raise UserError(f"{path}: on_gpu is false: it is of a CPU")

    @property
    def card(self) -> str:
        matched = NAME.fullmatch(self.path.name)
        assert matched, "a record is found by its name"
        return matched[2]

    def get(self, key: str, kind: type | tuple[type, ...], of: Any = None, where: str = "") -> Any:
        """`of`, the whole record if None, is what has the key; `where` it is."""
        holder = self.values if of is None else of
        if not isinstance(holder, dict) or key not in holder:
            raise UserError(f"{self.path}: {where}{key} is missing")
        value = holder[key]
        wrong = not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)
        if wrong or isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self.path}: {where}{key} is {one_line(json.dumps(value))[:60]}")
        return value

    def text(self, key: str, of: Any = None, where: str = "") -> str:
        return escaped(self.get(key, str, of, where))

    def number(self, key: str, of: Any = None, where: str = "") -> float:
        return self.get(key, (int, float), of, where)

    def maybe(self, key: str, of: Any, where: str, show: Callable[[float], str]) -> str:
        """A number that is null where there is none."""
        value = self.get(key, (int, float, type(None)), of, where)
        return "–" if value is None else show(value)

    def rows(self, key: str = "rows") -> list[tuple[dict[str, Any], str]]:
        """Each row, and where it is."""
        rows = self.get(key, list)
        return [(row, f"{key}[{i}].") for i, row in enumerate(rows)]


def escaped(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def milliseconds(value: float) -> str:
    """Of four digits; below 1, thousandths."""
    return f"{value:.{max(0, 3 - max(0, math.floor(math.log10(max(value, 1e-9)))))}f}"


def percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def gib(value: float) -> str:
    return f"{value / 2**30:.1f}"


def table(head: str, rows: list[list[str]]) -> str:
    lines = [head, "|" + "---|" * head.count(" | ") + "---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n\n"


def wkv7(record: Record) -> str:
    """A line for each shape and implementation."""
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row, where in record.rows():
        sizes = (str(record.get(key, int, row, where)) for key in ("batch", "time", "head", "size"))
        name, implementation = (record.text(k, row, where) for k in ("shape", "implementation"))
        cells = lines.setdefault((name, *sizes, f"`{implementation}`"), {})
        direction = record.text("pass", row, where)
        if direction not in ("forward", "forward_backward"):
            raise UserError(f"{record.path}: {where}pass is {direction}")
        if "error" in row:
            cells[direction] = [record.text("error", row, where), "–"]
        else:
            share = record.maybe("of_byte_floor", row, where, percent)
            cells[direction] = [milliseconds(record.number("ms", row, where)), share]
    head = "| shape | B | T | H | N | implementation | forward, ms | share of the floor "
    head += "| forward and backward, ms | share of the floor |"
    none = ["–", "–"]
    rows = [
        [*line, *cells.get("forward", none), *cells.get("forward_backward", none)]
        for line, cells in lines.items()
    ]
    copy = f"A plain copy moves {record.number('copy_gb_s'):.0f} GB/s.\n\n"
    return "### WKV-7\n\n" + copy + table(head, rows)


def train_step(record: Record) -> str:
    rows = []
    for row, where in record.rows():
        cells = [record.text("size", row, where)]
        cells += [str(record.get(key, int, row, where)) for key in OPTIONS]
        if "error" in row:
            rows.append([*cells, "–", record.text("error", row, where), "–", "–", "–"])
            continue
        cells += [
            record.text("precision", row, where),
            milliseconds(record.number("ms", row, where)),
            f"{record.number('tokens_per_s', row, where):,.0f}",
            record.maybe("mfu", row, where, percent),
            record.maybe("peak_bytes", row, where, gib),
        ]
        rows.append(cells)
    head = "| size | ctx_len | micro_bsz | grad_cp | precision | ms a step | tokens/s | MFU "
    text = "### Training\n\n" + table(head + "| peak memory, GiB |", rows)
    command, where = record.values.get("command"), "command."
    if command is not None and "error" not in command:
        speed = record.number("tokens_per_s", command, where)
        sizes = [f"`--{key} {record.get(key, int, command, where)}`" for key in OPTIONS]
        text += f"`python -m rwkv_jax.train` itself, with {', '.join(sizes)}: {speed:,.0f} "
        text += "tokens/s.\n\n"
    return text


OPTIONS = ("ctx_len", "micro_bsz", "grad_cp")


def profile(record: Record) -> str:
    parts = record.get("parts", dict)
    times = {part: record.number(part, parts, "parts.") for part in parts}
    total = sum(times.values()) or 1.0
    rows = [
        [part.replace("_", " "), milliseconds(ms), percent(ms / total)]
        for part, ms in times.items()
    ]
    kernels = []
    for row, where in record.rows("kernels")[:LONGEST]:
        kernels.append(
            [
                f"`{record.text('name', row, where)[:80]}`",
                record.text("part", row, where).replace("_", " "),
                milliseconds(record.number("ms", row, where)),
                percent(record.number("share", row, where)),
                f"{record.number('calls', row, where):g}",
            ]
        )
    step, busy = record.number("step_ms"), percent(record.number("busy_share"))
    size = ", ".join(f"{key} {record.get(key, int)}" for key in OPTIONS)
    return (
        "### Where the time of a step goes\n\n"
        f"{record.text('size')}, {size}: {milliseconds(step)} ms a step under the profiler, the "
        f"GPU busy for {busy} of it.\n\n"
        + table("| part | ms a step | share |", rows)
        + table("| kernel | part | ms a step | share | calls a step |", kernels)
    )


def rivals(record: Record) -> str:
    rows = []
    for row, where in record.rows():
        operator = record.text("what", row, where) == "wkv7"
        name = record.text("implementation", row, where)
        cells = [f"`{name}`", "WKV-7" if operator else "training step", "–", "–"]
        if "pass" in row:
            key = "shape" if operator else "size"
            cells[2] = record.text(key, row, where)
            if not operator:
                cells[2] += "".join(f", {k} {record.get(k, int, row, where)}" for k in OPTIONS)
            cells[3] = record.text("pass", row, where).replace("_", " and ")
        if "error" in row:
            rows.append([*cells, record.text("error", row, where), "–", "–"])
            continue
        cells.append(milliseconds(record.number("ms", row, where)))
        speed = "–" if operator else f"{record.number('tokens_per_s', row, where):,.0f}"
        ratio = "1" if name == "ours" else f"{record.number('ratio', row, where):.2f}"
        rows.append([*cells, speed, ratio])
    head = "| implementation | what | shape | pass | ms | tokens/s | times ours |"
    return "### Beside others\n\n" + RIVALS + table(head, rows)


SECTIONS = {"wkv7": wkv7, "train_step": train_step, "profile": profile, "rivals": rivals}
NAME = re.compile(rf"({'|'.join(SECTIONS)})_(\w+)\.json")


def runs(records: dict[str, Record]) -> str:
    """What each record of a card was made with."""
    rows = []
    for name, record in records.items():
        described = record.get("machine", dict)
        gpu = record.get("gpu", dict, described, "machine.")
        packages = record.get("packages", dict, described, "machine.")
        rows.append(
            [
                f"`{name}`",
                record.text("driver", gpu, "machine.gpu."),
                record.text("jax", packages, "machine.packages."),
                record.text("commit") or "–",
                record.text("date"),
            ]
        )
    return table("| record | driver | jax | commit | date |", rows)


def page(results: Path) -> str:
    """The page of what is in a folder.

    Raises:
        UserError: a record cannot be used, by file and key.
    """
    cards: dict[str, dict[str, Record]] = {}
    for name in SECTIONS:
        for path in sorted(results.glob(f"{name}_*.json")):
            matched = NAME.fullmatch(path.name)
            if matched and matched[1] == name and matched[2] not in NO_CARDS:
                cards.setdefault(matched[2], {})[name] = Record(path)
    if not cards:
        return HEAD + NOTHING + HOW
    text = HEAD + MEANING
    for _, records in sorted(cards.items()):
        text += f"## {next(iter(records.values())).text('device_kind')}\n\n" + runs(records)
        text += "".join(SECTIONS[name](record) for name, record in records.items())
    return text + HOW


def main() -> None:
    parser = command.record_parser(__doc__, "write the page here; else it is printed")
    results = ROOT / "benchmarks" / "results"
    parser.add_argument(
        "--results", type=Path, default=results, metavar="DIR", help="of the records (%(default)s)"
    )
    options = parser.parse_args()
    text = page(options.results)
    if not options.output:
        print(text, end="")
        return
    with reporting_os_errors(options.output, "write"), written_whole(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_command(main)
