"""What this process knows of its collectives: the last calls of all its groups, the groups, and why one was aborted.

    TRACE.join(group)             # a group is being made
    TRACE.scheduled(call, tensors)   # the runtime, at every call
    TRACE.step = 7                # the trainer
    TRACE.calls()

It is always on, and costs about a microsecond per call: shapes and the place in the caller's code are noted as they are and
become text only in a dump (``record``). The rest of a call's story is noted in the `Call` itself as it happens.
``NCCLX_TRACE_RECORDS`` is the number of calls that are kept (2000 where unset, 0: nothing is recorded).
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

import ncclx_py
from ncclx_py.errors import Call, CollectiveTimeout
from ncclx_py.watch.ring import Ring

RECORDS = 2000
_PACKAGES = tuple(
    str(Path(str(package.__file__)).parent) + os.sep for package in (torch, ncclx_py)
)  # whose frames are not the caller's
_PARTS = (f"{os.sep}deepspeed{os.sep}", "typing_extensions.py", f"{os.sep}contextlib.py", "<frozen ")
_GROUPS = 1024  # remembered; the oldest goes


class GroupFacts:
    """A group as a dump shows it: global ranks, description, why it was aborted ("" while it was not).

    `group` is the living group, while it lives.
    """

    def __init__(self, name: str, ranks: tuple[int, ...], group: Any) -> None:
        self.name, self.ranks = name, ranks
        self.desc = "undefined"
        self.reason = ""
        self.group: weakref.ReferenceType[Any] = weakref.ref(group)


class Trace:
    """See the module. `rank` and `world_size` are those of the program, known from its first group on."""

    def __init__(self, records: int) -> None:
        self.ring = Ring(records) if records else None
        self.rank, self.world_size = 0, 1
        self.groups: dict[str, GroupFacts] = {}
        self.step: int | None = None
        self._internal: dict[str, bool] = {}

    def join(self, name: str, rank: int, ranks: tuple[int, ...], world: bool, group: Any) -> GroupFacts:
        """A group of global `ranks` is being made, of which this is number `rank`."""
        if self.ring is not None and name in self.groups:
            self.ring.forget(name)
        self.rank = ranks[rank]
        if world or not self.groups:
            self.world_size = max(len(ranks), max(ranks) + 1)
        facts = self.groups[name] = GroupFacts(name, ranks, group)
        if len(self.groups) > _GROUPS:
            del self.groups[next(iter(self.groups))]
        return facts

    def scheduled(self, call: Call, inputs: Any, outputs: Any = None) -> None:
        """A call is about to be started. `inputs` and `outputs` are a tensor, a list of tensors, or nothing; without
        `outputs` the inputs are overwritten."""
        ring = self.ring
        if ring is None:
            return
        call.scheduled_ns = time.time_ns()
        if isinstance(inputs, Tensor):
            call.inputs, call.dtype = inputs.shape, inputs.dtype
        elif isinstance(inputs, list) and inputs:
            call.inputs, call.dtype = [tensor.shape for tensor in inputs], inputs[0].dtype
        if outputs is None:
            call.outputs = call.inputs
        elif isinstance(outputs, Tensor):
            call.outputs = outputs.shape
            call.dtype = outputs.dtype
        else:
            call.outputs = [tensor.shape for tensor in outputs]
        call.code, call.instruction = self._caller()
        ring.add(call)

    def _caller(self) -> tuple[CodeType, int]:
        """The code outside torch, DeepSpeed and this package that made the call, and the instruction in it; the outermost
        where there is none (a thread of autograd's)."""
        internal, frame = self._internal, sys._getframe(3)
        while True:
            name = frame.f_code.co_filename
            ours = internal.get(name)
            if ours is None:
                ours = internal[name] = name.startswith(_PACKAGES) or any(part in name for part in _PARTS)
            back = frame.f_back
            if not ours or back is None:
                return frame.f_code, frame.f_lasti
            frame = back

    def calls(self) -> list[Call]:
        return self.ring.calls() if self.ring is not None else []


def cause_of(error: BaseException) -> str:
    """Why a dump is written that `error` leads to: "timeout", "peer" or "error"."""
    if isinstance(error, CollectiveTimeout):
        return "timeout"
    text = str(error)
    return "peer" if "aborted by rank" in text or " is gone" in text or "A peer exited" in text else "error"


def records_wanted(env: Mapping[str, str]) -> int:
    """``NCCLX_TRACE_RECORDS``. Raises ValueError where it is no number of records."""
    text = env.get("NCCLX_TRACE_RECORDS", "")
    if not text:
        return RECORDS
    if not text.isdecimal():
        raise ValueError(f"NCCLX_TRACE_RECORDS={text!r} is no number of records: write 0 (off) or more, as in 2000.")
    return int(text)


TRACE = Trace(records_wanted(os.environ))
