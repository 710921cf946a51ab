"""Agreement inside one job of several replicas: what may fail is asked first, then all ranks return or all raise the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from distill.distributed import from_rank_0, gathered, rank
from distill.errors import DistillError
from ncclx_py.elastic.errors import Dropped, ElasticError, EpochChanged, RunFinished
from ncclx_py.elastic.member import StillWaiting
from ncclx_py.elastic.states import Gone

T = TypeVar("T")
FATES = (EpochChanged, Dropped, RunFinished, Gone)


class ReplicaError(DistillError):
    """The replicas cannot go on together: no store, no connection, settings that differ."""

    on_every_rank = True
    exit_status = 1


_RAISED = {"error": ReplicaError, **{fate.__name__: fate for fate in FATES}}


def together(ask: Callable[[], T]) -> T:
    """Rank 0 asks, all ranks get the answer or raise what it raised: one of FATES, or ReplicaError for an ElasticError."""
    while True:
        answer: tuple[str, Any] = ("", None)
        if rank() == 0:
            try:
                answer = ("value", ask())
            except StillWaiting:
                answer = ("waiting", None)  # the other ranks must not wait in one collective for ever
            except FATES as fate:
                answer = (type(fate).__name__, str(fate))
            except ElasticError as error:
                answer = ("error", str(error))
        kind, value = from_rank_0(answer)
        if kind == "value":
            return value
        if kind != "waiting":
            raise _RAISED[kind](value)


def agreed(ask: Callable[[], T]) -> T:
    """Every rank asks for itself; all go on, or all raise Gone."""
    value, problem = None, None
    try:
        value = ask()
    except (Gone, ElasticError) as error:
        problem = f"rank {rank()}: {error}"
    if found := first_problem(problem):
        raise Gone(found)
    return value  # type: ignore[return-value]


def first_problem(problem: str | None) -> str | None:
    """The first of all ranks' problems, on every rank; None where none has one."""
    return next((text for text in gathered(problem) if text is not None), None)


def here(make: Callable[[], T]) -> T:
    """What this rank makes for itself. Raises ReplicaError for what goes wrong with the store or a socket."""
    try:
        return make()
    except (ElasticError, OSError) as error:
        raise ReplicaError(f"engine.replicas: {error}") from None


def first_line(error: BaseException) -> str:
    """What an error says first, in at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
