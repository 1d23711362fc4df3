"""The World tokenizer for the `tokenizers` library, and so for `transformers.AutoTokenizer`.

That library has no greedy longest-match model. But it can split text with a regular expression, and
a trie can be written as one: `a(?:b(?:c)?|d)?` matches the longest of a, ab, abc, ad at the start
of a text. So `tokenizer.json` holds the vocabulary twice: as a trie that splits text into tokens,
and as a table of their ids. Bytes are written as characters in GPT-2's way (`ByteLevel`).
"""

import json
import re
from pathlib import Path
from typing import Any

from rwkv_jax.text import tokenizer

END = "<|rwkv_tokenizer_end_of_text|>"  # id 0; the name is that of published RWKV models


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into a folder.

    Ids equal those of `tokenizer.encode` for every text, except that `END` becomes id 0.
    """
    for name, content in (("tokenizer", _tokenizer()), ("tokenizer_config", _config())):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }


def _tokenizer() -> dict[str, Any]:
    characters = _characters()
    pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.VOCAB_SIZE)]
    ids = {
        "".join(characters[byte] for byte in piece): token
        for token, piece in enumerate(pieces)
        if piece
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": _expression(_trie(list(ids)))},
        "behavior": "Isolated",
        "invert": False,
    }
    end = {
        "id": tokenizer.END_OF_DOCUMENT,
        "content": END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level, split]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "WordLevel",
            "vocab": {END: tokenizer.END_OF_DOCUMENT} | ids,
            "unk_token": END,
        },
    }


def _characters() -> list[str]:
    """The character for each byte: itself if printable, else the next one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _trie(words: list[str]) -> dict[str, Any]:
    """Nested by character; the key "" marks the end of a word."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return root


def _expression(node: dict[str, Any]) -> str:
    """The regular expression of a trie; it is greedy, so it matches the longest word.

    >>> _expression(_trie(["a", "ab", "abc", "ad"]))
    '(?:a(?:b(?:c)?|d)?)'
    """
    after = [re.escape(key) + _expression(child) for key, child in node.items() if key]
    if not after:
        return ""
    return f"(?:{'|'.join(after)})?" if "" in node else f"(?:{'|'.join(after)})"
