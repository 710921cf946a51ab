"""The process group of a run: start, agree, gather, stop.

Works under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) and without one, where the
world is this process alone. Every reduction the trainer makes goes through here, so that a failure on one rank becomes
the same error on all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

import ncclx_py  # noqa: F401  (registers the backend)
from distill.config import CommConfig
from distill.data import CannotEncode, TooLong
from distill.errors import DistillError
from distill.local_ranks import free_port
from distill.rendezvous import connecting, meet
from distill.wire import decode, encode
from ncclx_py.small_messages import broadcast_bytes, gather_bytes

T = TypeVar("T")
USER_ERRORS = (TooLong, CannotEncode)  # their messages need no type in front


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The accelerator of this local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


@contextmanager
def process_group(
    config: CommConfig, store: dist.Store | None = None, number: int = -1, size: int = -1
) -> Iterator[None]:
    """Join the world described by the environment, or, as number ``number``, that of ``size`` ranks who meet at ``store``; leave
    it on the way out. An existing group is used as it is. Raises MeetingError when the ranks do not come together."""
    _forget_groups()
    if dist.is_initialized():
        yield
        return
    if store is None and "WORLD_SIZE" not in os.environ:
        _world_of_one()
    if device().type == "cuda":
        torch.cuda.set_device(device())
    if store is None:
        met, number, size = meet(config.timeout_s)
        store = dist.PrefixStore("default_pg", met)  # torch's own prefix
    timeout = timedelta(seconds=config.timeout_s)
    with connecting(number):
        dist.init_process_group(config.backend, timeout=timeout, store=store, rank=number, world_size=size)
    try:
        yield
    finally:
        _leave()


def _forget_groups() -> None:
    """DeepSpeed remembers groups of a world that somebody else has left, and would use them in the next one."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None and groups._WORLD_GROUP not in dist.distributed_c10d._world.pg_map:
        groups._release_process_group_references(group=None)


def _leave() -> None:
    """Destroy the group, and what DeepSpeed remembers of it: the next run in this process starts clean."""
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    if deepspeed_comm is not None and deepspeed_comm.is_initialized():
        deepspeed_comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def _world_of_one() -> None:
    """Give torch.distributed and DeepSpeed the environment that torchrun would have given a single process."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def total(values: list[float]) -> list[float]:
    """Element-wise sum over ranks, in fp64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def gathered(value: T) -> list[T]:
    """Every rank's ``value``, in rank order, on every rank. Values are what ``distill.wire`` carries; nothing is pickled."""
    return [decode(data) for data in gather_bytes(encode(value), device=device())]


def from_rank_0(value: T | None) -> T:
    """Rank 0's ``value`` on every rank. Values are what ``distill.wire`` carries; nothing is pickled."""
    return decode(broadcast_bytes(encode(value if rank() == 0 else None), 0, device=device()))


@contextmanager
def all_or_nothing(kind: type[DistillError]) -> Iterator[None]:
    """Run a block that may fail on some ranks only; afterwards either all ranks go on or all raise.

    The block must not communicate. The first failing rank's message is raised everywhere as ``kind``.
    """
    message: str | None = None
    try:
        yield
    except DistillError as error:
        message = str(error)
    except Exception as error:
        message = str(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"
    raise_together(kind, message)


def raise_together(kind: type[DistillError], message: str | None) -> None:
    """Raise the first rank's message on every rank; return where no rank has one. All ranks call it."""
    raise_first(kind, gathered(message))


def raise_first(kind: type[DistillError], messages: Sequence[str | None]) -> None:
    """Raise the first of all ranks' messages as an error that every rank raises; return where there is none."""
    failures = [(index, text) for index, text in enumerate(messages) if text is not None]
    if failures:
        index, text = failures[0]
        alike = len(failures) == len(messages) and len({text for _, text in failures}) == 1
        shared = kind(text if alike else f"{text} (rank {index})")
        shared.on_every_rank = True
        raise shared
