"""What all ways of ``ncclx launch`` share: options, faults, a folder for the logs, and how a job's end is told."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ncclx_py.faults.spec import Fault, check_links, check_ranks, parse
from ncclx_py.launch.inject import Drill
from ncclx_py.launch.logs import is_full
from ncclx_py.launch.ranks import JobError, Outcome, describe
from ncclx_py.launch.shape import Shape
from ncclx_py.launch.watched import Watched

PROGRAM = "-- (script.py | -m module) [arguments]"


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inject",
        action="append",
        default=[],
        metavar="FAULT",
        help="a fault on purpose, as kill:rank=3,step=20; repeat",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what ran and how it ended")
    parser.add_argument("program", nargs="+", help="what would follow torchrun's options: script.py … or -m module …")


def add_log_folder(parser: argparse.ArgumentParser, where: str = "") -> None:
    parser.add_argument(
        "--log-dir",
        type=Path,
        default=Path("outputs/launch"),
        metavar="DIR",
        help=f"{where}each launch makes a folder in it (default outputs/launch)",
    )


def read_faults(texts: Sequence[str], ranks: int | None, shape: Shape | None = None) -> tuple[Fault, ...]:
    """The faults of ``--inject`` for a job of `ranks` ranks (None: not known yet). Raises InjectError."""
    faults = tuple(parse(text) for text in texts)
    check_ranks(faults, ranks, None if shape is None else shape.hosts)
    if shape is not None:
        check_links(faults, shape.rates)
    return faults


def make_folder(parent: Path, name: str | None) -> Path:
    """A folder for this launch: one that all nodes of a named job share, or one of its own."""
    folder = parent / (name or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"--log-dir {parent} cannot be written: {error.strerror}; choose another folder.") from None
    return folder


def check_record(file: Path | None) -> None:
    """Refuse before the job starts what would lose its record at the end. Raises JobError."""
    if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise JobError(
            f"--json {file} cannot be written: is {file.absolute().parent} a folder that you may write into?"
        )


def report(
    outcome: Outcome, where: str, drill: Drill, watched: Watched, here: Collection[int] | None = None
) -> dict[str, Any] | None:
    """Says on stderr what failed, what the traces tell, and which faults came true. Returns the verdict."""
    verdict = None
    if outcome.failed is not None:
        failed = f"rank {outcome.failed}{where} failed first, with {describe(outcome.status)}"
        print(f"ncclx launch: {failed}", file=sys.stderr)
        if outcome.last_lines:
            print("its last lines:", *outcome.last_lines, sep="\n  ", file=sys.stderr)
        if watched.folder is not None and is_full(watched.folder):
            print(
                f"ncclx launch: the disk of {watched.folder} is full: free space, or choose another --log-dir",
                file=sys.stderr,
            )
        verdict, text = watched.verdict()
        if text:
            print(text, file=sys.stderr)
    for line in drill.report(here):
        print(f"ncclx launch: {line}", file=sys.stderr)
    return verdict


def record(
    args: argparse.Namespace, outcome: Outcome, drill: Drill, verdict: dict[str, Any] | None, seconds: float
) -> dict[str, Any]:
    ranks = max(outcome.statuses, default=-1) + 1
    return {
        "program": args.program,
        "status": outcome.status,
        "failed_rank": outcome.failed,
        "statuses": [outcome.statuses.get(rank) for rank in range(ranks)],
        "seconds": round(seconds, 3),
        "faults": [
            {"fault": fault.text, "happened": note} for fault, note in zip(drill.faults, drill.notes(), strict=True)
        ],
        "verdict": verdict,
    }
