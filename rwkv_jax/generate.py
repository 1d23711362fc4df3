"""`python -m rwkv_jax.generate`: continues texts, or chats, with a model.

The prompt is read in parallel, a piece at a time. Then each token is made from the one before and
the state alone, so memory and time a token stay the same however long the text gets. Several tokens
are made a call, sampling included: the host only sees the ids (decoding.py).
"""

import argparse
import io
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from rwkv_jax.device.precision import use_precision
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import CommandParser, UserError, path_argument, run_command
from rwkv_jax.files import check_writable, reporting_os_errors
from rwkv_jax.inference.decoder import Decoder
from rwkv_jax.inference.generation import (
    END_OF_TURN,
    THINK,
    Reply,
    Text,
    chat_turn,
    complete,
    generate,
    load_decoder,
    load_state,
    save_state,
)
from rwkv_jax.inference.sampling import DEFAULT, Sampling
from rwkv_jax.text import tokenizer
from rwkv_jax.text.corpus import decode, json_text

BATCH = 16  # prompts of a file that are continued at once
_SURROGATES = re.compile("[\ud800-\udfff]")  # by which Python escapes bytes that are not UTF-8


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
        description="Continue a text with an RWKV-7 model, or chat with it. A text goes to "
        "standard output; it ends after --length tokens, where the model ends the document, or "
        "before a --stop string.",
        epilog="example: %(prog)s --load_model out/rwkv-final.pth "
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
