"""What happens to this rank, and when: the part of fault injection that runs inside the ranks.

    injector = armed(os.environ)       # None where nothing is injected into this rank
    step(7)                            # training step 7 begins: faults with step=7 happen here or in this step's calls

A program says so through ``ncclx_py.mark_step``. Collectives count from 1. A fault of a collective that does not suit the
one it meets (a barrier has no size) waits for the next that does. Timers run in a thread, so that `seconds=` finds a rank that
is blocked in a collective.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ncclx_py.faults.notes import claim
from ncclx_py.faults.spec import CALL, FOLDER, LINK, VARIABLE, Fault, parse_all


class Injector:
    """The faults of one rank. `faults` are (number in the job's list, fault); `folder` takes a note of each that happens."""

    def __init__(self, faults: Sequence[tuple[int, Fault]], rank: int, folder: Path | None = None) -> None:
        self._waiting = list(faults)
        self._rank = rank
        self._folder = folder
        self._lock = threading.Lock()
        self._began = 0.0
        self._steps = 0
        self._calls: Counter[str] = Counter()  # by group; "" counts all
        self.held: Callable[[], Any] | None = None  # a collective that is to follow the next one

    def begin(self) -> None:
        """A group is made; `seconds` count from the first."""
        if self._began:
            return
        self._began = time.monotonic()
        for number, fault in self._waiting:
            if fault.seconds is not None and fault.kind in ("kill", "stop"):
                timer = threading.Timer(fault.seconds, self._happen, (number, fault))
                timer.daemon = True
                timer.start()

    def step(self, number: int) -> None:
        """Training step `number` begins."""
        self._steps = number
        for number, fault in self._due(lambda fault: fault.kind not in CALL and fault.step == self._steps):
            self._happen(number, fault)
        self._late()

    def before_call(self, names: Sequence[str]) -> None:
        """A collective begins on the group that goes by `names`: what befalls the rank itself happens now."""
        self._calls[""] += 1
        for name in names:
            self._calls[name] += 1
        for number, fault in self._due(lambda fault: fault.kind not in CALL and self._reached(fault, names)):
            self._happen(number, fault)
        self._late()

    def of_call(self, names: Sequence[str], suits: Callable[[Fault], bool]) -> str:
        """The kind of fault that befalls the collective that `before_call` was told of; "" for none."""
        for number, fault in self._due(
            lambda fault: fault.kind in CALL and (not fault.group or fault.group in names) and self._time_for(fault)
        ):
            if suits(fault) and self._claim(number, fault):
                return fault.kind
        return ""

    def _due(self, which: Callable[[Fault], bool]) -> list[tuple[int, Fault]]:
        return [(number, fault) for number, fault in self._waiting if which(fault)]

    def _late(self) -> None:
        """A delay with `seconds=` stops the program at its next step or collective."""
        for number, fault in self._due(lambda fault: fault.kind == "delay" and fault.seconds is not None):
            if self._time_for(fault):
                self._happen(number, fault)

    def _reached(self, fault: Fault, names: Sequence[str]) -> bool:
        here = not fault.group or fault.group in names
        return fault.call is not None and here and self._calls[fault.group] == fault.call

    def _time_for(self, fault: Fault) -> bool:
        """Whether the moment of a fault has come or is past."""
        if fault.seconds is not None:
            return bool(self._began) and time.monotonic() >= self._began + fault.seconds
        if fault.step is not None:
            return self._steps >= fault.step
        assert fault.call is not None
        return self._calls[fault.group] >= fault.call

    def _claim(self, number: int, fault: Fault) -> bool:
        """Takes a fault off the list; False where it happened before, in an earlier life of this rank."""
        with self._lock:
            if (number, fault) not in self._waiting:
                return False
            self._waiting.remove((number, fault))
        facts = {"fault": fault.text, "rank": self._rank, "step": self._steps, "call": self._calls[""]}
        return claim(self._folder, number, facts)

    def _happen(self, number: int, fault: Fault) -> None:
        if not self._claim(number, fault) or fault.kind in LINK:  # the launcher waits for the note and breaks the link
            return
        print(f"ncclx: injecting {fault} into rank {self._rank}", file=sys.stderr, flush=True)
        if fault.kind == "delay":
            time.sleep(fault.duration or 0.0)
        elif fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            if fault.duration is not None:
                _wake_after(fault.duration)
            os.kill(os.getpid(), signal.SIGSTOP)


def _wake_after(seconds: float) -> None:
    """A process of its own continues this one, which cannot do it itself, unless this one has ended by then."""
    parent = os.getpid()
    words = f'sleep {seconds:.3f}; [ "$(cut -d" " -f4 /proc/$$/stat)" = {parent} ] && kill -CONT {parent}'
    subprocess.Popen(["sh", "-c", words], stdin=subprocess.DEVNULL, start_new_session=True)


_lock = threading.Lock()
_made: dict[str, Injector | None] = {}


def armed(env: Mapping[str, str]) -> Injector | None:
    """The injector of this process, None where `env` injects nothing into its rank; the same one at every call.

    Raises InjectError for faults that are malformed.
    """
    text = env.get(VARIABLE, "")
    if not text:
        return None
    with _lock:
        if text not in _made:
            rank, folder = int(env.get("RANK", "0")), env.get(FOLDER)
            mine = [(number, fault) for number, fault in enumerate(parse_all(text)) if fault.rank == rank]
            _made[text] = Injector(mine, rank, Path(folder) if folder else None) if mine else None
        return _made[text]


def disarm() -> None:
    """Forgets what has been counted: the next group starts anew with what the environment then says."""
    with _lock:
        _made.clear()


def step(number: int) -> None:
    """Training step `number` begins on this rank. Where nothing is injected it costs a look-up."""
    if VARIABLE in os.environ:
        injector = armed(os.environ)
        if injector is not None:
            injector.begin()
            injector.step(number)
