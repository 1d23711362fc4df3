"""Turns text into a binidx file for training: N passes over its documents, each shuffled anew.

python -m data.make_data IN.jsonl N CTX_LEN
"""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from data.compute_magic_prime import report
from rwkv_jax.errors import CommandParser, UserError, path_argument, run_command
from rwkv_jax.files import reporting_os_errors, scratch_folder
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import BinIdx, BinIdxWriter, append_suffix, open_binidx, prefix_of
from rwkv_jax.text.corpus import SKIPPED, Corpus, add_options, find, skipped_note
from rwkv_jax.text.sampler import choose_magic_prime
from rwkv_jax.text.tokenization import progress_bar, tokenize

_COPIED_ITEMS = 256  # at once
_VERIFIED_ITEMS = 100  # documents whose text is compared in every pass


def make_data(text: Corpus, passes: int, ctx_len: int, prefix: Path, seed: int) -> str:
    """Writes `prefix.bin` and `prefix.idx`; returns what to tell the user.

    The text is tokenized once, into a folder beside `prefix` that is removed at the end; each pass
    copies from there. Memory grows by 32 bytes a document. Bad lines, where the corpus skips them,
    are listed in `prefix.skipped.tsv`.

    Raises:
        UserError: unusable arguments or text, too short for `ctx_len`, or not writable.
    """
    if passes < 1:
        raise UserError(f"N {passes}: the number of passes over the lines must be at least 1")
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
                append_suffix(prefix, SKIPPED).unlink(missing_ok=True)  # of files that are replaced
    return report(str(prefix), open_binidx(prefix), ctx_len)


def shuffled_order(items: int, seed: int, number: int) -> np.ndarray:
    """The order of pass `number`, [items]: by random 64-bit keys, which are NumPy's stable promise
    (`Generator.permutation` may change between releases).
    """
    keys = np.random.PCG64([seed, number]).random_raw(items)
    return np.argsort(keys, kind="stable")


def verify(text: Corpus, documents: BinIdx, written: BinIdx, passes: int, seed: int) -> None:
    """Reads back what was written: the lengths and closing tokens of all items, and in every pass
    the text of the first documents of `text`.

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
        raise UserError(
            f"{written.prefix}: reads back otherwise than written; is the disk failing?"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "python -m data.make_data",
        description='Turn text into PREFIX.bin and PREFIX.idx for training: a .jsonl, one {"text": '
        '"…"} a line; a .txt, one document; a .parquet; a folder of them, or a pattern in quotes. '
        "Also .jsonl.gz and .jsonl.zst. Blank lines are skipped; a line that cannot be used is "
        "named in an error.",
        epilog="example: python -m data.make_data demo.jsonl 3 4096 writes demo.bin and demo.idx "
        "and prints the options to train on them with.",
    )
    parser.add_argument(
        "source", metavar="IN.jsonl", type=path_argument, help="The text; see above."
    )
    parser.add_argument(
        "passes", metavar="N", type=int, help="Passes over the documents, one after the other."
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


if __name__ == "__main__":
    run_command(main)
