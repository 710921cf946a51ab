"""The command itself: load, check what is on disk, run what is missing, report. See the package's docstring for its use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import distill.compare
from distill.cli import run_command
from distill.compare.config import Comparison, load_comparison
from distill.compare.pictures import CURVES, LENGTHS, draw
from distill.compare.plan import jobs_of
from distill.compare.report import CSV, REPORT, RUNS, TABLE, baseline_rows, report, table, write_files
from distill.compare.results import RunRow, rows_of
from distill.compare.schedule import NOT_RUN, Schedule
from distill.compare.state import admit
from distill.errors import CheckpointError, ConfigError
from distill.progress import console
from distill.runs import claim

WIDE = 400  # columns that a table may have, also where the output is no terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 where a run failed, 2 for a mistake in the input."""
    failed: list[dict[str, Any]] = []

    def body(overrides: list[str]) -> dict[str, Any]:
        document = compare(load_comparison(overrides))
        failed.extend(document["failed"])
        return document

    code = run_command("compare", distill.compare.__doc__ or "", body, arguments)
    return code or int(bool(failed))


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run what is missing and write the report; returns it."""
    settings = comparison.compare
    jobs = jobs_of(comparison)
    folder = Path(settings.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = claim(folder, "compare.dir")
    except OSError as error:
        raise ConfigError(
            f"compare.dir={folder} cannot be written: {error.strerror}; choose another compare.dir"
        ) from None
    with lock:
        admit(jobs, settings.changed)
        failures = Schedule(jobs, settings.parallel, settings.run_timeout_s).run()
        rows = rows_of(jobs, failures)
        document, baseline = report(comparison, rows), baseline_rows(comparison, rows)
        try:
            write_files(folder, document, rows, baseline)
            draw(folder, rows, settings.accuracy)
        except OSError as error:
            raise CheckpointError(
                f"{folder} could not be written ({error.strerror}); free some space and run the same command again: all runs "
                "are kept"
            ) from None
    show(folder, document, rows, baseline)
    return document


def show(folder: Path, document: dict[str, Any], rows: list[RunRow], baseline: list[RunRow]) -> None:
    """The table, what failed, and where things are, for a person."""
    Console(stderr=True, highlight=False, soft_wrap=True, width=WIDE).print(table(rows, baseline))
    failures = document["failed"]
    for failure in failures:
        if not failure["reason"].startswith(NOT_RUN):
            console.print(escape(f"failed: {failure['run']}: {failure['reason']}   log: {failure['log']}"))
    waiting = sum(failure["reason"].startswith(NOT_RUN) for failure in failures)
    if waiting:
        console.print(f"{waiting} other runs need a model that is missing because of that")
    for note in document["notes"]:
        console.print(escape(f"note: {note}"))
    console.print(
        "mean ± 95 % interval over seeds (Student t); greedy, exact, length: one greedy answer per problem; pass@k: sampled; "
        "Δ: to compare.baseline, seed by seed\n"
        f"tables: {folder}/{{{TABLE},{CSV},{RUNS}}}   figures: {folder}/{REPORT}   "
        f"pictures: {folder}/{{{CURVES},{LENGTHS}}}"
    )
