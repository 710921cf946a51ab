"""Draws time over size: a panel for each collective, cluster and placement, a line per backend, the lower bound dashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ncclx_py.bench.rows import Row, panel

_PANEL = (6.0, 4.5)  # inches


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG of `rows` to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    collectives = list(dict.fromkeys(row.collective for row in rows))
    panels = list(dict.fromkeys(panel(row) for row in rows))
    extent = (_PANEL[0] * len(collectives), _PANEL[1] * len(panels))
    figure, axes = plt.subplots(len(panels), len(collectives), figsize=extent, squeeze=False, layout="constrained")
    for line, where in zip(axes, panels):
        for axis, collective in zip(line, collectives):
            inside = [row for row in rows if row.collective == collective and panel(row) == where]
            axis.set(title=f"{collective}  {'  '.join(where)}", xlabel="bytes", ylabel="seconds, median")
            _draw(axis, inside)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axis: Any, rows: Sequence[Row]) -> None:
    for backend in dict.fromkeys(row.backend for row in rows):
        axis.plot(
            *zip(*sorted((row.bytes, row.median_s) for row in rows if row.backend == backend)),
            marker="o",
            label=backend,
        )
    bound = sorted({(row.bytes, row.bound_s) for row in rows if row.bound_s})
    if bound:
        axis.plot(*zip(*bound), linestyle="--", color="black", label="lower bound")
    axis.set(xscale="log", yscale="log")
    axis.grid(visible=True, alpha=0.3)
    axis.legend()
