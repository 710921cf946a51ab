"""Times, bandwidths and sizes as people write them: "5us", "25GB/s", "200Mbit/s", "64MiB"; and back.

A number without a unit is refused for times and bandwidths (is 5 a second or a microsecond?) and means bytes for sizes.
In bandwidths k, M, G are powers of ten and Ki, Mi, Gi of two; B is bytes and bit is bits. In sizes KiB, MiB, GiB and, as in
nccl-tests, K, M, G are powers of two, while kB, MB, GB are powers of ten.
"""

from __future__ import annotations

import math
import re

_PER_SECOND = {"ns": 1e9, "us": 1e6, "µs": 1e6, "μs": 1e6, "ms": 1e3, "s": 1.0}
_PREFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZES = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZES |= {"k": 2**10, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_NUMBER = r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*"


def parse_time(text: str) -> float:
    """Seconds. Raises ValueError when `text` is not a number, zero or more, with one of ns, us, ms, s."""
    match = re.fullmatch(_NUMBER + r"(\S+)\s*", text)
    if match is None or match[2] not in _PER_SECOND:
        raise ValueError(f"{text!r} is not a time: write a number and ns, us, ms or s, for example 5us.")
    return _finite(float(match[1]) / _PER_SECOND[match[2]], text)


def parse_bandwidth(text: str) -> float:
    """Bytes per second, above zero. Raises ValueError when `text` is not one."""
    match = re.fullmatch(_NUMBER + r"(?:([kKmMgGtT]i?)?(B(?:/s)|bit(?:/s)?|bps))\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a bandwidth: write for example 25GB/s (bytes) or 200Mbit/s (bits).")
    value = float(match[1]) * _PREFIX[(match[2] or "").lower()]
    if value <= 0:
        raise ValueError(f"{text!r} is not a bandwidth: it must be above zero.")
    return _finite(value if match[3].startswith("B") else value / 8, text)


def parse_size(text: str) -> int:
    """Bytes, zero or more. Raises ValueError when `text` is not a whole number of bytes with a unit or none."""
    match = re.fullmatch(_NUMBER + r"([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _SIZES:
        raise ValueError(f"{text!r} is not a size: write bytes, or for example 64KiB, 16MiB, 1GiB.")
    value = _finite(float(match[1]) * _SIZES[match[2]], text)
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number of bytes.")
    return int(value)


def format_time(seconds: float) -> str:
    """Three figures with the unit that suits: 3.4 µs, 671 ms."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale * 0.9995:
            return f"{_figures(seconds / scale)} {unit}"
    return f"{_figures(seconds / 1e-9)} ns" if seconds else "0 s"


def format_bandwidth(value: float) -> str:
    """Bytes per second, in powers of ten: 25 GB/s."""
    for scale, unit in ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")):
        if value >= scale * 0.9995:
            return f"{_figures(value / scale)} {unit}"
    return f"{_figures(value)} B/s"


def format_size(size: int) -> str:
    """Bytes, in powers of two: 64 KiB, 1.5 MiB."""
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= scale:
            return f"{_figures(size / scale)} {unit}"
    return f"{size} B"


def _figures(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _finite(value: float, text: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is too large.")
    return value
