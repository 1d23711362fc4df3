"""`python -m rwkv_jax.generate`: continues texts or chats with a model.

The prompt is read in parallel, in pieces (prefill). Then each token depends only on the previous
token and the state, so time and memory per token are constant. One call generates several tokens,
including the sampling, so the host sees only ids (inference/decoder.py).
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
_SURROGATES = re.compile("[\ud800-\udfff]")  # Python's escapes for bytes that are not UTF-8


def main(argv: Sequence[str] | None = None) -> None:
    args = _options(argv)
    prompts = _read_prompts(args.prompts) if args.prompts else []
    prepare_jax()
    use_precision(args.precision)
    decoder = load_decoder(args.load_model, args.precision)
    text = start = load_state(args.load_state, decoder) if args.load_state else Text()
    if args.prompts:
        _complete_all(decoder, text, prompts, args)
        return
    if args.chat:
        texts = _chat(decoder, text, args)
    else:
        prompt = _read_stdin() if args.prompt is None else args.prompt
        texts = _stream(decoder, text.then(tokenizer.encode(prompt)), Reply(args.stop), args)
    try:
        for latest in texts:
            text = latest
    finally:  # also after an error or a signal: the text so far is not lost
        if args.save_state and text is not start:
            save_state(args.save_state, text, decoder)


def _complete_all(
    decoder: Decoder, before: Text, prompts: Sequence[str], args: argparse.Namespace
) -> None:
    """Prints a line of JSON for each prompt, continued after the text `before`."""
    for start in range(0, len(prompts), BATCH):
        group = prompts[start : start + BATCH]
        seed = (args.seed + start) % 2**31
        texts = complete(decoder, group, args.length, args.sampling, seed, args.stop, before)
        for prompt, text in zip(group, texts, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)


def _stream(decoder: Decoder, text: Text, reply: Reply, args: argparse.Namespace) -> Iterator[Text]:
    """Prints a reply during generation, then its speed; yields the text including the reply so far.

    Raises:
        UserError: a token of the text is outside the model's vocabulary.
    """
    text, calls = Text(text.prefill(decoder)), []
    yield text
    for (piece,) in generate(decoder, [text], [reply], args.length, args.sampling, args.seed):
        print(piece, end="", flush=True)
        calls.append((time.monotonic(), len(reply.ids)))
        yield text.then(reply.text_ids())
    print()
    # The tokens of the first call are not counted in the speed, because it includes compilation.
    (began, before), (now, count) = calls[0], calls[-1]
    speed = f", {(count - before) / (now - began):.1f} tokens/s" if count > before else ""
    seed = f", --seed {args.seed}" if args.sampling.temperature > 0 else ""
    print(f"[{count} tokens{speed}{seed}]", file=sys.stderr)


def _chat(decoder: Decoder, text: Text, args: argparse.Namespace) -> Iterator[Text]:
    """Chats until the end of standard input; yields the text of the chat so far.

    A reply is read together with the next message (prefill), so that tokens generated after the
    stop string do not enter the state. A line that cannot be a message is reported and skipped.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # as all input here, independent of the locale
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    ask = "> " if sys.stdin.isatty() else ""
    first = text.read is None
    if args.system and not first:
        raise UserError("--system starts a chat; leave it out if --load_state continues one")
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
            read = Text(text.then(tokenizer.encode(turn)).prefill(decoder))
        except UserError as error:
            print(f"note: {error}; that line was skipped", file=sys.stderr)
            continue
        print(THINK[args.think][1].lstrip(), end="")
        for text in _stream(decoder, read, Reply([END_OF_TURN, *args.stop]), args):
            yield text
        args.seed, first = (args.seed + 1) % 2**31, False


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line; adds `sampling` and a seed."""
    args = _parser().parse_args(argv)
    # The options have the names of its fields.
    args.sampling = Sampling(*(getattr(args, name) for name in Sampling._fields))
    args.sampling.validated()
    if args.seed is None:
        args.seed = secrets.randbits(31)
    if args.length < 1:
        raise UserError(f"--length {args.length}: give 1 or more")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed {args.seed}: give a number from 0 to {2**31 - 1}")
    if args.prompts and args.save_state:
        raise UserError(
            "--prompts has several texts, so there is no single state to save; leave out "
            "--save_state"
        )
    for name, given in (("--think", args.think != "off"), ("--system", args.system)):
        if given and not args.chat:
            raise UserError(f"{name} needs --chat")
    args.prompt, args.system = (_argument(name, vars(args)[name]) for name in ("prompt", "system"))
    args.stop = [_argument("stop", text) for text in args.stop]
    if args.save_state:
        check_writable(args.save_state)
    return args


def _parser() -> CommandParser:
    parser = CommandParser(
        description="Continue a text with an RWKV-7 model, or chat with it. The text goes to "
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
    _add_text_options(parser)
    parser.add_argument(
        "--length", type=int, default=200, help="maximum number of tokens to generate (200)"
    )
    _add_sampling_options(parser)
    parser.add_argument(
        "--save_state", metavar="FILE", type=Path, help="write the state after the text"
    )
    parser.add_argument(
        "--load_state",
        metavar="FILE",
        type=Path,
        help="continue from a saved state of this model, or start from a tuned state (the .pth of "
        "state tuning)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="precision of the computation; on a CPU, bf16 and fp16 only round the weights, with "
        "the time and memory of fp32 (default: fp32 on a CPU, bf16 on a GPU, fp16 on one older "
        "than Ampere)",
    )
    return parser


def _add_text_options(parser: CommandParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt",
        metavar="TEXT",
        help="used unchanged (in bash, write line breaks as $'…\\n…'); without --prompt, the text "
        "is read from standard input, without its last line break",
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
        help="chat: each line is a message, Ctrl-D ends; the model remembers the conversation",
    )
    parser.add_argument(
        "--think",
        choices=THINK,
        default="off",
        help="with --chat, for G1 models: start replies with <think, request short or long "
        "thinking, or use an empty thought (fake); …-2025: the wording for models from before "
        "April 2026 (off)",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        default="",
        help="with --chat: the system prompt, before the first message",
    )


def _add_sampling_options(parser: CommandParser) -> None:
    texts = {
        "temperature": "below 1 prefers likely tokens; 0 always takes the most likely token (1.0)",
        "top_p": "sample from the smallest set of most likely tokens with this total probability "
        "(0.85)",
        "top_k": "sample from at most this many tokens; 0: no limit (0)",
        "alpha_presence": "penalty on the logit of a token that has already been generated (0.2)",
        "alpha_frequency": "penalty for each occurrence; not for blanks and digits (0.2)",
        "alpha_decay": "decay of that count per token (0.996)",
    }
    for name, text in texts.items():
        default = getattr(DEFAULT, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this string; repeatable",
    )
    parser.add_argument("--seed", type=int, help="seed for sampling (default: a new one each time)")


def _argument(name: str, text: str | None) -> str | None:
    """An option's text, decoded as UTF-8 also if the locale is not UTF-8 (LC_ALL=C)."""
    if text is None or not _SURROGATES.search(text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError(f"--{name}: is not UTF-8") from None


def _read_prompts(path: Path) -> list[str]:
    """The non-blank prompts of a file, whose lines end only at LF or CR LF."""
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
        raise UserError(f"{path}: has no prompts")
    return prompts


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("prompt (end with Ctrl-D):", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: is not UTF-8 at byte {error.start}") from None


if __name__ == "__main__":
    run_command(main)
