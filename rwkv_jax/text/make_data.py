"""The command that writes text as a binidx file: N passes over its documents, each shuffled."""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_jax.errors import CommandParser, UserError, path_argument
from rwkv_jax.files import reporting_os_errors, scratch_folder
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import BinIdx, BinIdxWriter, append_suffix, open_binidx, prefix_of
from rwkv_jax.text.compute_magic_prime import report
from rwkv_jax.text.corpus import SKIPPED, Corpus, add_options, find, skipped_note
from rwkv_jax.text.sampler import choose_magic_prime
from rwkv_jax.text.tokenization import progress_bar, tokenize

_COPIED_ITEMS = 256  # at once
_VERIFIED_ITEMS = 100  # documents whose text is compared in every pass


def make_data(text: Corpus, passes: int, ctx_len: int, prefix: Path, seed: int) -> str:
    """Writes `prefix.bin` and `prefix.idx`; returns a summary for the user.

    The text is tokenized once, into a temporary folder beside `prefix`; each pass copies from it.
    Memory grows by 32 bytes per document. If the corpus skips bad lines, they are listed in
    `prefix.skipped.tsv`.

    Raises:
        UserError: the arguments or the text cannot be used, the text is too short for `ctx_len`, or
            the files cannot be written.
    """
    if passes < 1:
        raise UserError(f"N {passes}: the number of passes must be at least 1")
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative")
    with scratch_folder(prefix) as folder:
        tokenize(text, folder / "tokenized")
        documents = open_binidx(folder / "tokenized")
        choose_magic_prime(text.name, passes * len(documents.tokens), ctx_len)
        shuffled = folder / "shuffled"
        with BinIdxWriter(shuffled) as writer, progress_bar() as bar:
            task = bar.add_task("shuffling", total=passes * len(documents))
            for number in range(passes):
                order = shuffled_order(len(documents), seed, number)
                for start in range(0, len(order), _COPIED_ITEMS):
                    items = order[start : start + _COPIED_ITEMS]
                    writer.append(
                        np.concatenate([documents[i] for i in items]), documents.sizes[items]
                    )
                    bar.advance(task, len(items))
        verify(text, documents, open_binidx(shuffled), passes, seed)
        skipped = append_suffix(folder / "tokenized", SKIPPED)
        with reporting_os_errors(prefix, "write"):
            for ending in (".bin", ".idx"):
                os.replace(append_suffix(shuffled, ending), append_suffix(prefix, ending))
            if skipped.exists():
                os.replace(skipped, append_suffix(prefix, SKIPPED))
                print(skipped_note(append_suffix(prefix, SKIPPED)), file=sys.stderr)
            else:
                append_suffix(prefix, SKIPPED).unlink(missing_ok=True)  # from an earlier run
    return report(str(prefix), open_binidx(prefix), ctx_len)


def shuffled_order(items: int, seed: int, number: int) -> np.ndarray:
    """The order of pass `number`, int64 [items]: sorted by random 64-bit keys.

    NumPy guarantees only the stream of keys; `Generator.permutation` may change between releases.
    """
    keys = np.random.PCG64([seed, number]).random_raw(items)
    return np.argsort(keys, kind="stable")


def verify(text: Corpus, documents: BinIdx, written: BinIdx, passes: int, seed: int) -> None:
    """Compares the written file with the text: the lengths and end tokens of all items, and, in
    every pass, the text of the first documents.

    Raises:
        UserError: something differs.
    """
    first = itertools.islice(text.documents(), _VERIFIED_ITEMS)
    texts = [document.text.encode() for document in first]
    ends = np.cumsum(written.sizes, dtype=np.int64)
    intact = bool((written.tokens[ends - 1] == tokenizer.END_OF_DOCUMENT).all())
    for number in range(passes):
        begin = number * len(documents)
        order = shuffled_order(len(documents), seed, number)
        sizes = written.sizes[begin : begin + len(documents)]
        intact &= np.array_equal(sizes, documents.sizes[order])
        for position in np.flatnonzero(order < len(texts)).tolist():
            tokens = written[begin + position][:-1].tolist()
            intact &= tokenizer.decode_bytes(tokens) == texts[order[position]]
    if not intact or len(written) != passes * len(documents):
        raise UserError(f"{written.prefix}: differs when read back; is the disk failing?")


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Write text as PREFIX.bin and PREFIX.idx for training. The text is a .jsonl "
        '(also .jsonl.gz or .jsonl.zst) with one {"text": "…"} per line, a .txt (one document), a '
        ".parquet, a folder of them, or a quoted pattern. Blank lines are skipped; a line that "
        "cannot be used is an error that names it.",
        epilog="example: %(prog)s demo.jsonl 3 4096 writes demo.bin and demo.idx "
        "and prints the options to train on them with.",
    )
    parser.add_argument(
        "source", metavar="IN.jsonl", type=path_argument, help="The text; see above."
    )
    parser.add_argument(
        "passes", metavar="N", type=int, help="Number of passes over the documents."
    )
    parser.add_argument(
        "ctx_len", metavar="CTX_LEN", type=int, help="Length of a sample in tokens."
    )
    parser.add_argument(
        "--output",
        metavar="PREFIX",
        type=Path,
        help="What to write: PREFIX.bin and PREFIX.idx (default: IN, in the current folder).",
    )
    parser.add_argument(
        "--seed", metavar="SEED", type=int, default=0, help="Seed of the shuffling (0)."
    )
    add_options(parser)
    args = parser.parse_args(argv)
    text = find(args.source, args.text_key, args.on_bad_line)
    prefix = prefix_of(args.output or text.stem)
    if args.output and args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; add a name, {args.output / 'NAME'}")
    print(make_data(text, args.passes, args.ctx_len, prefix, args.seed))
