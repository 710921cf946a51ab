"""Fault injection as the launcher sees it: hands the faults to the ranks, breaks links, and says what came true.

    with Drill(faults, cluster.network, shape.host_of) as drill:
        … run the ranks with drill.environment() …
    drill.report()            # one line per fault

A link breaks when its time has come or when the rank it waits for has left its note (``ncclx_py/faults/notes.py``).
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ncclx_py.faults.notes import claim, claimed
from ncclx_py.faults.spec import FOLDER, LINK, VARIABLE, Fault

_PERIOD = 0.05  # seconds between looks at the notes


class Links(Protocol):
    """The links of emulated hosts; `rail` None means all of a host's."""

    def break_link(self, host: int, rail: int | None) -> None: ...

    def slow_link(self, host: int, rail: int | None) -> None: ...

    def mend_link(self, host: int, rail: int | None) -> None: ...


@dataclass(frozen=True)
class _Repair:
    at: float
    host: int
    rail: int | None


class Drill:
    """The faults of one job. `host_of` is the host of each rank, needed with `links` only. The notes are in `folder`, which
    stays, or else in a temporary one of this machine."""

    def __init__(
        self,
        faults: Sequence[Fault],
        links: Links | None = None,
        host_of: Sequence[int] = (),
        folder: Path | None = None,
    ) -> None:
        self.faults = tuple(faults)
        self._kept = folder
        self._links, self._host_of = links, host_of
        self._folder: Path | None = None
        self._notes: list[dict[str, Any] | None] = [None] * len(self.faults)
        self._repairs: list[_Repair] = []
        self._applied: set[int] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = 0.0

    def __enter__(self) -> Drill:
        if self.faults:
            if self._kept is not None:
                self._kept.mkdir(parents=True, exist_ok=True)
            self._folder = self._kept or Path(tempfile.mkdtemp(prefix="ncclx-inject-"))
            self._began = time.monotonic()
            if self._links is not None and any(fault.kind in LINK for fault in self.faults):
                self._thread = threading.Thread(target=self._watch, name="ncclx-inject", daemon=True)
                self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._folder is not None:
            self._notes = [claimed(self._folder, number) for number in range(len(self.faults))]
            if self._kept is None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """What the ranks are told; empty without faults."""
        if self._folder is None:
            return {}
        return {VARIABLE: ";".join(map(self._for_ranks, self.faults)), FOLDER: str(self._folder)}

    def notes(self) -> list[dict[str, Any] | None]:
        """What happened of each fault, None where nothing did. While the job runs: so far."""
        if self._folder is not None and not self._stop.is_set():
            return [claimed(self._folder, number) for number in range(len(self.faults))]
        return self._notes

    def report(self, here: Collection[int] | None = None) -> list[str]:
        """A line for each fault: whether it came true, and what may have kept it from doing so.

        `here` are the ranks that this launcher started, None for all: of others it knows nothing.
        """
        lines = []
        for fault, note in zip(self.faults, self._notes, strict=True):
            if note is not None:
                where = f"on rank {note['rank']}, in step {note['step']}, at its collective {note['call']}"
                lines.append(f"the fault {fault} came true" + (f" {where}" if note["rank"] is not None else ""))
            elif here is not None and fault.rank is not None and fault.rank not in here:
                lines.append(f"the fault {fault} was up to another launcher, which has rank {fault.rank}")
            else:
                lines.append(f"the fault {fault} never came true: {_why_not(fault)}")
        return lines

    @property
    def all_came_true(self) -> bool:
        return None not in self._notes

    def _for_ranks(self, fault: Fault) -> str:
        """A link's fault names the rank whose step or call is waited for: the first of its host."""
        if fault.kind not in LINK or fault.host is None:
            return fault.text
        return re.sub(r"(?<=[:,])\s*host=\d+", f"rank={self._host_of.index(fault.host)}", fault.text, count=1)

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self._look()
            except Exception as error:  # a thread must not die in silence
                print(f"ncclx launch: a link could not be changed: {error}", file=sys.stderr, flush=True)

    def _look(self) -> None:
        assert self._folder is not None
        for number, fault in enumerate(self.faults):
            if fault.kind in LINK and number not in self._applied and self._has_come(number, fault):
                self._applied.add(number)
                self._apply(fault)
        due = [repair for repair in self._repairs if repair.at <= time.monotonic()]
        self._repairs = [repair for repair in self._repairs if repair not in due]
        for repair in due:
            assert self._links is not None
            self._links.mend_link(repair.host, repair.rail)

    def _has_come(self, number: int, fault: Fault) -> bool:
        assert self._folder is not None
        if fault.seconds is None:
            return claimed(self._folder, number) is not None
        if time.monotonic() < self._began + fault.seconds:
            return False
        return claim(self._folder, number, {"fault": fault.text, "rank": None, "step": None, "call": None})

    def _apply(self, fault: Fault) -> None:
        assert self._links is not None
        host = fault.host if fault.host is not None else self._host_of[fault.rank or 0]
        act: Callable[[int, int | None], None]
        act = self._links.break_link if fault.kind == "drop-link" else self._links.slow_link
        print(f"ncclx launch: injecting {fault} into host {host}", file=sys.stderr, flush=True)
        act(host, fault.rail)
        if fault.duration is not None:
            self._repairs.append(_Repair(time.monotonic() + fault.duration, host, fault.rail))


def _why_not(fault: Fault) -> str:
    if fault.step is not None:
        few = f"rank {fault.rank} may have taken fewer than {fault.step} steps"
        return f"{few}, or its program does not call ncclx_py.mark_step()"
    if fault.call is not None:
        few = f"rank {fault.rank} may have made fewer than {fault.call} collectives"
        return f"{few}, or made them on another backend than ncclx"
    return "the job ended before"
