"""Continues texts and chats with a decoder."""

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

PATIENCE = 0.1  # seconds: while calls are shorter than this, more tokens are made a call
END_OF_TURN = "\n\nUser:"

# What is added to the user's message, and what the reply begins with: the templates of G1 models,
# RWKV-LM's RWKV-v7/RWKV7-G1x-templates.txt, and those of the models before April 2026.
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
    """A text to continue: what `Decoder.read` has made of its beginning, and the ids after it."""

    read: tuple[jax.Array, list[State]] | None = None  # None: nothing was read
    unread: list[int] = []

    def then(self, ids: list[int]) -> "Text":
        return Text(self.read, self.unread + ids)

    def read_by(self, decoder: Decoder) -> tuple[jax.Array, list[State]]:
        """What is made of all of it; a document is begun where there is nothing at all.

        Raises:
            UserError: a token is outside the model's vocabulary.
        """
        if self.read is None:
            return decoder.read(self.unread)
        return decoder.read(self.unread, self.read[1]) if self.unread else self.read


class Reply:
    """The text of one sequence, as it is made: whole characters, up to a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""  # what was given out so far
        self.ended = False
        self._cut = False  # by a stop string
        self._stop = [text for text in stop if text]
        self._held = ""  # made, but perhaps the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, ids: Iterable[int]) -> str:
        """Takes the next ids, as far as they count; returns what can be shown now.

        A character that several tokens make up comes with its last; bytes that are not UTF-8 become
        U+FFFD. Nothing follows an end of document or a stop string, which is left out itself.
        """
        shown = ""
        for token in ids:
            if self.ended:
                break
            if token == tokenizer.END_OF_DOCUMENT:
                shown += self.end()
                break
            self.ids.append(token)
            shown += self._show(self._decoder.decode(tokenizer.decode_bytes([token])))
        return shown

    def end(self) -> str:
        """No more ids come: what was held back."""
        if self.ended:
            return ""
        shown = self._show(self._decoder.decode(b"", final=True)) + self._held
        self.text += self._held
        self._held, self.ended = "", True
        return shown

    def _show(self, text: str) -> str:
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            keep, self.ended, self._cut = min(found), True, True
        else:
            begun = (
                n
                for stop in self._stop
                for n in range(len(stop) - 1, 0, -1)
                if self._held.endswith(stop[:n])
            )
            keep = len(self._held) - max(begun, default=0)
        shown, self._held = self._held[:keep], "" if found else self._held[keep:]
        self.text += shown
        return shown

    def kept_ids(self) -> list[int]:
        """The ids of `text`: those made, less a stop string that may begin inside a token."""
        if not self._cut:
            return list(self.ids)
        text, kept, size = self.text.encode(), [], 0
        for token in self.ids:
            piece = tokenizer.decode_bytes([token])
            if not text.startswith(piece, size):
                break
            kept.append(token)
            size += len(piece)
        return kept + tokenizer.encode(text[size:].decode("utf-8", errors="ignore"))


def generate(
    decoder: Decoder,
    texts: Sequence[Text],
    replies: Sequence[Reply],
    length: int,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
) -> Iterator[list[str]]:
    """Continues texts together; yields what each reply gained, a call's tokens at a time.

    Args:
        texts: what each reply follows; what is unread is read, one after the other.
        replies: one a text, filled in place; each ends after `length` tokens, at the model's end of
            document, or at a stop string.
        seed: the same seed on the same kind of device draws the same.

    Raises:
        UserError: a token of a text is outside the model's vocabulary.
    """
    batch = decoder.batch([text.read_by(decoder) for text in texts], seed)
    count = 1
    while length > 0 and not all(reply.ended for reply in replies):
        began = time.monotonic()
        ids, batch = decoder.make(batch, min(count, length), sampling)
        length -= ids.shape[1]
        yield [reply.add(row.tolist()) for reply, row in zip(replies, ids, strict=True)]
        if time.monotonic() - began < PATIENCE:
            count = min(2 * count, TOKENS_PER_CALL)
    yield [reply.end() for reply in replies]


def complete(
    decoder: Decoder,
    prompts: Sequence[str],
    length: int,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    stop: Sequence[str] = (),
    before: Text | None = None,
) -> list[str]:
    """What follows each prompt (see `generate`), as text.

    Args:
        before: what each prompt follows.
    """
    replies = [Reply(stop) for _ in prompts]
    texts = [(before or Text()).then(tokenizer.encode(prompt)) for prompt in prompts]
    for _ in generate(decoder, texts, replies, length, sampling, seed):
        pass
    return [reply.text for reply in replies]


def chat_turn(message: str, think: str = "off", first: bool = True, system: str = "") -> str:
    """What is read when a user has spoken, up to where the reply begins.

    No space follows "Assistant:": the reply brings its own. Empty lines end a turn in the data that
    such models are trained on, so there are none inside a message or a system prompt.

    Args:
        think: a name in `THINK`.
        first: no turn comes before this one.
        system: the system prompt, with the first turn.
    """
    added, begin = THINK[think]
    system, message = (re.sub(r"\n\s*\n", "\n", text.strip()) for text in (system, message))
    before = f"System: {system}\n\n" if system else "" if first else END_OF_TURN[:2]
    return f"{before}User: {message}{added}\n\nAssistant:{begin}"


def save_state(path: Path, text: Text, decoder: Decoder) -> None:
    """Writes what `load_state` reads: the state after the text, and the next token's logits.

    The file, NumPy's `.npz`, holds shift_att and shift_ffn [L, C], wkv [L, H, N, N] (value row, key
    column), and logits [V], all float32.

    Raises:
        UserError: it cannot be written.
    """
    logits, states = text.read_by(decoder)
    stacked = jax.tree.map(
        lambda *rows: np.stack([np.asarray(row[0], np.float32) for row in rows]), *states
    )
    with reporting_os_errors(path, "write"), written_whole(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, logits=np.asarray(logits[0]), **stacked._asdict())


def load_state(path: Path, decoder: Decoder) -> Text:
    """The text that a state stands for, to continue.

    A tuned state, a .pth, stands for none: the decoder begins every text in it.

    Raises:
        UserError: no such file, or the state of another model.
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
                f"{path}: is neither a state that --save_state wrote nor the .pth of a tuned one"
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
    """A model for World text, from all that `rwkv_jax.load` takes.

    Raises:
        UserError: it cannot be loaded, or is another tokenizer's.
    """
    precision = precision or device_precision()
    config, params, tuned = rwkv_jax.load_tuned(path, PRECISIONS[precision])
    tokenizer.check_vocabulary(config.vocab_size, path)
    decoder = Decoder(config, params, precision, tuned)
    V = config.vocab_size
    if V < tokenizer.VOCAB_SIZE - 6:
        print(f"note: {path} knows the first {V} ids of the World tokenizer only", file=sys.stderr)
    return decoder
