"""The comparison as a table for a person, CSV files, and one JSON object.

table.md, table.csv     an entry per line; NAME is a mean over seeds and NAME_ci95 the half-width of its 95 % interval;
                        NAME_vs_baseline the mean difference per seed to compare.baseline, with an interval of its own
runs.csv                a run per line
report.json             settings, stages, entries, runs, failures and notes
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.compare.config import Comparison
from distill.compare.results import RunRow, differences, groups, summarise
from distill.compare.statistics import Spread
from distill.runs import write_atomically, write_json

TABLE, CSV, RUNS, REPORT = "table.md", "table.csv", "runs.csv", "report.json"
_DECAYING = ("linear", "cosine", "cosine_with_min_lr")


def report(comparison: Comparison, rows: Sequence[RunRow]) -> dict[str, Any]:
    """Everything as one JSON object."""
    models = groups(rows)
    baseline = baseline_rows(comparison, rows)
    return {
        "settings": {**asdict(comparison.compare), "eval": asdict(comparison.eval), "common": comparison.common},
        "stages": {name: _group(part, []) for name, part in models.items() if part[0].job.stage},
        "entries": {
            name: {"overrides": comparison.entries[name], **_group(part, baseline)}
            for name, part in models.items()
            if not part[0].job.stage
        },
        "runs": [_run(row) for row in rows],
        "failed": [
            {"run": row.job.title, "reason": row.failure, "log": str(row.job.log)} for row in rows if row.failure
        ],
        "notes": notes(comparison, rows),
    }


def baseline_rows(comparison: Comparison, rows: Sequence[RunRow]) -> list[RunRow]:
    """The runs of compare.baseline; none without one, or where it is not among the entries that were asked for."""
    return [row for row in rows if not row.job.stage and row.job.name == comparison.compare.baseline]


def _group(rows: Sequence[RunRow], baseline: Sequence[RunRow]) -> dict[str, Any]:
    group = {
        "runs": len(rows),
        "failed": sum(row.failure is not None for row in rows),
        "figures": _figures(summarise(rows)),
    }
    return group | ({"vs_baseline": _figures(differences(rows, baseline))} if baseline else {})


def _figures(found: dict[str, Spread]) -> dict[str, Any]:
    return {name: {"mean": value.mean, "ci95": value.half_width, "runs": value.count} for name, value in found.items()}


def _run(row: RunRow) -> dict[str, Any]:
    job = row.job
    return {"name": job.name, "seed": job.seed, "folder": str(job.folder.path), "failure": row.failure, **row.figures}


def notes(comparison: Comparison, rows: Sequence[RunRow]) -> list[str]:
    """What a reader must know to judge the table."""
    found = []
    budget = comparison.compare.budget
    if budget.tokens is not None:
        decaying = sorted(
            {
                row.job.name
                for row in rows
                if not row.job.stage
                and row.job.config.engine.schedule in _DECAYING
                and row.figures.get("steps", budget.steps) < budget.steps
            }
        )
        if decaying:
            found.append(
                f"stopped by compare.budget.tokens in the middle of a decaying learning rate: {', '.join(decaying)}; "
                "engine.schedule=constant_with_warmup treats all entries alike"
            )
        short = sorted(
            {
                row.job.name
                for row in rows
                if not row.job.stage and row.figures.get("spent_tokens", budget.tokens) < budget.tokens
            }
        )
        if short:
            found.append(
                f"ended by compare.budget.steps={budget.steps} before the token budget was spent: {', '.join(short)}"
            )
    done = [row for row in rows if not row.job.stage and row.failure is None]
    if done and not any(row.curve for row in done):
        found.append("no entry was evaluated during training (eval.every=0 in `common`): no curves")
    if len(comparison.compare.seeds) == 1:
        found.append("one seed: no interval, and no conclusion about which entry is better")
    return found


def write_files(folder: Path, document: dict[str, Any], rows: Sequence[RunRow], baseline: Sequence[RunRow]) -> None:
    """All files but the pictures, each whole or as it was before. Raises OSError on a full disk."""
    write_json(folder / REPORT, document)
    write_atomically(folder / RUNS, _csv([_run(row) for row in rows]))
    lines = []
    for name, part in groups(rows).items():
        line: dict[str, Any] = {"name": name, "runs": len(part), "failed": sum(row.failure is not None for row in part)}
        for figure, value in summarise(part).items():
            line |= {figure: value.mean, f"{figure}_ci95": value.half_width}
        for figure, value in _against(part, baseline).items():
            line |= {f"{figure}_vs_baseline": value.mean, f"{figure}_vs_baseline_ci95": value.half_width}
        lines.append(line)
    write_atomically(folder / CSV, _csv(lines))
    header, body = cells(rows, baseline)
    text = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *body]]
    write_atomically(folder / TABLE, "\n".join(text) + "\n")


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def table(rows: Sequence[RunRow], baseline: Sequence[RunRow]) -> Table:
    """For the terminal."""
    header, body = cells(rows, baseline)
    shown = Table()
    for title in header:
        shown.add_column(title, no_wrap=True)
    for line in body:
        shown.add_row(*line)
    return shown


def _against(part: Sequence[RunRow], baseline: Sequence[RunRow]) -> dict[str, Spread]:
    """Differences of an entry to the baseline; none for the baseline itself and for stages."""
    return {} if part[0].job.stage or part[0] in baseline else differences(part, baseline)


def cells(rows: Sequence[RunRow], baseline: Sequence[RunRow]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table, as text; columns that no run has are left out."""
    present = {name for row in rows for name in row.figures}
    sampled = sorted((n for n in present if n.startswith("sampled_pass_at_")), key=lambda n: int(n.rpartition("_")[2]))
    columns = [
        ("pass_at_1", "greedy", ".3f"),
        *((name, f"pass@{name.rpartition('_')[2]}", ".3f") for name in sampled),
        ("exact_chain", "exact", ".3f"),
        ("mean_length", "length", ".1f"),
        ("kl_teacher", "KL", ".3f"),
        ("student_tokens", "student tokens", ",.0f"),
        ("teacher_tokens", "teacher tokens", ",.0f"),
        ("steps", "steps", ",.0f"),
        ("seconds", "seconds", ",.1f"),
    ]
    columns = [column for column in columns if column[0] in present]
    compared = [column for column in columns if baseline and column[0] in ("pass_at_1", "exact_chain", "mean_length")]
    body = []
    for name, part in groups(rows).items():
        figures = summarise(part)
        good = sum(row.failure is None for row in part)
        runs = str(good) if good == len(part) else f"{good}, {len(part) - good} failed"
        against = _against(part, baseline)
        line = [name, runs, *(cell(figures.get(column), form) for column, _, form in columns)]
        body.append([*line, *(cell(against.get(column), f"+{form}") for column, _, form in compared)])
    titles = [title for _, title, _ in columns] + [f"Δ {title}" for _, title, _ in compared]
    return ["", "runs", *titles], body


def cell(value: Spread | None, form: str) -> str:
    """``0.931 ± 0.012``: mean and half-width in one format; equal values have no half-width."""
    if value is None:
        return "–"
    mean = format(value.mean, form)
    return f"{mean} ± {format(value.half_width, form.removeprefix('+'))}" if value.half_width else mean
