"""The command-line parser that all benchmarks share."""

import argparse
from pathlib import Path
from typing import Any

from rwkv_jax.errors import CommandParser

RECORD = "write the measurements and the machine as JSON to this file"
TABLES = "update the tables in a page (.md); write the record (JSON) to any other file"


def parser(doc: str | None, **settings: Any) -> CommandParser:
    """The parser of a benchmark, whose --help shows `doc`, the module's docstring."""
    style = argparse.RawDescriptionHelpFormatter
    return CommandParser(description=doc, formatter_class=style, **settings)


def record_parser(doc: str | None, help: str = RECORD, **settings: Any) -> CommandParser:
    """The same, with `--output PATH`, without which nothing is written."""
    made = parser(doc, **settings)
    made.add_argument("--output", type=Path, metavar="PATH", help=help)
    return made


def tables_parser(doc: str | None) -> CommandParser:
    """The same, with `--output PATH …` for pages of the docs and for a record."""
    made = parser(doc)
    made.add_argument("--output", type=Path, nargs="+", default=[], metavar="PATH", help=TABLES)
    return made
