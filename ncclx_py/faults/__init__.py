"""Faults on purpose, for tests and for drills: a rank is killed, stopped or delayed, or breaks a collective.

    ncclx launch torchrun --inject kill:rank=3,step=20 -- train.py       # from outside: see docs/faults.md
    ncclx_py.mark_step(20)                                               # a training loop says that a step begins

The launcher hands the faults over in `NCCLX_INJECT`. Groups made by a rank that has none are ordinary groups, so where
nothing is injected no collective pays for it. `spec.py` holds the words, `inject.py` what happens, `group.py` where.
"""

from __future__ import annotations

from ncclx_py.faults.inject import Injector, armed, disarm, step

__all__ = ["Injector", "armed", "disarm", "step"]
