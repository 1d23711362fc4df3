"""The arithmetic corpus: every answer worked out again, from the text alone, in fractions."""

import json
import re
import subprocess
import sys
import unicodedata
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from rwkv_jax.errors import UserError
from rwkv_jax.text import arithmetic

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "data" / "demo.jsonl"

# --- reading numbers, without the generator's help ----------------------------------------------

CHINESE_DIGITS = {
    c: i for s in ("零一二三四五六七八九", "零壹贰叁肆伍陆柒捌玖") for i, c in enumerate(s)
}
CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000}
SMALL = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
} | {
    word: 10 * number
    for number, word in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
    )
}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
ENGLISH = "|".join([*sorted(SMALL, key=len, reverse=True), "hundred", *SCALES, "point"])
NUMBER = re.compile(
    r"-?\d+(?:\.\d+)?"
    r"|负?[零一二三四五六七八九壹贰叁肆伍陆柒捌玖十百千拾佰仟万亿点]+"
    rf"|(?:negative )?\b(?:{ENGLISH})\b(?:[ -](?:{ENGLISH})\b)*"
)


def value_of(text: str) -> Fraction:
    if re.match(r"-?\d", text):
        return Fraction(text)
    if re.match(r"[a-z]", text):
        sign = -1 if text.startswith("negative ") else 1
        whole, _, fraction = text.removeprefix("negative ").partition(" point ")
        total = group = 0
        for word in re.split("[ -]", whole):
            if word == "hundred":
                group *= 100
            elif word in SCALES:
                total, group = total + group * SCALES[word], 0
            else:
                group += SMALL[word]
        tail = "".join(str(SMALL[word]) for word in fraction.split())
    else:
        sign = -1 if text.startswith("负") else 1
        whole, _, fraction = text.removeprefix("负").partition("点")
        total = group = digit = 0
        for character in whole:
            if character in CHINESE_DIGITS:
                digit = CHINESE_DIGITS[character]
            elif character in CHINESE_UNITS:
                group, digit = group + (digit or 1) * CHINESE_UNITS[character], 0
            else:
                total += (group + digit) * {"万": 10**4, "亿": 10**8}[character]
                group = digit = 0
        group += digit
        tail = "".join(str(CHINESE_DIGITS[character]) for character in fraction)
    return sign * (Fraction(total + group) + Fraction(int(tail or 0), 10 ** len(tail)))


# --- reading sentences ------------------------------------------------------------------------

SYMBOLS = [
    (r" plus |加(?!起来|上)", "+"),
    (r" minus |减(?!去)", "-"),
    (r" equals | is (?=N|x)|等于(?=N)|是(?=N)", "="),
]


def shape_of(text: str) -> tuple[str, list[Fraction]]:
    """The text with N for each number, operators as symbols and no spaces around them."""
    text = unicodedata.normalize("NFKC", text).lower().replace("一共", "共")
    # The minus after an operand is an operator: 5-3, x-3, 5)-3.
    text = re.sub(r"(?<=[\dx)])-", " minus ", text)
    values = [value_of(match) for match in NUMBER.findall(text)]
    text = NUMBER.sub("N", text).replace("(N)", "N")
    for pattern, symbol in SYMBOLS:
        text = re.sub(pattern, symbol, text)
    return re.sub(r" *([-+=]) *", r"\1", text), values


EXPRESSION = re.compile(r"([Nx])([-+])([Nx])(?:=(N))?")
# In words: what is asked of two numbers, or of one and the last result.
RELATIONS = [
    (r"add N and N|sum of N and N|N and N add up|N与N的和|把N和N加起来", lambda a, b: a + b),
    (r"subtract N from N|take N away from N", lambda a, b: b - a),
    (r"N与N的差|从N里减去N", lambda a, b: a - b),
    (r"^now add N\.$|if you add N to that|^and N more|^再(?:加上|[+])N", lambda b, last: last + b),
    (
        r"^now subtract N\.$|take N away from that|^and N less|^再(?:减去|-)N",
        lambda b, last: last - b,
    ),
]
PLEASANTRIES = {
    "Hello!": "Hello! What shall we calculate?",
    "Can you help me with some arithmetic?": "Of course. What is the question?",
    "你好！": "你好！想算什么？",
    "能帮我做几道算术题吗？": "当然可以，请出题。",
    "Thank you!": "You're welcome!",
    "Thanks, that's all.": "Goodbye!",
    "谢谢！": "不客气！",
    "谢谢，就这些。": "再见！",
}


def answer_to(question: str, last: Fraction | None) -> Fraction:
    shape, values = shape_of(question)
    for pattern, relation in RELATIONS:
        if re.search(pattern, shape):
            if len(values) == 1:
                assert last is not None, question
                return relation(values[0], last)
            return relation(*values)
    matches = [match for match in EXPRESSION.findall(shape) if "N" in match]
    assert len(matches) == 1, (question, shape)
    left, operator, right, equals = matches[0]
    sign = 1 if operator == "+" else -1
    if not equals:
        first, second = values
        return first + sign * second
    known, total = values
    if left == "x":  # x ± known = total
        return total - sign * known
    return sign * (total - known)  # known ± x = total


def check_statements(reply: str, x: Fraction) -> None:
    """Everything that the reply sets equal is equal."""
    shape, values = shape_of(reply)
    remaining = iter(values)
    for clause in re.split(r",(?: because )?(?:因为)?", shape):
        sides = []
        for side in clause.strip(" .。").split("="):
            numbers = [next(remaining) if c == "N" else x for c in re.findall("[Nx]", side)]
            if re.fullmatch("[Nx]", side):
                sides.append(numbers[0])
            elif match := re.fullmatch("[Nx]([-+])[Nx]", side):
                sides.append(numbers[0] + (1 if match[1] == "+" else -1) * numbers[1])
            elif re.search("sum of N and N|N与N的和", side):
                sides.append(sum(numbers))
            elif "N与N的差" in side:
                sides.append(numbers[0] - numbers[1])
        assert len(set(sides)) <= 1, reply


def turns_of(line: str) -> list[tuple[str, str]]:
    record = json.loads(line)
    assert list(record) == ["text"]
    parts = record["text"].split("\n\n")
    assert len(parts) % 2 == 0
    assert all(part.startswith("User: ") for part in parts[::2])
    assert all(part.startswith("Assistant: ") for part in parts[1::2])
    turns = [part.partition(": ")[2] for part in parts]
    return list(zip(turns[::2], turns[1::2], strict=True))


@pytest.fixture(scope="module")
def other_lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("arithmetic") / "other.jsonl"
    arithmetic.write_corpus(path, 2000, 7)
    return path.read_text(encoding="utf-8").splitlines()


def test_every_answer_is_right(other_lines):
    lines = DEMO.read_text(encoding="utf-8").splitlines() + other_lines
    questions = 0
    for line in lines:
        last = None
        for question, reply in turns_of(line):
            if question in PLEASANTRIES:
                assert reply == PLEASANTRIES[question]
                continue
            questions += 1
            last = answer_to(question, last)
            _, values = shape_of(reply)
            assert values[-1] == last, (question, reply)
            check_statements(reply, last)
            if "words" in question:
                assert re.fullmatch(r"[A-Z][a-z]+([ -][a-z]+)*\.", reply), reply
            elif "digits" in question or "阿拉伯数字" in question:
                assert re.fullmatch(r"-?\d+(\.\d+)?", reply), reply
            elif "大写" in question:
                assert re.fullmatch("[负零壹贰叁肆伍陆柒捌玖拾佰仟万亿点]+。", reply), reply
    assert questions > 2.5 * len(lines)


def test_the_kinds_promised_are_there():
    text = DEMO.read_text(encoding="utf-8")
    for pattern in [
        r"Solve for x",
        r"求x",
        r"求ｘ",
        r"－?[０-９]+．[０-９]＋（－[０-９]",
        r"[壹贰叁肆伍陆柒捌玖][仟佰拾]",
        r"负[壹贰叁肆伍陆柒捌玖]",
        r"[壹贰叁肆伍陆柒捌玖]亿",
        r"万零",
        r"点[壹贰叁肆伍陆柒捌玖]",
        r"[二三]千[一二]百",
        r"forty-",
        r"negative",
        r"[a-z]+ point [a-z]+",
        r"- \(-\d",
        r"Hello!",
        r"谢谢",
    ]:
        assert re.search(pattern, text), pattern
    chats = [json.loads(line)["text"] for line in text.splitlines()]
    mixed = [chat for chat in chats if re.search("[a-z]{4}.*[多少求计算]", chat.replace("\n", ""))]
    assert len(mixed) > 50


def test_a_reply_follows_from_what_precedes_it(other_lines):
    """So a model's answer is right or wrong: a first question has one reply."""
    replies: dict[str, str] = {}
    for line in other_lines:
        question, reply = turns_of(line)[0]
        assert replies.setdefault(question, reply) == reply


NUMERALS = [
    # value, plain, capital, English
    ("0", "零", "零", "zero"),
    ("10", "十", "壹拾", "ten"),
    ("12", "十二", "壹拾贰", "twelve"),
    ("20", "二十", "贰拾", "twenty"),
    ("21", "二十一", "贰拾壹", "twenty-one"),
    ("100", "一百", "壹佰", "one hundred"),
    ("105", "一百零五", "壹佰零伍", "one hundred five"),
    ("110", "一百一十", "壹佰壹拾", "one hundred ten"),
    ("1005", "一千零五", "壹仟零伍", "one thousand five"),
    ("1050", "一千零五十", "壹仟零伍拾", "one thousand fifty"),
    ("10000", "一万", "壹万", "ten thousand"),
    ("10005", "一万零五", "壹万零伍", "ten thousand five"),
    ("15000", "一万五千", "壹万伍仟", "fifteen thousand"),
    ("100500", "十万零五百", "壹拾万零伍佰", "one hundred thousand five hundred"),
    ("120000", "十二万", "壹拾贰万", "one hundred twenty thousand"),
    ("20300000", "二千零三十万", "贰仟零叁拾万", "twenty million three hundred thousand"),
    ("100000001", "一亿零一", "壹亿零壹", "one hundred million one"),
    ("100002000", "一亿零二千", "壹亿零贰仟", "one hundred million two thousand"),
    ("300050000", "三亿零五万", "叁亿零伍万", "three hundred million fifty thousand"),
    ("1200000000", "十二亿", "壹拾贰亿", "one billion two hundred million"),
    ("-3.2", "负三点二", "负叁点贰", "negative three point two"),
    ("0.05", "零点零五", "零点零伍", "zero point zero five"),
    ("-12.50", "负十二点五", "负壹拾贰点伍", "negative twelve point five"),
]


@pytest.mark.parametrize(("value", "plain", "capital", "english"), NUMERALS)
def test_numerals(value, plain, capital, english):
    number = Decimal(value)
    assert arithmetic.chinese(number) == plain
    assert arithmetic.capital(number) == capital
    assert arithmetic.words(number) == english
    full_width = arithmetic.full_width(number)
    assert unicodedata.normalize("NFKC", full_width) == arithmetic.digits(number)
    assert not re.search("[ -~]", full_width)
    assert {value_of(plain), value_of(capital), value_of(english)} == {Fraction(value)}


def test_digits_are_plain():
    cases = {
        "12.50": "12.5",
        "100": "100",
        "1E+3": "1000",
        "-0.10": "-0.1",
        "3.00": "3",
        "0.0": "0",
    }
    assert {given: arithmetic.digits(Decimal(given)) for given in cases} == cases


# --- the command ------------------------------------------------------------------------------


def test_the_demo_is_what_the_command_writes(tmp_path):
    """The command of the module's docstring, in a fresh process."""
    documented = re.search(r"data\.arithmetic (.+) data/demo\.jsonl", arithmetic.__doc__)[1]
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "data.arithmetic", *documented.split(), str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert out.read_bytes() == DEMO.read_bytes()
    assert 250_000 < DEMO.stat().st_size < 350_000


def test_the_seed_decides(tmp_path, capsys):
    for name, seed in [("a", "1"), ("b", "1"), ("c", "2")]:
        arithmetic.main([str(tmp_path / name), "--count", "5", "--seed", seed])
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    assert a.count(b"\n") == 5
    assert f"5 chats, {len(a)} bytes" in capsys.readouterr().out


def test_no_half_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic.Chat, "draw", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        arithmetic.main([str(tmp_path / "x.jsonl"), "--count", "1"])
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path):
    with pytest.raises(UserError, match="--count 0: must be at least 1"):
        arithmetic.main([str(tmp_path / "x.jsonl"), "--count", "0"])
    with pytest.raises(UserError, match=r"none/x\.jsonl: cannot write: No such file"):
        arithmetic.main([str(tmp_path / "none" / "x.jsonl"), "--count", "1"])
    assert list(tmp_path.iterdir()) == []
