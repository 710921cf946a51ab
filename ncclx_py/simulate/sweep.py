"""Predictions over sizes and numbers of hosts: a table, and a plot with a line per number of hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ncclx_py.plans.plan import Collective
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.predict import predict
from ncclx_py.units import format_size, format_time

Point = dict[str, Any]


def run(
    collective: Collective,
    clusters: Sequence[Cluster],
    sizes: Sequence[int],
    itemsize: int,
    algorithm: str = "",
    progress: Callable[[str], None] | None = None,
) -> list[Point]:
    """One point per cluster and size: hosts, ranks, bytes, algorithm, predicted_s, bound_s, method."""
    points = []
    for cluster in clusters:
        for size in sizes:
            hosts = len(cluster.topology.hosts)
            if progress is not None:
                progress(f"{hosts} hosts, {format_size(size)}")
            found = predict(collective, cluster, size, itemsize, algorithm)
            points.append(
                {
                    "hosts": hosts,
                    "ranks": found.ranks,
                    "bytes": size,
                    "algorithm": found.algorithm,
                    "predicted_s": found.seconds,
                    "bound_s": found.bound.seconds,
                    "method": found.method,
                }
            )
    return points


def table(points: Sequence[Point]) -> str:
    lines = [f"{'hosts':>7} {'ranks':>8} {'size':>10} {'predicted':>11} {'bound':>11}  algorithm"]
    for point in points:
        lines.append(
            f"{point['hosts']:>7} {point['ranks']:>8} {format_size(point['bytes']):>10} {format_time(point['predicted_s']):>11} "
            f"{format_time(point['bound_s']):>11}  {point['algorithm']} ({point['method']})"
        )
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path) -> None:
    """Writes a PNG: time over size, a line per number of hosts, its bound dashed; over hosts where there is one size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    over, lines = ("bytes", "hosts") if len({point["bytes"] for point in points}) > 1 else ("hosts", "bytes")
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for value in dict.fromkeys(point[lines] for point in points):
        chosen = sorted((point for point in points if point[lines] == value), key=lambda point: point[over])
        label = f"{value} hosts" if lines == "hosts" else format_size(value)
        (line,) = axis.plot([p[over] for p in chosen], [p["predicted_s"] for p in chosen], marker="o", label=label)
        bounds = [point["bound_s"] for point in chosen]
        axis.plot([point[over] for point in chosen], bounds, linestyle="--", color=line.get_color(), alpha=0.5)
    axis.set(xscale="log", yscale="log", xlabel=over, ylabel="seconds (dashed: lower bound)")
    axis.grid(visible=True, alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
