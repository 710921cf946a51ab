"""Malformed input made of valid input: by structure where it has one (JSON), by words and by bytes.

data = mutated(random.Random(7), seeds)      # bytes; now and then a seed as it is, which must be accepted or refused too
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), 2**31, 2**63, -(2**63), 10**30,
    "", " ", "0", "-1", "nan", "\x00", "../../escape", "/etc/passwd", "é", "\ud800", "x" * 5000, "[8KiB, *)", "(", "{}", "%s%n",
    [], {}, [[]], [None], {"": None}, [1, 2, 3], {"a": {"b": 1}},
]  # fmt: skip
WORDS = [
    b"", b"0", b"-1", b"1e999", b"nan", b"inf", b"99999999999999999999", b"1000000000", b"0x10", b"1_0", b"true", b"null",
    b'""', b"'", b'"', b"[", b"]", b"{", b"}", b"=", b",", b";", b":", b"#", b"*", b"\\", b"\x00", b"\xff\xfe", b"\xed\xa0\x80",
    b"\r\n", b"\n", b"../../escape", b"/dev/zero", b"~", b"${oc.env:HOME}", b"${", b"???", b"\xe2\x80\xae", b"-9223372036854775809",
    b"9" * 5000,
]  # fmt: skip


def mutated(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One case from `seeds`; the same for equal states of `draw`."""
    data = draw.choice(seeds)
    if draw.random() < 0.02:
        return data
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = draw.choice(_WAYS)(draw, data)
    return data


def _by_structure(draw: random.Random, data: bytes) -> bytes:
    """Changes one place of a JSON document, or of one line of JSON lines; other text is changed by words."""
    lines = data.split(b"\n")
    whole = data.lstrip().startswith((b"{", b"["))
    at = draw.randrange(len(lines))
    text = lines[at]
    try:
        value, rest = (json.loads(data), None) if whole and b"\n{" not in data else (json.loads(text), at)
    except (ValueError, RecursionError):
        return _word(draw, data)
    try:
        new = json.dumps(_changed(draw, value), ensure_ascii=draw.random() < 0.5)
    except (ValueError, RecursionError):
        return data
    encoded = new.encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:  # a key twice: the last one wins in Python, others differ
        encoded = re.sub(rb'("[^"]{1,20}": )(\d+)', rb"\1\2, \g<1>0", encoded, count=1)
    if rest is None:
        return encoded
    return b"\n".join([*lines[:rest], encoded, *lines[rest + 1 :]])


def _changed(draw: random.Random, value: Any) -> Any:
    """`value` with one place in it replaced, removed, doubled or wrapped."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        how = draw.random()
        if how < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if how < 0.15:
            return {**value, str(draw.choice(STRANGE)): draw.choice(STRANGE)}
        return {**value, key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at, how = draw.randrange(len(value)), draw.random()
        if how < 0.1:
            return value[:at] + value[at + 1 :]
        if how < 0.2:
            return [*value[: at + 1], *value[at:]]
        return [*value[:at], _changed(draw, value[at]), *value[at + 1 :]]
    if draw.random() < 0.05:
        for _ in range(draw.choice((10, 300))):
            value = [value]
        return value
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return draw.choice(
            (value + 1, value - 1, -value, value * 1000, value / 2 if abs(value) < 2**60 else 0.5, hex(value))
        )
    return draw.choice(STRANGE)


def _word(draw: random.Random, data: bytes) -> bytes:
    """Replaces a number, a name or a sign."""
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?|\w+|[^\w\s]", data))
    if not found:
        return draw.choice(WORDS)
    chosen = draw.choice(found)
    return data[: chosen.start()] + draw.choice(WORDS) + data[chosen.end() :]


def _flip(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"x")
    for _ in range(draw.choice((1, 1, 4, 16))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _cut(draw: random.Random, data: bytes) -> bytes:
    end = draw.randrange(len(data) + 1)
    return data[:end] if draw.random() < 0.8 else data[end:]


def _insert(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice(WORDS) * draw.choice((1, 1, 3, 200)) + data[at:]


def _lines(draw: random.Random, data: bytes) -> bytes:
    """Doubles, drops or swaps lines."""
    lines = data.split(b"\n")
    first, second = draw.randrange(len(lines)), draw.randrange(len(lines))
    how = draw.randrange(3)
    if how == 0:
        lines.insert(second, lines[first])
    elif how == 1:
        del lines[first]
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


def _deep(draw: random.Random, data: bytes) -> bytes:
    """Brackets nested deeper than a recursive reader can follow."""
    depth = draw.choice((50, 50, 50, 2000, 2000, 20_000))
    at = draw.randrange(len(data) + 1)
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")")))
    return data[:at] + opening * depth + b"1" + closing * depth + data[at:]


def _foreign(draw: random.Random, data: bytes) -> bytes:
    """Another encoding, another end of line, or noise."""
    how = draw.randrange(5)
    if how == 0:
        return b"\xef\xbb\xbf" + data
    if how == 1:
        return data.replace(b"\n", b"\r\n")
    if how == 2:
        return data.decode("utf-8", "replace").encode("utf-16")
    if how == 3:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    return b""


_WAYS: list[Callable[[random.Random, bytes], bytes]] = [
    _by_structure, _by_structure, _by_structure, _word, _word, _word, _flip, _flip, _cut, _insert, _lines, _lines, _deep, _foreign,
]  # fmt: skip
