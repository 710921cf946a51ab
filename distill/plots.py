"""The picture of a run: loss and accuracy over steps, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw ``train/loss`` (left axis) and ``eval/pass_at_1`` (right axis, where measured) into ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    steps = [row["step"] for row in rows if "train/loss" in row]
    axis.plot(steps, [row["train/loss"] for row in rows if "train/loss" in row], color="tab:blue", linewidth=1)
    axis.set(xlabel="optimizer step", ylabel="loss per token", title=title)
    axis.yaxis.label.set_color("tab:blue")
    points = [(row["step"], row["eval/pass_at_1"]) for row in rows if "eval/pass_at_1" in row]
    if points:
        right = axis.twinx()
        right.plot(*zip(*points, strict=True), color="tab:orange", marker="o", markersize=3)
        right.set(ylabel="pass@1 on held-out problems", ylim=(0, 1.02))
        right.yaxis.label.set_color("tab:orange")
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
