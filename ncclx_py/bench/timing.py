"""Times the collectives of several groups in turn, as a user who calls them back to back would see them.

A *sample* is: a barrier, one call that is not timed (it drains what shaped links let pass for free, and aligns the ranks),
then `inner` calls back to back; its value is their mean, and the slowest rank's counts. Short calls are repeated until a
sample takes about 50 ms; long ones are called once, without the untimed call. The groups take turns sample by sample.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ncclx_py.small_messages import gather_json

_SAMPLE_SECONDS = 0.05
_MOST_INNER = 50
_LONG = 0.3  # seconds from which a call is timed alone: what links let pass for free is then below 2 %


@dataclass(frozen=True)
class Times:
    """Seconds per call: the median sample of the slowest rank, and percentiles over all ranks and samples; `samples` are those of
    the slowest rank, in order."""

    median: float
    p50: float
    p95: float
    samples: tuple[float, ...] = ()


def times_of(samples: Sequence[Sequence[float]]) -> Times:
    """`samples[rank][i]` is sample i on `rank`, in seconds."""
    slowest = [max(ranks) for ranks in zip(*samples)]
    everything = sorted(value for rank in samples for value in rank)
    return Times(statistics.median(slowest), statistics.median(everything), percentile(everything, 95), tuple(slowest))


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed."""
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]


def measure(
    calls: Sequence[Callable[[], None]], control: dist.ProcessGroup, iters: int, warmup: int, device: str
) -> list[Times]:
    """Times of each call; `calls[i]` runs one collective of group i. All ranks get the same answer.

    `control` is a group that is not measured. Every call is run `warmup` times (at least once) before.
    """
    inner = [_inner(call, control, warmup, device) for call in calls]
    mine: list[list[float]] = [[] for _ in calls]
    for _ in range(iters):
        for call, repeats, samples in zip(calls, inner, mine):
            samples.append(_sample(call, control, repeats, device))
    everyone = gather_json(mine, control)
    return [times_of([samples[which] for samples in everyone]) for which in range(len(calls))]


def synchronize(device: str) -> None:
    """Waits until the device has done what was queued; a host that works alone has nothing queued."""
    if device != "cpu":
        torch.cuda.synchronize()


def _inner(call: Callable[[], None], control: dist.ProcessGroup, warmup: int, device: str) -> int:
    """How many calls make a sample: the same on all ranks. 0 says that a call is long, and timed alone."""
    for _ in range(max(warmup - 1, 0)):
        call()
    dist.barrier(control)
    spent = _timed(call, 1, device)
    slowest = torch.tensor([spent])
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=control)
    longest = slowest.item()
    return 0 if longest >= _LONG else max(1, min(_MOST_INNER, math.ceil(_SAMPLE_SECONDS / longest)))


def _sample(call: Callable[[], None], control: dist.ProcessGroup, inner: int, device: str) -> float:
    dist.barrier(control)
    if inner:
        call()
    return _timed(call, max(inner, 1), device)


def _timed(call: Callable[[], None], repeats: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats
