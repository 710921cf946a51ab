"""Indexed line files: every way a file can be broken, and exact random access to what is left."""

import logging
import os
import pickle
from pathlib import Path

import pytest

from distill.data.lines import BadLine, ChangedFile, EmptyDataset, LineFile, Unusable, parse_object, text_of

pytestmark = pytest.mark.unit


def write(tmp_path, data: bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    return path


def accept(line: bytes) -> None:
    if line.startswith(b"bad"):
        raise Unusable("it says so")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_lines_and_their_numbers(tmp_path, end, start, last):
    texts = [b"one", b"", b"  \t", b"t\xc3\xa9n", b"bad", b"x" * 5000, b"last"]
    lines = LineFile(write(tmp_path, start + end.join(texts) + last), accept, on_bad="skip")
    assert [lines.read(i) for i in range(len(lines))] == [b"one", b"t\xc3\xa9n", b"x" * 5000, b"last"]
    assert [lines.number(i) for i in range(len(lines))] == [1, 4, 6, 7]
    assert [str(error) for error in lines.skipped] == [f"{lines.path}:5: it says so"]


def test_the_first_bad_line_is_an_error(tmp_path):
    with pytest.raises(BadLine, match=r"data\.jsonl:2: it says so") as caught:
        LineFile(write(tmp_path, b"one\nbad 1\nbad 2\n"), accept)
    assert (caught.value.number, caught.value.reason) == (2, "it says so")


def test_skipped_lines_are_counted_capped_and_logged_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        lines = LineFile(write(tmp_path, b"bad\n" * 250 + b"good\n"), accept, on_bad="skip")
        lines.read(0)
    assert (lines.skipped_count, len(lines.skipped), lines.skipped[-1].number) == (250, 100, 100)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"{lines.path}: skipped 250 bad lines"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_huge_lines_are_bad_lines_and_do_not_shift_the_rest(tmp_path, end):
    data = b"a" * 100 + b"\n" + b"b" * 101 + b"\n" + b"c" * 100_000 + b"\r\n" + b"d" * 100 + end
    lines = LineFile(write(tmp_path, data), accept, on_bad="skip", max_line_bytes=100)
    assert [lines.read(i) for i in range(len(lines))] == [b"a" * 100, b"d" * 100]
    assert [lines.number(i) for i in range(len(lines))] == [1, 4]
    assert [error.reason for error in lines.skipped] == ["longer than 100 bytes"] * 2


@pytest.mark.parametrize("data", [b"", b"\n\n \r\n", b"\xef\xbb\xbf", b"bad\n"])
def test_nothing_usable_is_an_empty_dataset(tmp_path, data):
    with pytest.raises(EmptyDataset, match=r"empty dataset: .*data\.jsonl.*do this"):
        LineFile(write(tmp_path, data), accept, on_bad="skip", remedy="; do this")


@pytest.mark.parametrize("opened", [True, False])
def test_a_file_that_changes_is_an_error(tmp_path, opened):
    path = write(tmp_path, b"one\ntwo\n")
    lines = LineFile(path, accept)
    if opened:
        assert lines.read(1) == b"two"
    with open(path, "ab") as file:
        file.write(b"three\n")
    with pytest.raises(ChangedFile, match=r"data\.jsonl changed since it was indexed \(size 8 → 14 bytes\)"):
        lines.read(0)


def test_a_file_that_is_touched_up_in_place_is_an_error(tmp_path):
    path = write(tmp_path, b"one\ntwo\n")
    lines = LineFile(path, accept)
    with open(path, "r+b") as file:
        file.write(b"ONE")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ChangedFile):
        lines.read(0)


def test_a_file_written_while_it_is_indexed_is_an_error(tmp_path):
    path = write(tmp_path, b"one\ntwo\n")

    def append(line):
        with open(path, "ab") as file:
            file.write(b"more\n" * 10_000)  # more than is read ahead: an index that follows the writer never ends
        assert path.stat().st_size < 2**20, "the index follows the writer"

    with pytest.raises(ChangedFile, match="while it was being indexed"):
        LineFile(path, append)


def test_memory_does_not_grow_with_the_text(tmp_path):
    path = write(tmp_path, (b"x" * 1000 + b"\n") * 2000)
    assert len(pickle.dumps(LineFile(path, accept))) < 50_000  # 2 MB of text, 16 bytes per line


def test_a_pickled_copy_reads_on(tmp_path):
    lines = LineFile(write(tmp_path, b"one\ntwo\n"), accept)
    lines.read(0)
    assert pickle.loads(pickle.dumps(lines)).read(1) == b"two"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'a': 1}", "invalid JSON at column 2"),
        (b'{"a": 1', "invalid JSON at column"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 8"),
        (b'{"a": "caf\xc3', "invalid UTF-8 at byte 11"),
        ('{"a": 1}'.encode("utf-16"), "invalid UTF-8 at byte 1"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"[" * 200_000, "unreadable JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "unreadable JSON"),
    ],
)
def test_broken_json_has_a_reason(line, reason):
    with pytest.raises(Unusable, match=reason):
        parse_object(line)


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "got NoneType"), (3, "got int"), ("  ", "is empty"), ("ab\ud800", "position 3")]
)
def test_text_must_be_text(value, reason):
    with pytest.raises(Unusable, match=f"prompt.*{reason}"):
        text_of(value, "prompt")
