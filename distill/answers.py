"""Final answers: finding one in a response, and deciding whether it equals the gold answer.

``extract_answer`` looks for, in this order: ``#### answer`` (the first), ``\\boxed{answer}`` (the last), "the answer
is …" (the last), and as a fallback that can be switched off the last number. Only what follows ``</think>`` counts,
where a response has it. ``answers_match`` compares numbers as rationals; what is not a number is compared as text and then
as LaTeX by math-verify, in a process of its own (``data/math_worker.py``), because model output can make a
computer-algebra system run for hours. Neither function raises on any text. Example::

    answers_match(extract_answer("so x = 3/6.\\n#### 0.5"), "\\\\frac{1}{2}")   # True
"""

import re
from collections import deque
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from distill.data import math_worker

Fallback = Literal["last_number", "none"]

MAX_SYMBOLIC = 400  # characters; a longer "answer" is prose or a loop, not an expression
_SPECIAL = re.compile(r"<[|/]?[A-Za-z_]{1,20}[|]?>")
_NUMBER = r"[0-9]{1,300}(?:,[0-9]{3}){0,100}(?:\.[0-9]{1,300})?|\.[0-9]{1,300}"
_LAST_NUMBER = re.compile(rf"(?<![0-9.])-?[$€£]?(?:{_NUMBER})")
_STATED = re.compile(r"\banswer\b(?:\*\*)?\s{0,5}(?:is\b|[:=])[ \t:*]{0,8}([^\n]{1,400})", re.IGNORECASE)
_WITH_UNIT = re.compile(rf"([-+]?[$€£]?(?:{_NUMBER}))\s{{1,3}}[A-Za-z][A-Za-z .]{{0,60}}")
_PLAIN = re.compile(rf"[-+]?(?:{_NUMBER})")
_RATIO = re.compile(r"([-+]?[0-9]{1,300})/([0-9]{1,300})")
_FRAC = re.compile(r"([-+]?)\\[dt]?frac\{?(-?[0-9]{1,300}?)\}?\{?([0-9]{1,300})\}?")
_FRAC_DIGITS = re.compile(r"([-+]?)\\[dt]?frac([0-9])([0-9])")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|mathbf)\s?\{([^{}]*)\}")
# A space between two digits stays: "1 1/2" is not 11/2.
_SPACING = re.compile(r"\\[!,;: ]|~|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|(?<![0-9])\s+|\s+(?![0-9\s])")


def extract_answer(text: str, fallback: Fallback = "last_number") -> str | None:
    """The final answer in a response, as written there; None where there is none."""
    final = strip_special(text.rpartition("</think>")[2])
    number = _last_number(final) if fallback == "last_number" else None
    return marked_answer(final) or _stated_answer(final) or number


def marked_answer(text: str) -> str | None:
    """The answer that is marked as such: the first ``####``, else the last ``\\boxed{}``."""
    return _after_hashes(text) or _last_boxed(text)


def answers_match(predicted: str | None, gold: str) -> bool:
    """Whether two answers say the same.

    Numbers (signs, thousands commas, decimals, fractions, currency, percent) are compared as rationals: to six
    digits, integers exactly. Everything else must be equal as text, or symbolically for math-verify.
    """
    if predicted is None or not predicted.strip() or len(predicted) > 10 * MAX_SYMBOLIC:
        return False
    ours, theirs = parse_number(predicted), parse_number(gold)
    if ours is not None and theirs is not None:
        return _numbers_equal(ours, theirs) or _percent_equal(predicted, ours, gold, theirs)
    if _as_text(predicted) == _as_text(gold) != "":
        return True
    if max(len(predicted), len(gold)) > MAX_SYMBOLIC:
        return False
    return _symbolically_equal(_unwrap(predicted), _unwrap(gold))


def parse_number(text: str) -> Fraction | None:
    """The rational number that ``text`` as a whole denotes; None where it denotes none. A percent sign is ignored."""
    plain = _SPACING.sub("", _unwrap(text).replace("{,}", ","))
    plain = _TEXT.sub(lambda match: match[1] if match[0] == plain else "", plain)
    plain = re.sub(r"\\?[$%€£]|\^?\{?\\circ\}?", "", plain).removesuffix(".")
    if _PLAIN.fullmatch(plain):
        return Fraction(plain.replace(",", "")) if _commas_right(plain) else None
    match = _FRAC_DIGITS.fullmatch(plain) or _FRAC.fullmatch(plain)
    if match:
        sign, over, under = match.groups()
        return Fraction(int(sign + "1") * int(over), int(under)) if int(under) else None
    match = _RATIO.fullmatch(plain)
    return Fraction(int(match[1]), int(match[2])) if match and int(match[2]) else None


def number_before_unit(text: str) -> str:
    """``"72 clips"`` → ``"72"``; anything that is not a number and plain words comes back as it is."""
    match = _WITH_UNIT.fullmatch(_unwrap(text))
    return match[1] if match else text


def strip_special(text: str) -> str:
    """Without space around it, and without the ``<eos>``, ``</s>`` or ``<|endoftext|>`` that a decoder left."""
    text = text.strip()
    while text.endswith(">") and _SPECIAL.fullmatch(text, max(text.rfind("<"), 0)):
        text = text[: text.rfind("<")].rstrip()
    return text


def _after_hashes(text: str) -> str | None:
    for part in text.split("####")[1:]:
        answer = part.partition("\n")[0].strip().strip("#").strip()
        if answer:
            return answer
    return None


def _last_boxed(text: str) -> str | None:
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip() or None
    return None


def _stated_answer(text: str) -> str | None:
    found = [match[1] for match in _STATED.finditer(text)]
    return re.split(r"\.(?:\s|\Z)", found[-1])[0].strip(" *`") or None if found else None


def _last_number(text: str) -> str | None:
    found = deque(_LAST_NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")), maxlen=1)
    return found[0][0] if found else None


def _unwrap(text: str) -> str:
    """Without the marks people put around an answer: spaces, Markdown, ``$…$``, ``\\(…\\)``, a final full stop."""
    text = text.replace("\N{MINUS SIGN}", "-").strip(" \t\r\n*`")
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        bare = text.removesuffix(".").rstrip()
        if len(bare) > len(opening + closing) and bare.startswith(opening) and bare.endswith(closing):
            text = bare[len(opening) : -len(closing)].strip()
    return text


def _commas_right(number: str) -> bool:
    """Thousands commas only where they belong: ``1,234,567`` but not ``1234,567``."""
    whole = number.lstrip("+-").partition(".")[0]
    return "," not in whole or len(whole.partition(",")[0]) <= 3


def _numbers_equal(ours: Fraction, theirs: Fraction) -> bool:
    """To six digits, at most 1e-6 apart: integers must be equal, 0.333333 will do for 1/3."""
    return abs(ours - theirs) <= Fraction(1, 10**6) * min(Fraction(1), abs(theirs))


def _percent_equal(predicted: str, ours: Fraction, gold: str, theirs: Fraction) -> bool:
    """One side says 50 %, the other 0.5."""
    if ("%" in predicted) == ("%" in gold):
        return False
    return _numbers_equal(ours / 100, theirs) if "%" in predicted else _numbers_equal(ours, theirs / 100)


def _as_text(text: str) -> str:
    """For answers that are words or choices: no LaTeX text macros, spaces, case, or brackets around one letter."""
    plain = _SPACING.sub("", _TEXT.sub(r"\1", _unwrap(text))).casefold().removesuffix(".")
    return plain[1:-1] if re.fullmatch(r"\([a-z]\)", plain) else plain


@lru_cache(maxsize=4096)
def _symbolically_equal(predicted: str, gold: str) -> bool:
    return math_worker.shared().equal(predicted, gold)
