"""The World tokenizer, against the `rwkv` package's own."""

import codecs
import json
import random
from pathlib import Path

import pytest

from rwkv_jax.errors import UserError
from rwkv_jax.text import tokenizer

DATA = Path(__file__).parents[1] / "data"

VARIED = [
    "",
    " ",
    "\n\n",
    "\r\n\t \n",
    "\0",
    "".join(map(chr, range(256))),
    "Today is a beautiful day. 今天是美好的一天。",
    "１２３４５．６７－８９＝？",
    "负壹万贰仟叁佰肆拾伍点陆",
    "👩‍👩‍👧‍👦 🇨🇳 e\u0301 \u200b \ufeff \U0010ffff",
    "def f(x):\n    return x  # 注释\n",
    "नमस्ते สวัสดี مرحبا Ωμέγα Привет 日本語 한국어",
    " " * 1000 + "a" * 1000,
    "\\u4e2d <|endoftext|> \x7f\x1b[0m",
]


@pytest.fixture(scope="module")
def official():
    import rwkv.rwkv_tokenizer

    folder = Path(rwkv.rwkv_tokenizer.__file__).parent
    return rwkv.rwkv_tokenizer.TRIE_TOKENIZER(str(folder / "rwkv_vocab_v20230424.txt"))


def random_texts() -> list[str]:
    """Mixtures of scripts, where a greedy match is cut at odd places."""
    draw = random.Random(0)
    alphabets = [
        "ab \n",
        "0123456789.,-+",
        "的一是不了人我在有他",
        "αβ🦢é\u0300",
        "\0\x01\x80\xff\u2028",
    ]
    return [
        "".join(draw.choice(draw.choice(alphabets)) for _ in range(draw.randrange(80)))
        for _ in range(400)
    ]


@pytest.mark.torch
def test_encodes_like_the_official_tokenizer(official):
    lines = (DATA / "demo_official.jsonl").read_text(encoding="utf-8").splitlines()
    texts = VARIED + random_texts() + [json.loads(line)["text"] for line in lines[:40]]
    for text in texts:
        assert tokenizer.encode(text) == official.encode(text), text


@pytest.mark.torch
def test_decodes_every_id_like_the_official_tokenizer(official):
    for index in range(1, 65530):
        assert tokenizer.decode_bytes([index]) == official.idx2token[index]


def test_published_ids():
    assert tokenizer.encode("\n\n") == [261]
    assert tokenizer.encode("\0") == [1]
    assert tokenizer.encode("Today is a beautiful day. 今天是美好的一天。") == [
        *(33520, 4600, 332, 59219, 21509, 47, 33),
        *(10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080),
    ]


@pytest.mark.parametrize("text", VARIED)
def test_round_trip(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_join_over_any_split():
    text = "🦢中"
    pieces = [tokenizer.decode_bytes([1 + byte]) for byte in text.encode()]  # ids 1 … 256: bytes
    assert b"".join(pieces) == text.encode()
    assert all(len(piece) == 1 for piece in pieces)

    stream = codecs.getincrementaldecoder("utf-8")(errors="replace")
    assert [stream.decode(piece) for piece in pieces] == ["", "", "", "🦢", "", "", "中"]


def test_what_is_not_text_decodes_without_an_exception():
    assert tokenizer.decode([241, 34]) == "\ufffd!"
    assert tokenizer.decode([34, 0, 65530, 65535, 34]) == "!!"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("index", [-1, 65536])
def test_an_id_outside_the_vocabulary_is_refused(index):
    with pytest.raises(ValueError, match=f"token id {index} is outside the vocabulary of 65536"):
        tokenizer.decode_bytes([index])


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(
        UserError, match=r"character 2 of the text, '\\ud83d', is half of a surrogate"
    ):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("piece", [200, 333, 1000])
def test_pieces_join_to_the_whole(piece, monkeypatch):
    """Also where it ends within a long token, or between tokens that end within a character."""
    rng = random.Random(piece)
    text = "".join(rng.choice(VARIED) + "😀" * rng.randrange(40) for _ in range(300))
    monkeypatch.setattr(tokenizer, "_PIECE", piece)
    pieces = list(tokenizer.encode_pieces(text))
    assert len(pieces) > 5 and sum(pieces, []) == tokenizer.encode(text)
    assert list(tokenizer.encode_pieces("")) == [[]]
