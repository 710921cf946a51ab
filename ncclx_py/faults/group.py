"""A process group whose collectives the injector may break, before anything else sees them.

What the caller asked for is changed where the caller would have got it wrong: a collective that is skipped is never
asked for, a wrong size is that of the caller's tensor. So the trace and the verdict see what they would see of a real defect.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ncclx_py.errors import Call
from ncclx_py.faults.inject import Injector
from ncclx_py.faults.spec import Fault
from ncclx_py.runtime.basis import Membership
from ncclx_py.runtime.process_group import NcclxProcessGroup
from ncclx_py.runtime.progress import Job
from ncclx_py.runtime.work import CollectiveWork

Run = Callable[..., Any]

# c10d's names of the collectives; those in the second group take (outputs, inputs).
_IN_PLACE = ("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "monitored_barrier")
_OUT_OF_PLACE = (
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "allgather",
    "allgather_coalesced",
    "all_gather_single",
    "all_gather_single_coalesced",
    "_allgather_base",
    "allgather_into_tensor_coalesced",
    "all_to_all_single",
    "alltoall_base",
    "alltoall",
    "gather",
    "scatter",
)


class InjectedGroup(NcclxProcessGroup):
    """`NcclxProcessGroup` with an injector before its collectives; see `make`."""

    injector: Injector
    is_world: bool
    _inside = threading.local()  # one collective may be made of others, which do not count

    def intercepted(self, name: str, original: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one collective, or what has become of it."""
        if getattr(self._inside, "yes", False):
            return original(self, *args, **kwargs)
        self._inside.yes = True
        try:
            return self._one(name, partial(original, self), args, kwargs)
        finally:
            self._inside.yes = False

    def _one(self, name: str, original: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [self.getGroupName(), self.getGroupDesc(), *(["world"] if self.is_world else [])]
        self.injector.before_call(names)
        kind = self.injector.of_call(names, lambda fault: self._suits(fault, name, args))
        if kind == "skip":
            return self._finished(name, args)
        if kind == "wrong-order":
            self.injector.held = partial(original, *args, **kwargs)
            return self._finished(name, args)
        if kind == "wrong-size":
            args = tuple(_doubled(value) for value in args)
        elif kind == "nan":
            for tensor in self._inputs(name, args):
                tensor.view(-1)[0] = float("nan")
        held, self.injector.held = self.injector.held, None
        work = original(*args, **kwargs)
        if held is not None:
            if work is not None and not any(getattr(value, "asyncOp", False) for value in args):
                work.wait()  # the program would not get to its next collective before
            held()
        return work

    def _suits(self, fault: Fault, name: str, args: tuple[Any, ...]) -> bool:
        """Whether a collective with these arguments can have this fault."""
        if fault.kind == "wrong-size":
            return bool(_tensors(args[0] if args else None))
        if fault.kind == "nan":
            return bool(self._inputs(name, args))
        return fault.kind == "skip" or self.injector.held is None

    def _inputs(self, name: str, args: tuple[Any, ...]) -> list[Tensor]:
        """What this rank gives to a collective, where it can hold a NaN."""
        if name == "broadcast" and len(args) > 1 and args[1].rootRank != self.rank():
            return []
        place = 1 if name in _OUT_OF_PLACE else 0
        found = _tensors(args[place]) if len(args) > place else []
        return [tensor for tensor in found if tensor.is_floating_point() and tensor.is_contiguous() and tensor.numel()]

    def _finished(self, name: str, args: tuple[Any, ...]) -> CollectiveWork:
        """The handle of a collective that this rank does not make: done, and the tensors are as they were."""
        job = Job(lambda _: None)
        job.work()
        job.let_go()
        call = Call(name, self.getGroupName(), self.rank(), self.size(), 0)
        return CollectiveWork(call, [job], _tensors(args[0]) if args else [])


def make(injector: Injector, store: Any, member: Membership, timeout: timedelta, options: Any) -> InjectedGroup:
    """A group of a rank that `injector` has faults for; the arguments are those of `NcclxProcessGroup`."""
    injector.begin()
    group = InjectedGroup(store, member, timeout, options)
    group.injector, group.is_world = injector, member.world
    return group


def _intercepting(name: str) -> Run:
    original = getattr(NcclxProcessGroup, name)

    def method(self: InjectedGroup, *args: Any, **kwargs: Any) -> Any:
        return self.intercepted(name, original, args, kwargs)

    method.__name__ = name
    return method


for _name in (*_IN_PLACE, *_OUT_OF_PLACE):
    setattr(InjectedGroup, _name, _intercepting(_name))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument: a tensor, a list of them, or a list of lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _doubled(value: Any) -> Any:
    """A tensor twice as long, also in lists; and numbers of rows to fit."""
    if isinstance(value, Tensor):
        flat = value.reshape(1) if value.dim() == 0 else value
        return torch.cat([flat, flat])
    if isinstance(value, list | tuple):
        return [2 * part if isinstance(part, int) else _doubled(part) for part in value]
    return value
