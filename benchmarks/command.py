"""The command-line parser that all benchmarks share."""

import argparse
from pathlib import Path
from typing import Any

from rwkv_jax.errors import CommandParser

RECORD = "write the measurements and the machine as JSON to this file"
TABLES = "update the tables in a page (.md); write the record (JSON) to any other file"


def parser(file: str, doc: str | None, **settings: Any) -> CommandParser:
    """The parser of a benchmark; its --help shows the module's docstring.

    Args:
        file: the module's `__file__`.
        doc: its `__doc__`.
    """
    return CommandParser(
        prog=f"python -m benchmarks.{Path(file).stem}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )


def record_parser(file: str, doc: str | None, help: str = RECORD, **settings: Any) -> CommandParser:
    """The same, with `--output PATH`, without which nothing is written."""
    made = parser(file, doc, **settings)
    made.add_argument("--output", type=Path, metavar="PATH", help=help)
    return made


def tables_parser(file: str, doc: str | None) -> CommandParser:
    """The same, with `--output PATH …` for pages of the docs and for a record."""
    made = parser(file, doc)
    made.add_argument("--output", type=Path, nargs="+", default=[], metavar="PATH", help=TABLES)
    return made
