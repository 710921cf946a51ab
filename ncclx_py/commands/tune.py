"""``ncclx tune``: times the algorithms on the real links, checks their results, and writes the table that corrects the model.

ncclx launch emulate 2x4 --rate 200mbit -- -m ncclx_py tune all_reduce -o table.json
torchrun --nproc-per-node 4 -m ncclx_py tune all_reduce all_to_all -b 1KiB -e 16MiB
NCCLX_TABLE=table.json torchrun …
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path

from ncclx_py.bench.settings import DTYPES, sizes_between
from ncclx_py.bench.tuning import Options, Trial, tune
from ncclx_py.plans.algorithms.registry import ALGORITHMS
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.table import Row, Table, read_table
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.tuner import Choice, Tuner
from ncclx_py.units import format_size, format_time, parse_size

NAME = "tune"
HELP = "time the algorithms on the real links, check their results, and write the table that the choice uses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collectives", nargs="+", choices=ALGORITHMS, metavar="COLLECTIVE", help=", ".join(ALGORITHMS))
    parser.add_argument("-b", "--begin", default="1KiB", metavar="SIZE", help="the smallest size (default 1KiB)")
    parser.add_argument("-e", "--end", default="16MiB", metavar="SIZE", help="the largest size (default 16MiB)")
    parser.add_argument("-f", "--factor", type=float, default=8, help="between sizes (default 8)")
    parser.add_argument("--iters", type=int, default=5, metavar="N", help="samples of each algorithm (default 5)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--hopeless", type=float, default=3, metavar="X", help="leave out what is predicted X × the best (default 3)"
    )
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="S", help="deadline of one collective (default 60)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the table, for NCCLX_TABLE; rows of other sizes stay"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    sizes = sizes_between(parse_size(args.begin), parse_size(args.end), args.factor)
    if args.iters < 1 or args.hopeless < 1 or args.timeout <= 0:
        raise ValueError("--iters and --hopeless are at least 1, --timeout is above 0.")
    old = read_table(args.output).rows if args.output is not None and args.output.exists() else ()
    options = Options(args.iters, args.dtype, args.hopeless, args.timeout)
    topology, trials = tune(
        tuple(dict.fromkeys(args.collectives)), sizes, options, partial(print, file=sys.stderr, flush=True)
    )
    if os.environ["RANK"] != "0":
        return 0
    new = [trial.row for trial in trials if trial.row is not None]
    table = Table(merged(old, new), str(args.output or "measured now"))
    tuner = Tuner(topology, table)
    print(_as_json(trials, tuner) if args.json else as_text(trials, tuner))
    if args.output is not None:
        args.output.write_text(table.to_json(), encoding="utf-8")
        print(f"wrote {args.output}: {len(table.rows)} rows", file=sys.stderr)
    return 1 if any(not row.correct for row in new) else 0


def merged(old: Sequence[Row], new: Sequence[Row]) -> tuple[Row, ...]:
    """`old` rows, replaced by `new` ones of the same collective, size, topology, algorithm and parameters."""
    rows = {
        (row.collective, row.bytes, row.topology, row.algorithm, *sorted(row.parameters.items())): row
        for row in (*old, *new)
    }
    return tuple(rows.values())


def as_text(trials: Sequence[Trial], tuner: Tuner) -> str:
    """What was measured beside what the model said, and per size what is chosen with and without the table."""
    lines: list[str] = []
    for (collective, size), group in groupby(trials, key=lambda trial: (trial.collective, trial.bytes)):
        members = list(group)
        lines.append(f"{collective}, {format_size(size)}")
        for trial in members:
            lines.append("  " + _line(trial))
        lines.append("  " + verdict(members, tuner))
    return "\n".join(lines)


def verdict(trials: Sequence[Trial], tuner: Tuner) -> str:
    """One line on a size: what is chosen now, and what the model alone would have cost."""
    now, before = _choices(trials[0], tuner)
    measured = {
        _name(trial.row.algorithm, trial.row.parameters): trial.row.median_s
        for trial in trials
        if trial.row is not None and trial.row.correct
    }
    text = f"→ {_name(now.algorithm, now.parameters)}"
    if (now.algorithm, now.parameters) == (before.algorithm, before.parameters):
        return f"{text}, as the model says"
    alone, tuned = (measured.get(_name(one.algorithm, one.parameters)) for one in (before, now))
    cost = f" ({100 * (alone / tuned - 1):+.0f} %)" if alone and tuned else " (not measured)"
    return f"{text}; the model alone: {_name(before.algorithm, before.parameters)}{cost}"


def _choices(trial: Trial, tuner: Tuner) -> tuple[Choice, Choice]:
    """The choice with the table, and without."""
    topology: Topology = tuner.topology
    problem = uniform(trial.collective, topology.size, trial.bytes, 1)  # type: ignore[arg-type]
    return tuner.choose(problem, 1), Tuner(topology).choose(problem, 1)


def _line(trial: Trial) -> str:
    predicted = trial.candidate.predicted_s
    model = f"model {format_time(predicted):>8}" if predicted is not None else f"model {'-':>8}"
    if trial.row is None:
        return f"{trial.candidate!s:<26} {'-':>10}  {model}  left out: {trial.note}"
    if not trial.row.correct:
        return f"{trial.candidate!s:<26} {'-':>10}  {model}  WRONG: {trial.note}"
    ratio = f"{trial.row.median_s / predicted:6.2f} × the model" if predicted else ""
    return f"{trial.candidate!s:<26} {format_time(trial.row.median_s):>10}  {model}  {ratio}"


def _name(algorithm: str, parameters: object) -> str:
    values = {name: value for name, value in dict(parameters).items() if name != "window"}  # type: ignore[call-overload]
    return algorithm + (f" ({', '.join(f'{name} {value}' for name, value in values.items())})" if values else "")


def _as_json(trials: Sequence[Trial], tuner: Tuner) -> str:
    found = []
    for (collective, size), group in groupby(trials, key=lambda trial: (trial.collective, trial.bytes)):
        members = list(group)
        now, before = _choices(members[0], tuner)
        found.append(
            {
                "collective": collective,
                "bytes": size,
                "choice": asdict(now),
                "model_alone": asdict(before),
                "trials": [
                    {
                        "candidate": asdict(trial.candidate),
                        "row": asdict(trial.row) if trial.row else None,
                        "note": trial.note,
                    }
                    for trial in members
                ],
            }
        )
    return json.dumps(found, indent=1)
