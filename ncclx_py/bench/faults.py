"""The fault matrix: every kind of fault at several places, and whether the verdict names the right rank and the right cause.

    python -m ncclx_py.bench.faults --json matrix.json               # 8 kinds × 10 places on 2 emulated hosts (needs root)
    python -m ncclx_py.bench.faults --kinds kill,stop --placements 3

Each case is a fresh job on the emulated hosts with one fault (``ncclx_py.faults``, as ``ncclx launch emulate --inject``
has it), judged from its dumps like ``ncclx diagnose`` does: as soon as all ranks have ended, or `SETTLE` after the first sign
of trouble. A verdict's time counts from the fault plus the deadline. Then healthy jobs are recorded, and replayed many
times with jitter and cuts (``fault_replay.py``): every verdict but "all good" is a false alarm. The same command again goes on
where it was stopped. Exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncclx_py.bench.fault_cases import KINDS, Case, make_cases
from ncclx_py.bench.fault_ranks import Setting, write_case
from ncclx_py.bench.fault_replay import replay
from ncclx_py.faults.spec import KINDS as ALL_KINDS
from ncclx_py.faults.spec import parse
from ncclx_py.launch.emulate import Cluster
from ncclx_py.launch.inject import Drill
from ncclx_py.launch.ranks import Interrupted, prefixed, raise_on_signals
from ncclx_py.launch.shape import Shape, parse_ranks, parse_rates, str_ranks
from ncclx_py.watch.reading import read_job
from ncclx_py.watch.report import as_json
from ncclx_py.watch.triggers import request_dumps
from ncclx_py.watch.verdict import judge

SETTLE = 2.0  # seconds from the first sign of trouble to the verdict, where ranks are still there
GIVE_UP = 20.0  # seconds after which a case is judged although nothing has shown
WITHIN = 5.0  # seconds after the deadline by which a verdict is wanted
ENOUGH = 0.95  # share of cases that are to be right
_LOOK = 0.05
_FIRST_PORT = 21000


@dataclass
class _Options:
    shape: Shape
    deadline: float
    healthy: int
    replays: int
    seed: int


class Matrix:
    """Runs cases on a cluster whose ranks are up; `rows` are the results so far, written to `file` after each."""

    def __init__(self, cluster: Cluster, options: _Options, rows: list[dict[str, Any]], file: Path | None) -> None:
        self.cluster, self.options, self.rows, self.file = cluster, options, rows, file
        self.folder = Path(tempfile.mkdtemp(prefix="ncclx-faults-"))
        self.false_alarms: list[dict[str, Any]] = []
        self.replayed = 0
        self.failure: BaseException | None = None
        self._number = 0

    def run(self, cases: Sequence[Case]) -> None:
        """Runs all cases, then the healthy jobs; called beside the ranks, which it ends."""
        try:
            done = {row["case"] for row in self.rows}
            for case in cases:
                if case.name not in done:
                    row = self._case(case)
                    self.rows.append(row)
                    _note(_line(row, len(self.rows), len(cases)))
                    self.save()
            self._healthy()
            self.save()
        except BaseException as error:
            self.failure = error
        finally:
            (self.folder / "end").touch()

    def save(self) -> None:
        if self.file is None:
            return
        record = {**summary(self.rows), "replays": self.replayed, "false_alarms": self.false_alarms}
        record |= {"cluster": str_ranks(self.options.shape.ranks), "deadline_s": self.options.deadline}
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text(json.dumps({**record, "rows": self.rows}, indent=1) + "\n")
        partial.replace(self.file)

    def _start(self, drill: Drill | None, traces: Path, setting: dict[str, Any]) -> int:
        env = {"NCCLX_TRACE_DIR": str(traces), "NCCLX_NAN_CHECK": "1", "MASTER_PORT": str(_FIRST_PORT + self._number)}
        env |= drill.environment() if drill is not None else {}
        number, self._number = self._number, self._number + 1
        write_case(self.folder, number, Setting(env, self.options.deadline, **setting))
        return number

    def _case(self, case: Case) -> dict[str, Any]:
        shape, traces = self.options.shape, self.folder / f"trace-{self._number}"
        slow = case.kind == "halve-rate"
        with Drill([parse(case.fault)], self.cluster.network, shape.host_of) as drill:
            number = self._start(drill, traces, {"steps": 60, "elements": 250_000} if slow else {})
            trouble, ended = self._until_trouble(number, drill, slow, traces)
            fired = (drill.notes()[0] or {}).get("time_ns")
            verdict, judged_ns = self._verdict(traces), time.time_ns()
            (self.folder / f"case-{number}.over").touch()
            self._until(lambda: len(self._answers(number)) == shape.size, GIVE_UP)
        if case.kind in ("drop-link", "halve-rate"):
            self.cluster.network.mend_link(case.host)
        right_rank, right_cause = case.expects(verdict, shape.host_of)
        late = (judged_ns - fired) / 1e9 - self.options.deadline if fired else None
        return {
            "case": case.name,
            "kind": case.kind,
            "fault": case.fault,
            "happened": fired is not None,
            "right_rank": right_rank,
            "right_cause": right_cause,
            "after_deadline_s": None if late is None else round(late, 2),
            "shown": trouble,
            "ended_before_verdict": ended,
            "verdict": {key: verdict[key] for key in ("verdict", "cause", "ranks", "collective", "summary")},
        }

    def _until_trouble(self, number: int, drill: Drill, slow: bool, traces: Path) -> tuple[bool, int]:
        """Waits for the moment at which a person would ask for a verdict. Whether trouble has shown, and how many ended."""
        size = self.options.shape.size
        if slow:
            self._until(lambda: drill.notes()[0] is not None, GIVE_UP)
            time.sleep(2 * SETTLE)
            request_dumps(traces)
            time.sleep(SETTLE)
            return True, len(self._answers(number))
        shown = self._until(lambda: bool(self._answers(number)), GIVE_UP)
        self._until(lambda: len(self._answers(number)) == size, SETTLE)
        return shown, len(self._answers(number))

    def _verdict(self, traces: Path) -> dict[str, Any]:
        try:
            job = read_job(traces)
        except ValueError as error:
            return {"verdict": "none", "cause": "none", "ranks": [], "collective": "", "summary": str(error)}
        return as_json(job, judge(job))

    def _healthy(self) -> None:
        """Records healthy jobs, in the middle and at the end, and judges them and their replays."""
        if self.replayed >= self.options.replays:
            return
        recorded: list[Path] = []
        for job in range(self.options.healthy):
            traces = self.folder / f"trace-{self._number}"
            self._record_healthy(traces, 2.5 + 0.2 * job)
            self._judge_healthy(traces, f"healthy job {job}")
            recorded.append(traces)
            _note(f"healthy job {job + 1} of {self.options.healthy} recorded")
        copy = self.folder / "replay"
        while self.replayed < self.options.replays and recorded:
            replay(recorded[self.replayed % len(recorded)], copy, seed=self.options.seed * 100_000 + self.replayed)
            self._judge_healthy(copy, f"replay {self.replayed}")
            self.replayed += 1
        _note(f"{self.replayed} replays of healthy jobs: {len(self.false_alarms)} false alarms")

    def _record_healthy(self, traces: Path, seconds: float) -> None:
        """Runs a healthy job, and asks for its dumps after so many seconds. Raises RuntimeError where it is not healthy."""
        size = self.options.shape.size
        number = self._start(None, traces, {"steps": 100, "work": 0.05})
        self._until(lambda: bool(self._answers(number)), seconds)
        request_dumps(traces)
        self._until(lambda: len(self._answers(number)) == size, 60.0)
        (self.folder / f"case-{number}.over").touch()
        dumps = list(traces.glob("trace-rank-*.jsonl"))
        if any(status != 0 for status in self._answers(number)) or len(dumps) != size:
            raise RuntimeError(f"a healthy job failed: {self._answers(number)}, {len(dumps)} dumps; see {self.folder}")

    def _judge_healthy(self, traces: Path, name: str) -> None:
        found = self._verdict(traces)
        if found["verdict"] != "ALL_GOOD":
            self.false_alarms.append(
                {"traces": name, **{key: found[key] for key in ("verdict", "cause", "ranks", "summary")}}
            )
            _note(f"false alarm: {self.false_alarms[-1]}")

    def _answers(self, number: int) -> list[int | None]:
        """The exit statuses of the ranks that have ended in a case."""
        return [json.loads(file.read_text())["status"] for file in self.folder.glob(f"case-{number}-rank-*.json")]

    def _until(self, done: Any, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK)
        return True


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right verdicts, in all and by kind, and the times of verdicts in seconds after the deadline."""
    late = [row["after_deadline_s"] for row in rows if row["after_deadline_s"] is not None]
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {
        "cases": len(rows),
        "right": sum(_is_right(row) for row in rows),
        "share": round(sum(_is_right(row) for row in rows) / len(rows), 4) if rows else None,
        "by_kind": {
            kind: f"{sum(_is_right(r) for r in rows if r['kind'] == kind)}/{_count(rows, kind)}" for kind in kinds
        },
        "after_deadline_s": {"median": statistics.median(late), "most": max(late)} if late else None,
    }


def _is_right(row: dict[str, Any]) -> bool:
    return bool(row["happened"] and row["right_rank"] and row["right_cause"])


def _count(rows: Sequence[dict[str, Any]], kind: str) -> int:
    return sum(row["kind"] == kind for row in rows)


def _line(row: dict[str, Any], number: int, cases: int) -> str:
    verdict = row["verdict"]
    said = f"{verdict['verdict']} ({verdict['cause']}) ranks {verdict['ranks']}"
    mark = "right" if _is_right(row) else "WRONG" if row["happened"] else "DID NOT HAPPEN"
    return f"[{number}/{cases}] {row['fault']}: {said}, {row['after_deadline_s']} s after the deadline: {mark}"


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    args = _parser().parse_args()
    kinds = tuple(args.kinds.split(","))
    if unknown := [kind for kind in kinds if kind not in ALL_KINDS]:
        _note(f"error: {', '.join(unknown)}: no such kind; there are {', '.join(ALL_KINDS)}")
        return 2
    shape = Shape(parse_ranks(args.cluster), parse_rates(args.rate, None))
    options = _Options(shape, args.deadline, args.healthy, args.replays, args.seed)
    cases = make_cases(kinds, args.placements, shape, args.seed)
    rows = json.loads(args.json.read_text())["rows"] if args.json is not None and args.json.exists() else []
    try:
        with raise_on_signals(), Cluster(shape) as cluster:
            matrix = Matrix(cluster, options, rows, args.json)
            coordinator = threading.Thread(target=matrix.run, args=(cases,), daemon=True)
            coordinator.start()
            cluster.run(["-m", "ncclx_py.bench.fault_ranks", str(matrix.folder)], show=prefixed)
            coordinator.join()
    except Interrupted as stop:
        _note(f"{stop}: the ranks were ended and the hosts removed")
        return 128 + stop.signum
    if matrix.failure is not None:
        raise matrix.failure
    if not args.keep:
        shutil.rmtree(matrix.folder, ignore_errors=True)
    return _conclude(matrix, args)


def _conclude(matrix: Matrix, args: argparse.Namespace) -> int:
    found = summary(matrix.rows)
    print(json.dumps({**found, "replays": matrix.replayed, "false_alarms": len(matrix.false_alarms)}, indent=1))
    if args.keep:
        _note(f"dumps and outputs: {matrix.folder}")
    late = [row for row in matrix.rows if (row["after_deadline_s"] or 0.0) > WITHIN]
    return 1 if found["share"] is None or found["share"] < ENOUGH or late or matrix.false_alarms else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cluster", default="2x3", help="hosts and ranks (default 2x3)")
    parser.add_argument("--rate", default="1gbit", help="of every link (default 1gbit)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of faults (default {','.join(KINDS)})")
    parser.add_argument("--placements", type=int, default=10, metavar="N", help="of each kind (default 10)")
    parser.add_argument("--deadline", type=float, default=2.0, metavar="S", help="of the job's collectives (default 2)")
    parser.add_argument(
        "--healthy", type=int, default=6, metavar="N", help="healthy jobs that are recorded (default 6)"
    )
    parser.add_argument("--replays", type=int, default=200, metavar="N", help="of healthy jobs (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other places (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; a file that is there is continued")
    parser.add_argument("--keep", action="store_true", help="keep dumps and outputs, and say where")
    return parser


if __name__ == "__main__":
    sys.exit(main())
