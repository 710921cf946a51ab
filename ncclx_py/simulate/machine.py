"""One machine that all ranks share, as emulated hosts do: what the event engine needs to know of it (shared.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """`cores` that all ranks share. The next are seconds of one core: `local` and `remote` of a message (both ends), inside a
    host and between hosts; `wake` of a rank that slept until a message came; `call` of a rank's call, beside its messages;
    `copy` of a byte copied; `wire` of a byte between hosts (both ends and the links). `burst` bytes pass a NIC at once after
    it was idle, as its shaper lets them. `sharing` says what a NIC carries while several streams share it: (streams, share of
    its bandwidth), fewest first; between them it is interpolated over the logarithm of the number. Empty: always all of it.
    `spread` says how unevenly they share it: the standard deviation of the logarithm of a stream's part.
    """

    cores: int
    local: float
    remote: float
    wake: float
    call: float
    copy: float
    wire: float
    burst: float = 0.0
    sharing: tuple[tuple[int, float], ...] = ()
    spread: float = 0.0
