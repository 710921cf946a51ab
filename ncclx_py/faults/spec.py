"""Faults to inject, as a person writes them: ``kill:rank=3,step=20``. Shared by the launcher and the ranks.

    spec = parse("stop:rank=1,call=7,for=3")
    parse_all("kill:rank=3,step=20;delay:rank=0,seconds=2")     # what NCCLX_INJECT holds

A fault is a kind, who it befalls, and when. ``docs/faults.md`` explains every kind. Pure data: nothing happens here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VARIABLE = "NCCLX_INJECT"  # the faults of a job, for its ranks
FOLDER = "NCCLX_INJECT_DIR"  # where ranks leave a note of each fault that came true

PROCESS = ("kill", "stop", "delay")  # befall a rank wherever it is
CALL = ("wrong-size", "wrong-order", "skip", "nan")  # befall one collective of a rank
LINK = ("drop-link", "halve-rate")  # befall a host's link; only emulated hosts have links that can be broken
KINDS = PROCESS + CALL + LINK

_WHOLE = ("rank", "host", "rail", "step", "call")
_SECONDS = ("seconds", "for")
_TRIGGERS = ("step", "call", "seconds")
_LASTING = ("stop", "delay", *LINK)
_LONGEST = 7 * 86400.0  # seconds

FORMS = (
    "write KIND:rank=R,step=N as in kill:rank=3,step=20. "
    f"Kinds: {', '.join(KINDS)}. When: step=N (training step), call=N (n-th collective of the rank) or seconds=S. "
    "Optional: for=S (how long; stop, delay and links), group=NAME (collectives of that group only). "
    "Links take host=H (and rail=I) in place of rank=R."
)


class InjectError(ValueError):
    """A fault that cannot be: the message names the value and the valid forms."""


@dataclass(frozen=True)
class Fault:
    """One fault. Steps and calls count from 1; `seconds` count from the rank's first group (links: from the job's start).

    `duration` (``for=``) is in seconds, None for ever; `text` is what was written. Exactly one of `step`, `call` and
    `seconds` is set. For links `rank` is the rank whose step or call is waited for.
    """

    kind: str
    text: str
    rank: int | None = None
    step: int | None = None
    call: int | None = None
    seconds: float | None = None
    duration: float | None = None
    group: str = ""
    host: int | None = None
    rail: int | None = None

    def __str__(self) -> str:
        return self.text


def parse(text: str) -> Fault:
    """One fault. Raises InjectError naming what is wrong and how to write it."""
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise _wrong(text, f"{kind!r} is no kind of fault")
    values: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.strip().partition("=")
        if not equals or not value:
            raise _wrong(text, f"{part!r} is not KEY=VALUE")
        if key in values:
            raise _wrong(text, f"{key} is given twice")
        values[key] = value
    return _checked(text, kind, values)


def parse_all(text: str) -> tuple[Fault, ...]:
    """Faults separated by semicolons; empty parts are passed over. Raises InjectError."""
    return tuple(parse(part) for part in text.split(";") if part.strip())


def join(faults: Sequence[Fault]) -> str:
    """The text that `parse_all` reads as `faults`."""
    return ";".join(fault.text for fault in faults)


def check_ranks(faults: Sequence[Fault], ranks: int | None, hosts: int | None = None) -> None:
    """Raises InjectError for a fault of a rank or host that a job of `ranks` ranks (None: not known) does not have.

    `hosts` is None where links cannot be broken.
    """
    for fault in faults:
        if ranks is not None and fault.rank is not None and fault.rank >= ranks:
            raise _wrong(fault.text, f"rank {fault.rank} is not one of this job's, 0 to {ranks - 1}")
        if fault.kind in LINK:
            if hosts is None:
                raise _wrong(fault.text, "only the links of emulated hosts can be broken: use ncclx launch emulate")
            if fault.host is not None and fault.host >= hosts:
                raise _wrong(fault.text, f"host {fault.host} is not one of this job's, 0 to {hosts - 1}")


def check_links(faults: Sequence[Fault], rates: Sequence[float | None]) -> None:
    """Raises InjectError for a fault of a rail that hosts with these rates do not have, or cannot have without a rate."""
    for fault in faults:
        if fault.rail is not None and fault.rail >= len(rates):
            raise _wrong(fault.text, f"rail {fault.rail} is not one of the hosts', 0 to {len(rates) - 1}")
        if fault.kind == "halve-rate" and None in (rates if fault.rail is None else [rates[fault.rail]]):
            raise _wrong(fault.text, "the links have no rate to be halved: give the cluster a --rate")


def _checked(text: str, kind: str, values: Mapping[str, str]) -> Fault:
    allowed = {"rank", *_TRIGGERS, "group"}
    if kind in LINK:
        allowed |= {"host", "rail"}
    if kind in _LASTING:
        allowed.add("for")
    for key in values:
        if key not in allowed:
            raise _wrong(text, f"{kind} takes no {key!r}; it takes {', '.join(sorted(allowed))}")
    whole = {key: _whole(text, key, values[key]) for key in _WHOLE if key in values}
    seconds = {key: _seconds(text, key, values[key]) for key in _SECONDS if key in values}
    triggers = [key for key in _TRIGGERS if key in values]
    if len(triggers) != 1:
        raise _wrong(text, f"give exactly one of {', '.join(_TRIGGERS)}" + (f", not {triggers}" if triggers else ""))
    if kind in LINK:
        if ("host" in whole) == ("rank" in whole):
            raise _wrong(text, "give host=H, or rank=R for the host of that rank")
    elif "rank" not in whole:
        raise _wrong(text, "rank=R is missing")
    if kind == "delay" and "for" not in seconds:
        raise _wrong(text, "a delay needs for=SECONDS")
    for key in ("step", "call"):
        if whole.get(key) == 0:
            raise _wrong(text, f"{key}=0: the first is {key}=1")
    if "group" in values and "call" not in whole and kind not in CALL:
        raise _wrong(text, "group= goes with call=")
    return Fault(
        kind,
        text.strip(),
        whole.get("rank"),
        whole.get("step"),
        whole.get("call"),
        seconds.get("seconds"),
        seconds.get("for"),
        values.get("group", ""),
        whole.get("host"),
        whole.get("rail"),
    )


def _whole(text: str, key: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise _wrong(text, f"{key}={value} is not a whole number from 0")
    return int(value)


def _seconds(text: str, key: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _LONGEST:
        raise _wrong(text, f"{key}={value} is not a number of seconds from 0 to a week")
    return seconds


def _wrong(text: str, reason: str) -> InjectError:
    shown = text if len(text) <= 200 else text[:200] + "…"
    return InjectError(f"The fault {shown!r}: {reason}. To inject one, {FORMS}")
