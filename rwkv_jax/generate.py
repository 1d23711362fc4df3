"""`python -m rwkv_jax.generate`: continues a text with a model.

The prompt is read in parallel, a piece at a time. Then each token is made from the one before and
the state alone, so memory and time a token stay the same however long the text gets. Several tokens
are made a call, sampling included: the host only sees the ids.
"""

import argparse
import codecs
import functools
import math
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rwkv_jax
from rwkv_jax import tokenizer
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.model import RWKV7, State

Array = jax.Array

PROMPT_PIECE = 256  # tokens read a call: bounds the logits, and two shapes are compiled at most
TOKENS_PER_CALL = 16


def generate(
    model: RWKV7,
    prompt: Sequence[int],
    length: int,
    temperature: float = 1.0,
    top_p: float = 0.85,
    seed: int = 0,
) -> Iterator[int]:
    """Yields the ids that follow `prompt`: at most `length`, ending before an end of document.

    Args:
        model: from `rwkv_jax.load`.
        prompt: token ids in [0, V); when empty, a new document is begun.
        temperature, top_p: see `sampling_logits`; at temperature 0 the likeliest token is taken.
        seed: the same seed on the same kind of device gives the same ids.
    """
    tokens, state = np.asarray(prompt or [tokenizer.END_OF_DOCUMENT], np.int32)[None], None
    for start in range(0, tokens.size, PROMPT_PIECE):
        piece, state = model.forward(jnp.asarray(tokens[:, start : start + PROMPT_PIECE]), state)
    logits, key = piece[0, -1], jax.random.key(seed)
    graphdef, params = nnx.split(model)
    while length > 0:
        count = min(length, TOKENS_PER_CALL)
        made, logits, state, key = _decode(
            graphdef, params, logits, state, key, count, temperature, top_p
        )
        for token in made[:count].tolist():
            if token == tokenizer.END_OF_DOCUMENT:
                return
            yield token
        length -= count


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3, 4))
def _decode(
    graphdef, params, logits: Array, state: State, key: Array, count: int, temperature, top_p
) -> tuple[Array, Array, State, Array]:
    """Makes `count` tokens, or fewer when one ends the document.

    Args:
        logits: [V] float32 of the first of them.
        state: with B = 1.
        count: TOKENS_PER_CALL or less.
    Returns:
        The ids, [TOKENS_PER_CALL]; then logits, state and key to go on from.
    """
    model: RWKV7 = nnx.merge(graphdef, params)

    def unfinished(carry) -> Array:
        made, tokens, *_ = carry
        return (made < count) & (tokens[made - 1] != tokenizer.END_OF_DOCUMENT)

    def step(carry):
        made, tokens, logits, state, key = carry
        key, draw = jax.random.split(key)
        token = jax.lax.cond(
            temperature == 0,
            lambda: jnp.argmax(logits),
            lambda: jax.random.categorical(draw, sampling_logits(logits, temperature, top_p)),
        ).astype(jnp.int32)
        after, state = model.forward(token[None, None], state)
        return made + 1, tokens.at[made].set(token), after[0, 0], state, key

    # The place before the first token is the last: any id but that of an end of document.
    tokens = jnp.full(TOKENS_PER_CALL, -1, jnp.int32)
    carry = (0, tokens, logits, state, key)
    _, tokens, logits, state, key = jax.lax.while_loop(unfinished, step, carry)
    return tokens, logits, state, key


def sampling_logits(logits: Array, temperature: float | Array, top_p: float | Array) -> Array:
    """The logits of the distribution that a token is drawn from, -inf where that is 0.

    As in the `rwkv` package, top_p cuts first: kept are the fewest of the likeliest tokens whose
    probabilities reach top_p together (and others just as likely as the last of them); what is kept
    is then raised to 1/temperature and normalised. In logarithms, so that nothing underflows.

    Args:
        logits: [V] float32.
        temperature: above 0.
        top_p: in [0, 1]; 0 keeps the likeliest, 1 keeps all.
    """
    p = jax.nn.softmax(logits)
    falling = jnp.sort(p, descending=True)
    last = jnp.minimum(jnp.sum(jnp.cumsum(falling) < top_p), p.size - 1)
    cut = (p < falling[last]) & (top_p < 1)  # rounded, a sum may reach 1 too early
    return jnp.where(cut, -jnp.inf, (logits - jnp.max(logits)) / temperature)


def decode_stream(ids: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is whole: a character that several tokens make up comes with its last.

    Bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m rwkv_jax.generate",
        description="Continue a text with an RWKV-7 model. The continuation goes to standard "
        "output; it ends after --length tokens or where the model ends the document.",
        epilog="example: python -m rwkv_jax.generate --load_model out/rwkv-final.pth "
        "--prompt $'User: 123+456=?\\n\\nAssistant:'",
    )
    parser.add_argument(
        "--load_model",
        required=True,
        metavar="X",
        help="a .pth, the output folder of a run, or a checkpoint",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="taken as it is: in bash, $'…\\n…' makes the line breaks; without --prompt the text "
        "is read from standard input, less one line break at its end",
    )
    parser.add_argument("--length", type=int, default=200, help="most tokens to make (200)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="below 1 keeps to what is likely, 0 takes the likeliest token each time (1.0)",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.85,
        help="choose among the likeliest tokens that have this probability together (0.85)",
    )
    parser.add_argument("--seed", type=int, help="of the choices (a new one each time)")
    args = parser.parse_args(argv)
    seed = secrets.randbits(31) if args.seed is None else args.seed
    if args.length < 1:
        raise UserError(f"--length {args.length}: give 1 or more")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature}: give a finite number, 0 or more")
    if not 0 <= args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p}: give a number from 0 to 1")
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed {seed}: give a number from 0 to {2**31 - 1}")

    on_cpu = jax.default_backend() == "cpu"
    model = rwkv_jax.load(args.load_model, "float32" if on_cpu else "bfloat16")
    V = model.config.vocab_size
    if not tokenizer.VOCAB_SIZE - 6 <= V <= tokenizer.VOCAB_SIZE:
        raise UserError(
            f"{args.load_model}: has a vocabulary of {V}, so it was not trained on the World "
            f"tokenizer's text, which takes {tokenizer.VOCAB_SIZE}"
        )
    prompt = tokenizer.encode(_read_stdin() if args.prompt is None else args.prompt)

    count, first = 0, math.nan

    def counted(ids: Iterable[int]) -> Iterator[int]:
        nonlocal count, first
        for token in ids:
            first = time.monotonic() if count == 0 else first
            count += 1
            yield token

    ids = generate(model, prompt, args.length, args.temperature, args.top_p, seed)
    for text in decode_stream(counted(ids)):
        print(text, end="", flush=True)
    print()
    # The first call's tokens are not counted in the speed: it is also what compiles.
    steady = count - TOKENS_PER_CALL
    speed = f", {steady / (time.monotonic() - first):.1f} tokens/s" if steady > 0 else ""
    chosen = f", --seed {seed}" if args.temperature > 0 else ""
    print(f"[{count} tokens{speed}{chosen}]", file=sys.stderr)


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("prompt, to its end (Ctrl-D):", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: is not UTF-8 at byte {error.start}") from None


if __name__ == "__main__":
    run_command(main)
