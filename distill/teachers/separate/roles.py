"""One job, two roles: the last ``teacher.ranks`` ranks are teachers, all others students, each with a default group of its own.

    with joined_job(config) as job:
        figures = serve(config, job) if job.seats.teaches else train_students()

Everything that asks ``torch.distributed`` for rank and size (the trainer, DeepSpeed, checkpoints) so sees the students only; the
bridge joins all. In traces and verdicts each rank keeps its number in the job. The students end the job: in good order when all
of them leave together, and else by an abort, which ends the teachers too.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from distill.config import RunConfig
from distill.distributed import device, process_group
from distill.errors import ConfigError, DistillError, TeacherRankLost
from distill.rendezvous import connecting, meet
from distill.teachers.separate.bridge import NOTICE_S, Bridge, Seats
from distill.teachers.separate.student import Client
from ncclx_py.runtime.registration import number_ranks

LEFT = "teachers/left"  # key of the job's store: the exit status with which students have left


@dataclass
class Job:
    """This rank's part of a job with separate teachers. ``client`` is a student's."""

    config: RunConfig
    client: Client
    met: bool = False  # the teachers serve, so that a last tick can end them

    @property
    def bridge(self) -> Bridge:
        """The one in use."""
        return self.client.bridge

    @property
    def seats(self) -> Seats:
        return self.bridge.seats


class _Current:
    """The job that this process is in; the process group of torch is such a global too."""

    job: Job | None = None


def current_job() -> Job:
    """Raises ConfigError outside of ``distill train``."""
    if _Current.job is None:
        raise ConfigError(
            "teacher.placement=separate is for `distill train` under torchrun or `ncclx launch`; set teacher.placement=colocated"
        )
    return _Current.job


@contextmanager
def joined_job(config: RunConfig) -> Iterator[Job]:
    """Meet the other ranks, take a role, build the bridge; leave on the way out. Raises ConfigError for an impossible split, and
    MeetingError when the ranks do not come together."""
    store, rank, size = _rendezvous(config)
    students = size - config.teacher.ranks
    if students < 1:
        raise ConfigError(
            f"teacher.ranks={config.teacher.ranks} of a job of {size} {'rank leaves' if size == 1 else 'ranks leaves'} no student; "
            f"start it on more ranks (torchrun --nproc-per-node {config.teacher.ranks + 1} …)"
        )
    seats = Seats(tuple(range(size)), students, rank)
    with connecting(rank):
        bridge = Bridge(config.comm.backend, store, seats, True, config.comm.timeout_s, _bridge_device(config), 0)
    role, first = ("teachers", students) if seats.teaches else ("students", 0)
    members = range(first, size if seats.teaches else students)
    number_ranks(role, members)
    job = _Current.job = Job(config, Client(bridge, config.teacher.on_loss))
    try:
        group = process_group(config.comm, dist.PrefixStore(role, store), rank - first, len(members))
        with group, _last_words(job), _ending(job):
            yield job
    finally:
        _Current.job = None
        number_ranks("", ())


def _rendezvous(config: RunConfig) -> tuple[Any, int, int]:
    if dist.is_initialized():
        raise ConfigError(
            "teacher.placement=separate makes process groups of its own; leave the one that is open first"
        )
    if "WORLD_SIZE" not in os.environ:
        return dist.HashStore(), 0, 1
    return meet(config.comm.timeout_s)


def _bridge_device(config: RunConfig) -> torch.device:
    return torch.device("cpu") if config.comm.backend == "gloo" else device()


@contextmanager
def _ending(job: Job) -> Iterator[None]:
    """How a rank leaves the bridge: with the others when they all leave, else by an abort that all of them see."""
    try:
        yield
    except BaseException as error:
        if not job.seats.teaches and not isinstance(error, TeacherRankLost):
            together = isinstance(error, DistillError) and error.on_every_rank
            _leave(job, error.exit_status if isinstance(error, DistillError) else 1, together)
        job.bridge.abort()
        raise
    if not job.seats.teaches:
        _leave(job, 0, True)
    job.bridge.shutdown()


def _leave(job: Job, status: int, together: bool) -> None:
    """A student tells the teachers that it leaves: in the store, and in a last tick where all students leave ``together``."""
    with suppress(TeacherRankLost, RuntimeError):
        job.bridge.store.set(LEFT, str(status))
        if together and job.met:
            job.client.end(status)
            job.bridge.shutdown()
            return
    job.bridge.abort()
    if job.seats.me == 0:
        _wait_until_heard(job)


def heard(rank: int) -> str:
    """The key that a teacher rank sets when it knows that the students have left."""
    return f"teachers/heard/{rank}"


def _wait_until_heard(job: Job) -> None:
    """The store may be in this process: teachers read in it why the students leave, unless they take too long."""
    teachers = [heard(rank) for rank in job.seats.ranks[job.seats.students :]]
    until = time.monotonic() + NOTICE_S
    with suppress(RuntimeError):
        while time.monotonic() < until and not all(job.bridge.store.check([key]) for key in teachers):
            time.sleep(0.02)


@contextmanager
def _last_words(job: Job) -> Iterator[None]:
    """A student that is told to end because a teacher died finishes first: launchers end all ranks soon after one, but leave
    them some seconds, which is enough for a checkpoint."""
    if job.seats.teaches or not _main_thread():
        yield
        return
    former = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: FrameType | None) -> None:
        until = time.monotonic() + NOTICE_S
        while time.monotonic() < until:
            if any(place >= job.seats.students for place in job.bridge.lost()):
                return
            time.sleep(0.02)
        signal.signal(number, former)
        if callable(former):
            former(number, frame)
        else:
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
