"""Ranks × collectives as a picture: a row per rank, a column per call of the busiest or the stuck group.

Colours say how a call stands on a rank: done (shaded by how long it waited), running, scheduled, failed, or not called. The
ranks that the verdict names are marked, and so is the collective.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ncclx_py.watch.grid import ABSENT, Grid
from ncclx_py.watch.model import COMPLETED, FAILED, SCHEDULED, STARTED, Group, Job
from ncclx_py.watch.verdict import Verdict

_COLUMNS = 60  # the latest calls that are shown
_ROWS = 256  # ranks that are shown: those of the verdict, and others evenly
_NOT_CALLED, _NO_DUMP, _RUNNING, _WAITING, _FAILED = 5, 6, 7, 8, 9
_COLOURS = (
    "#dcefe0",
    "#b5dfc0",
    "#8accA0",
    "#57b67c",
    "#2f8f58",
    "#ffffff",
    "#d9d9d9",
    "#f2b134",
    "#f7dfa6",
    "#cf3f3f",
)
_MEANING = {
    0: "done, waited briefly",
    4: "done, waited long",
    _RUNNING: "running",
    _WAITING: "scheduled",
    _FAILED: "failed",
    _NOT_CALLED: "not called",
    _NO_DUMP: "no dump",
}


def draw(job: Job, verdict: Verdict, path: Path) -> None:
    """Writes a PNG to `path`. Raises ValueError when no rank has a collective in its dump."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = _chosen(job, verdict)
    if grid is None:
        raise ValueError("There is no collective in the dumps to draw.")
    ranks = _shown(grid.group, verdict.ranks)
    cells = _cells(job, grid, ranks)
    first = grid.first + grid.agreed.shape[1] - cells.shape[1]
    figure, axis = plt.subplots(
        figsize=(max(8.0, 2.5 + 0.2 * cells.shape[1]), 2.4 + min(14.0, 0.24 * len(ranks))), layout="constrained"
    )
    palette = matplotlib.colors.ListedColormap(_COLOURS)
    axis.pcolormesh(cells, cmap=palette, vmin=-0.5, vmax=len(_COLOURS) - 0.5, edgecolors="#ffffff", linewidth=0.4)
    axis.invert_yaxis()
    _label(axis, job, grid, ranks, first, verdict)
    used = set(np.unique(cells).tolist())
    handles = [
        matplotlib.patches.Patch(facecolor=_COLOURS[code], edgecolor="#888888", label=name)
        for code, name in _MEANING.items()
        if code in used or (code in (0, 4) and used & set(range(5)))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(_wrapped(f"{verdict.word}: {verdict.summary}", cells.shape[1]), fontsize=10, x=0.01, ha="left")
    temporary = path.with_name(f".{path.name}.tmp.png")
    try:
        figure.savefig(temporary, dpi=130)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def _chosen(job: Job, verdict: Verdict) -> Grid | None:
    """The group of the verdict, else the one with the most ranks and calls."""
    if verdict.place is not None and verdict.place.group in job.groups:
        grid = Grid.of(job, verdict.place.group, _COLUMNS)
        if grid is not None:
            return grid
    grids = [grid for group in job.groups if (grid := Grid.of(job, group, _COLUMNS)) is not None]
    return max(grids, key=lambda grid: (len(grid.ranks), (grid.state != ABSENT).sum()), default=None)


def _shown(group: Group, named: list[int]) -> list[int]:
    if len(group.ranks) <= _ROWS:
        return list(group.ranks)
    keep = {rank for rank in named[: _ROWS // 2] if rank in group.ranks}
    spaced = np.linspace(0, len(group.ranks) - 1, _ROWS - len(keep)).astype(int)
    return sorted(keep | {group.ranks[place] for place in spaced.tolist()})


def _cells(job: Job, grid: Grid, ranks: list[int]) -> np.ndarray:
    """A colour for each rank and call."""
    lines = {rank: line for line, rank in enumerate(grid.ranks)}
    cells = np.full((len(ranks), grid.agreed.shape[1]), _NOT_CALLED)
    shades = _shades(grid)
    for row, rank in enumerate(ranks):
        line = lines.get(rank)
        if line is None:
            cells[row] = _NO_DUMP
            continue
        states = grid.state[line]
        cells[row] = np.where(states == COMPLETED, shades[line], cells[row])
        for state, colour in ((STARTED, _RUNNING), (SCHEDULED, _WAITING), (FAILED, _FAILED)):
            cells[row][states == state] = colour
    return cells


def _shades(grid: Grid) -> np.ndarray:
    """0 to 4 by how long a rank waited in a call; the longest waits of the picture are darkest."""
    done = grid.state == COMPLETED
    waited = np.where(done, np.maximum(0, grid.finished - grid.scheduled), 0).astype(float)
    longest = float(np.percentile(waited[done], 95)) if done.any() else 0.0
    shades: np.ndarray = np.clip((waited * 5 / (longest or 1.0)).astype(int), 0, 4)
    return shades


def _label(axis: Any, job: Job, grid: Grid, ranks: list[int], first: int, verdict: Verdict) -> None:
    step = max(1, len(ranks) // 48)
    rows = [row for row in range(len(ranks)) if row % step == 0 or ranks[row] in verdict.ranks[:48]]
    names = [
        f"{'► ' if ranks[row] in verdict.ranks else ''}{job.host(ranks[row])} {ranks[row]}".strip() for row in rows
    ]
    axis.set_yticks([row + 0.5 for row in rows], names, fontsize=8)
    for label, row in zip(axis.get_yticklabels(), rows):
        if ranks[row] in verdict.ranks:
            label.set(color="#cf3f3f", fontweight="bold")
    columns = grid.agreed.shape[1]
    every = max(1, columns // 20)
    ticks = [at for at in range(columns) if (first + at) % every == 0]
    axis.set_xticks([at + 0.5 for at in ticks], [str(first + at) for at in ticks], fontsize=8)
    axis.set_xlabel(f"collective of {grid.group}", fontsize=9)
    axis.set_ylabel("host, rank", fontsize=9)
    if verdict.place is not None and verdict.place.group == grid.group:
        at = verdict.place.seq - first
        if 0 <= at < columns:
            axis.axvline(at, color="#cf3f3f", linewidth=1)
            axis.axvline(at + 1, color="#cf3f3f", linewidth=1)
            axis.set_title(verdict.collective, fontsize=8, color="#cf3f3f", loc="right")


def _wrapped(text: str, columns: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, max(80, int(columns * 2.2))))
