"""What the kernel knows about a TCP connection (``TCP_INFO``, Linux): how much it carried, in how much busy time.

    facts = link_facts(connection)      # {"bytes": …, "busy_us": …, …}, or None where the kernel does not tell

Read when a trace is written, so it costs a collective nothing. `bytes` that the peer has acknowledged over the time that
the connection had something to send is the rate of the link; ``ncclx diagnose`` compares the links of a job by it.
"""

from __future__ import annotations

import socket
import struct

_WANTED = struct.Struct(
    "<68xI28xI16xQ40xQQ8x"
)  # of struct tcp_info: rtt, total_retrans, bytes_acked, busy, rwnd_limited


def link_facts(connection: socket.socket) -> dict[str, int] | None:
    """`bytes` acknowledged by the peer, `busy_us` with data in flight or waiting, of which `limited_us` because the
    receiver was full, `rtt_us` smoothed, and `retransmits`. None for a closed socket or an old kernel."""
    try:
        raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _WANTED.size)
    except (OSError, AttributeError):  # closed, or not Linux
        return None
    if len(raw) < _WANTED.size:
        return None
    rtt, retransmits, acknowledged, busy, limited = _WANTED.unpack(raw)
    return {
        "bytes": acknowledged,
        "busy_us": busy,
        "limited_us": limited,
        "rtt_us": rtt,
        "retransmits": retransmits,
    }
