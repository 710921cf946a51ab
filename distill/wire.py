"""Plain values as bytes and back, for what ranks and replicas tell each other.

JSON, and never pickle, which runs what it is sent:

    @travels
    @dataclass
    class Fact: ...

    decode(encode((Fact(3), None, {1: 0.5}))) == (Fact(3), None, {1: 0.5})      # equal, and of the same types

None, truth values, integers, floats (to the bit, NaN and infinity too), strings, bytes, paths, lists, tuples, sets and dicts
travel, and enumerations and dataclasses that are marked with `travels`. Bytes can only become values of these: a class without
the mark is an error, whoever asks for it.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

_PLAIN = (type(None), bool, int, float, str)
_MARKED: dict[str, type] = {}  # by name
# What is neither plain nor a list is an object with one key, which says how to read its value.
_READERS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda items: tuple(map(_value, items)),
    "set": lambda items: set(map(_value, items)),
    "dict": lambda pairs: {_value(key): _value(value) for key, value in pairs},
    "bytes": lambda text: b64decode(text, validate=True),
    "path": Path,
}


class WireError(ValueError):
    """Bytes that are no value, or a value that cannot travel."""


def travels(kind: C) -> C:
    """Mark a dataclass or an enumeration: its values may be sent, and made from what is received."""
    assert is_dataclass(kind) or issubclass(kind, Enum), kind
    name = f"{kind.__module__}.{kind.__qualname__}"
    _MARKED[name] = kind
    return kind


def encode(value: Any) -> bytes:
    """Raises WireError for a value that cannot travel."""
    return json.dumps(_json(value), separators=(",", ":"), check_circular=False).encode()


def decode(data: bytes) -> Any:
    """What was encoded. Raises WireError."""
    try:
        return _value(json.loads(data))
    except WireError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WireError(f"{len(data)} bytes are no value: {type(error).__name__}: {str(error)[:200]}") from None


def _json(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_json(item) for item in value]
    if kind in (tuple, set):
        return {kind.__name__: [_json(item) for item in value]}
    if kind is dict:
        return {"dict": [[_json(key), _json(item)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": b64encode(value).decode()}
    if isinstance(value, Path):
        return {"path": str(value)}
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _MARKED.get(name) is not kind:
        raise WireError(
            f"a value of {name} cannot travel between ranks: {str(value)[:100]}; mark its class with @travels"
        )
    if isinstance(value, Enum):
        return {name: _json(value.value)}
    return {name: [_json(getattr(value, field.name)) for field in fields(kind)]}


def _value(found: Any) -> Any:
    if isinstance(found, list):
        return [_value(item) for item in found]
    if not isinstance(found, dict):
        return found
    if len(found) != 1:
        raise WireError(f"an object of {len(found)} keys stands for no value")
    ((name, content),) = found.items()
    if name in _READERS:
        return _READERS[name](content)
    kind: Any = _MARKED.get(name)
    if kind is None:
        raise WireError(f"values of {name[:100]!r} are not taken from others")
    if issubclass(kind, Enum):
        return kind(_value(content))
    names = [field.name for field in fields(kind)]
    if len(content) != len(names):
        raise WireError(f"{name} has {len(names)} fields, and {len(content)} were sent")
    return kind(**dict(zip(names, map(_value, content), strict=True)))
