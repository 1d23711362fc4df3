"""`X.jsonl`, one `{"text": …}` a line, to a binidx token file: one pass, in file order."""

import collections
import concurrent.futures
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rwkv_jax import tokenizer
from rwkv_jax.binidx import BinIdxWriter
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors

_TASK_BYTES = 1 << 20  # of lines that a worker is handed at once
_WORKER_BYTES = 16 << 20  # of file that repay starting one more worker


def read_text(line: bytes, where: str) -> str:
    """The "text" of one line of a jsonl file; `where` ("FILE:LINE") opens the error.

    Raises:
        UserError: not UTF-8, no JSON, or no object with a string "text".
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: is not {{"text": "…"}}: it has no string "text"')
    return text


def progress_bar() -> Progress:
    """A bar with the time left, on standard error."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def tokenize_jsonl(path: Path, prefix: Path) -> None:
    """Writes `prefix.bin` and `prefix.idx`: each line's tokens, then token 0. Shows a progress bar.

    Blank lines are skipped. Memory does not grow with the file. A large file is shared out over the
    cores; the order is the file's.

    Raises:
        UserError: "FILE:LINE: …" for a line that cannot be used; no text at all; not writable.
    """
    with reporting_os_errors(path, "read"):
        total = path.stat().st_size
    workers = min(os.cpu_count() or 1, total // _WORKER_BYTES)
    with BinIdxWriter(prefix) as writer, progress_bar() as bar:
        task = bar.add_task(f"tokenizing {path.name}", total=total)
        for tokens, sizes, nbytes in _tokenized(path, workers):
            writer.append(tokens, sizes)
            bar.advance(task, nbytes)
        if writer.items == 0:
            raise UserError(f'{path}: holds no text; each line should be {{"text": "…"}}')


_Tokenized = tuple[np.ndarray, np.ndarray, int]


def _tokenized(path: Path, workers: int) -> Iterator[_Tokenized]:
    if workers < 2:
        for number, lines in _line_groups(path):
            yield _tokenize_lines(str(path), number, lines)
        return
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # forking a process that runs JAX's threads may hang
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's to report
    ) as pool:
        # A window, not pool.map: that would read the whole file into its queue.
        pending: collections.deque[concurrent.futures.Future[_Tokenized]] = collections.deque()
        try:
            for number, lines in _line_groups(path):
                pending.append(pool.submit(_tokenize_lines, str(path), number, lines))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _line_groups(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """(number of the first line, lines) of about `_TASK_BYTES` each, in order."""
    number = 1
    with reporting_os_errors(path, "read"), path.open("rb") as file:
        while lines := file.readlines(_TASK_BYTES):
            yield number, lines
            number += len(lines)


def _tokenize_lines(path: str, first: int, lines: list[bytes]) -> _Tokenized:
    """Tokens [n] uint16, sizes [documents] int32 of the lines that are not blank, bytes read."""
    documents = []
    for number, line in enumerate(lines, first):
        if line.strip():
            where = f"{path}:{number}"
            text = read_text(line, where)
            try:
                ids = tokenizer.encode(text)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            ids.append(tokenizer.END_OF_DOCUMENT)
            documents.append(np.array(ids, np.uint16))
    sizes = np.array([len(document) for document in documents], np.int32)
    tokens = np.concatenate(documents) if documents else np.empty(0, np.uint16)
    return tokens, sizes, sum(map(len, lines))
