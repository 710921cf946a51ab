"""One response in two tokenizers: which tokens of the student and of its teacher stand for the same bytes.

Both sides spell the same text, so each token has a place in it, counted in bytes. Where a token ends on both sides there is a
*cut*; the tokens between two cuts are a *group*: the fewest tokens that cover the same bytes on both sides. A character cut
between tokens, leading spaces and tokens of unequal length all come out as larger groups.

    student   Hel|lo|,| wor|ld|EOS      groups   Hel lo   ,   " wor" ld   EOS
    teacher   Hello|,| w|orld|EOS                Hello    ,   " w" orld   EOS

Ends of sequence are a group of their own. Without a counterpart (group −1) are: special tokens inside a response; bytes that are
no UTF-8 (the teacher reads U+FFFD in their place, and nothing where the text ends in the middle of a character); and whatever
lies between the first and the last byte that the teacher's tokenizer changes (a normaliser, unknown characters), with the
groups that this touches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from distill.teachers.spelling import Spelling

NONE = -1  # the group of a token without a counterpart
REPLACEMENT = "\ufffd"
_NO_UTF8 = "".join(map(chr, range(0xDC80, 0xDD00)))  # what bytes that are no UTF-8 are decoded to


@dataclass(frozen=True, slots=True)
class Alignment:
    """m tokens of the student and n of the teacher for one response."""

    student: list[int]  # [m]: group of each token, ascending, or NONE
    teacher: list[int]  # [n]: the same
    teacher_ids: list[int]  # [n]
    sizes: list[int]  # [m] bytes of each student token; 1 for one without text
    shifted: bool  # the teacher's first token has a space in front that the text has not

    @property
    def aligned_bytes(self) -> int:
        return sum(size for size, group in zip(self.sizes, self.student) if group != NONE)


def align(student: Spelling, ids: Sequence[int], teacher: Spelling, encode: Callable[[str], list[int]]) -> Alignment:
    """Align a response of the student with the teacher's tokens for the same text.

    ``encode`` is the teacher's tokenizer, without special tokens. It may raise for a text that it cannot encode: then nothing but
    the end is aligned.
    """
    pieces = student.of(ids)
    ended = bool(ids) and ids[-1] == student.end
    raw = b"".join(piece or b"" for piece in pieces)
    text, places, bad = readable(raw)
    try:
        theirs = encode(text) if text else []
    except Exception:  # the tokenizers library raises bare Exception for a symbol it does not know
        theirs, bad = [], [(0, len(text.encode()))]
    our_ends = [places[end] for end in accumulate(len(piece or b"") for piece in pieces)]
    spelled = _Spelled([teacher[token] or b"" for token in theirs], text.encode())
    cuts = sorted({*our_ends}.intersection(end for end in spelled.ends if end))
    groups = _Groups(cuts, bad + spelled.changed)
    ours = [NONE if piece is None else groups(end) for piece, end in zip(pieces, our_ends, strict=True)]
    others = [groups(end) for end in spelled.ends]
    if ended:
        ours[-1] = len(cuts)
        theirs, others = [*theirs, teacher.end], [*others, len(cuts)]
    sizes = [1 if piece is None else len(piece) for piece in pieces]
    return Alignment(ours, others, theirs, sizes, spelled.shifted)


def readable(raw: bytes) -> tuple[str, list[int], list[tuple[int, int]]]:
    """Bytes as a text, with U+FFFD for each byte that is no UTF-8, and without those at its end (a character that was cut off).

    Returns the text, the place in its bytes of every place in ``raw`` (0 … len), and the ranges of what was replaced. What was
    left out has places behind the text's end.
    """
    decoded = raw.decode("utf-8", "surrogateescape")
    text: list[str] = []
    places, bad = [0], []
    for character in decoded:
        begin = places[-1]
        if character in _NO_UTF8:
            character = REPLACEMENT
            places.append(begin + len(REPLACEMENT.encode()))
            bad.append((begin, places[-1]))
        else:
            places.extend(range(begin + 1, begin + len(character.encode()) + 1))
        text.append(character)
    return "".join(text[: len(decoded.rstrip(_NO_UTF8))]), places, bad


class _Spelled:
    """Where the teacher's tokens end in the text that they were made of."""

    def __init__(self, pieces: Sequence[bytes], text: bytes) -> None:
        whole, ends = b"".join(pieces), list(accumulate(map(len, pieces)))
        self.shifted = whole == b" " + text or (whole[:1] == b" " and text[:1] != b" ")
        if self.shifted:
            whole, ends = whole[1:], [max(end - 1, 0) for end in ends]
        self.ends: list[int | None] = list(ends)
        self.changed: list[tuple[int, int]] = []  # ranges of the text that the tokens do not spell
        if whole != text:
            self._compare(whole, text, ends)

    def _compare(self, whole: bytes, text: bytes, ends: Sequence[int]) -> None:
        """Only what lies before the first and behind the last difference has a known place; a token in between ends where the
        next one does."""
        before = _common(whole, text)
        behind = min(_common(whole[::-1], text[::-1]), min(len(whole), len(text)) - before)
        self.changed = [(before, max(len(text) - behind, before + 1))]
        following: int | None = None
        for place in reversed(range(len(ends))):
            if ends[place] <= before:
                following = ends[place]
            elif ends[place] > len(whole) - behind:
                following = ends[place] - len(whole) + len(text)
            self.ends[place] = following


def _common(a: bytes, b: bytes) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class _Groups:
    """From the place where a token ends to its group. Groups that touch a ``wrong`` range of bytes are NONE."""

    def __init__(self, cuts: Sequence[int], wrong: Sequence[tuple[int, int]]) -> None:
        self._cuts = cuts
        self._wrong = {
            group for first, last in wrong for group in range(bisect_left(cuts, first + 1), bisect_left(cuts, last) + 1)
        }

    def __call__(self, end: int | None) -> int:
        group = len(self._cuts) if end is None else bisect_left(self._cuts, end)
        return NONE if group == len(self._cuts) or group in self._wrong else group
