"""Continues texts and chats with a `Decoder`."""

import codecs
import re
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rwkv_jax
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.device.precision import PRECISIONS, device_precision
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors, written_whole
from rwkv_jax.inference.decoder import TOKENS_PER_CALL, Decoder
from rwkv_jax.inference.sampling import DEFAULT, Sampling
from rwkv_jax.model.rwkv7 import State
from rwkv_jax.text import tokenizer

PATIENCE = 0.1  # seconds: while calls are shorter, the number of tokens per call is doubled
END_OF_TURN = "\n\nUser:"

# The suffix of the user's message and the beginning of the reply: the templates of G1 models
# (RWKV-LM's RWKV-v7/RWKV7-G1x-templates.txt) and of the models before April 2026.
THINK = {
    "off": ("", ""),
    "on": (" (think)", " <think"),
    "short": (" (think a bit)", " <think"),
    "long": (" (think a lot)", " <think"),
    "fake": ("", " <think>\n</think"),
    "on-2025": (" think", " <think"),
    "short-2025": (" think a bit", " <think"),
    "long-2025": (" think a lot", " <think"),
}


class Text(NamedTuple):
    """A text to continue: logits and states of the part already read, and the unread ids."""

    read: tuple[jax.Array, list[State]] | None = None  # None: nothing was read
    unread: list[int] = []

    def then(self, ids: list[int]) -> "Text":
        return Text(self.read, self.unread + ids)

    def prefill(self, decoder: Decoder) -> tuple[jax.Array, list[State]]:
        """Reads the rest of the text; an empty text starts a new document.

        Raises:
            UserError: a token is outside the model's vocabulary.
        """
        if self.read is None:
            return decoder.prefill(self.unread)
        return decoder.prefill(self.unread, self.read[1]) if self.unread else self.read


class Reply:
    """The text of one sequence during generation: whole characters, up to a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""  # the text returned so far
        self.ended = False
        self._stopped = False  # by a stop string
        self._stop = [text for text in stop if text]
        self._held = ""  # held back: may be the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: Iterable[int]) -> str:
        """Adds the next ids, up to the end; returns the text that can be shown now.

        A character made of several tokens is returned with its last token; bytes that are not UTF-8
        become U+FFFD. Output ends before an end of document or a stop string.
        """
        shown = ""
        for token in ids:
            if self.ended:
                break
            if token == tokenizer.END_OF_DOCUMENT:
                shown += self.finish()
                break
            self.ids.append(token)
            shown += self._show(self._decoder.decode(tokenizer.decode_bytes([token])))
        return shown

    def finish(self) -> str:
        """Called after the last ids; returns the text that was held back."""
        if self.ended:
            return ""
        shown = self._show(self._decoder.decode(b"", final=True)) + self._held
        self.text += self._held
        self._held, self.ended = "", True
        return shown

    def _show(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            keep, self.ended, self._stopped = min(found), True, True
        else:
            partial = (
                n
                for stop in self._stop
                for n in range(len(stop) - 1, 0, -1)
                if self._held.endswith(stop[:n])
            )
            keep = len(self._held) - max(partial, default=0)
        shown, self._held = self._held[:keep], "" if found else self._held[keep:]
        self.text += shown
        return shown

    def text_ids(self) -> list[int]:
        """The ids of `text`: the generated ids without the stop string, which may begin inside a
        token.
        """
        if not self._stopped:
            return list(self.ids)
        text, ids, size = self.text.encode(), [], 0
        for token in self.ids:
            piece = tokenizer.decode_bytes([token])
            if not text.startswith(piece, size):
                break
            ids.append(token)
            size += len(piece)
        return ids + tokenizer.encode(text[size:].decode("utf-8", errors="ignore"))


def generate(
    decoder: Decoder,
    texts: Sequence[Text],
    replies: Sequence[Reply],
    length: int,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
) -> Iterator[list[str]]:
    """Continues texts as a batch; yields the new text of each reply after every call.

    Args:
        texts: the text before each reply; unread parts are read first, one text at a time.
        replies: one per text, filled in place; each ends after `length` tokens, at the model's end
            of document, or at a stop string.
        seed: the same seed on the same kind of device draws the same tokens.

    Raises:
        UserError: a token of a text is outside the model's vocabulary.
    """
    batch = decoder.batch([text.prefill(decoder) for text in texts], seed)
    count = 1
    while length > 0 and not all(reply.ended for reply in replies):
        began = time.monotonic()
        ids, batch = decoder.generate(batch, min(count, length), sampling)
        length -= ids.shape[1]
        yield [reply.add(row.tolist()) for reply, row in zip(replies, ids, strict=True)]
        if time.monotonic() - began < PATIENCE:
            count = min(2 * count, TOKENS_PER_CALL)
    yield [reply.finish() for reply in replies]


def complete(
    decoder: Decoder,
    prompts: Sequence[str],
    length: int,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    stop: Sequence[str] = (),
    before: Text | None = None,
) -> list[str]:
    """Returns the continuation of each prompt as text (see `generate`).

    Args:
        before: the text before each prompt.
    """
    replies = [Reply(stop) for _ in prompts]
    texts = [(before or Text()).then(tokenizer.encode(prompt)) for prompt in prompts]
    for _ in generate(decoder, texts, replies, length, sampling, seed):
        pass
    return [reply.text for reply in replies]


def chat_turn(message: str, think: str = "off", first: bool = True, system: str = "") -> str:
    """Formats a user's message, up to the point where the reply begins.

    No space follows "Assistant:", because the reply starts with one. Empty lines end a turn in the
    training data of such models, so they are removed from messages and system prompts.

    Args:
        think: a name in `THINK`.
        first: this is the first turn.
        system: the system prompt, only with the first turn.
    """
    suffix, begin = THINK[think]
    system, message = (re.sub(r"\n\s*\n", "\n", text.strip()) for text in (system, message))
    before = f"System: {system}\n\n" if system else "" if first else END_OF_TURN[:2]
    return f"{before}User: {message}{suffix}\n\nAssistant:{begin}"


def save_state(path: Path, text: Text, decoder: Decoder) -> None:
    """Writes the state after the text and the next token's logits, for `load_state`.

    The file is a NumPy `.npz` with shift_att and shift_ffn [L, C], wkv [L, H, N, N] (value row, key
    column), and logits [V], all float32.

    Raises:
        UserError: it cannot be written.
    """
    logits, states = text.prefill(decoder)
    stacked = jax.tree.map(
        lambda *rows: np.stack([np.asarray(row[0], np.float32) for row in rows]), *states
    )
    with reporting_os_errors(path, "write"), written_whole(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, logits=np.asarray(logits[0]), **stacked._asdict())


def load_state(path: Path, decoder: Decoder) -> Text:
    """Loads a saved state as a text to continue.

    A tuned state (a .pth) is not a text: the decoder starts every text from it.

    Raises:
        UserError: the file does not exist, or is the state of another model.
    """
    states = decoder.initial_state()
    shapes = {name: (len(states), *row.shape[1:]) for name, row in states[0]._asdict().items()}
    shapes["logits"] = (decoder.config.vocab_size,)
    with reporting_os_errors(path, "read"):
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
                arrays = {name: members[name] for name in shapes}
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            if path.suffix == ".pth":
                decoder.tuned = weights.tuned_state(pth.read(path), decoder.config, str(path))
                return Text()
            raise UserError(
                f"{path}: is neither a state of --save_state nor the .pth of a tuned state"
            ) from None
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise UserError(
                f"{path}: is another model's state: {name} is {array.dtype} {list(array.shape)}, "
                f"not float32 {list(shape)}"
            )
    logits = jnp.asarray(arrays.pop("logits")[None])
    stacked = State(**arrays)
    layers = [
        State(*(jnp.asarray(row[None], like.dtype) for row, like in zip(rows, state, strict=True)))
        for rows, state in zip(zip(*stacked, strict=True), states, strict=True)
    ]
    return Text((logits, layers))


def load_decoder(path: str, precision: str | None = None) -> Decoder:
    """Loads a model for text of the World tokenizer, from anything that `rwkv_jax.load` accepts.

    Raises:
        UserError: the model cannot be loaded, or has another tokenizer.
    """
    precision = precision or device_precision()
    config, params, tuned = rwkv_jax.load_tuned(path, PRECISIONS[precision])
    tokenizer.check_vocabulary(config.vocab_size, path)
    decoder = Decoder(config, params, precision, tuned)
    V = config.vocab_size
    if V < tokenizer.VOCAB_SIZE - 6:
        print(f"note: {path} has only the first {V} ids of the World tokenizer", file=sys.stderr)
    return decoder
