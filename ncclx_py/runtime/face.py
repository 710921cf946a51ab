"""What torch sees where it asks a group for the c10d backend of CPU tensors: a gloo of this rank alone.

It carries nothing. ``_set_pg_timeout`` sets the group's timeout in it, ``batch_isend_irecv`` and FSDP2's allocator ask what it
can do. It is made when it is asked for, and connects to nobody.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ncclx_py.runtime.basis import Membership


class Face:
    """The timeout of a group's calls on CPU tensors, and the backend that torch changes it in."""

    def __init__(self, member: Membership, timeout: timedelta) -> None:
        self._member, self._timeout = member, timeout
        self._gloo: Any = None
        self._lock = threading.Lock()

    def timeout(self) -> timedelta:
        """The default of calls. torch may have set it past us."""
        found: timedelta = self._timeout if self._gloo is None else self._gloo.options._timeout
        return found

    def set_timeout(self, timeout: timedelta) -> None:
        with self._lock:
            self._timeout = timeout
            if self._gloo is not None:
                self._gloo._set_default_timeout(timeout)

    def backend(self) -> Any:
        """A ``ProcessGroupGloo``, the same each time."""
        with self._lock:
            if self._gloo is None:
                gloo: Any = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, self._timeout)
                gloo.options.global_ranks_in_group = [self._member.ranks[self._member.rank]]
                gloo.options.group_name = self._member.group
                self._gloo = gloo
            return self._gloo

    def close(self) -> None:
        with self._lock:
            if self._gloo is not None:
                self._timeout = self._gloo.options._timeout
                self._gloo.shutdown()
                self._gloo = None
