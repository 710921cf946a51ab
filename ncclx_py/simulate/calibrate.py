"""What calls, messages and bytes cost a machine, from calls that were timed on it: least squares through the simulator itself.

    machine = calibrate(shots, topology, cores=2)

The calls ran on the same emulated hosts, but between links that are not shaped, so that the cores alone limit them, and at sizes
that are not predicted later. The six costs of `Machine` are those with which the plans, played, take the time that was measured:
Levenberg–Marquardt over their logarithms, on the logarithm of the times, with outliers counting less (Cauchy's loss). Weak prior
values keep a cost that no call shows from running away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ncclx_py.plans.plan import Plan
from ncclx_py.plans.topology import Topology
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.machine import Machine
from ncclx_py.simulate.schedule import Floats
from ncclx_py.simulate.shared import call_seconds

_ITEMSIZE = 4
_START = {"local": 5e-5, "remote": 5e-5, "wake": 1e-5, "call": 4e-4, "copy": 1e-10, "wire": 7e-10}
_PRIOR = 1.5  # standard deviation of the logarithm of a cost
_SPREAD = 0.15  # of a measured time: a residual several times as large counts little
_STEP, _LARGEST = 0.1, 1.0  # of a logarithm: for derivatives, and in one go
_ROUNDS = 4
_ENOUGH = 0.01  # improvement of the loss, below which it ends
_GIVE_UP = 100.0  # damping


@dataclass(frozen=True)
class Shot:
    """A call that was timed: `seconds` as `bench/timing.py` measures."""

    plan: Plan
    seconds: float


def calibrate(shots: Sequence[Shot], topology: Topology, cores: int) -> Machine:
    """The costs that explain `shots`, which ran on `topology` with links that limit nothing. ValueError where there are none."""
    if not shots:
        raise ValueError("There is no timed call to calibrate the machine with.")
    free = replace(topology, inter=replace(topology.inter, bandwidth=1e15), nics=())
    cluster = Cluster(free)
    measured = np.log([shot.seconds for shot in shots])
    names = list(_START)

    def machine(costs: Floats) -> Machine:
        return Machine(cores, **dict(zip(names, np.exp(costs).tolist())))

    def misfit(costs: Floats) -> Floats:
        played = [call_seconds(shot.plan, _ITEMSIZE, cluster, machine(costs)) for shot in shots]
        return (np.log(played) - measured) / _SPREAD

    start = np.log([_START[name] for name in names])
    return machine(_fitted(misfit, start))


def _fitted(misfit: Callable[[Floats], Floats], start: Floats) -> Floats:
    """The arguments with the least loss: Levenberg–Marquardt with weights, derivatives from differences."""

    def loss(point: Floats, off: Floats) -> float:
        return float(np.log1p(off**2).sum() + (((point - start) / _PRIOR) ** 2).sum())

    point, off, damping = start, misfit(start), 0.1
    least = loss(point, off)
    for _ in range(_ROUNDS):
        slopes = np.stack([(misfit(point + _STEP * unit) - off) / _STEP for unit in np.eye(len(start))], axis=1)
        weighted = slopes / (1 + off**2)[:, None]
        hessian = weighted.T @ slopes + np.eye(len(start)) / _PRIOR**2
        gradient = weighted.T @ off + (point - start) / _PRIOR**2
        before = least
        while damping < _GIVE_UP:
            change = -np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
            tried = point + np.clip(change, -_LARGEST, _LARGEST)
            missed = misfit(tried)
            if (new := loss(tried, missed)) < least:
                point, off, least = tried, missed, new
                damping /= 4
                break
            damping *= 4
        if before - least < _ENOUGH * max(1.0, before) or not math.isfinite(least):
            break
    return point
