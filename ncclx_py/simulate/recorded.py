"""What ``accuracy.py`` measured: in memory, in a file, and several measurements as one.

recorded = read([Path("first.json"), Path("second.json")])      # points of both; those that both have, with the runs of both
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ncclx_py.simulate.measured import Hosts, Links, mean_rates, merged, point_from_json
from ncclx_py.simulate.score import Point


@dataclass(frozen=True)
class Recorded:
    """All that was measured: `hosts` by shape, `links` by cluster; `others` is the share of the processors that others took."""

    congestion: str
    others: float
    hosts: dict[str, Hosts] = field(default_factory=dict)
    links: dict[str, Links] = field(default_factory=dict)
    points: tuple[Point, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "congestion_control": self.congestion,
            "others": self.others,
            "hosts": {name: one.to_json() for name, one in self.hosts.items()},
            "links": {name: asdict(one) for name, one in self.links.items()},
            "points": [asdict(point) for point in self.points],
        }


def together(parts: Sequence[Recorded]) -> Recorded:
    """As one: what several of them measured has the runs of all. Raises ValueError where they cannot be compared."""
    if len({part.congestion for part in parts}) > 1:
        raise ValueError("They were measured with different congestion controls.")
    hosts: dict[str, Hosts] = {}
    links: dict[str, list[Links]] = defaultdict(list)
    for part in parts:
        for shape, one in part.hosts.items():
            hosts[shape] = hosts[shape].with_calls_of(one) if shape in hosts else one
        for name, carried in part.links.items():
            links[name].append(carried)
    try:
        rates = {name: mean_rates(several) for name, several in links.items()}
    except KeyError:
        raise ValueError("They were measured with different links.") from None
    points = merged(point for part in parts for point in part.points)
    return Recorded(parts[0].congestion, max(part.others for part in parts), hosts, rates, points)


def read(files: Sequence[Path]) -> Recorded:
    """What files of ``--json`` hold, as one. Raises ValueError where one is none."""
    parts = [_read(path) for path in files]
    try:
        return together(parts)
    except ValueError as error:
        raise ValueError(f"--replay {', '.join(map(str, files))}: {error}") from None


def _read(path: Path) -> Recorded:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(map(point_from_json, found["points"]))
        if not points:
            raise ValueError(f"--replay {path} holds no points: measure again.")
        hosts = {name: Hosts.from_json(one) for name, one in found["hosts"].items()}
        links = {name: Links.from_json(one) for name, one in found["links"].items()}
        if (
            not {point.cluster for point in points} <= links.keys()
            or not {one.hosts for one in links.values()} <= hosts.keys()
        ):
            raise KeyError("links or hosts of a point")
        return Recorded(str(found["congestion_control"]), float(found["others"]), hosts, links, points)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--replay {path} cannot be read: {error}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--replay {path} is not what --json writes (with the probed hosts): {error!r} is missing or wrong. "
            "Measure again."
        ) from error
