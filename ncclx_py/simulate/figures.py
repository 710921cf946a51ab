"""A figure that a model rests on, with where it comes from: so that a prediction can be doubted at the right place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

MEASURED, PUBLISHED, FITTED, ASSUMED = "measured", "published", "fitted", "assumed"


@dataclass(frozen=True)
class Figure:
    """`source` is one of the words above; `why` says by which command, where, or on what ground."""

    value: float
    unit: str
    source: str
    why: str

    def __float__(self) -> float:
        return self.value


def named(figures: Any) -> dict[str, Figure]:
    """The figures of a dataclass by name."""
    found = {field.name: getattr(figures, field.name) for field in fields(figures)}
    return {name: value for name, value in found.items() if isinstance(value, Figure)}


def table(figures: dict[str, Figure]) -> list[str]:
    return [
        f"  {name:<20} {figure.value:>10.4g} {figure.unit:<18} {figure.source:<9}  {figure.why}"
        for name, figure in figures.items()
    ]
