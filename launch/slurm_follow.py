"""Follows a SLURM job to its end, and finds the rank that broke it.

    end = Follower(number, job).to_the_end()       # shows changes of state, the script's output, and what rank 0 writes
    end.outcome.status, end.outcome.failed         # as for the other launchers, see ranks.py

Every rank notes its exit status and the time in ``rank-R.end`` (``templates/job.sbatch``): the first that failed is the one
with the earliest time, to the precision of the nodes' clocks. Where a rank had no time to write one, srun's message tells.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ncclx_py.launch.logs import last_lines, tail
from ncclx_py.launch.ranks import Outcome, prefixed
from ncclx_py.launch.slurm import AGAIN, SlurmJob
from ncclx_py.launch.slurm_queue import ENDED, SlurmError, look

_QUICK, _SLOW = 1.0, 10.0  # seconds between looks: in the first minute, and later
_SILENCE = 600.0  # seconds for which SLURM's controller may be away
_SRUN = re.compile(r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)")


@dataclass(frozen=True)
class Life:
    """One start of the job, or of one task of an array: its folder, and the ranks as they ended."""

    folder: Path
    outcome: Outcome
    node: str | None = None  # of the rank that failed first


@dataclass
class End:
    """How a job ended: the state of each part in SLURM's words, and the life that failed, or else the last one."""

    states: dict[str, str]
    life: Life
    log: list[str] = field(default_factory=list)  # the end of what the script wrote, where no rank failed

    @property
    def outcome(self) -> Outcome:
        return self.life.outcome

    @property
    def status(self) -> int:
        """The exit status for the shell."""
        if self.outcome.failed is not None:
            return self.outcome.status
        bad = [state for state in self.states.values() if state != "COMPLETED"]
        if bad and AGAIN in self.outcome.statuses.values():
            return AGAIN  # stopped as it was told, and not started again
        return {"CANCELLED": 143, "TIMEOUT": 124}.get(bad[0], 1) if bad else 0


class Follower:
    """Watches one job. `lives` of a job without an array are its folder and those of its restarts."""

    def __init__(self, number: int, job: SlurmJob) -> None:
        self.number, self.job = number, job
        self._read: dict[Path, int] = {}
        self._began = time.monotonic()

    def to_the_end(self) -> End:
        """Returns when no part of the job will run any more. Raises SlurmError when SLURM is away for too long."""
        shown: dict[str, tuple[str, str]] = {}
        states: dict[str, str] = {}
        heard = time.monotonic()
        while True:
            try:
                now = look(self.number)
                heard = time.monotonic()
            except SlurmError as error:
                if time.monotonic() > heard + _SILENCE:
                    raise
                now = shown
                print(f"ncclx launch: {error} Asking again.", file=sys.stderr)
            for part, (state, reason) in now.items():
                if shown.get(part) != (state, reason):
                    why = f" ({reason})" if reason not in ("None", "") else ""
                    print(f"ncclx launch: job {part} is {state}{why}", file=sys.stderr, flush=True)
            shown, states = now, {part: state for part, (state, _) in now.items()} or states
            if not self.job.sweep:
                self._show()
            if not now or all(state in ENDED for state in states.values()):
                self._show()
                return self._end(states if now else dict.fromkeys(states, "COMPLETED"))
            time.sleep(_QUICK if time.monotonic() < self._began + 60 else _SLOW)

    def _show(self) -> None:
        """What the script and rank 0 have written since the last look."""
        files = [self.job.log] if not self.job.sweep else []
        files += [file for life in lives(self.job.folder) for file in (life / "rank-0.out", life / "rank-0.err")]
        for file in files:
            if not self.job.sweep and file.exists():
                with file.open("rb") as source:
                    source.seek(self._read.get(file, 0))
                    text, newline, _ = source.read().rpartition(b"\n")
                self._read[file] = self._read.get(file, 0) + len(text + newline)
                for line in text.decode(errors="replace").splitlines():
                    if file == self.job.log:
                        print(line, file=sys.stderr, flush=True)
                    else:
                        prefixed(0, line, file.suffix == ".err")

    def _end(self, states: dict[str, str]) -> End:
        tasks = sorted(self.job.folder.glob("task-*")) or [self.job.folder]
        last = [read_life(lives(task)[-1], self._log(task)) for task in tasks]
        if "CANCELLED" in states.values():
            last = [_spared(life) for life in last]
        worst = next((life for life in last if life.outcome.failed is not None), last[-1])
        return End(states, worst, self._log(worst.folder))

    def _log(self, folder: Path) -> list[str]:
        task = re.search(r"task-(\d+)", str(folder.relative_to(self.job.folder)))
        log = self.job.folder / (f"job-{task[1]}.log" if task else "job.log")
        return tail(log) if log.exists() else []


def lives(folder: Path) -> list[Path]:
    """The folders of a job's starts, the first one first."""
    restarts = [path for path in folder.glob("restart-*") if path.name[8:].isdigit()]
    return [folder, *sorted(restarts, key=lambda path: int(path.name[8:]))]


def read_life(folder: Path, log: list[str]) -> Life:
    """How the ranks of one start ended; `log` is the end of the batch script's output."""
    statuses, failures = {}, []
    for file in folder.glob("rank-*.end"):
        match = re.fullmatch(r"(\d+) (\d+[.,]\d+) (\S+)\n", file.read_text())
        if match is None:
            continue  # half written by a rank that was killed
        rank, status = int(file.stem[5:]), int(match[1])
        statuses[rank] = status
        if status not in (0, AGAIN):
            failures.append((float(match[2].replace(",", ".")), rank, match[3]))
    if failures:
        _, rank, node = min(failures)
        return Life(folder, Outcome(statuses, rank, last_lines(folder, rank)), node)
    for match in filter(None, map(_SRUN.search, log)):
        rank = int(match[2])
        if statuses.get(rank) is None:
            return Life(folder, Outcome(statuses | {rank: _status(match[3])}, rank, last_lines(folder, rank)), match[1])
    return Life(folder, Outcome(statuses))


def _spared(life: Life) -> Life:
    """Of a job that was cancelled: a rank that ended by SLURM's own SIGTERM or SIGKILL has not failed."""
    ended = life.outcome.failed is not None and life.outcome.status in (128 + signal.SIGTERM, 128 + signal.SIGKILL)
    return Life(life.folder, Outcome(life.outcome.statuses)) if ended else life


def _status(words: str) -> int:
    """The exit status in srun's words: ``Exited with exit code 3``, ``Killed``."""
    code = re.search(r"exit code (\d+)", words)
    signals = {"Killed": 137, "Terminated": 143, "Segmentation fault": 139, "Aborted": 134, "Out Of Memory": 137}
    return int(code[1]) if code else signals.get(words.split(" (")[0].strip(), 1)
