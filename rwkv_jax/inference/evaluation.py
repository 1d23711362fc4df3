"""Measures a model on text, LAMBADA or the arithmetic task.

All three tasks need the same from the model: the probability of each token of a document given the
tokens before it, and whether it is the argmax. Greedy decoding gives an answer exactly if every
token of the answer is the argmax after those before it, so nothing has to be generated.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_jax.errors import UserError
from rwkv_jax.inference.decoder import NOT_FINITE
from rwkv_jax.inference.scoring import Document, SpanScore, in_groups, score
from rwkv_jax.inference.tasks import TASKS, item_documents
from rwkv_jax.model.rwkv7 import RWKV7
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import open_binidx
from rwkv_jax.text.corpus import (
    SKIPPED,
    BadLine,
    Corpus,
    find,
    is_binidx,
    is_text,
    skipped_note,
    writing_skipped,
)
from rwkv_jax.text.tokenization import progress_bar


class _Totals(NamedTuple):
    """Sums over the scored documents."""

    documents: int = 0
    answers: int = 0
    right: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0

    def add(self, document: Document, scores: Sequence[SpanScore]) -> "_Totals":
        return _Totals(
            self.documents + 1,
            self.answers + len(scores),
            self.right + sum(score.first for score in scores),
            self.tokens + sum(end - begin for begin, end in document.spans),
            self.bytes + document.nbytes,
            self.nats + sum(score.nats for score in scores),
        )


def evaluate(
    model: RWKV7,
    task: str,
    path: str | Path,
    limit: int = 0,
    text_key: str = "text",
    on_bad_line: str = "stop",
) -> dict[str, Any]:
    """Computes the metrics of one task on one file, with a progress bar on standard error.

    text: `bits_per_byte` (unless the model has another tokenizer), and `perplexity` per token.
    lambada: `accuracy`, and `perplexity` of the last word. arithmetic: `exact_match`, the fraction
    of answers that greedy decoding gives.

    Args:
        task: a name in `TASKS`.
        path: text, anything that `corpus.find` accepts; for the task text also a binidx prefix;
            any other file is read as one text.
        limit: number of documents, from the first; 0: all.
        text_key, on_bad_line: as for `dataset.open_dataset`; `skipped` lines are counted, and
            listed in NAME.skipped.tsv in the current folder.

    Raises:
        UserError: the data cannot be used, or has no text.
    """
    skipped: list[BadLine] = []
    V = model.config.vocab_size
    is_world = not tokenizer.other_tokenizer(V)
    corpus = None
    if task == "text" and is_binidx(path):
        data = open_binidx(path)
        documents, total = item_documents(data, V), len(data)
    else:
        tokenizer.check_vocabulary(V, str(path))
        corpus = _corpus(path, task, text_key, on_bad_line)
        documents, total = TASKS[task](corpus.documents(skipped)), 0
        if not limit and all(file.is_file() for file in corpus.files):
            total = sum(1 for _ in corpus.documents())
    totals = _score_all(model, task, documents, limit, limit or total)
    if not (totals.bytes if is_world else totals.tokens):
        first = [f": every line was skipped; {bad.where}: {bad.reason}" for bad in skipped[:1]]
        raise UserError(f"{path}: holds no text" + "".join(first))
    result: dict[str, Any] = {"task": task, "file": str(path), "documents": totals.documents}
    if corpus and skipped:
        listed = Path(corpus.stem + SKIPPED)
        with writing_skipped(listed) as rows:
            rows.writelines(bad.row() for bad in skipped)
        print(skipped_note(listed), file=sys.stderr)
        result["skipped"] = len(skipped)
    return result | _metrics(task, totals, is_world)


def _score_all(
    model: RWKV7, task: str, documents: Iterator[Document], limit: int, total: int
) -> _Totals:
    totals = _Totals()
    with progress_bar() as bar:
        progress = bar.add_task(task, total=total or None)
        for group in in_groups(documents, limit):
            for number, scores in score(model, group):
                totals = totals.add(group[number], scores)
                bar.advance(progress)
            if not math.isfinite(totals.nats):
                raise UserError(NOT_FINITE)
    return totals


def _metrics(task: str, totals: _Totals, is_world: bool) -> dict[str, Any]:
    if task == "text":
        metrics: dict[str, Any] = {"tokens": totals.tokens}
        if is_world:  # the bytes of another tokenizer's tokens are not known
            bits = totals.nats / math.log(2)
            metrics |= {"bytes": totals.bytes, "bits_per_byte": bits / totals.bytes}
        return metrics | {"perplexity": _exp(totals.nats / totals.tokens)}
    accuracy = totals.right / totals.answers
    if task == "lambada":
        return {"accuracy": accuracy, "perplexity": _exp(totals.nats / totals.answers)}
    return {"answers": totals.answers, "exact_match": accuracy}


def _corpus(path: str | Path, task: str, text_key: str, on_bad_line: str) -> Corpus:
    """The text; for the task text, any file whatever its extension is read as one text."""
    file = Path(path)
    if task == "text" and file.exists() and not file.is_dir() and not is_text(file):
        return Corpus(str(path), (file,))
    return find(path, text_key, on_bad_line)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
