"""The World tokenizer (`rwkv_vocab_v20230424`): bytes, greedy longest match.

pyrwkv-tokenizer does the encoding, but not the decoding: it has no call that returns bytes, and
panics on ids that are not text. A token may end in the middle of a character, so only bytes can be
joined; to stream, feed `decode_bytes` to a
`codecs.getincrementaldecoder("utf-8")(errors="replace")`.
"""

import ast
import functools
import importlib.resources
from collections.abc import Iterable, Iterator

import numpy as np
from pyrwkv_tokenizer import RWKVTokenizer

from rwkv_jax.errors import UserError

VOCAB_NAME = "rwkv_vocab_v20230424"
VOCAB_SIZE = 65536
END_OF_DOCUMENT = 0
_PIECE = 1 << 18  # characters encoded at once
# Numbers of rows of emb.weight that are not World's: GPT-NeoX's tokenizer has 50277 tokens, which
# Pile models pad to up to 50432, and GPT-2's has 50257.
_PILE = range(50254, 50433)


@functools.cache
def _encoder() -> RWKVTokenizer:
    return RWKVTokenizer()


@functools.cache
def _vocabulary() -> list[bytes]:
    """The bytes of each id, `[VOCAB_SIZE]`; empty for ids without text.

    A line of the file is `ID LITERAL LENGTH`; the literal is a Python str (as UTF-8) or bytes.
    """
    path = importlib.resources.files("pyrwkv_tokenizer") / f"{VOCAB_NAME}.txt"
    table = [b""] * VOCAB_SIZE
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            index, rest = line.split(" ", 1)
            literal = ast.literal_eval(rest.rpartition(" ")[0])
            table[int(index)] = literal if isinstance(literal, bytes) else literal.encode()
    return table


@functools.cache
def _sizes() -> np.ndarray:
    """Number of bytes of each id, `[VOCAB_SIZE]`."""
    return np.array([len(token) for token in _vocabulary()])


def encode(text: str) -> list[int]:
    """Token ids of `text`, without an end-of-document mark. Any text is encodable.

    >>> encode("User: 你好\\n\\n")
    [24281, 59, 33, 10464, 11685, 261]

    Raises:
        UserError: `text` has half of a surrogate pair, which has no UTF-8 encoding.
    """
    try:
        return _encoder().encode(text)
    except UnicodeEncodeError:
        check(text)
        raise


def encode_pieces(text: str) -> Iterator[list[int]]:
    """`encode` in pieces that join to the same ids; one list of all ids takes 40 bytes per token.

    A token depends only on the next bytes up to the length of the longest token. So all tokens of a
    piece except the last few equal those of the whole text; the next piece starts at a token and
    character boundary.

    Raises:
        UserError: as `encode`.
    """
    at = 0
    while len(text) - at > _PIECE:
        piece = text[at : at + _PIECE]
        ids = encode(piece)
        content = np.frombuffer(piece.encode(), np.uint8)
        ends = np.cumsum(_sizes()[ids])
        ends = ends[ends <= len(content) - _sizes().max()]
        begins_character = content[ends] & 0xC0 != 0x80
        if not begins_character.any():
            break
        last = int(np.flatnonzero(begins_character)[-1])
        yield ids[: last + 1]
        at += len(content[: ends[last]].tobytes().decode())
    yield encode(text[at:])


def check(text: str) -> None:
    """Checks that `encode` accepts `text`.

    Raises:
        UserError: `text` has half of a surrogate pair, which has no UTF-8 encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text, {text[error.start]!a}, is half of a surrogate "
            "pair, not a character"
        ) from None


def other_tokenizer(rows: int) -> str:
    """The tokenizer implied by the number of rows of emb.weight; empty if it may be World's.

    A model with fewer rows than World's ids may have only the first of them.
    """
    if rows in _PILE:
        return "GPT-NeoX's, of the Pile models"
    return "" if rows <= VOCAB_SIZE else f"larger than World's {VOCAB_SIZE}"


def check_vocabulary(rows: int, source: str) -> None:
    """Refuses text for a model with another tokenizer than World's (see `other_tokenizer`).

    Args:
        source: the model or the text, for the error.

    Raises:
        UserError: the model has another tokenizer.
    """
    if whose := other_tokenizer(rows):
        raise UserError(
            f"{source}: the model has a vocabulary of {rows}, {whose}, so it is not for the World "
            "tokenizer: it cannot read text, only token files (binidx) made with its own tokenizer"
        )


def decode_bytes(ids: Iterable[int]) -> bytes:
    """The bytes of `ids`; the results of any split of `ids` can be joined.

    Id 0 (end of document) and the unused ids 65530 … 65535, which an untrained model may generate,
    have no bytes.

    Raises:
        ValueError: an id outside [0, 65536).
    """
    table = _vocabulary()
    pieces = []
    for index in ids:
        if not 0 <= index < VOCAB_SIZE:
            raise ValueError(f"token id {index} is outside the vocabulary of {VOCAB_SIZE}")
        pieces.append(table[index])
    return b"".join(pieces)


def decode(ids: Iterable[int]) -> str:
    """`decode_bytes` as text; bytes that are not UTF-8 become U+FFFD.

    >>> decode([10464, 11685]), decode([229])
    ('你好', '�')
    """
    return decode_bytes(ids).decode("utf-8", errors="replace")
