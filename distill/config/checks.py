"""Checks that sections share: each names the key, its value and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import ConfigError

T = TypeVar("T")


def one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{key}={value} is not valid; choose one of: {', '.join(map(str, allowed))}")


def in_range(key: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Raise ConfigError unless ``low <= value <= high`` (a bound of None is open)."""
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{key}={value} is out of range; it must be {bounds}")


def and_above(key: str) -> Iterator[str]:
    """a.b.c → a.b.c, a.b, a."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence that points from a wrong name to the right one."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid names: {', '.join(names)}"


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make dataclass ``cls`` from a mapping; unknown keys and wrong types raise ConfigError naming ``where.key``."""
    check_keys(cls, values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(values)))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None


def check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for the first key of ``values`` that dataclass ``cls`` (or one nested in it) lacks."""
    known = {f.name: f for f in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key '{where}.{key}'; {nearest(key, known)}")
        nested = known[key].default_factory
        if isinstance(value, Mapping) and isinstance(nested, type) and is_dataclass(nested):
            check_keys(nested, value, f"{where}.{key}")
