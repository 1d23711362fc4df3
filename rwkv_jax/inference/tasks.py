"""The tasks of `evaluate` as documents to score: text, LAMBADA, arithmetic."""

from collections.abc import Iterable, Iterator

import numpy as np

from rwkv_jax.errors import UserError
from rwkv_jax.inference.scoring import Document
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import BinIdx
from rwkv_jax.text.corpus import Text
from rwkv_jax.text.dataset import check_ids


def text_documents(texts: Iterable[Text]) -> Iterator[Document]:
    """The whole text is scored."""
    for _, text in texts:
        ids = tokenizer.encode(text)
        yield Document(ids, [(0, len(ids))], len(text.encode()))


def lambada_documents(texts: Iterable[Text]) -> Iterator[Document]:
    """The last word of each text, with the space before it, is the answer."""
    for where, text in texts:
        begin, blank, word = text.rpartition(" ")
        if not blank or not word:
            raise UserError(
                f"{where}: no space before the last word in {text[:40]!a}: is it from LAMBADA?"
            )
        before, answer = tokenizer.encode(begin), tokenizer.encode(blank + word)
        ids = before + answer
        yield Document(ids, [(len(before), len(ids))], len((blank + word).encode()))


def arithmetic_documents(texts: Iterable[Text]) -> Iterator[Document]:
    """The text after each "Assistant:" (or "=", if a text is not a chat), with the token that ends
    it: the blank line in the middle of a chat, the end of the document at the end of a text.
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
        vocab_size: of the model. With another tokenizer than World's, documents have no bytes.

    Raises:
        UserError: an id that the tokenizer does not have.
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
