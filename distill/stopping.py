"""A run that is told to stop: it finishes its step, saves a checkpoint, and leaves with exit status 75, which asks for a restart.

    listen()                     # once, from the main thread: SIGUSR1, or the signal that NCCLX_STOP_SIGNAL names
    if told(): …                 # after each step, on all ranks together: True on all once any has got the signal

``ncclx launch slurm`` sends the signal before the time limit, requeues the job, and the same command goes on from the checkpoint.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from distill.distributed import total
from distill.errors import ConfigError, DistillError

VARIABLE = "NCCLX_STOP_SIGNAL"
AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class _Heard:
    """What this process has heard; only processes that listen ask the others."""

    listening = False
    signal = False


class ToldToStop(DistillError):
    """The run was told to stop and has saved its state; the same command continues it."""

    on_every_rank = True
    exit_status = AGAIN


def listen() -> None:
    """Take the signal from now on. Every rank of a job must call it, or none. Raises ConfigError for a name that is no signal."""
    name = os.environ.get(VARIABLE, "USR1")
    number = getattr(signal, f"SIG{name}", None)
    if not isinstance(number, signal.Signals):
        raise ConfigError(f"{VARIABLE}={name!r} is not the name of a signal; use USR1 or USR2")
    signal.signal(number, _hear)
    _Heard.listening = True


def told() -> bool:
    """Whether any rank was told to stop. All ranks of the job call it together."""
    return _Heard.listening and total([float(_Heard.signal)])[0] > 0


def _hear(_number: int, _frame: FrameType | None) -> None:
    _Heard.signal = True
