"""Tokenizes a corpus to a binidx token file: one pass, in the order of the text, on all cores."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rwkv_jax.errors import UserError
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import BinIdxWriter, append_suffix
from rwkv_jax.text.corpus import SKIPPED, BadLine, Corpus, Piece, Text, read, writing_skipped

_WORKER_BYTES = 16 << 20  # bytes of text per worker that justify starting it


def progress_bar() -> Progress:
    """A progress bar with the time left, on standard error."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def tokenize(corpus: Corpus, prefix: Path) -> None:
    """Writes `prefix.bin` and `prefix.idx`: each document's tokens, then token 0.

    Shows a progress bar. Memory does not grow with the text, except for a plain text file, which is
    one document. If the corpus skips bad lines, they are listed in `prefix.skipped.tsv` with place,
    reason and the beginning of each, as JSON.

    Raises:
        UserError: "FILE:LINE: …" for a line that cannot be used; there is no text; not writable.
    """
    total = corpus.size()
    workers = min(os.cpu_count() or 1, total // _WORKER_BYTES)
    first, listed = "", append_suffix(prefix, SKIPPED)
    with BinIdxWriter(prefix) as writer, writing_skipped(listed) as rows, progress_bar() as bar:
        task = bar.add_task(f"tokenizing {Path(corpus.name).name}", total=total)
        for tokens, sizes, nbytes, skipped in _tokenized(corpus, workers):
            writer.append(tokens, sizes)
            for bad in skipped:
                rows.write(bad.row())
                first = first or f"{bad.where}: {bad.reason}"
            bar.advance(task, nbytes)
        if writer.items == 0 and first:
            raise UserError(f"{corpus.name}: holds no text: every line was skipped; {first}")
        if writer.items == 0:
            form = f'each line should be {{"{corpus.text_key}": "…"}}'
            raise UserError(f"{corpus.name}: holds no text; {form}")
    if not first:
        listed.unlink()


class _Tokenized(NamedTuple):
    tokens: np.ndarray  # [sum of sizes] uint16
    sizes: np.ndarray  # [documents] int64
    nbytes: int  # bytes read
    skipped: list[BadLine]


def _tokenized(corpus: Corpus, workers: int) -> Iterator[_Tokenized]:
    options = corpus.text_key, corpus.skip_bad
    if workers < 2:
        for piece in corpus.pieces():
            yield _tokenize_piece(piece, *options)
        return
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # forking a process that runs JAX's threads may hang
        initializer=_end_with_parent,
    ) as pool:
        # A window, not pool.map: that would read the whole text into its queue.
        pending: collections.deque[concurrent.futures.Future[_Tokenized]] = collections.deque()
        try:
            for piece in corpus.pieces():
                with _interrupt_blocked():  # inherited by a worker that this starts
                    pending.append(pool.submit(_tokenize_piece, piece, *options))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                f"{corpus.name}: a tokenizing process was killed; if memory ran out, free some and "
                "run the same command again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Blocks SIGINT: Ctrl-C reaches every process of the terminal; only the parent reports it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Ends a worker when its parent has ended for any reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _tokenize_piece(piece: Piece, text_key: str, skip_bad: bool) -> _Tokenized:
    documents, skipped = [], []
    for each in read(piece, text_key):
        if isinstance(each, Text):
            ids = [np.array(ids, np.uint16) for ids in tokenizer.encode_pieces(each.text)]
            documents.append(
                np.concatenate([*ids, np.array([tokenizer.END_OF_DOCUMENT], np.uint16)])
            )
        elif skip_bad:
            skipped.append(each)
        else:
            raise each.error()
    sizes = np.array([len(document) for document in documents], np.int64)
    tokens = np.concatenate(documents) if documents else np.empty(0, np.uint16)
    return _Tokenized(tokens, sizes, piece.nbytes, skipped)
