"""The two pictures of a comparison, as PNG files.

``accuracy_over_tokens.png``: in-training accuracy over tokens spent (student and teacher, see ``distill.token_counts``), a line per
entry with the 95 % interval over seeds as a band. ``length_over_accuracy.png``: mean response length over accuracy of the final
evaluation, a point per seed and a cross of intervals per entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.compare.results import RunRow, groups, mean_curve
from distill.compare.statistics import spread

CURVES, LENGTHS = "accuracy_over_tokens.png", "length_over_accuracy.png"
_TITLES = {"pass_at_1": "pass@1", "exact_chain": "exact chains"}


def draw(folder: Path, rows: Sequence[RunRow], accuracy: str) -> None:
    """Write both; ``accuracy`` is ``pass_at_1`` or ``exact_chain``. Raises OSError on a full disk."""
    entries = {name: part for name, part in groups(rows).items() if not part[0].job.stage}
    _draw_curves(folder / CURVES, entries, accuracy)
    _draw_lengths(folder / LENGTHS, entries, accuracy)


def _draw_curves(path: Path, entries: dict[str, list[RunRow]], accuracy: str) -> None:
    figure, axis = _figure()
    for number, (name, part) in enumerate(entries.items()):
        points = mean_curve(part, f"eval/{accuracy}")
        if points:
            style = _style(number)
            tokens, means = [x for x, _ in points], [y.mean for _, y in points]
            widths = [y.half_width or 0.0 for _, y in points]
            axis.plot(tokens, means, label=name, linewidth=1.5, **style)
            low = [max(mean - width, 0.0) for mean, width in zip(means, widths, strict=True)]
            high = [min(mean + width, 1.0) for mean, width in zip(means, widths, strict=True)]
            axis.fill_between(tokens, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.set(
        xlabel="tokens: student generated + teacher read + teacher generated", ylabel=f"held-out {_TITLES[accuracy]}"
    )
    axis.set_ylim(0, 1.02)
    _save(figure, axis, path)


def _draw_lengths(path: Path, entries: dict[str, list[RunRow]], accuracy: str) -> None:
    figure, axis = _figure()
    for number, (name, part) in enumerate(entries.items()):
        done = [row for row in part if accuracy in row.figures]
        if done:
            color, marker = _style(number)["color"], _MARKERS[number % len(_MARKERS)]
            xs, ys = [row.figures[accuracy] for row in done], [row.figures["mean_length"] for row in done]
            axis.scatter(xs, ys, s=8, color=color, alpha=0.5)
            x, y = spread(xs), spread(ys)
            axis.errorbar(x.mean, y.mean, xerr=x.half_width, yerr=y.half_width, color=color, marker=marker, label=name)
    axis.set(xlabel=f"{_TITLES[accuracy]}, greedy", ylabel="mean response length (tokens)")
    _save(figure, axis, path)


_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")


def _style(number: int) -> dict[str, Any]:
    """Ten colours, then the same with another line."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, axis: Any, path: Path) -> None:
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small", ncols=2)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
