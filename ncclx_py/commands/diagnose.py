"""``ncclx diagnose``: what is wrong with a job, which rank is to blame, and what to do; from the dumps of its ranks.

ncclx diagnose outputs/run/trace                          # after a hang or a crash; dumps may be missing or cut off
ncclx diagnose --live outputs/run/trace                   # of a job that still runs
ncclx diagnose outputs/run/trace --json --picture calls.png --chrome calls.json

Exit status: 0 when nothing is wrong, 1 when something is, 2 when there is nothing to judge.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ncclx_py.watch.chrome import export
from ncclx_py.watch.graph import PATIENCE
from ncclx_py.watch.live import read_live
from ncclx_py.watch.model import Job
from ncclx_py.watch.picture import draw
from ncclx_py.watch.reading import read_job
from ncclx_py.watch.report import as_json, as_text
from ncclx_py.watch.verdict import judge

NAME = "diagnose"
HELP = "say what is wrong with a job, which rank is to blame and what to do, from the dumps of its ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the dumps are: NCCLX_TRACE_DIR of the job")
    parser.add_argument("--live", action="store_true", help="the job still runs: ask its ranks for dumps first")
    parser.add_argument(
        "--wait", type=float, default=5.0, metavar="S", help="with --live: for the answers of all ranks (default 5)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="S",
        help=f"a call that is open for longer counts as stuck; one that failed always does (default {PATIENCE:g})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw ranks x collectives, as PNG")
    parser.add_argument("--chrome", type=Path, metavar="FILE", help="write all calls for Perfetto or chrome://tracing")


def run(args: argparse.Namespace) -> int:
    try:
        if args.wait <= 0 or args.patience < 0:
            raise ValueError("--wait and --patience are seconds, above zero.")
        job = _read(args)
    except ValueError as error:
        print(f"ncclx diagnose: error: {error}", file=sys.stderr)
        return 2
    verdict = judge(job, args.patience)
    print(json.dumps(as_json(job, verdict), indent=2) if args.json else as_text(job, verdict))
    if args.picture is not None:
        draw(job, verdict, args.picture)
        _note(f"wrote {args.picture}")
    if args.chrome is not None:
        export(args.folder, args.chrome)
        _note(f"wrote {args.chrome}")
    return 0 if verdict.healthy else 1


def _read(args: argparse.Namespace) -> Job:
    return read_live(args.folder, args.wait, _note) if args.live else read_job(args.folder)


def _note(text: str) -> None:
    print(text, file=sys.stderr)
