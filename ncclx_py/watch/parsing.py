"""One dump file → `Parsed`. The file may be truncated, damaged or hostile: what cannot be used is a complaint that names
file and line, and the rest is used. Nothing in a file decides how much is read, looped over or allocated.
"""

from __future__ import annotations

import json
import stat
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ncclx_py.watch.model import COLUMNS, COMPLETED, FAILED, PEER_OPS, STATES, Asked, Group, Nan, Open, Place, RankTrace
from ncclx_py.watch.shapes import LARGEST as _LARGEST
from ncclx_py.watch.shapes import Shapes

FORMAT, VERSION = "ncclx-trace", 1
MAX_RANKS = 1_000_000
MAX_FILE = 256 << 20  # bytes that are read of one file
MAX_LINE = 8 << 20
MAX_COMPLAINTS = 5  # of one file
_TEXT = 400  # characters that are kept of free text


class BadLine(ValueError):
    """A line that cannot be used; the text says why."""


@dataclass(slots=True)
class Parsed:
    """A trace whose tables refer to `asked`, `sites` and `groups` of its own. `trace` is None for an unusable file."""

    trace: RankTrace | None
    asked: list[Asked] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def parse(path: Path) -> Parsed:
    """Reads one dump. Never raises for what the file holds."""
    name = path.name
    try:
        lines, complaint = _lines(path)
    except OSError as error:
        return Parsed(None, complaints=[f"{name}: cannot be read: {error.strerror or error}"])
    if not lines:
        return Parsed(None, complaints=[f"{name}: {complaint or 'it is empty'}"])
    try:
        trace = _header(_object(lines[0]), name)
    except BadLine as error:
        return Parsed(None, complaints=[f"{name}: line 1: {error}: this rank's dump is not used"])
    return _Rows(trace, name, [complaint] if complaint else []).read(lines)


def read_header(path: Path) -> RankTrace | None:
    """The first line of a dump, without its calls; None where it cannot be used."""
    try:
        with path.open("rb") as source:
            return _header(_object(source.readline(MAX_LINE + 1)), path.name)
    except (OSError, BadLine):
        return None


def _lines(path: Path) -> tuple[list[bytes], str]:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return [], "it is not a file"
    with path.open("rb") as source:
        data = source.read(MAX_FILE)
    too_long = f"larger than {MAX_FILE >> 20} MiB: only the beginning is read" if status.st_size > MAX_FILE else ""
    return data.split(b"\n"), too_long


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise BadLine(f"{len(line)} bytes long")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(found, dict):
        raise BadLine(f"a {type(found).__name__} in place of an object")
    return found


# The header


def _header(head: dict[str, Any], name: str) -> RankTrace:
    if head.get("format") != FORMAT:
        raise BadLine(f"format {str(head.get('format'))[:40]!r}, expected {FORMAT!r}")
    if head.get("version") != VERSION:
        raise BadLine(
            f"version {str(head.get('version'))[:40]}: this program reads version {VERSION}; use the other's ncclx"
        )
    size = integer(head, "world_size", 1, MAX_RANKS)
    rank = integer(head, "rank", 0, size - 1)
    if name != f"trace-rank-{rank}.jsonl":
        raise BadLine(f"rank {rank} in a file of that name")
    step = head.get("step")
    return RankTrace(
        rank=rank,
        world_size=size,
        host=text(head, "host"),
        pid=integer(head, "pid", 0, _LARGEST, 0),
        reason=text(head, "reason"),
        detail=text(head, "detail"),
        time_ns=integer(head, "time_ns", 0, _LARGEST, 0),
        step=step if type(step) is int else None,
        complete=False,
        groups=_groups(head.get("groups"), size),
        aborts={str(key): str(value)[:_TEXT] for key, value in mapping(head.get("aborts")).items()},
        threads=_threads(head.get("threads")),
        peers=_peers(head.get("peers"), size),
        links=_links(head.get("links"), size),
        path=name,
        site=text(head, "site"),
        dropped=integer(head, "dropped", 0, _LARGEST, 0),
    )


def _groups(found: Any, size: int) -> tuple[Group, ...]:
    groups = []
    for name, described in mapping(found).items():
        ranks = described.get("ranks") if isinstance(described, dict) else None
        if not isinstance(ranks, list) or not all(type(rank) is int and 0 <= rank < size for rank in ranks):
            raise BadLine(f"group {name[:40]!r} has no list of ranks between 0 and {size - 1}")
        if len(set(ranks)) != len(ranks):
            raise BadLine(f"group {name[:40]!r} has a rank twice")
        groups.append(Group(name[:_TEXT], tuple(ranks)))
    return tuple(groups)


def _threads(found: Any) -> dict[str, tuple[str, ...]]:
    return {
        str(name)[:_TEXT]: tuple(str(frame)[:_TEXT] for frame in frames[-200:])
        for name, frames in list(mapping(found).items())[:1000]
        if isinstance(frames, list)
    }


def _peers(found: Any, size: int) -> dict[int, str]:
    known = {}
    for key, state in mapping(found).items():
        if (
            key.isascii()
            and key.isdigit()
            and len(key) < 8
            and int(key) < size
            and state in ("alive", "stopped", "gone")
        ):
            known[int(key)] = state
    return known


def _links(found: Any, size: int) -> tuple[Mapping[str, int], ...]:
    if not isinstance(found, list):
        return ()
    return tuple(
        link
        for link in found
        if isinstance(link, dict)
        and all(type(value) is int and 0 <= value < _LARGEST for value in link.values())
        and link.get("peer", size) < size
        and {"bytes", "busy_us"} <= link.keys()
    )


# The records


class _Rows:
    """The table of one trace while it is read."""

    def __init__(self, trace: RankTrace, name: str, complaints: list[str]) -> None:
        self.trace, self.name, self.complaints = trace, name, complaints
        self.found: list[tuple[int, ...]] = []
        self.groups = {group.name: (number, group) for number, group in enumerate(trace.groups)}
        self.asked: dict[Any, int] = {}
        self.described: dict[Asked, int] = {}
        self.listed: list[Asked] = []
        self.sites: dict[str, int] = {}
        self.unusable = 0
        self.shapes = Shapes()

    def read(self, lines: list[bytes]) -> Parsed:
        for number in range(1, len(lines)):
            line = lines[number]
            if not line:
                continue
            try:
                if not self.shapes.add(line, self.found):
                    record = json.loads(line) if len(line) < MAX_LINE else _object(line)
                    self._add(record)
                    self.shapes.learn(line, record, self.found[-1])
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError) as error:
                if type(record := _end_of(line)) is dict and record.get("end") is True:
                    self._end(record, number + 1)
                    break
                self._complain(number + 1, error, number == len(lines) - 1)
        if self.unusable > MAX_COMPLAINTS:
            self.complaints.append(f"{self.name}: {self.unusable - MAX_COMPLAINTS} more lines cannot be used")
        if not self.trace.complete and not self.unusable:
            self.complaints.append(f"{self.name}: ends without its last line: the latest calls may be missing")
        self._finish()
        return Parsed(self.trace, self.listed, list(self.sites), list(self.trace.groups), self.complaints)

    def _add(self, record: dict[str, Any]) -> None:
        """One dictionary in, one tuple of integers out; whatever is odd raises."""
        get = record.get
        key = (
            record["op"], get("dtype"), get("root"), get("reduce_op"), get("peer"), get("algorithm"),
            str(get("input_sizes")), str(get("output_sizes")), get("bytes"), get("splits") and str(get("splits")),
            record["group"],
        )  # fmt: skip
        asked = self.asked.get(key)
        if asked is None:
            asked = self.asked[key] = self._describe(record)
        group = self.groups[record["group"]]
        site = get("call_site") or ""
        state = STATES[record["state"]]
        row = array(
            "q",
            (
                group[0], record["seq"], asked, self.sites.setdefault(site, len(self.sites)), state,
                get("scheduled_ns") or 0, get("started_ns") or 0, get("finished_ns") or 0,
            ),
        )  # fmt: skip
        if min(row) < 0 or max(row) >= _LARGEST:
            raise BadLine("a negative or huge number")
        if state != COMPLETED:
            self._add_open(record, group[1], self.listed[asked], site, state)
        if get("nan"):
            place = Place(group[1], record["seq"])
            self.trace.nans.append(Nan(place, self.listed[asked], site, state == FAILED))
        self.found.append(tuple(row))

    def _describe(self, record: dict[str, Any]) -> int:
        group = self.groups[record["group"]][1]
        op = text(record, "op")
        asked = Asked(
            op=op,
            dtype=text(record, "dtype").removeprefix("torch."),
            elements=elements(op, record.get("input_sizes"), record.get("output_sizes"), len(group.ranks)),
            root=integer(record, "root", -1, _LARGEST, -1),
            reduce_op=text(record, "reduce_op"),
            peer=integer(record, "peer", -1, len(group.ranks) - 1, -1),
            bytes=integer(record, "bytes", 0, _LARGEST, 0),
            algorithm=text(record, "algorithm"),
            splits=_splits(record.get("splits")),
        )
        if asked not in self.described:
            self.described[asked] = len(self.listed)
            self.listed.append(asked)
        return self.described[asked]

    def _add_open(self, record: dict[str, Any], group: Group, asked: Asked, site: str, state: int) -> None:
        waiting, steps = record.get("waiting_for"), record.get("plan_step")
        if waiting is not None and not all(type(rank) is int and 0 <= rank < len(group.ranks) for rank in waiting):
            raise BadLine(f"waiting_for {str(waiting)[:40]} are not ranks of {group}")
        if steps is not None and not (len(steps) == 2 and all(type(step) is int for step in steps)):
            raise BadLine(f"plan_step {str(steps)[:40]} is not [done, all]")
        timeout = record.get("timeout_s")
        self.trace.open.append(
            Open(
                rank=self.trace.rank,
                group=group,
                seq=record["seq"],
                asked=asked,
                site=site[:_TEXT],
                state=state,
                since=record.get("scheduled_ns") or 0,
                ended=record.get("finished_ns") or 0,
                waiting_for=None if waiting is None else tuple(group.ranks[rank] for rank in waiting),
                progress=None if steps is None else (steps[0], steps[1]),
                error=text(record, "error"),
                is_async=bool(record.get("async")),
                timeout_s=float(timeout) if isinstance(timeout, int | float) else 0.0,
                reason=text(record, "reason"),
            )
        )

    def _end(self, record: dict[str, Any], line: int) -> None:
        self.trace.complete = True
        if record.get("records") != len(self.found) + self.unusable:
            self.complaints.append(
                f"{self.name}: line {line}: it counts {str(record.get('records'))[:20]} records, "
                f"the file has {len(self.found) + self.unusable}"
            )

    def _complain(self, line: int, error: Exception, last: bool) -> None:
        self.unusable += 1
        if self.unusable > MAX_COMPLAINTS:
            return
        if last:
            why = "cut off in the middle: the latest calls may be missing"
        elif isinstance(error, BadLine):
            why = str(error)
        elif isinstance(error, KeyError):
            why = f"{str(error)[:80]} is missing or unknown"
        else:
            why = f"not a record ({type(error).__name__}: {str(error)[:80]})"
        self.complaints.append(f"{self.name}: line {line}: {why}")

    def _finish(self) -> None:
        rows = np.array(self.found, dtype=np.int64).reshape(-1, len(COLUMNS))
        self.found = []
        self.trace.table = {name: np.ascontiguousarray(rows[:, place]) for place, name in enumerate(COLUMNS)}


def _end_of(line: bytes) -> Any:
    """The object in a short line that is no record."""
    try:
        return json.loads(line) if len(line) < 1000 else None
    except (ValueError, RecursionError):
        return None


# Fields


def integer(record: Mapping[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    value = record.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise BadLine(f"{key} is {str(value)[:40] if not isinstance(value, int) or abs(value) < 1 << 70 else 'huge'}, "
                      f"expected a whole number from {low} to {high}")  # fmt: skip
    return value


def text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadLine(f"{key} is {str(value)[:40]}, expected text")
    return value[:_TEXT]


def mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}


def elements(op: str, inputs: Any, outputs: Any, size: int) -> int:
    """The number that all ranks of a call must agree on; −1 where there is none."""
    name = op.replace("_", "")
    if op in PEER_OPS or "alltoall" in name or "barrier" in name:
        return -1
    if "reducescatter" in name or "reduce" in name:
        return _count(inputs)
    if "allgather" in name:
        return _count(outputs) if outputs else _count(inputs) * size
    if "broadcast" in name:
        return _count(inputs or outputs)
    if "gather" in name:
        return _count(inputs)
    if "scatter" in name:
        return _count(outputs)
    return -1


def _count(sizes: Any) -> int:
    """Elements of a list of shapes."""
    if not sizes:
        return -1
    total = 0
    for shape in sizes:
        product = 1
        for extent in shape:
            if type(extent) is not int or extent < 0:
                raise BadLine(f"a size of {str(extent)[:40]}")
            product = min(product * extent, _LARGEST)
        total = min(total + product, _LARGEST - 1)
    return total


def _splits(found: Any) -> tuple[tuple[int, ...], ...]:
    """Counts sent to and received from each rank, where the record has them."""
    if not isinstance(found, list) or len(found) != 2:
        return ()
    return tuple(tuple(_whole(part)) for part in found if isinstance(part, list))


def _whole(numbers: Iterable[Any]) -> list[int]:
    return [number if type(number) is int and 0 <= number < _LARGEST else -1 for number in numbers]
