"""Times, bandwidths and sizes as text."""

from __future__ import annotations

import pytest

from ncclx_py.units import format_bandwidth, format_size, format_time, parse_bandwidth, parse_size, parse_time

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5us", 5e-6), ("3.4 µs", 3.4e-6), ("300ns", 3e-7), ("0.05ms", 5e-5), ("1s", 1.0), ("1e-5s", 1e-5)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("25GB/s", 25e9),
        ("200Mbit/s", 25e6),
        ("200mbit", 25e6),
        ("10Gbps", 1.25e9),
        ("1GiB/s", 2**30),
        ("8bit/s", 1.0),
        ("2.5e9B/s", 2.5e9),
    ],
)
def test_bandwidths(text: str, value: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("64KiB", 65536), ("1.5MiB", 3 << 19), ("8M", 8 << 20), ("1GB", 10**9), ("512B", 512)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "us", "-5us", "5 u s", "5min", "1e999s", "nan s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"time|too large"):
        parse_time(text)


@pytest.mark.parametrize("text", ["25", "GB/s", "0GB/s", "-1GB/s", "25gb", "25 G", "inf B/s", "5us"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        parse_bandwidth(text)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "64kib", "1 TB", "12XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size(text)


def test_formats() -> None:
    assert [format_time(value) for value in (0, 3.4e-7, 5e-6, 0.671, 0.9996, 2)] == [
        "0 s",
        "340 ns",
        "5 µs",
        "671 ms",
        "1 s",
        "2 s",
    ]
    assert [format_bandwidth(value) for value in (8e9, 25e6, 999.6, 12)] == ["8 GB/s", "25 MB/s", "1 kB/s", "12 B/s"]
    assert [format_size(value) for value in (12, 1 << 10, 3 << 19, 1 << 30)] == ["12 B", "1 KiB", "1.5 MiB", "1 GiB"]
