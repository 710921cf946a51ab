"""A lane joins rank r of each replica with rank r of the others: a process group per epoch, and sums in a fixed order.

    lane = Lane.connect(member.client, backend="ncclx", epoch=7, lane=rank, members=(0, 2, 3), replica=2, timeout_s=10)
    lane.sum(tensors, contributors=(0, 2, 3))      # in place: the same bits on every replica
    lane.exchange(b"...")                          # replica → its bytes
    lane.abort()                                   # any thread: whoever waits raises

The sum of element x is ((x_a + x_b) + x_c) … over the contributors in the order of their ids, in fp32 or wider, whatever
the group's algorithm: each member gets one part of every contribution (all-to-all), adds it up in that order, and the parts
are gathered. That moves 2·(n−1)/n of the data per member, as a ring does. A member that does not contribute gets the
sum all the same. Nothing here outlives a failure: abort the lane and connect that of the next epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ncclx_py.elastic.client import Client
from ncclx_py.elastic.errors import ElasticError
from ncclx_py.runtime.registration import join_group

BACKENDS = ("ncclx", "gloo", "nccl")
CHUNK = 32 << 20  # elements summed at a time


class KeyStore(dist.Store):
    """The epoch store's keys as torch's rendezvous store. Values are bytes, as c10d wants; keys belong to one lane."""

    def __init__(self, client: Client, prefix: str, timeout_s: float) -> None:
        super().__init__()
        self._client, self._prefix, self._timeout_s = client, prefix, timeout_s

    def set(self, key: str, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else bytes(value)
        self._client.ask("set", key=self._prefix + key, value=raw.decode("latin-1"))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [text.encode("latin-1") for text in self._look(list(keys), self._timeout_s)]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._look(list(keys), self._timeout_s if timeout is None else timeout.total_seconds())

    def check(self, keys: Sequence[str]) -> bool:
        return self._client.ask("get", keys=[self._prefix + key for key in keys])["answer"] == "ok"

    def _look(self, keys: list[str], timeout_s: float) -> list[str]:
        import time

        until = time.monotonic() + timeout_s
        names = [self._prefix + key for key in keys]
        answer = self._client.decide("get", lambda: time.monotonic() > until, keys=names, wait=True)
        if answer["answer"] != "ok":
            raise RuntimeError(f"the keys {names} were not set within {timeout_s:g} s")
        return list(answer["values"])


class Lane:
    """This rank's connections to its counterparts in the other replicas, for one epoch."""

    def __init__(self, group: Any, members: Sequence[int], replica: int, device: torch.device) -> None:
        self._group, self.members, self.replica, self._device = group, tuple(members), replica, device

    @classmethod
    def connect(
        cls,
        client: Client,
        *,
        backend: str,
        epoch: int,
        lane: int,
        members: Sequence[int],
        replica: int,
        timeout_s: float,
        device: torch.device,
    ) -> Lane:
        """Joins the lane of an epoch; every member must call it. Raises RuntimeError when some do not come in time."""
        group = None
        if len(members) > 1:
            store = KeyStore(client, f"epoch/{epoch}/lane/{lane}/", timeout_s)
            name = f"replicas.lane{lane}.epoch{epoch}"
            group = connect_group(backend, store, list(members).index(replica), range(len(members)), timeout_s, name)
        return cls(group, members, replica, device)

    def abort(self) -> None:
        """Ends the group now; whoever waits in it raises. Again: nothing."""
        if self._group is not None:
            self._group.abort()

    def sum(self, tensors: Sequence[Tensor], contributors: Sequence[int]) -> None:
        """Each tensor becomes its sum over the contributors, in the order of their ids. Raises RuntimeError when a
        member is gone: the tensors are undefined then."""
        order = sorted(contributors)
        if not set(order) <= set(self.members):
            raise ElasticError(
                f"replicas {sorted(set(order) - set(self.members))} are to contribute, but are not members"
            )
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            self._sum_flat([tensor for tensor in tensors if tensor.dtype == dtype], order)

    def _sum_flat(self, tensors: list[Tensor], order: list[int]) -> None:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            part.copy_(self._sum_part(part.to(wide), order))
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(piece.view_as(tensor))

    def _sum_part(self, part: Tensor, order: list[int]) -> Tensor:
        if self._group is None:
            return part
        size = len(self.members)
        share = -(-part.numel() // size)
        given = part.new_zeros(share * size)
        given[: part.numel()] = part
        received = torch.empty_like(given)
        self._all_to_all(received, given)
        rows = received.view(size, share)
        places = [self.members.index(replica) for replica in order]
        total = rows[places[0]].clone()
        for place in places[1:]:
            total += rows[place]
        self._all_gather(given, total)
        return given[: part.numel()]

    def exchange(self, mine: bytes) -> dict[int, bytes]:
        """Every member's bytes, by replica."""
        if self._group is None:
            return {self.replica: mine}
        sizes = torch.empty(len(self.members), dtype=torch.int64, device=self._device)
        self._all_gather(sizes, torch.tensor([len(mine)], device=self._device))
        lengths = sizes.tolist()
        longest = max(max(lengths), 1)
        padded = torch.frombuffer(bytearray(mine.ljust(longest, b"\0")), dtype=torch.uint8).to(self._device)
        gathered = torch.empty(longest * len(lengths), dtype=torch.uint8, device=self._device)
        self._all_gather(gathered, padded)
        rows = gathered.view(len(lengths), longest).cpu()
        return {r: rows[i, :n].numpy().tobytes() for i, (r, n) in enumerate(zip(self.members, lengths, strict=True))}

    def _all_to_all(self, output: Tensor, source: Tensor) -> None:
        self._finish(self._group.all_to_all_single(output, source, [], []))

    def _all_gather(self, output: Tensor, source: Tensor) -> None:
        self._finish(self._group.all_gather_single(output, source))

    def _finish(self, work: Any) -> None:
        work.wait()
        if self._device.type == "cuda":  # `wait` only orders the streams: a dead peer must show before anyone votes
            torch.cuda.synchronize(self._device)


class _Native:
    """A c10d backend of torch's own under the names that a lane uses."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def all_to_all_single(self, output: Tensor, source: Tensor, received: list[int], sent: list[int]) -> Any:
        return self._native.alltoall_base(output, source, received, sent)

    def all_gather_single(self, output: Tensor, source: Tensor) -> Any:
        return self._native._allgather_base(output, source)

    def broadcast(self, tensors: list[Tensor], root: int) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._native.broadcast(tensors, options)

    def abort(self) -> None:
        self._native.abort()

    def shutdown(self) -> None:
        """gloo closes its connections with its last reference."""
        if hasattr(self._native, "shutdown"):
            self._native.shutdown()

    def peers(self) -> dict[int, str]:
        """Nothing is known of other processes."""
        return {}


def connect_group(
    backend: str, store: Any, rank: int, ranks: Sequence[int], timeout_s: float, name: str, world: bool = True
) -> Any:
    """This rank's part, number `rank`, in a group of the given backend, with the methods that lanes use. `ranks` are their numbers
    in traces; `world`: these are all there are."""
    timeout, size = timedelta(seconds=timeout_s), len(ranks)
    if backend == "ncclx":
        return join_group(store, name, ranks, rank, timeout, world=world)
    if backend == "gloo":
        return _Native(dist.ProcessGroupGloo(store, rank, size, timeout))
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return _Native(dist.ProcessGroupNCCL(store, rank, size, options))
    raise ElasticError(f"lanes run on one of {', '.join(BACKENDS)}, not on {backend!r}")
