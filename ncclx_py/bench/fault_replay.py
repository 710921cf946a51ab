"""Healthy traces again, a little different each time: what a verdict must not be alarmed by.

    replay(Path("recorded"), Path("copy"), seed=7)

Every rank's dump is taken back to a moment near one common moment (dumps of a running job are never quite simultaneous):
later calls are dropped, those under way become unfinished. Clocks differ by milliseconds, calls last a little longer, now
and then a dump is cut short or missing.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

_APART = 50_000_000  # ns between the moments of two ranks, at most
_SKEW = 2_000_000  # ns by which clocks differ


def replay(source: Path, target: Path, seed: int) -> None:
    """Writes a variant of the dumps in `source` into `target`, which is emptied; equal for equal seeds."""
    draw = random.Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    dumps = {file: _lines(file) for file in sorted(source.glob("trace-rank-*.jsonl"))}
    times = [record["scheduled_ns"] for lines in dumps.values() for record in lines[1:] if "scheduled_ns" in record]
    moment = draw.randint(min(times), min(lines[0]["time_ns"] for lines in dumps.values()) - _APART)
    lost = draw.choice(list(dumps)) if draw.random() < 0.1 else None
    for file, lines in dumps.items():
        if file == lost:
            continue
        changed = _taken_back(lines, moment + draw.randint(0, _APART), draw.randint(-_SKEW, _SKEW), draw)
        if draw.random() < 0.1 and len(changed) > 2:
            changed = changed[: draw.randint(1, len(changed) - 1)]
        (target / file.name).write_text("".join(json.dumps(line) + "\n" for line in changed))


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _taken_back(lines: list[dict[str, Any]], moment: int, skew: int, draw: random.Random) -> list[dict[str, Any]]:
    """One rank's dump as it would have been at `moment`, by a clock that is `skew` ahead."""
    header, *records, end = lines
    kept = []
    for record in records:
        if record["scheduled_ns"] > moment:
            continue
        changed = dict(record)
        longer = draw.randint(0, 200_000)
        if record["finished_ns"] and record["finished_ns"] + longer > moment:
            changed |= {"finished_ns": 0, "state": "started", "plan_step": None, "waiting_for": None}
            longer = 0
        if record["started_ns"] > moment:
            changed |= {"started_ns": 0, "state": "scheduled"}
        for key in ("scheduled_ns", "started_ns", "finished_ns"):
            if changed[key]:
                changed[key] += skew + (longer if key == "finished_ns" else 0)
        kept.append(changed)
    first = {**header, "reason": "demand", "time_ns": moment + skew, "monotonic_ns": header["monotonic_ns"]}
    return [first, *kept, {**end, "records": len(kept)}]
