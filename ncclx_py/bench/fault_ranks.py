"""The ranks of the fault matrix: each is a process that has imported everything, and forks a fresh rank for each case.

The coordinator (``faults.py``) writes ``case-N.json``, each rank answers with ``case-N-rank-R.json`` when its process has
ended or ``case-N.over`` says that it was watched for long enough; ``end`` ends all. A fork starts in milliseconds what a new
process would import for seconds.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, ModuleType

from ncclx_py.bench import fault_job

_LOOK = 0.01  # seconds


@dataclass(frozen=True)
class Setting:
    """What a case needs: environment, and the arguments of ``fault_job.train``."""

    env: dict[str, str]
    deadline: float
    steps: int = 10
    work: float = 0.02
    elements: int = 1000


def run_rank(job: ModuleType, setting: Setting, output: Path) -> None:
    """In a forked child: runs the job and ends as Python would. Does not return."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with output.open("wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    os.environ.update(setting.env)
    status = 1
    try:
        job.train(setting.deadline, setting.steps, setting.work, setting.elements)
        status = 0
    except BaseException as error:
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(folder: Path, rank: int) -> None:
    """Runs this rank's part of one case after the other until ``end`` appears."""
    job, number = _copied(folder, rank), 0
    while not (folder / "end").exists():
        case = folder / f"case-{number}.json"
        if not case.exists():
            time.sleep(_LOOK)
            continue
        setting = Setting(**json.loads(case.read_text()))
        child = os.fork()
        if not child:
            run_rank(job, setting, folder / f"case-{number}-rank-{rank}.txt")
        status = _watched(child, folder / f"case-{number}.over")
        answer = folder / f"case-{number}-rank-{rank}.json"
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps({"status": status, "time_ns": time.time_ns()}))
        partial.replace(answer)
        number += 1


def _copied(folder: Path, rank: int) -> ModuleType:
    """The job as a file of its own, outside of this package."""
    copy = folder / f"job-{rank}" / "job.py"
    copy.parent.mkdir()
    shutil.copy(fault_job.__file__, copy)
    spec = importlib.util.spec_from_file_location("job", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _watched(child: int, over: Path) -> int | None:
    """The exit status of a child; None when it had to be killed because the case was over."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if over.exists():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(_LOOK)


def write_case(folder: Path, number: int, setting: Setting) -> None:
    """Starts case `number` on all ranks."""
    partial = folder / f"case-{number}.partial"
    partial.write_text(json.dumps(asdict(setting)))
    partial.replace(folder / f"case-{number}.json")


def _leave(_: int, __: FrameType | None) -> None:
    os._exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    serve(Path(sys.argv[1]), int(os.environ["RANK"]))
