"""Flows over shared pipes, shared fairly and without waste: what a flow cannot use, others do. For tens of flows, not thousands.

A flow of some units uses `uses[i]` of pipe `rows[i]` per unit: a byte between hosts takes a byte of two NICs and a little of two
threads. Flows get equal parts of the pipe that holds them back, weighted (progressive filling). A pipe may have a bucket: what
it did not carry is saved, up to `burst`, and passes at once later, as a token bucket shaper lets it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ncclx_py.simulate.schedule import Floats, Ints

_NEVER = np.iinfo(np.int64).max
_DROP = 1.0  # units that a bucket must hold to count
_FREE = 1e15  # units per second of a flow that nothing holds back


class FairFlows:
    """Stands in for `flows.Flows`; `shaped` says which pipes have a bucket of `burst` units, full at first.

    Those carry a part of their capacity while several flows share them: `sharing` is (flows, share), fewest flows first.
    """

    def __init__(
        self,
        capacity: Floats,
        width: int,
        grain: float,
        shaped: NDArray[np.bool_],
        burst: float,
        sharing: tuple[tuple[int, float], ...] = (),
    ) -> None:
        self.bytes = np.zeros(len(capacity))
        self._whole, self._capacity, self._grain = capacity, capacity, grain
        self._shaped = shaped
        self._sharing = (np.log([count for count, _ in sharing]), np.array([share for _, share in sharing]))
        self._bucketed, self._burst = shaped & (burst > 0), burst
        self._level = np.where(self._bucketed, burst, 0.0)
        self._use = np.zeros(len(capacity))
        self._empties = np.full(len(capacity), np.inf)
        self._now = 0.0
        self._owners = np.empty(0, np.int64)
        self._rows, self._uses = np.empty((0, width), np.int64), np.empty((0, width))
        self._weights, self._left, self._rate, self._ends = (np.empty(0) for _ in range(4))
        self._new: list[tuple[Ints, Ints, Floats, Floats, Floats]] = []
        self._stale = False

    def open(self, owners: Ints, rows: Ints, uses: Floats, weights: Floats, sizes: Floats) -> None:
        """Lets `sizes` units flow from now on, once the window is settled."""
        self._new.append((owners, rows, uses, weights, sizes))

    def next_end(self) -> int:
        """The window in which a flow ends, or a bucket is empty."""
        first = min(self._ends.min(initial=np.inf), self._empties.min(initial=np.inf))
        return int(np.ceil(first / self._grain)) if np.isfinite(first) else _NEVER

    def close(self, window: int) -> tuple[Ints, Floats]:
        """Takes out what ends up to `window`; returns its owners and when they ended."""
        over = np.ceil(self._ends / self._grain) <= window
        self._stale = self._stale or bool(over.any()) or bool((np.ceil(self._empties / self._grain) <= window).any())
        if not over.any():
            return np.empty(0, np.int64), np.empty(0)
        self._pass(window)
        owners, ends = self._owners[over], self._ends[over]
        self._keep(~over)
        return owners, ends

    def settle(self, window: int) -> None:
        """Adds what was opened, and shares anew."""
        if not self._new and not self._stale:
            return
        self._pass(window)
        if self._new:
            owners, rows, uses, weights, sizes = (np.concatenate(parts) for parts in zip(*self._new))
            self._new = []
            np.add.at(self.bytes, rows.ravel(), (sizes[:, None] * uses).ravel())
            self._owners = np.concatenate([self._owners, owners])
            self._rows, self._uses = np.concatenate([self._rows, rows]), np.concatenate([self._uses, uses])
            self._weights, self._left = np.concatenate([self._weights, weights]), np.concatenate([self._left, sizes])
            self._rate = np.concatenate([self._rate, np.zeros(len(sizes))])
        self._stale = False
        self._share()

    def _keep(self, which: NDArray[np.bool_]) -> None:
        self._owners, self._rows, self._uses = self._owners[which], self._rows[which], self._uses[which]
        self._weights, self._left = self._weights[which], self._left[which]
        self._rate, self._ends = self._rate[which], self._ends[which]

    def _pass(self, window: int) -> None:
        """Lets time pass until `window`."""
        now = window * self._grain
        spent = max(0.0, now - self._now)
        self._left = np.maximum(0.0, self._left - self._rate * spent)
        filled = self._level + (np.where(self._bucketed, self._capacity, 0.0) - self._use) * spent
        self._level = np.where(self._bucketed, np.clip(filled, 0.0, self._burst), 0.0)
        self._now = now

    def _share(self) -> None:
        pipes = len(self._capacity)
        if len(self._sharing[0]):
            flows = np.maximum(1, np.bincount(self._rows[self._uses > 0], minlength=pipes))
            share = np.interp(np.log(flows), *self._sharing)
            self._capacity = np.where(self._shaped, self._whole * share, self._whole)
        room = np.where(self._level > _DROP, np.inf, self._capacity)
        speed = np.zeros(len(self._owners))
        active = np.ones(len(self._owners), np.bool_)
        wants = self._uses * self._weights[:, None]
        while active.any():
            load = np.bincount(self._rows[active].ravel(), wants[active].ravel(), pipes)
            with np.errstate(divide="ignore", invalid="ignore"):
                limit = np.where(load > 1e-30, room / load, np.inf)
            tightest = limit.min()
            held = active & ((limit[self._rows] <= tightest * (1 + 1e-9)) & (self._uses > 0)).any(axis=1)
            if not np.isfinite(tightest) or not held.any():
                speed[active] = _FREE
                break
            speed[held] = tightest
            room = np.maximum(0.0, room - tightest * np.bincount(self._rows[held].ravel(), wants[held].ravel(), pipes))
            active &= ~held
        self._rate = speed * self._weights
        with np.errstate(divide="ignore", invalid="ignore"):
            self._ends = self._now + np.where(self._left > 0, self._left / self._rate, 0.0)
            self._use = np.bincount(self._rows.ravel(), (self._uses * self._rate[:, None]).ravel(), pipes).astype(float)
            drains = self._bucketed & (self._level > _DROP) & (self._use > self._capacity)
            self._empties = np.where(drains, self._now + self._level / (self._use - self._capacity), np.inf)
