"""Bytes on their way over shared pipes, for the event engine: who ends next, when the pipes are shared evenly."""

from __future__ import annotations

import numpy as np

from ncclx_py.simulate.schedule import Floats, Ints

_NEVER = np.iinfo(np.int64).max


class Flows:
    """Each flow runs at the pace of its tightest pipe; windows of `grain` seconds are as in events.py.

    `owners` are steps: sends between hosts, receives inside one, and local ones. A flow goes through `pipes` (a row of `width`),
    with all of its bytes or a `share` of them. `bytes` counts what each pipe has taken.
    """

    def __init__(self, capacity: Floats, width: int, grain: float) -> None:
        self.bytes = np.zeros(len(capacity))
        self._capacity, self._width, self._grain = capacity, width, grain
        self._load = np.zeros(len(capacity))
        self._owners = np.empty(0, np.int64)
        self._pipes, self._shares = np.empty((0, width), np.int64), np.empty((0, width))
        self._left, self._rate, self._since, self._ends = (np.empty(0) for _ in range(4))
        self._new: list[tuple[Ints, Floats, Ints, Floats, Floats]] = []

    def open(self, owners: Ints, times: Floats, pipes: Ints, share: Floats | None, sizes: Floats) -> None:
        """Lets `sizes` bytes flow from `times` on, once the window is settled."""
        self._new.append((owners, times, pipes, np.ones(pipes.shape) if share is None else share, sizes))

    def next_end(self) -> int:
        """The window in which the next flow ends."""
        return int(np.rint(self._ends.min() / self._grain)) if len(self._ends) else _NEVER

    def close(self, window: int) -> tuple[Ints, Floats]:
        """Takes out what ends up to `window`; returns its owners and when they ended."""
        over = np.rint(self._ends / self._grain) <= window
        owners, ends = self._owners[over], self._ends[over]
        if len(owners):
            np.subtract.at(self._load, self._pipes[over].ravel(), self._shares[over].ravel())
            keep = ~over
            self._owners, self._pipes, self._shares = self._owners[keep], self._pipes[keep], self._shares[keep]
            self._left, self._rate, self._since = self._left[keep], self._rate[keep], self._since[keep]
            if not len(self._owners):
                self._load[:] = 0.0  # shares are fractions, of which rounding would leave a rest
            self._reckon(window)
        return owners, ends

    def settle(self, window: int) -> None:
        """Adds what was opened."""
        if not self._new:
            return
        owners, times, pipes, shares, sizes = (np.concatenate(parts) for parts in zip(*self._new))
        self._new = []
        np.add.at(self._load, pipes.ravel(), shares.ravel())
        np.add.at(self.bytes, pipes.ravel(), (sizes[:, None] * shares).ravel())
        self._owners = np.concatenate([self._owners, owners])
        self._pipes, self._shares = np.concatenate([self._pipes, pipes]), np.concatenate([self._shares, shares])
        self._left = np.concatenate([self._left, sizes])
        self._rate = np.concatenate([self._rate, np.zeros(len(sizes))])
        self._since = np.concatenate([self._since, times])
        self._reckon(window)

    def _reckon(self, window: int) -> None:
        """From `window` on, new rates."""
        if not len(self._owners):
            self._ends = np.empty(0)
            return
        now = np.maximum(self._since, window * self._grain)
        self._left = np.maximum(0.0, self._left - self._rate * (now - self._since))
        self._since = now
        with np.errstate(divide="ignore", invalid="ignore"):
            self._rate = (self._capacity[self._pipes] / self._load[self._pipes]).min(axis=1)
            self._ends = now + self._left / self._rate
