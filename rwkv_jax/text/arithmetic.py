"""The command that writes a corpus of exact arithmetic as chats in English and Chinese.

    python -m data.arithmetic --count 1000 --seed 42 data/demo.jsonl

writes the demo text. Each line is {"text": "User: …\\n\\nAssistant: …"}: sums, differences and
equations in one unknown, in half- and full-width digits, Chinese numerals (plain and capital) and
English words. A reply is determined by the text before it, so that a model's answers can be scored.
The same count and seed give the same bytes on every Python.
"""

import dataclasses
import json
import random
import zlib
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

from rwkv_jax.errors import CommandParser, UserError
from rwkv_jax.files import reporting_os_errors, written_whole

# Numbers as text ----------------------------------------------------------------------------------


def digits(value: Decimal) -> str:
    """12.50 as "12.5": no exponent, no trailing zeros."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def full_width(value: Decimal) -> str:
    """12.5 as "１２．５"."""
    return digits(value).translate({ord(c): ord(c) + 0xFEE0 for c in "0123456789.-"})


def _chinese(value: Decimal, numerals: str, units: str) -> str:
    """Groups of four digits, 个 万 亿; zeros inside a number, however many, become one 零."""

    def group(number: int) -> str:
        text, gap = "", False
        for digit, unit in zip(f"{number:04}", (*reversed(units), ""), strict=True):
            if digit == "0":
                gap = text != ""
            else:
                text += numerals[0] * gap + numerals[int(digit)] + unit
                gap = False
        return text

    whole, _, fraction = digits(abs(value)).partition(".")
    text, gap = "", False
    for unit, power in (("亿", 8), ("万", 4), ("", 0)):
        number = int(whole) // 10**power % 10**4
        if number:
            gap = text != "" and (gap or number < 1000)
            text += numerals[0] * gap + group(number) + unit
        gap = number == 0
    text = text or numerals[0]
    if fraction:
        text += "点" + "".join(numerals[int(digit)] for digit in fraction)
    return text


def chinese(value: Decimal) -> str:
    """-12.5 as "负十二点五"; |value| < 10¹²."""
    text = _chinese(value, "零一二三四五六七八九", "十百千")
    return "负" * (value < 0) + (text[1:] if text.startswith("一十") else text)


def capital(value: Decimal) -> str:
    """-12.5 as "负壹拾贰点伍", as on cheques; |value| < 10¹²."""
    return "负" * (value < 0) + _chinese(value, "零壹贰叁肆伍陆柒捌玖", "拾佰仟")


_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def words(value: Decimal) -> str:
    """-12.5 as "negative twelve point five"; |value| < 10¹²."""

    def below_thousand(number: int) -> list[str]:
        hundreds, rest = divmod(number, 100)
        parts = [_SMALL[hundreds], "hundred"] if hundreds else []
        if rest >= 20:
            parts.append(_TENS[rest // 10 - 2] + ("-" + _SMALL[rest % 10] if rest % 10 else ""))
        elif rest:
            parts.append(_SMALL[rest])
        return parts

    whole, _, fraction = digits(abs(value)).partition(".")
    parts = []
    for scale, power in (("billion", 9), ("million", 6), ("thousand", 3), ("", 0)):
        number = int(whole) // 10**power % 1000
        if number:
            parts += [*below_thousand(number), scale]
    parts = [part for part in parts if part] or [_SMALL[0]]
    if fraction:
        parts += ["point", *(_SMALL[int(digit)] for digit in fraction)]
    return " ".join(["negative"] * (value < 0) + parts)


# Notations and phrases ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phrases:
    """Questions with their replies.

    `{a} {b}` the operands, `{c}` the result, `{e}` the expression a ± b, `{q}` an equation with the
    unknown `{x}`, `{s}` its solving expression, `{v}` its value, `{o}` the result in the notation's
    other way of writing, `{eq}` the equals sign. `{E}` and `{O}` start with a capital.
    """

    ask: Sequence[tuple[str, str]]
    ask_sum: Sequence[tuple[str, str]]
    ask_difference: Sequence[tuple[str, str]]
    solve: Sequence[tuple[str, str]]
    then_add: Sequence[tuple[str, str]]
    then_subtract: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Notation:
    """How numbers and expressions are written."""

    number: Callable[[Decimal], str]
    other: Callable[[Decimal], str]
    plus: str
    minus: str
    equals: str
    unknown: str
    brackets: tuple[str, str]  # around a negative right operand
    phrases: Phrases

    def expression(self, left: str | Decimal, sign: int, right: str | Decimal) -> str:
        """`left` ± `right`, each a number or the name of the unknown."""

        def operand(value: str | Decimal) -> str:
            return value if isinstance(value, str) else self.number(value)

        end = operand(right)
        if isinstance(right, Decimal) and right < 0:
            end = end.join(self.brackets)
        return operand(left) + (self.plus if sign > 0 else self.minus) + end


_ENGLISH_SYMBOLS = Phrases(
    ask=(
        ("What is {e}?", "{e} = {c}"),
        ("{e} = ?", "{c}"),
        ("Calculate {e}.", "The answer is {c}."),
        ("What is {e}? Answer in words.", "{O}."),
    ),
    ask_sum=(
        ("Add {a} and {b}.", "{e} = {c}"),
        ("What is the sum of {a} and {b}?", "The sum is {c}."),
    ),
    ask_difference=(
        ("Subtract {b} from {a}.", "{e} = {c}"),
        ("Take {b} away from {a}.", "That leaves {c}."),
    ),
    solve=(
        ("Solve for {x}: {q}", "{x} = {s} = {v}"),
        ("If {q}, what is {x}?", "{x} = {v}"),
        ("Find the number {x} such that {q}.", "{x} = {s} = {v}"),
    ),
    then_add=(("Now add {b}.", "{e} = {c}"), ("And if you add {b} to that?", "That makes {c}.")),
    then_subtract=(
        ("Now subtract {b}.", "{e} = {c}"),
        ("And if you take {b} away from that?", "That leaves {c}."),
    ),
)
_ENGLISH_WORDS = Phrases(
    ask=(
        ("What is {e}?", "{E} is {c}."),
        ("How much is {e}?", "{E} equals {c}."),
        ("Work out {e}, please.", "The answer is {c}."),
        ("What is {e}? Answer in digits.", "{o}"),
    ),
    ask_sum=(
        ("Please add {a} and {b}.", "The sum of {a} and {b} is {c}."),
        ("What do {a} and {b} add up to?", "They add up to {c}."),
    ),
    ask_difference=(
        ("Please subtract {b} from {a}.", "{E} is {c}."),
        ("Take {b} away from {a}.", "That leaves {c}."),
    ),
    solve=(
        ("If {q}, what is {x}?", "{x} is {v}, because {s} is {v}."),
        ("Given that {q}, find {x}.", "{x} equals {v}."),
    ),
    then_add=(("Now add {b}.", "{E} is {c}."), ("And {b} more?", "That makes {c}.")),
    then_subtract=(("Now subtract {b}.", "{E} is {c}."), ("And {b} less?", "That leaves {c}.")),
)
_CHINESE_SYMBOLS = Phrases(
    ask=(
        ("{e}{eq}？", "{c}"),
        ("计算：{e}", "{e}{eq}{c}"),
        ("{e}等于多少？", "{e}{eq}{c}"),
        ("{e}等于多少？请用大写数字回答。", "{o}。"),
    ),
    ask_sum=(
        ("{a}与{b}的和是多少？", "{a}与{b}的和是{c}。"),
        ("请把{a}和{b}加起来。", "{e}{eq}{c}"),
    ),
    ask_difference=(
        ("{a}与{b}的差是多少？", "{a}与{b}的差是{c}。"),
        ("从{a}里减去{b}得多少？", "得{c}。"),
    ),
    solve=(
        ("已知{q}，求{x}。", "{x}{eq}{s}{eq}{v}"),
        ("解方程：{q}", "{x}{eq}{s}{eq}{v}"),
        ("如果{q}，那么{x}是多少？", "{x}{eq}{v}"),
    ),
    then_add=(("再加上{b}呢？", "{e}{eq}{c}"), ("再加{b}，一共是多少？", "一共是{c}。")),
    then_subtract=(("再减去{b}呢？", "{e}{eq}{c}"), ("再减{b}得多少？", "得{c}。")),
)
_CHINESE_WORDS = Phrases(
    ask=(
        ("{e}等于多少？", "{e}等于{c}。"),
        ("请问{e}是多少？", "答案是{c}。"),
        ("{e}等于几？请用阿拉伯数字回答。", "{o}"),
    ),
    ask_sum=(
        ("{a}与{b}的和是多少？", "{a}与{b}的和是{c}。"),
        ("把{a}和{b}加起来是多少？", "加起来是{c}。"),
    ),
    ask_difference=(
        ("{a}与{b}的差是多少？", "{a}与{b}的差是{c}。"),
        ("从{a}里减去{b}得多少？", "得{c}。"),
    ),
    solve=(
        ("已知{q}，求{x}。", "{x}等于{v}，因为{s}等于{v}。"),
        ("如果{q}，那么{x}是多少？", "{x}是{v}。"),
    ),
    then_add=(("再加上{b}呢？", "{e}等于{c}。"), ("再加{b}，一共是多少？", "一共是{c}。")),
    then_subtract=(("再减去{b}呢？", "{e}等于{c}。"), ("再减{b}得多少？", "得{c}。")),
)


@dataclasses.dataclass(frozen=True)
class Language:
    notations: Sequence[Notation]
    greetings: Sequence[tuple[str, str]]
    thanks: Sequence[tuple[str, str]]


LANGUAGES = (
    Language(
        notations=(
            Notation(digits, words, " + ", " - ", " = ", "x", ("(", ")"), _ENGLISH_SYMBOLS),
            Notation(words, digits, " plus ", " minus ", " equals ", "x", ("", ""), _ENGLISH_WORDS),
        ),
        greetings=(
            ("Hello!", "Hello! What shall we calculate?"),
            ("Can you help me with some arithmetic?", "Of course. What is the question?"),
        ),
        thanks=(("Thank you!", "You're welcome!"), ("Thanks, that's all.", "Goodbye!")),
    ),
    Language(
        notations=(
            Notation(digits, capital, "+", "-", "=", "x", ("(", ")"), _CHINESE_SYMBOLS),
            Notation(full_width, capital, "＋", "－", "＝", "ｘ", ("（", "）"), _CHINESE_SYMBOLS),
            Notation(chinese, digits, "加", "减", "等于", "x", ("", ""), _CHINESE_WORDS),
            Notation(capital, digits, "加", "减", "等于", "x", ("", ""), _CHINESE_WORDS),
        ),
        greetings=(
            ("你好！", "你好！想算什么？"),
            ("能帮我做几道算术题吗？", "当然可以，请出题。"),
        ),
        thanks=(("谢谢！", "不客气！"), ("谢谢，就这些。", "再见！")),
    ),
)

# Chats --------------------------------------------------------------------------------------------

_LENGTHS = "1" * 12 + "2" * 15 + "3" * 8 + "4" * 4 + "9"  # digits of a number: mostly short

Option = TypeVar("Option")


class Chat:
    """Draws chats. Uses only `random()`, whose stream is the same on every Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def _chance(self, probability: float) -> bool:
        return self._random() < probability

    def _pick(self, options: Sequence[Option]) -> Option:
        return options[int(self._random() * len(options))]

    def _number(self, signed: bool = True) -> Decimal:
        value = Decimal(int(self._random() * 10 ** int(self._pick(_LENGTHS))))
        if self._chance(0.2):
            places = self._pick((1, 1, 1, 2))
            value += Decimal(int(self._random() * 10**places)).scaleb(-places)
        return -value if value and signed and self._chance(0.15) else value

    def draw(self) -> str:
        """User and Assistant in turn: 1 to 5 questions, now and then a greeting and thanks."""
        language = self._pick(LANGUAGES)
        notation = self._pick(language.notations)
        result: Decimal | None = None
        turns = [self._pick(language.greetings)] if self._chance(0.1) else []
        for _ in range(self._pick((1, 2, 2, 3, 3, 4, 5))):
            if result is not None and self._chance(0.35):
                turn, result = self._compute(notation, previous=result)
            else:
                if self._chance(0.2):
                    language = self._pick(LANGUAGES)
                notation = self._pick(language.notations)
                make = self._solve if self._chance(0.35) else self._compute
                turn, result = make(notation)
            turns.append(turn)
        if self._chance(0.1):
            turns.append(self._pick(language.thanks))
        return "\n\n".join(f"User: {question}\n\nAssistant: {reply}" for question, reply in turns)

    def _compute(
        self, notation: Notation, previous: Decimal | None = None
    ) -> tuple[tuple[str, str], Decimal]:
        """A sum or difference of two new numbers, or continuing from the `previous` result."""
        sign = self._pick((1, -1))
        phrases = notation.phrases
        if previous is None:
            left, right = self._number(), self._number()
            specific = phrases.ask_sum if sign > 0 else phrases.ask_difference
            choices = [*phrases.ask, *specific]
        else:
            left, right = previous, self._number(signed=False)
            choices = list(phrases.then_add if sign > 0 else phrases.then_subtract)
        result = left + sign * right
        expression = notation.expression(left, sign, right)
        fields = {
            "a": notation.number(left),
            "b": notation.number(right),
            "c": notation.number(result),
            "e": expression,
            "E": expression[0].upper() + expression[1:],
            "o": notation.other(result),
            "O": notation.other(result).capitalize(),
            "eq": notation.equals,
        }
        question, reply = self._pick(choices)
        return (question.format(**fields), reply.format(**fields)), result

    def _solve(self, notation: Notation) -> tuple[tuple[str, str], Decimal]:
        """x ± b = c or a ± x = c."""
        sign = self._pick((1, -1))
        x, known = self._number(), self._number()
        if self._chance(0.5):
            result = x + sign * known
            left_side = notation.expression(notation.unknown, sign, known)
            solving = notation.expression(result, -sign, known)
        else:
            result = known + sign * x
            left_side = notation.expression(known, sign, notation.unknown)
            # a + x = c: x = c - a;  a - x = c: x = a - c
            first, second = (result, known) if sign > 0 else (known, result)
            solving = notation.expression(first, -1, second)
        fields = {
            "x": notation.unknown,
            "q": left_side + notation.equals + notation.number(result),
            "s": solving,
            "v": notation.number(x),
            "eq": notation.equals,
        }
        question, reply = self._pick(notation.phrases.solve)
        return (question.format(**fields), reply.format(**fields)), x


# Plain sums ---------------------------------------------------------------------------------------

HELD_OUT = 10  # one problem in this many is kept for the test


class Sums:
    """Draws "1 2 + 3 4 = 4 6": one sum or difference of whole numbers, no words.

    Spaces make each digit a token, and all tokens are below 512. With `--vocab_size 512`, most of a
    small model's work is arithmetic, and a CPU is enough. The number of digits of an
    operand is uniform from 1 to `digits`. Whether a problem is held out depends on the problem
    alone, so the two parts share none, whatever their seeds.
    """

    def __init__(self, digits: int, held_out: bool, seed: int) -> None:
        self._digits, self._held_out = digits, held_out
        self._random = random.Random(seed).random

    def draw(self) -> str:
        while True:
            left, right = self._number(), self._number()
            sign = "+" if self._random() < 0.5 else "-"
            problem = f"{left} {sign} {right} ="
            if (zlib.crc32(problem.encode()) % HELD_OUT == 0) == self._held_out:
                break
        return self._apart(f"{problem} {left + right if sign == '+' else left - right}")

    def _number(self) -> int:
        length = 1 + int(self._random() * self._digits)
        return int(self._random() * 10**length)

    @staticmethod
    def _apart(text: str) -> str:
        """12 + 34 = 46 as 1 2 + 3 4 = 4 6."""
        return " ".join(text.replace(" ", ""))


def write_corpus(path: Path, count: int, seed: int, draw: Callable[[], str] | None = None) -> None:
    """Writes `count` texts, by default chats; the file appears when it is complete.

    Raises:
        UserError: `count` is below 1, or `path` cannot be written.
    """
    if count < 1:
        raise UserError(f"--count {count}: must be at least 1")
    draw = draw or Chat(seed).draw
    with reporting_os_errors(path, "write"), written_whole(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for _ in range(count):
                file.write(json.dumps({"text": draw()}, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Write a corpus of exact arithmetic, as chats in English and Chinese: sums, "
        "differences and equations in one unknown, in digits, words and Chinese numerals.",
        epilog="example: %(prog)s --count 20000 --seed 1 arithmetic.jsonl",
    )
    parser.add_argument("output", metavar="OUT.jsonl", type=Path, help="The file to write.")
    parser.add_argument(
        "--count", metavar="TEXTS", type=int, required=True, help="Number of texts, one per line."
    )
    parser.add_argument(
        "--seed",
        metavar="SEED",
        type=int,
        default=0,
        help="The same seed gives the same bytes (0).",
    )
    parser.add_argument(
        "--sums",
        metavar="DIGITS",
        type=int,
        help="Instead of chats, write plain sums and differences of whole numbers of at most "
        "DIGITS digits, such as 1 2 + 3 4 = 4 6. A tenth of all problems is held out.",
    )
    parser.add_argument(
        "--held_out",
        action="store_true",
        help="With --sums: write only the problems that are held out.",
    )
    args = parser.parse_args(argv)
    draw = None
    if args.sums is not None:
        if not 1 <= args.sums <= 9:
            raise UserError(f"--sums {args.sums}: give a number of digits from 1 to 9")
        draw = Sums(args.sums, args.held_out, args.seed).draw
    elif args.held_out:
        raise UserError("--held_out needs --sums; for held-out chats, use another --seed")
    write_corpus(args.output, args.count, args.seed, draw)
    kind = "chats" if draw is None else "sums"
    print(f"{args.output}: {args.count} {kind}, {args.output.stat().st_size} bytes")
