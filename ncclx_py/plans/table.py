"""Measured times of algorithms, which correct the model's: JSON, written by ``ncclx tune``.

    {"format": 1, "rows": [{"collective": "all_reduce", "bytes": 1048576, "topology": "hosts 4+4, rails 1",
                            "algorithm": "pipelined", "parameters": {"chunks": 4}, "median_s": 0.043, "correct": true}]}

`Corrections` holds what a table says about one topology: the ratio of measured to modelled time at each size, interpolated over
the logarithm of the size and held at the ends; rows for other topologies say nothing. An algorithm with a row that is not
correct is never chosen.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ncclx_py.plans.algorithms.registry import ALGORITHMS
from ncclx_py.plans.cost import estimate
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.topology import Topology
from ncclx_py.units import format_size

FORMAT = 1
_ITEMSIZE = 4  # of the elements that the model is asked about: only bytes matter


@dataclass(frozen=True)
class Row:
    """One measurement; `topology` is a `signature`, `median_s` seconds."""

    collective: str
    bytes: int
    topology: str
    algorithm: str
    parameters: Mapping[str, int]
    median_s: float
    correct: bool


@dataclass(frozen=True)
class Table:
    """The rows of a file."""

    rows: tuple[Row, ...]
    path: str = ""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n"


def signature(topology: Topology) -> str:
    """What must be equal for a measurement to count: the sizes of the hosts and the rails."""
    return f"hosts {'+'.join(str(len(members)) for members in topology.hosts)}, rails {topology.rails}"


def read_table(path: str | Path) -> Table:
    """The table in a file. Raises ValueError naming the file, the row and what is wrong with it."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The table {path} cannot be read: {error}.") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # no JSON, a number of thousands of digits, brackets nested too deeply
        raise ValueError(f"The table {path} is not JSON: {error}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("rows"), list):
        raise ValueError(
            f'The table {path} must be an object with "format": {FORMAT} and "rows"; make it with ncclx tune.'
        )
    return Table(tuple(_row(path, index, row) for index, row in enumerate(data["rows"])), str(path))


def _row(path: str | Path, index: int, row: Any) -> Row:
    def fail(what: str) -> ValueError:
        return ValueError(f"The table {path}: row {index}: {what}.")

    kinds: dict[str, Any] = {"collective": str, "bytes": int, "topology": str, "algorithm": str, "parameters": dict}
    kinds |= {"median_s": (int, float), "correct": bool}
    if not isinstance(row, dict) or set(row) != set(kinds):
        raise fail(f"it must have exactly the keys {', '.join(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(row[key], kind) or (isinstance(row[key], bool) and kind is not bool):
            raise fail(f"{key} = {row[key]!r} has the wrong type")
    if row["algorithm"] not in ALGORITHMS.get(row["collective"], {}):
        raise fail(f"there is no algorithm {row['algorithm']!r} for {row['collective']!r}")
    known = ALGORITHMS[row["collective"]][row["algorithm"]].parameters
    for name, value in row["parameters"].items():
        if name not in known or not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise fail(f"parameter {name} = {value!r}; it has {', '.join(known) or 'none'}, whole numbers from 1")
    if row["bytes"] < 1 or not 0 < row["median_s"] < math.inf:
        raise fail(f"bytes = {row['bytes']} and median_s = {row['median_s']} must be above zero and finite")
    return Row(**row)


@dataclass
class _Curve:
    """Ratios of measured to modelled time by size."""

    points: list[tuple[float, float]] = field(default_factory=list)  # log size, log ratio

    def at(self, size: float) -> float:
        place = math.log(max(size, 1))
        index = bisect_left(self.points, (place, -math.inf))
        if index == 0 or index == len(self.points):
            return math.exp(self.points[min(index, len(self.points) - 1)][1])
        (left, low), (right, high) = self.points[index - 1], self.points[index]
        return math.exp(low + (high - low) * (place - left) / (right - left))


class Corrections:
    """What a table says about one topology."""

    def __init__(self, table: Table, topology: Topology) -> None:
        self.path = table.path
        self._wrong: dict[tuple[str, str], int] = {}
        ratios: dict[tuple[str, str, str], dict[int, list[float]]] = {}
        for row in table.rows:
            if row.topology != signature(topology):
                continue
            if not row.correct:
                self._wrong[row.collective, row.algorithm] = row.bytes
                continue
            problem = uniform(row.collective, topology.size, row.bytes, _ITEMSIZE)  # type: ignore[arg-type]
            values = {**ALGORITHMS[row.collective][row.algorithm].parameters, **row.parameters}
            modelled = estimate(problem, topology, _ITEMSIZE, row.algorithm, values)
            if modelled > 0:
                for variant in (_name(values), ""):
                    known = ratios.setdefault((row.collective, row.algorithm, variant), {})
                    known.setdefault(row.bytes, []).append(math.log(row.median_s / modelled))
        self._curves = {
            key: _Curve(sorted((math.log(size), _mean(logs)) for size, logs in known.items()))
            for key, known in ratios.items()
        }
        self._ranges: dict[tuple[str, str], tuple[int, int]] = {}  # of an algorithm, and under "" of the collective
        for (collective, algorithm, _), known in ratios.items():
            for name in (algorithm, ""):
                low, high = self._ranges.get((collective, name), (min(known), max(known)))
                self._ranges[collective, name] = (min(low, *known), max(high, *known))

    def ratio(self, collective: str, algorithm: str, parameters: Mapping[str, int], size: int) -> float | None:
        """Measured over modelled time at `size` bytes; from other parameters where these were not measured, None
        where the algorithm was not.
        """
        curve = self._curves.get((collective, algorithm, _name(parameters)))
        curve = curve or self._curves.get((collective, algorithm, ""))
        return curve.at(size) if curve else None

    def unmeasured(self, collective: str, algorithm: str, size: int) -> str:
        """Why an algorithm cannot be compared at `size` bytes with what was measured, or "".

        Beyond the smallest and the largest size of the table a ratio is held, but not where others were measured and
        this algorithm was not.
        """
        if (collective, "") not in self._ranges:
            return ""
        if (collective, algorithm) not in self._ranges:
            return "not measured, though others are"
        (low, high), (least, most) = self._ranges[collective, algorithm], self._ranges[collective, ""]
        if (size < low and low > least) or (size > high and high < most):
            return f"measured only from {format_size(low)} to {format_size(high)}"
        return ""

    def covers(self, collective: str) -> bool:
        """Whether the table has rows for the collective."""
        return (collective, "") in self._ranges

    def wrong(self, collective: str, algorithm: str) -> str:
        """Why the algorithm must not be chosen, or ""."""
        size = self._wrong.get((collective, algorithm))
        return f"gave wrong results at {format_size(size)} ({self.path})" if size else ""


def _name(parameters: Mapping[str, int]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(parameters.items())) or "-"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
