"""Text files as documents: jsonl, plain text and Parquet; one file, a folder or a pattern.

The extension, in upper or lower case, determines how a file is read:

    .jsonl, .json   each line is a document, a JSON object; its text is the string under `text_key`
    .txt            the file is one document, unchanged
    .parquet        each row is a document; its text is the string in the column `text_key`

`.gz` or `.zst` may follow the first three. Every document has a place, "FILE:LINE" (for Parquet,
the row), with which every error about it begins.
"""

import argparse
import contextlib
import dataclasses
import difflib
import glob
import gzip
import importlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors, written_whole
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import append_suffix

ENDINGS = (".jsonl", ".txt", ".parquet")  # read in a folder; .json is often something else
COMPRESSED = (".gz", ".zst")
KNOWN = ".jsonl, .json and .txt, also with .gz or .zst, and .parquet"
SKIPPED = ".skipped.tsv"  # suffix of the list of skipped lines
_PIECE_BYTES = 1 << 20  # bytes of lines per piece
_PIECE_ROWS = 256

_UTF16 = "UTF-16: convert it with iconv -f UTF-16 -t UTF-8"
_FOREIGN = {  # first bytes of formats that a wrong extension may hide
    b"\x1f\x8b": "gzip: give it the extension .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard: give it the extension .zst",
    b"PAR1": "Parquet: give it the extension .parquet",
    b"PK\3\4": "a zip archive: unpack it",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}


class Text(NamedTuple):
    """A document and its place."""

    where: str
    text: str


class BadLine(NamedTuple):
    """A document that cannot be used: its place, the reason, and its beginning."""

    where: str
    reason: str
    begin: str

    def error(self) -> UserError:
        return UserError(f"{self.where}: {self.reason}; --on_bad_line skip skips it")

    def row(self) -> str:
        """A line of the list of skipped lines."""
        return f"{self.where}\t{self.reason}\t{json.dumps(self.begin, ensure_ascii=False)}\n"


class Piece(NamedTuple):
    """Consecutive documents of a file, not decoded yet.

    Attributes:
        file: path of the file.
        first: line or row of the first document.
        raw: the documents, including blank ones; None is an empty cell.
        nbytes: bytes of the file on disk that were read for these documents (compressed size).
    """

    file: str
    first: int
    raw: list[bytes | None]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text files and how to read them; created by `find`.

    Attributes:
        name: as the user gave it.
        files: in the order of reading.
        text_key: key of a jsonl, or column of a Parquet file, with the text.
        skip_bad: skip lines that cannot be used instead of raising an error.
    """

    name: str
    files: tuple[Path, ...]
    text_key: str = "text"
    skip_bad: bool = False

    @property
    def stem(self) -> str:
        """Default output name: the name of the file or folder without its known extensions."""
        path = Path(self.name)
        if [path] == list(self.files):
            kind, compression = _endings(path)
            return path.name[: len(path.name) - len(kind + compression)]
        return (path if path.is_dir() else path.parent).resolve().name or "text"

    def size(self) -> int:
        """Bytes of all files.

        Raises:
            UserError: a file does not exist.
        """
        return sum(_size(path) for path in self.files)

    def pieces(self) -> Iterator[Piece]:
        """The content of all files in order, in constant memory except for plain text files.

        Raises:
            UserError: a file cannot be read, or its format does not match its extension.
        """
        for path in self.files:
            kind = _endings(path)[0]
            with reporting_os_errors(path, "read"):
                if kind == ".parquet":
                    yield from _row_pieces(path, self.text_key)
                elif kind in (".jsonl", ".json"):
                    yield from _line_pieces(path)
                else:
                    with _open(path) as (file, _):
                        yield Piece(
                            str(path), 1, [_refuse_other_formats(path, file.read())], _size(path)
                        )

    def documents(self, skipped: list[BadLine] | None = None) -> Iterator[Text]:
        """All texts in order, without blank files and lines.

        Args:
            skipped: bad lines are appended to it, if the corpus skips them.

        Raises:
            UserError: as `pieces`; a bad line, if the corpus does not skip them.
        """
        for piece in self.pieces():
            for each in read(piece, self.text_key):
                if isinstance(each, Text):
                    yield each
                elif not self.skip_bad:
                    raise each.error()
                elif skipped is not None:
                    skipped.append(each)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that reads text: --text_key and --on_bad_line."""
    parser.add_argument(
        "--text_key",
        metavar="KEY",
        default="text",
        help="Key of a .jsonl, or column of a .parquet, with the text (text).",
    )
    parser.add_argument(
        "--on_bad_line",
        choices=("stop", "skip"),
        default="stop",
        help="What to do with a line that cannot be used: stop with an error that names it, or "
        "skip it; skipped lines are counted, and listed in a file with the reason (stop).",
    )


@contextlib.contextmanager
def writing_skipped(path: Path) -> Iterator[TextIO]:
    """Opens a list of skipped lines (`BadLine.row`), written atomically when the block ends."""
    with (
        reporting_os_errors(path, "write"),
        written_whole(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        yield file


def skipped_note(path: Path) -> str:
    """A note about a list of skipped lines."""
    with path.open("rb") as file:
        count = sum(1 for _ in file)
    return f"note: bad lines skipped: {count}; {path} lists them"


def find(name: str | Path, text_key: str = "text", on_bad_line: str = "stop") -> Corpus:
    """Finds the text files of `name`: one file, all in a folder, or those of a pattern (`*`).

    A folder is searched recursively for files with an extension in `ENDINGS`, sorted by path;
    hidden files are ignored. Skipped files are reported on standard error.

    Raises:
        UserError: there are none; the message may suggest a file.
    """
    path = Path(name)
    if str(name) == "" or os.path.realpath(path) == "/":
        raise UserError(f"{str(name)!r} is not data: give a text file, a folder or a pattern")
    if path.is_dir():
        found = list(_walk(path))
        files = [file for file in found if is_text(file) and _endings(file)[0] in ENDINGS]
        if not files:
            tokens = [str(file.with_suffix("")) for file in found if file.suffix == ".idx"]
            hint = f"; for the token files in it, give {tokens[0]}" if tokens else ""
            raise UserError(f"{path}: no text in this folder ({KNOWN} are read){hint}")
    elif not path.exists() and re.search(r"[*?[]", str(name)):
        found = [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
        found = [match for match in found if not match.is_dir()]
        files = [file for file in found if is_text(file)]
        if not files:
            raise UserError(f"{name}: matches no text file ({KNOWN} are read)")
    else:
        if not path.exists():
            raise UserError(f"{name}: no such file{_suggestion(path)}")
        if not is_text(path):
            raise UserError(
                f"{path}: is neither a text file (with the extension {KNOWN}) nor the PREFIX of a "
                "PREFIX.bin and PREFIX.idx"
            )
        found = files = [path]
    others = [file.name for file in found if file not in set(files)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        print(
            f"note: {name}: {len(files)} text files; skipped: {', '.join(others[:3])}{more}",
            file=sys.stderr,
        )
    for file in files:
        if file.is_fifo():
            raise UserError(f"{file}: is a pipe, but text is read twice: write it to a file first")
    return Corpus(str(name), tuple(sorted(files)), text_key, on_bad_line == "skip")


def is_text(path: Path) -> bool:
    """Whether a file name has an extension that is read as text."""
    kind, compression = _endings(path)
    return kind in (*ENDINGS, ".json") and not (kind == ".parquet" and compression)


def is_binidx(name: str | Path) -> bool:
    """Whether `name` is a token file or the prefix of one, and not an existing text file."""
    path = Path(name)
    if path.is_file() and is_text(path) or not path.name:
        return False
    exist = [append_suffix(path, ending).is_file() for ending in (".bin", ".idx")]
    return path.suffix in (".bin", ".idx") or (all if path.exists() else any)(exist)


def _endings(path: Path) -> tuple[str, str]:
    """Kind and compression: (".jsonl", ".gz") of X.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    return suffixes[-1] if suffixes else "", compression


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot read: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _suggestion(path: Path) -> str:
    """Suggests an existing file for a missing path: the same name with an extension, or a similar
    name.
    """
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(path.parent) if is_text(Path(name))]
        same = sorted(name for name in names if name.startswith(f"{path.name}."))
        like = same or difflib.get_close_matches(path.name, names, 1, 0.8)
        if like:
            return f"; did you mean {path.with_name(like[0])}?"
    return ", and no token files of that name" if not is_text(path) else ""


def _size(path: Path) -> int:
    with reporting_os_errors(path, "read"):
        return path.stat().st_size


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file; yields the decompressed stream and the raw file, whose position shows the
    progress.
    """
    compression = _endings(path)[1]
    with path.open("rb") as raw:
        if not compression:
            yield raw, raw
            return
        if compression == ".gz":
            module: Any = gzip
            opened: Any = gzip.GzipFile(fileobj=raw)
        else:
            name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
            module = _extra(name, "backports.zstd", path)
            window = {module.DecompressionParameter.window_log_max: 31}
            opened = module.ZstdFile(raw, options=window)
        broken = (EOFError, zlib.error, gzip.BadGzipFile, getattr(module, "ZstdError", EOFError))
        try:
            with opened:
                yield opened, raw
        except broken as error:
            raise UserError(
                f"{path}: cannot be decompressed: {error}; the copy is incomplete or damaged"
            ) from None


def _extra(module: str, package: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{path}: cannot read: {package} is missing: pip install {package} (the extra data)"
        ) from None


def _refuse_other_formats(path: Path, content: bytes) -> bytes:
    """Returns `content`, the beginning of a file, unless it is that of another format.

    Raises:
        UserError: it is; the message names the format.
    """
    for begin, what in _FOREIGN.items():
        if content.startswith(begin):
            raise UserError(f"{path}: is {what}")
    return content


def _line_pieces(path: Path) -> Iterator[Piece]:
    number, read = 1, 0
    with _open(path) as (file, raw):
        while lines := file.readlines(_PIECE_BYTES):
            if number == 1:
                _refuse_other_formats(path, lines[0])
                if b"\0" in lines[0][:4]:  # JSON cannot begin like this
                    raise UserError(f"{path}: is {_UTF16}")
            at = raw.tell() if raw.seekable() else 0
            yield Piece(str(path), number, list(lines), at - read)
            number, read = number + len(lines), at


def _row_pieces(path: Path, text_key: str) -> Iterator[Piece]:
    pyarrow, parquet = (_extra(name, "pyarrow", path) for name in ("pyarrow", "pyarrow.parquet"))
    number, size = 1, _size(path)
    try:
        with parquet.ParquetFile(path) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
            if text_key not in fields:
                raise UserError(
                    f'{path}: has no column "{text_key}"; choose one with --text_key: '
                    + ", ".join(fields)
                )
            kind = fields[text_key]
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise UserError(f'{path}: the column "{text_key}" is {kind}, not text')
            rows = file.metadata.num_rows
            for batch in file.iter_batches(_PIECE_ROWS, columns=[text_key]):
                # As bytes, so that text that is not UTF-8 is a bad row like any other.
                cells = batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                yield Piece(str(path), number, cells.to_pylist(), size * len(cells) // max(rows, 1))
                number += len(cells)
    except (pyarrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be read as Parquet: {reason}") from None


def read(piece: Piece, text_key: str) -> Iterator[Text | BadLine]:
    """The documents of a piece. Blank lines and blank plain files are skipped."""
    kind = _endings(Path(piece.file))[0]
    for number, raw in enumerate(piece.raw, piece.first):
        where = f"{piece.file}:{number}"
        try:
            if raw is None:
                raise UserError("is empty (null)")
            if kind == ".parquet":
                yield Text(where, decode(raw))
            elif not raw.strip():
                continue
            elif kind in (".jsonl", ".json"):
                yield Text(where, json_text(raw, text_key, ": choose one with --text_key"))
            else:
                yield Text(where, decode(raw))
        except UserError as error:
            yield BadLine(where, str(error), (raw or b"")[:200].decode("utf-8", "replace").strip())


def decode(raw: bytes) -> str:
    """Decodes UTF-8, without a byte order mark.

    Raises:
        UserError: the reason, without the place.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start)
        place = f"byte {error.start}" + (f" (line {line + 1})" if line else "")
        raise UserError(
            f"{place} is not UTF-8; convert the file with iconv -f ENCODING -t UTF-8 (Chinese text "
            "is often GB18030)"
        ) from None


def json_text(line: bytes, key: str, hint: str = "") -> str:
    """The string under `key` of a JSON object in a line.

    Args:
        hint: added to the message if the key is missing.

    Raises:
        UserError: the reason, without the place: not UTF-8, not valid JSON, not an object with such
            a string, or half of a surrogate pair.
    """
    text = decode(line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not valid JSON: {error}{_hint(text.strip())}") from None
    if isinstance(record, list):
        raise UserError(f"is a JSON array{_hint('[')}")
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str):
        form = f'is not {{"{key}": "…"}}: it has no string "{key}"'
        if isinstance(record, dict) and record:
            names = [name for name, value in record.items() if isinstance(value, str)]
            form += (
                f"; strings in it: {_listed(names)}{hint}"
                if names
                else (f"; its keys are {_listed(record)}")
            )
        raise UserError(form)
    tokenizer.check(value)
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(json.dumps(name, ensure_ascii=False)[:60] for name in list(names)[:8])


def _hint(line: str) -> str:
    """A hint for a line that is not valid JSON, if the line shows the cause."""
    if line.startswith("["):
        return "; a .jsonl has one object per line: convert an array with jq -c '.[]'"
    if re.search(r"}\s*\r\s*{", line):
        return r"; the lines end in CR only: convert them with tr '\r' '\n' < OLD > NEW"
    if re.search(r"}\s*{", line):
        return "; put each object on its own line, for example with jq -c ."
    if line.startswith("{") and not line.endswith("}"):
        return "; each object has to be on one line: use jq -c ."
    return f" in {line[:30]!a}"
