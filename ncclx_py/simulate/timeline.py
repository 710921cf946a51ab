"""A picture of what was played: a row for each of some ranks, a bar for each step, coloured by what it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ncclx_py.simulate.events import Player
from ncclx_py.simulate.predict import Prediction
from ncclx_py.simulate.schedule import LOCAL, RECEIVE, SEND

_MOST_ROWS, _MOST_BARS = 32, 20_000
_COLOURS = {
    "send to another host": "tab:red",
    "send inside the host": "tab:orange",
    "receive from another host": "tab:blue",
    "receive inside the host": "tab:cyan",
    "copy or reduce": "tab:green",
}


def draw(prediction: Prediction, path: Path) -> None:
    """Writes a PNG. Raises ValueError where nothing was played."""
    if prediction.outcome is None:
        raise ValueError("There is no timeline of a closed form: choose a smaller cluster, or another algorithm.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    outcome = prediction.outcome
    player = outcome.player
    ranks = _rows(player)
    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.28 * len(ranks)), layout="constrained")
    drawn: set[str] = set()
    for row, rank in enumerate(ranks):
        steps = np.flatnonzero(player.rank_of == rank)[: _MOST_BARS // len(ranks)]
        for name, chosen in _kinds(player, steps).items():
            bars = [(outcome.started[step], outcome.ended[step] - outcome.started[step]) for step in chosen]
            if bars:
                height = {"send": 0.0, "receive": 0.3, "copy": 0.6}[name.split()[0]]
                label = None if name in drawn else name
                axis.broken_barh(bars, (row + 0.05 + height, 0.3), facecolors=_COLOURS[name], alpha=0.6, label=label)
                drawn.add(name)
    axis.axvline(prediction.bound.seconds, color="black", linestyle="--", label="lower bound")
    axis.set(
        yticks=[row + 0.5 for row in range(len(ranks))],
        yticklabels=[f"rank {rank}" for rank in ranks],
        xlabel="seconds",
        title=f"{prediction.collective} by {prediction.algorithm}, {prediction.ranks} ranks ({prediction.method})",
    )
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rows(player: Player) -> list[int]:
    ranks = player.schedule.ranks
    if ranks <= _MOST_ROWS:
        return list(range(ranks))
    return [int(rank) for rank in np.linspace(0, ranks - 1, _MOST_ROWS)]


def _kinds(player: Player, steps: np.ndarray) -> dict[str, np.ndarray]:
    kinds = player.kind[player.row[steps]]
    local = np.ones(len(steps), np.bool_)
    messages = kinds != LOCAL
    local[messages] = player.links.is_local(steps[messages])
    return {
        "send to another host": steps[(kinds == SEND) & ~local],
        "send inside the host": steps[(kinds == SEND) & local],
        "receive from another host": steps[(kinds == RECEIVE) & ~local],
        "receive inside the host": steps[(kinds == RECEIVE) & local],
        "copy or reduce": steps[kinds == LOCAL],
    }
