"""The dumps of a folder → a `Job`.

    job = read_job(Path("outputs/run/trace"))       # raises ValueError when there is nothing to judge
    job.missing, job.complaints

Files are ``trace-rank-<R>.jsonl``, one per rank; any of them may be missing, truncated or damaged. Many are read by
several processes.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from ncclx_py.watch.model import Asked, Group, Job, RankTrace
from ncclx_py.watch.parsing import Parsed, parse

_NAME = re.compile(r"trace-rank-(\d{1,7})\.jsonl")
_ENOUGH_FOR_HELP = 32 << 20  # bytes of dumps from which on several processes read them
_BATCH = 8  # files handed to a process at once

T = TypeVar("T")


def read_job(folder: Path) -> Job:
    """Raises ValueError, which names the folder and what is wrong, when no dump in it can be used."""
    paths = dump_files(folder)
    if not paths:
        raise ValueError(
            f"{folder}: no dumps (trace-rank-<rank>.jsonl) in it. Give the folder that NCCLX_TRACE_DIR named in the job; "
            "a distill run writes to <run folder>/trace. From a job that still runs: ncclx diagnose --live."
        )
    job = assemble(_parse_all(list(paths.values())))
    if not job.ranks:
        raise ValueError("\n".join([f"{folder}: none of its {len(paths)} dumps can be used:", *job.complaints]))
    return job


def dump_files(folder: Path) -> dict[int, Path]:
    """The dumps in a folder, by rank. Raises ValueError when it cannot be listed."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read: {error.strerror or error}.") from error
    found = {int(match[1]): folder / name for name in names if (match := _NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def assemble(parts: Iterable[Parsed]) -> Job:
    """One job of the dumps of its ranks. Dumps that contradict the latest one about the size of the job are left out."""
    parts = list(parts)
    complaints = [complaint for part in parts for complaint in part.complaints]
    traces = [part.trace for part in parts if part.trace is not None]
    latest = max(traces, key=lambda trace: trace.time_ns, default=None)
    size = latest.world_size if latest is not None else 0
    ranks: dict[int, RankTrace] = {}
    asked: dict[Asked, int] = {}
    sites: dict[str, int] = {}
    groups: dict[Group, int] = {}
    for part in parts:
        trace = part.trace
        if trace is None:
            continue
        if trace.world_size != size:
            complaints.append(
                f"{trace.path}: from a job of {trace.world_size} ranks, the latest dump is from one of {size}: not used"
            )
            continue
        table = trace.table
        table["asked"] = _numbers(part.asked, asked)[table["asked"]]
        table["site"] = _numbers(part.sites, sites)[table["site"]]
        table["group"] = _numbers(part.groups, groups)[table["group"]]
        ranks[trace.rank] = trace
    return Job(dict(sorted(ranks.items())), size, list(asked), list(sites), list(groups), complaints)


def _numbers(things: list[T], known: dict[T, int]) -> np.ndarray:
    """The number of each thing in `known`, which grows."""
    return np.array([known.setdefault(thing, len(known)) for thing in things] or [0], dtype=np.int64)


def _parse_all(paths: list[Path]) -> list[Parsed]:
    workers = min(os.cpu_count() or 1, 16, len(paths))
    if workers < 2 or sum(_size(path) for path in paths) < _ENOUGH_FOR_HELP:
        return [parse(path) for path in paths]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(parse, paths, chunksize=_BATCH))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
