"""Distillation methods, one file each; ``build_method`` makes the one that the configuration names.

To add one: a file here with the paper's formula in its docstring, a YAML in ``conf/method/``, a line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.config import build, nearest
from distill.errors import ConfigError
from distill.methods.ace import Ace
from distill.methods.akl import Akl
from distill.methods.base import DivergenceSpec, Method, Source, Targets, TokenLosses
from distill.methods.essence import Essence
from distill.methods.gkd import Gkd
from distill.methods.gopd import Gopd
from distill.methods.grpo import Grpo
from distill.methods.hpd import Hpd
from distill.methods.motab import Motab
from distill.methods.off_policy import OffPolicy
from distill.methods.on_policy import OnPolicy
from distill.methods.opsdc import Opsdc
from distill.methods.paced import Paced
from distill.methods.seqkd import SeqKd
from distill.methods.sft import Sft
from distill.methods.skd import Skd

__all__ = ["METHODS", "DivergenceSpec", "Method", "Source", "Targets", "TokenLosses", "build_method"]

METHODS: dict[str, type[Method]] = {
    "sft": Sft,
    "seqkd": SeqKd,
    "off_policy": OffPolicy,
    "akl": Akl,
    "on_policy": OnPolicy,
    "gkd": Gkd,
    "hpd": Hpd,
    "gopd": Gopd,
    "paced": Paced,
    "essence": Essence,
    "opsdc": Opsdc,
    "grpo": Grpo,
    "ace": Ace,
    "motab": Motab,
    "skd": Skd,
}


def build_method(values: Mapping[str, Any]) -> Method:
    """The method named by ``values["name"]`` with the rest as its options. Raises ConfigError for a wrong key or value."""
    name = str(values.get("name"))
    if name not in METHODS:
        raise ConfigError(f"method.name={name} is not a method; {nearest(name, METHODS)}")
    cls = METHODS[name]
    return cls(build(cls.Config, values, "method"))  # type: ignore[call-arg]
