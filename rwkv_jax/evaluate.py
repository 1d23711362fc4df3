"""`python -m rwkv_jax.evaluate`: measures a model on text, LAMBADA or the arithmetic task.

All three are one question to the model: how likely is each token of a document, given its own
beginning, and is it the model's first choice? A greedy continuation is an answer exactly if every
token of the answer is the first choice after those before it, so nothing has to be generated.
"""

import functools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import rwkv_jax
from rwkv_jax import tokenizer
from rwkv_jax.binidx import BinIdx, open_binidx
from rwkv_jax.build import PRECISIONS, device_precision, prepare_jax
from rwkv_jax.corpus import (
    SKIPPED,
    BadLine,
    Corpus,
    Text,
    add_options,
    find,
    is_binidx,
    is_text,
    skipped_note,
    writing_skipped,
)
from rwkv_jax.dataset import check_ids
from rwkv_jax.decoding import NOT_FINITE
from rwkv_jax.errors import CommandParser, UserError, path_argument, run_command
from rwkv_jax.files import check_writable, reporting_os_errors, written_whole
from rwkv_jax.model import RWKV7, State, use_precision
from rwkv_jax.tokenizing import progress_bar

Array = jax.Array

CALL = 2048  # tokens a call, in rows of a length below: so many shapes are compiled at most
PIECES = (32, 64, 128, 256, 512, 1024, 2048)  # tokens of each document a call
HEAD_CHUNK = 128  # tokens whose logits exist at once
DOCUMENTS = 1024  # in memory at once; of these, such of like length go together


class Document(NamedTuple):
    """Tokens, which of them count, and what they are: all that a task asks about."""

    ids: list[int]
    spans: list[tuple[int, int]]  # of tokens that are an answer each; for text, the whole
    nbytes: int = 0  # of the text that the spans hold


class Answer(NamedTuple):
    """What the model makes of a span, after token 0 and all tokens before it."""

    nats: float  # -log p of it
    first: bool  # each of its tokens is the model's first choice


def score(model: RWKV7, documents: Sequence[Document]) -> Iterator[tuple[int, list[Answer]]]:
    """(number of the document, an answer a span), in whatever order suits.

    Each document begins with the state of none and, as in training, after a token 0. Memory does
    not depend on their lengths.

    Raises:
        UserError: an id that the model does not know.
    """
    V = model.config.vocab_size
    order = sorted(range(len(documents)), key=lambda number: len(documents[number].ids))
    graphdef, params = nnx.split(model)
    while order:
        T = _piece([len(documents[number].ids) for number in order])
        B = CALL // T
        group, order = order[:B], order[B:]
        longest = len(documents[group[-1]].ids)
        rows = np.zeros((B, 1 + longest + -longest % T), np.int32)
        asked = np.zeros((B, rows.shape[1] - 1), bool)
        for row, number in enumerate(group):
            rows[row, 1 : 1 + len(documents[number].ids)] = documents[number].ids
            for begin, end in documents[number].spans:
                asked[row, begin:end] = True
        if rows.max() >= V:
            raise UserError(f"a token of the text is {rows.max()}; the model knows {V}")
        state = model.initial_state(B)
        nats, first = np.zeros(asked.shape, np.float32), np.zeros(asked.shape, bool)
        for at in range(0, longest, T):
            here = np.s_[:, at : at + T]
            piece = rows[:, at : at + T + 1]
            *found, state = _score(graphdef, params, piece, asked[here], state)
            nats[here], first[here] = found
        for row, number in enumerate(group):
            yield (
                number,
                [
                    Answer(
                        float(nats[row, begin:end].sum(dtype=np.float64)),
                        bool(first[row, begin:end].all()),
                    )
                    for begin, end in documents[number].spans
                ],
            )


def _piece(lengths: list[int]) -> int:
    """The T of `PIECES` with which a call works on most tokens, of lengths in rising order.

    >>> _piece([70] * 64), _piece([70] * 16), _piece([10_000])
    (32, 128, 2048)
    """

    def calls_a_token(T: int) -> float:
        group = lengths[: CALL // T]
        return math.ceil(group[-1] / T) / max(sum(group), 1)

    return min(PIECES, key=calls_a_token)


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef, params, rows: Array, asked: Array, state: State) -> tuple[Array, Array, State]:
    """-log p and first choice, [B, T], of the tokens after the first of rows [B, T+1]: of those
    that asked [B, T] names, for the head takes as long as many layers. And the state.
    """
    model: RWKV7 = nnx.merge(graphdef, params)
    x, state = model.hidden(rows[:, :-1], state)
    x, targets = x.reshape(-1, x.shape[-1]), rows[:, 1:].reshape(-1)
    places = jnp.argsort(~asked.reshape(-1)).astype(jnp.int32)  # those asked for first

    def chunk(index: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        here = jax.lax.dynamic_slice(places, (index * HEAD_CHUNK,), (HEAD_CHUNK,))
        z = jnp.einsum(
            "tc,vc->tv", x[here], model.head.weight[...], preferred_element_type=jnp.float32
        )
        wanted = jnp.take_along_axis(z, targets[here][:, None], axis=-1)[:, 0]
        nats = jax.nn.logsumexp(z, axis=-1) - wanted
        first = jnp.argmax(z, axis=-1).astype(targets.dtype) == targets[here]
        return found[0].at[here].set(nats), found[1].at[here].set(first)

    count = jnp.sum(asked, dtype=jnp.int32)
    none = jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)
    found = jax.lax.fori_loop(0, (count + HEAD_CHUNK - 1) // HEAD_CHUNK, chunk, none)
    nats, first = (each.reshape(asked.shape) for each in found)
    return nats, first, state


# Tasks: texts → documents -------------------------------------------------------------------------


def text_documents(texts: Iterable[Text]) -> Iterator[Document]:
    """All of each text is asked about."""
    for _, text in texts:
        ids = tokenizer.encode(text)
        yield Document(ids, [(0, len(ids))], len(text.encode()))


def lambada_documents(texts: Iterable[Text]) -> Iterator[Document]:
    """The last word of each text, with the blank before it, is the answer."""
    for where, text in texts:
        begin, blank, word = text.rpartition(" ")
        if not blank or not word:
            raise UserError(
                f"{where}: no blank before a last word in {text[:40]!a}: is it LAMBADA's?"
            )
        before, answer = tokenizer.encode(begin), tokenizer.encode(blank + word)
        ids = before + answer
        yield Document(ids, [(len(before), len(ids))], len((blank + word).encode()))


def arithmetic_documents(texts: Iterable[Text]) -> Iterator[Document]:
    """What follows each "Assistant:", or "=" where a text is no chat, and the token that ends it.

    In the middle of a chat that is the blank line, at the end of a text the end of the document.
    """
    for where, text in texts:
        data = text.encode()
        marks, stop = (b"Assistant:", b"\n\nUser:") if b"Assistant:" in data else (b"=", data)
        answers, at = [], 0
        while (found := data.find(marks, at)) >= 0:
            begin = found + len(marks)
            end = data.find(stop, begin)
            at = end = len(data) if end < 0 else end
            answers.append((begin, end))
        if not answers:
            raise UserError(f'{where}: no "Assistant:" and no "=" in {text[:40]!a}')
        ids = [*tokenizer.encode(text), tokenizer.END_OF_DOCUMENT]
        ends = np.cumsum([len(tokenizer.decode_bytes([token])) for token in ids])
        ends[-1] += 1  # the end of the document comes after the last byte
        starts = np.concatenate([[0], ends[:-1]])
        spans = []
        for begin, end in answers:
            touched = np.flatnonzero((ends > begin) & (starts <= end))
            spans.append((int(touched[0]), int(touched[-1]) + 1))
        yield Document(ids, spans, sum(end - begin for begin, end in answers))


TASKS = {
    "text": text_documents,
    "lambada": lambada_documents,
    "arithmetic": arithmetic_documents,
}


def item_documents(data: BinIdx, vocab_size: int) -> Iterator[Document]:
    """Each item of a token file, without its closing token 0.

    Args:
        vocab_size: of the model. If it has another tokenizer than World's, documents have no bytes.

    Raises:
        UserError: an id that is none of the tokenizer's.
    """
    is_world = not tokenizer.other_tokenizer(vocab_size)
    ids_end = tokenizer.VOCAB_SIZE if is_world else vocab_size
    for item in range(len(data)):
        start = int(data.pointers[item]) // data.tokens.itemsize
        check_ids(str(data.prefix), data[item], start, ids_end)
        ids = data[item].astype(np.int64).tolist()
        if ids and ids[-1] == tokenizer.END_OF_DOCUMENT:
            ids.pop()
        nbytes = len(tokenizer.decode_bytes(ids)) if is_world else 0
        yield Document(ids, [(0, len(ids))], nbytes)


# Results ------------------------------------------------------------------------------------------


def evaluate(
    model: RWKV7,
    task: str,
    path: str | Path,
    limit: int = 0,
    text_key: str = "text",
    on_bad_line: str = "stop",
) -> dict[str, Any]:
    """The numbers of one task on one file, with a progress bar on standard error.

    text: `bits_per_byte` (unless the model has another tokenizer), and `perplexity` of a token.
    lambada: `accuracy`, and `perplexity` of a last word. arithmetic: `exact_match`, the part of all
    answers that greedy decoding gives.

    Args:
        task: a name in `TASKS`.
        path: text, all that `corpus.find` takes; for the task text also a binidx prefix, and any
            other file, as one text.
        limit: documents, from the first; 0: all.
        text_key, on_bad_line: as for `dataset.open_dataset`; `skipped` lines are counted, and
            listed in NAME.skipped.tsv in the current folder.

    Raises:
        UserError: the data cannot be used, or holds nothing.
    """
    skipped: list[BadLine] = []
    V = model.config.vocab_size
    is_world = not tokenizer.other_tokenizer(V)
    if task == "text" and is_binidx(path):
        data = open_binidx(path)
        documents, total = item_documents(data, V), len(data)
    else:
        tokenizer.check_vocabulary(V, str(path))
        corpus = _corpus(path, task, text_key, on_bad_line)
        documents, total = TASKS[task](corpus.documents(skipped)), 0
        if not limit and all(file.is_file() for file in corpus.files):
            total = sum(1 for _ in corpus.documents())
    total = limit or total
    counts = {"documents": 0, "answers": 0, "right": 0, "tokens": 0, "bytes": 0}
    nats = 0.0
    with progress_bar() as bar:
        progress = bar.add_task(task, total=total or None)
        for group in _groups(documents, limit):
            for number, answers in score(model, group):
                counts["answers"] += len(answers)
                counts["right"] += sum(answer.first for answer in answers)
                counts["tokens"] += sum(end - begin for begin, end in group[number].spans)
                counts["documents"] += 1
                counts["bytes"] += group[number].nbytes
                nats += sum(answer.nats for answer in answers)
                bar.advance(progress)
            if not math.isfinite(nats):
                raise UserError(NOT_FINITE)
    if not counts["bytes" if is_world else "tokens"]:
        first = [f": every line was skipped; {bad.where}: {bad.reason}" for bad in skipped[:1]]
        raise UserError(f"{path}: holds no text" + "".join(first))
    shown = {"task": task, "file": str(path), "documents": counts["documents"]}
    if skipped:
        listed = Path(corpus.stem + SKIPPED)
        with writing_skipped(listed) as rows:
            rows.writelines(bad.row() for bad in skipped)
        print(skipped_note(listed), file=sys.stderr)
        shown["skipped"] = len(skipped)
    if task == "text":
        shown |= {"tokens": counts["tokens"]}
        if is_world:  # the bytes of another tokenizer are not known
            shown |= {
                "bytes": counts["bytes"],
                "bits_per_byte": nats / math.log(2) / counts["bytes"],
            }
        return shown | {"perplexity": _exp(nats / counts["tokens"])}
    right = counts["right"] / counts["answers"]
    if task == "lambada":
        return shown | {"accuracy": right, "perplexity": _exp(nats / counts["answers"])}
    return shown | {"answers": counts["answers"], "exact_match": right}


def _corpus(path: str | Path, task: str, text_key: str, on_bad_line: str) -> Corpus:
    """The text; for the task text any file, whatever its name ends in, is one."""
    file = Path(path)
    if task == "text" and file.exists() and not file.is_dir() and not is_text(file):
        return Corpus(str(path), (file,))
    return find(path, text_key, on_bad_line)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _groups(documents: Iterable[Document], limit: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for number, document in enumerate(documents):
        if limit and number == limit:
            break
        group.append(document)
        if len(group) == DOCUMENTS:
            yield group
            group = []
    if group:
        yield group


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "python -m rwkv_jax.evaluate",
        description="Measure a model on text: a .jsonl, .txt or .parquet, a folder of them, or a "
        "pattern in quotes. text: bits per byte and perplexity, also of a binidx, and of any other "
        "file as one text; lambada: how often the last word of a text is the model's choice, and "
        "its perplexity; arithmetic: how often greedy decoding gives the answer exactly. Prints a "
        "line of JSON.",
        epilog="example: python -m rwkv_jax.evaluate --load_model out --data_file held_out.jsonl",
    )
    parser.add_argument(
        "--load_model",
        required=True,
        type=path_argument,
        metavar="X",
        help="a .pth, the output folder of a run, or a checkpoint",
    )
    parser.add_argument(
        "--data_file", required=True, type=path_argument, metavar="FILE", help="see above"
    )
    add_options(parser)
    parser.add_argument("--task", choices=TASKS, default="text", help="what to measure (text)")
    parser.add_argument(
        "--limit", type=int, default=0, help="only so many documents, from the first (0: all)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="of the computation (default: fp32 on a CPU, bf16 on a GPU, fp16 on those before "
        "Ampere)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, too")
    args = parser.parse_args(argv)
    if args.limit < 0:
        raise UserError(f"--limit {args.limit}: give 0 (all) or more")
    if args.output:
        check_writable(args.output)
    prepare_jax()
    precision = args.precision or device_precision()
    use_precision(precision)
    model = rwkv_jax.load(args.load_model, PRECISIONS[precision])
    result = {"model": args.load_model, "precision": precision}
    data = args.data_file, args.limit, args.text_key, args.on_bad_line
    result |= evaluate(model, args.task, *data)
    text = json.dumps(result, ensure_ascii=False)
    print(text)
    if args.output:
        with reporting_os_errors(args.output, "write"), written_whole(args.output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
