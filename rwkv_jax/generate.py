"""`python -m rwkv_jax.generate`: continues texts, or chats, with a model.

The prompt is read in parallel, a piece at a time. Then each token is made from the one before and
the state alone, so memory and time a token stay the same however long the text gets. Several tokens
are made a call, sampling included: the host only sees the ids (decoding.py).
"""

import argparse
import codecs
import io
import json
import os
import re
import secrets
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import rwkv_jax
from rwkv_jax import pth, tokenizer, weights
from rwkv_jax.build import PRECISIONS, device_precision, prepare_jax
from rwkv_jax.corpus import decode, json_text
from rwkv_jax.decoding import TOKENS_PER_CALL, Decoder
from rwkv_jax.errors import CommandParser, UserError, path_argument, run_command
from rwkv_jax.files import check_writable, reporting_os_errors, written_whole
from rwkv_jax.model import State, use_precision
from rwkv_jax.sampling import DEFAULT, Sampling

BATCH = 16  # prompts of a file that are continued at once
PATIENCE = 0.1  # seconds: while calls are shorter than this, more tokens are made a call
END_OF_TURN = "\n\nUser:"
_SURROGATES = re.compile("[\ud800-\udfff]")  # by which Python escapes bytes that are not UTF-8
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


def main(argv: Sequence[str] | None = None) -> None:
    args = _options(argv)
    prompts = _read_prompts(args.prompts) if args.prompts else []
    prepare_jax()
    use_precision(args.precision)
    decoder = load_decoder(args.load_model, args.precision)
    text = begun = load_state(args.load_state, decoder) if args.load_state else Text()
    if args.prompts:
        _complete_all(decoder, text, prompts, args)
        return
    if args.chat:
        said = _chat(decoder, text, args)
    else:
        prompt = _read_stdin() if args.prompt is None else args.prompt
        said = _stream(decoder, text.then(tokenizer.encode(prompt)), Reply(args.stop), args)
    try:
        for latest in said:
            text = latest
    finally:  # an error or a signal loses nothing that was said before it
        if args.save_state and text is not begun:
            save_state(args.save_state, text, decoder)


def _complete_all(
    decoder: Decoder, before: Text, prompts: Sequence[str], args: argparse.Namespace
) -> None:
    """A line of JSON for each prompt, which follows the text before."""
    for start in range(0, len(prompts), BATCH):
        group = prompts[start : start + BATCH]
        seed = (args.seed + start) % 2**31
        made = complete(decoder, group, args.length, args.sampling, seed, args.stop, before)
        for prompt, text in zip(group, made, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)


def _stream(decoder: Decoder, text: Text, reply: Reply, args: argparse.Namespace) -> Iterator[Text]:
    """Shows a reply as it is made, then how fast it was; yields the text with what is made so far.

    Raises:
        UserError: a token of the text is outside the model's vocabulary.
    """
    text, calls = Text(text.read_by(decoder)), []
    yield text
    for (piece,) in generate(decoder, [text], [reply], args.length, args.sampling, args.seed):
        print(piece, end="", flush=True)
        calls.append((time.monotonic(), len(reply.ids)))
        yield text.then(reply.kept_ids())
    print()
    # The first call's tokens are not counted in the speed: it is also what compiles.
    (began, before), (now, count) = calls[0], calls[-1]
    speed = f", {(count - before) / (now - began):.1f} tokens/s" if count > before else ""
    chosen = f", --seed {args.seed}" if args.sampling.temperature > 0 else ""
    print(f"[{count} tokens{speed}{chosen}]", file=sys.stderr)


def _chat(decoder: Decoder, text: Text, args: argparse.Namespace) -> Iterator[Text]:
    """Turn after turn to the end of standard input; yields all that was said so far.

    A reply is read with the next message, in parallel: what the model made after the stop string
    is then not in its mind. A line that cannot be a message is reported and skipped.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the locale, as all that is read here
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    ask = "> " if sys.stdin.isatty() else ""
    first = text.read is None
    if args.system and not first:
        raise UserError("--system begins a chat; leave it out where --load_state continues one")
    while True:
        try:
            message = input(ask)
        except EOFError:
            return
        if not message.strip():
            continue
        if _SURROGATES.search(message):
            print("note: not UTF-8; that line was skipped", file=sys.stderr)
            continue
        turn = chat_turn(message, args.think, first, args.system if first else "")
        try:
            read = Text(text.then(tokenizer.encode(turn)).read_by(decoder))
        except UserError as error:
            print(f"note: {error}; that line was skipped", file=sys.stderr)
            continue
        print(THINK[args.think][1].lstrip(), end="")
        for text in _stream(decoder, read, Reply([END_OF_TURN, *args.stop]), args):
            yield text
        args.seed, first = (args.seed + 1) % 2**31, False


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; with `sampling` made of it, and a seed."""
    parser = CommandParser(
        "python -m rwkv_jax.generate",
        description="Continue a text with an RWKV-7 model, or chat with it. A text goes to "
        "standard output; it ends after --length tokens, where the model ends the document, or "
        "before a --stop string.",
        epilog="example: python -m rwkv_jax.generate --load_model out/rwkv-final.pth "
        "--prompt $'User: 123+456=?\\n\\nAssistant:'",
    )
    parser.add_argument(
        "--load_model",
        required=True,
        type=path_argument,
        metavar="X",
        help="a .pth, the output folder of a run, or a checkpoint",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt",
        metavar="TEXT",
        help="taken as it is: in bash, $'…\\n…' makes the line breaks; without --prompt the text "
        "is read from standard input, less one line break at its end",
    )
    what.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='continue each line of a text file, or each {"prompt": "…"} of a .jsonl, several at a '
        'time; writes {"prompt": …, "text": …} lines',
    )
    what.add_argument(
        "--chat",
        action="store_true",
        help="talk: a line is a message, Ctrl-D ends; the model keeps in mind what was said",
    )
    parser.add_argument(
        "--think",
        choices=THINK,
        default="off",
        help="with --chat, for models that can (G1): begin replies with <think, ask for a short or "
        "long one, or with an empty thought (fake); …-2025: in the words that models from before "
        "April 2026 know (off)",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        default="",
        help="with --chat: the system prompt, which comes before the first message",
    )
    parser.add_argument("--length", type=int, default=200, help="most tokens to make (200)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=DEFAULT.temperature,
        help="below 1 keeps to what is likely, 0 takes the likeliest token each time (1.0)",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=DEFAULT.top_p,
        help="choose among the likeliest tokens that have this probability together (0.85)",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        default=DEFAULT.top_k,
        help="and among so many at most; 0: no limit (0)",
    )
    parser.add_argument(
        "--alpha_presence",
        type=float,
        default=DEFAULT.alpha_presence,
        help="lower the logit of a token once it was made (0.2)",
    )
    parser.add_argument(
        "--alpha_frequency",
        type=float,
        default=DEFAULT.alpha_frequency,
        help="… and each time it was; not for blanks and digits (0.2)",
    )
    parser.add_argument(
        "--alpha_decay",
        type=float,
        default=DEFAULT.alpha_decay,
        help="what is left of such a count a token later (0.996)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable"
    )
    parser.add_argument("--seed", type=int, help="of the choices (a new one each time)")
    parser.add_argument(
        "--save_state", metavar="FILE", type=Path, help="write the state after the text"
    )
    parser.add_argument(
        "--load_state",
        metavar="FILE",
        type=Path,
        help="continue from such a state of this model, or begin in a tuned one (the .pth of state "
        "tuning)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="of the computation; on a CPU, bf16 and fp16 only round the weights, and take as much "
        "time and memory as fp32 (default: fp32 on a CPU, bf16 on a GPU, fp16 on those before "
        "Ampere)",
    )
    args = parser.parse_args(argv)
    # The options have the names of its fields.
    args.sampling = Sampling(*(getattr(args, name) for name in Sampling._fields))
    args.sampling.checked()
    if args.seed is None:
        args.seed = secrets.randbits(31)
    if args.length < 1:
        raise UserError(f"--length {args.length}: give 1 or more")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed {args.seed}: give a number from 0 to {2**31 - 1}")
    if args.prompts and args.save_state:
        raise UserError("--prompts: its texts have no one state; leave out --save_state")
    for name, given in (("--think", args.think != "off"), ("--system", args.system)):
        if given and not args.chat:
            raise UserError(f"{name} goes with --chat")
    args.prompt, args.system = (_argument(name, vars(args)[name]) for name in ("prompt", "system"))
    args.stop = [_argument("stop", text) for text in args.stop]
    if args.save_state:
        check_writable(args.save_state)
    return args


def _argument(name: str, text: str | None) -> str | None:
    """An option's text, also where the locale (LC_ALL=C) is not that of its UTF-8 bytes."""
    if text is None or not _SURROGATES.search(text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError(f"--{name}: is not UTF-8") from None


def _read_prompts(path: Path) -> list[str]:
    """The prompts of a file that are not blank: its lines end at LF or CR LF, and nowhere else."""
    with reporting_os_errors(path, "read"):
        lines = path.read_bytes().split(b"\n")
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            if path.suffix.lower() == ".jsonl" and line.strip():
                prompt = json_text(line, "prompt")
            else:
                prompt = decode(line).removesuffix("\r")
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if prompt.strip():
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: holds no prompts")
    return prompts


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("prompt, to its end (Ctrl-D):", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: is not UTF-8 at byte {error.start}") from None


if __name__ == "__main__":
    run_command(main)
