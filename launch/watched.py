"""What a launcher keeps of a job: a log per rank, a folder of traces, and the verdict when the job failed.

watched = Watched(folder, os.environ)
… run the ranks with watched.environment(), showing lines through written_to(folder, prefixed) …
verdict, text = watched.verdict()
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ncclx_py.launch.ranks import Show

TRACE_VARIABLE = "NCCLX_TRACE_DIR"
_CLOCK = 2.0  # seconds by which a file system's clock may be behind


class Watched:
    """The traces of one job. They go where `NCCLX_TRACE_DIR` says, or else into ``trace`` of the launch's `folder`.

    Without both the job leaves no traces for the launcher to judge.
    """

    def __init__(self, folder: Path | None, env: Mapping[str, str]) -> None:
        given = env.get(TRACE_VARIABLE)
        self.folder = folder
        self._own = not given and folder is not None
        self.traces = Path(given) if given else None if folder is None else (folder / "trace").absolute()
        self._began = time.time() - _CLOCK

    def environment(self) -> dict[str, str]:
        """What the ranks are told."""
        return {TRACE_VARIABLE: str(self.traces)} if self._own else {}

    def verdict(self) -> tuple[dict[str, Any] | None, str]:
        """What the traces of this job tell, as data and as text; None and "" where there are none."""
        if self.traces is None or not self._fresh(self.traces):
            return None, ""
        from ncclx_py.watch.reading import read_job
        from ncclx_py.watch.report import as_json, as_text
        from ncclx_py.watch.verdict import judge

        try:
            job = read_job(self.traces)
        except ValueError as error:
            return None, f"ncclx launch: no verdict: {error}"
        verdict = judge(job)
        return as_json(job, verdict), as_text(job, verdict)

    def _fresh(self, folder: Path) -> bool:
        """Whether a trace in the folder was written since this job began."""
        return any(file.stat().st_mtime >= self._began for file in folder.glob("trace-rank-*.jsonl"))


def written_to(folder: Path, show: Show) -> Show:
    """`show`, that also writes each line to ``rank-R.out`` or ``rank-R.err`` in `folder`."""
    files: dict[tuple[int, bool], IO[str]] = {}

    def tee(rank: int, line: str, error: bool) -> None:
        if (rank, error) not in files:
            name = f"rank-{rank}.{'err' if error else 'out'}"
            files[rank, error] = (folder / name).open("w", encoding="utf-8", buffering=1)
        try:
            files[rank, error].write(line + "\n")
        except OSError as problem:  # a full disk must not end the job
            print(f"ncclx launch: the log of rank {rank} could not be written: {problem}", file=sys.stderr)
        show(rank, line, error)

    return tee
