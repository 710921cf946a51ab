"""Random access to the lines of a file that never has to fit into memory.

One pass over the file notes where each usable line starts (16 bytes per line); after that any line is one ``pread``.
Lines that cannot be used are found in this pass, before training starts, and named with file, line number and reason:
the first one raises :class:`BadLine`, or with ``on_bad="skip"`` they are counted, kept for inspection and reported
once. Blank lines do not count, a byte-order mark and CRLF are accepted. A file that changes after it was indexed is
an error, never a wrong sample.
"""

import json
import logging
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_LINE_BYTES = 16 * 2**20
KEPT_BAD_LINES = 100
_BOM = b"\xef\xbb\xbf"

logger = logging.getLogger(__name__)


class Unusable(ValueError):
    """Why a line cannot be used; raised by whoever parses it."""


class BadLine(ValueError):
    """A line that cannot be used: which file, which line (from 1), and why."""

    def __init__(self, path: Path, number: int, reason: str) -> None:
        super().__init__(f"{path}:{number}: {reason}")
        self.path, self.number, self.reason = path, number, reason


class EmptyDataset(ValueError):
    """A file or a split of it holds no usable line."""


class ChangedFile(RuntimeError):
    """A file is not what it was when it was indexed."""


class LineFile:
    """The usable lines of a file, by position.

    Args:
        check: called with each line's bytes (no line end); raises :class:`Unusable` for a line that cannot be used.
        keep: which usable lines belong to this split; None keeps all.
        on_bad: ``"error"`` raises at the first bad line, ``"skip"`` leaves bad lines out.
        remedy: what the user can do where no line is left, appended to that error.
    Raises:
        BadLine, EmptyDataset, OSError.
    """

    def __init__(
        self,
        path: str | Path,
        check: Callable[[bytes], object],
        *,
        keep: Callable[[bytes], bool] | None = None,
        on_bad: str = "error",
        max_line_bytes: int = MAX_LINE_BYTES,
        remedy: str = "",
    ) -> None:
        self.path = Path(path)
        self.skipped: list[BadLine] = []
        self.skipped_count = 0
        self._on_bad = on_bad
        self._offsets, self._lengths, self._numbers = array("Q"), array("I"), array("I")
        self._file: BinaryIO | None = None
        with self._open() as file:
            self._stamp = _stamp(file)
            self._index(file, check, keep, max_line_bytes)
            if _stamp(file) != self._stamp:
                raise ChangedFile(f"{self.path} changed while it was being indexed: wait for its writer to finish")
        self._report(remedy)

    def __len__(self) -> int:
        return len(self._offsets)

    def number(self, position: int) -> int:
        """The line number (from 1) of the line at ``position``."""
        return self._numbers[position]

    def read(self, position: int) -> bytes:
        """The line at ``position`` without its line end. Raises ChangedFile where the file is not what was indexed."""
        if self._file is None:
            self._file = self._open()
        # pread has no file position: threads and forked processes may share the handle.
        line = os.pread(self._file.fileno(), self._lengths[position], self._offsets[position])
        if _stamp(self._file) != self._stamp:
            raise ChangedFile(
                f"{self.path} changed since it was indexed (size {self._stamp[0]} → {_stamp(self._file)[0]} bytes): "
                "start again with a file that nobody writes to"
            )
        return line

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _open(self) -> BinaryIO:
        return open(self.path, "rb")

    def _index(
        self,
        file: BinaryIO,
        check: Callable[[bytes], object],
        keep: Callable[[bytes], bool] | None,
        max_line_bytes: int,
    ) -> None:
        for number, offset, line, whole in _lines(file, max_line_bytes, self._stamp[0]):
            try:
                if not whole:
                    raise Unusable(f"longer than {max_line_bytes} bytes")
                check(line)
            except Unusable as reason:
                self._bad(BadLine(self.path, number, str(reason)))
                continue
            if keep is None or keep(line):
                self._offsets.append(offset)
                self._lengths.append(len(line))
                self._numbers.append(number)

    def _bad(self, error: BadLine) -> None:
        if self._on_bad != "skip":
            raise error
        self.skipped_count += 1
        if len(self.skipped) < KEPT_BAD_LINES:
            self.skipped.append(error)

    def _report(self, remedy: str) -> None:
        if self.skipped_count:
            examples = "; ".join(map(str, self.skipped[:3]))
            logger.warning("%s: skipped %d bad lines (%s)", self.path, self.skipped_count, examples)
        if not self._offsets:
            bad = f", {self.skipped_count} bad lines were skipped" if self.skipped_count else ""
            raise EmptyDataset(f"empty dataset: {self.path} has no usable line{bad}{remedy}")


def parse_object(line: bytes) -> dict[str, Any]:
    """A line as a JSON object. Raises Unusable with the reason and, where it is known, the place in the line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unusable(f"invalid UTF-8 at byte {error.start + 1}: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise Unusable(f"invalid JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested too deeply
        raise Unusable(f"unreadable JSON: {error}") from error
    if not isinstance(record, dict):
        raise Unusable(f"expected a JSON object, got {type(record).__name__}")
    return record


def text_of(value: object, what: str) -> str:
    """``value`` as non-empty text. Raises Unusable that says what was expected where."""
    if not isinstance(value, str):
        raise Unusable(f"{what} must be text, got {type(value).__name__}")
    if not value.strip():
        raise Unusable(f"{what} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Unusable(f"{what} has half a character (a lone surrogate) at position {error.start + 1}") from error
    return value


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _lines(file: BinaryIO, limit: int, size: int) -> Iterator[tuple[int, int, bytes, bool]]:
    """(number, offset, bytes without line end, whether that is all of it) of each line that is not blank.

    Ends at ``size``: a file that grows faster than it is read would never end.
    """
    offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(offset)
    number = 0
    while offset < size and (raw := file.readline(limit + 2)):  # room for CR LF
        number += 1
        start, end = offset, offset + len(raw)
        while not raw.endswith(b"\n") and (more := file.readline(limit)):
            end += len(more)
            if more.endswith(b"\n"):
                break
        offset = end
        line = raw.rstrip(b"\r\n")
        whole = len(line) <= limit and end - start == len(raw)
        if line.strip() or not whole:
            yield number, start, line, whole
