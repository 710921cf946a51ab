"""Distillation methods, one file each; ``build_method`` makes the one that the configuration names.

To add one: a file here with the paper's formula in its docstring, a YAML in ``conf/method/``, a line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.config import build, nearest
from distill.errors import ConfigError
from distill.methods.base import DivergenceSpec, Method, Source, Targets, TokenLosses
from distill.methods.gkd import Gkd
from distill.methods.off_policy import OffPolicy
from distill.methods.on_policy import OnPolicy
from distill.methods.sft import Sft

__all__ = ["METHODS", "DivergenceSpec", "Method", "Source", "Targets", "TokenLosses", "build_method"]

METHODS: dict[str, type[Method]] = {"sft": Sft, "off_policy": OffPolicy, "on_policy": OnPolicy, "gkd": Gkd}


def build_method(values: Mapping[str, Any]) -> Method:
    """The method named by ``values["name"]`` with the rest as its options. Raises ConfigError for a wrong key or value."""
    name = str(values.get("name"))
    if name not in METHODS:
        raise ConfigError(f"method.name={name} is not a method; {nearest(name, METHODS)}")
    cls = METHODS[name]
    return cls(build(cls.Config, values, "method"))  # type: ignore[call-arg]
