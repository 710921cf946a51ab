"""Dispatch and combine for mixture-of-experts, with one copy of a row per destination host between hosts.

A row that is routed to k experts on h hosts crosses between hosts at most h times instead of k: it goes to the rank of
the same local index on each host (so rails stay apart), which hands it on to the ranks that hold its experts. On the way
back results are weighted and summed on each rank, then on that host's entry rank, and cross once. For k experts chosen
evenly among E on N hosts, N (1 − C(E − E/N, k) / C(E, k)) hosts are expected per row.

    dispatcher = Dispatcher(group, topology, experts=64)
    sent = dispatcher.dispatch(rows, expert_ids, weights)
    outputs = torch.cat([expert(part) for expert, part in zip(my_experts, sent.rows.split(sent.counts))])
    result = dispatcher.combine(outputs, sent)                # [T, H]: for each row, Σ weight · expert(row)

Expert e is on rank e // (experts / ranks). Everything is differentiable, in the rows and in the weights: the gradient of
a dispatch is a combine, and the other way round. Only ``torch.distributed.all_to_all_single`` on the given group is used,
so any backend will do. All ranks must call alike, also those that have no rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ncclx_py.plans.topology import Topology
from ncclx_py.small_messages import gather_json
from ncclx_py.transport.identity import host_id


@dataclass(slots=True)
class Traffic:
    """What this rank has sent to ranks of other hosts, in dispatch and combine together; backward passes included.

    `row_bytes` are the rows alone, `other_bytes` counts, expert ids and weights. `rows` is the number of rows that
    dispatch sent, `copies` the number that it would have sent with one copy per expert.
    """

    row_bytes: int = 0
    other_bytes: int = 0
    rows: int = 0
    copies: int = 0


@dataclass(frozen=True)
class Dispatched:
    """What `dispatch` brought to this rank.

    `rows` [M, H] holds the rows of each local expert one after the other, `counts` how many each has; `weights` [M] goes
    with them. The rest is for `combine`.
    """

    rows: Tensor
    counts: list[int]
    weights: Tensor
    _origin: Tensor
    _hops: tuple[_Hop, ...]


class Dispatcher:
    """Routes rows to experts over `group`, whose ranks are where `topology` says; `experts` are divided evenly.

    Without a topology, ranks that report the same host identity are on one host (a collective call).
    Raises ValueError when the numbers do not fit.
    """

    def __init__(self, group: dist.ProcessGroup | None, topology: Topology | None, experts: int) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.topology = topology if topology is not None else _topology_of(group)
        self.traffic = Traffic()
        if self.topology.size != self.size:
            raise ValueError(
                f"the topology has {self.topology.size} ranks, the group {self.size}; they must be the same"
            )
        if experts < 1 or experts % self.size:
            raise ValueError(f"{experts} experts cannot be divided evenly among {self.size} ranks")
        self.experts = experts
        self.local_experts = experts // self.size

    def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        """Sends each of `rows` [T, H] to the experts `expert_ids` [T, k], with `weights` [T, k] for `combine`."""
        self._check(rows, expert_ids, weights)
        number, choices = expert_ids.shape
        pairs = _Pairs(
            torch.arange(number, device=rows.device).repeat_interleave(choices), expert_ids.reshape(-1).long()
        )
        holder = pairs.expert // self.local_experts
        self.traffic.copies += int(self._host_of(rows.device)[holder].ne(self.topology.host_of[self.rank]).sum())
        values = weights.reshape(-1)
        hops = []
        for inside in (False, True):
            holder = pairs.expert // self.local_experts
            to = holder if inside else self._entries(rows.device)[holder]
            hop, taken = self._hop(pairs, to, rows.shape[0])
            pairs = self._exchange_pairs(hop, pairs, taken)
            rows, values = _Exchange.apply(
                rows.index_select(0, hop.sent_rows), values.index_select(0, taken), hop, self
            )
            hops.append(hop)
        self.traffic.rows += sum(hops[0].crossing(self))
        return self._grouped(rows, pairs, values, tuple(hops))

    def combine(self, outputs: Tensor, sent: Dispatched) -> Tensor:
        """The sum over experts of weight · output, for each row that this rank had dispatched: [T, H].

        `outputs` [M, H] belongs to ``sent.rows``. Sums are in float32 for shorter types; what travels has their type.
        """
        if outputs.shape[0] != sent.rows.shape[0]:
            raise ValueError(f"there are {outputs.shape[0]} outputs for {sent.rows.shape[0]} dispatched rows")
        wide = torch.promote_types(outputs.dtype, torch.float32)
        total = outputs.to(wide) * sent.weights.to(wide).unsqueeze(1)
        places = sent._origin
        for hop in reversed(sent._hops):
            total = _summed(total, places, sum(hop.received)).to(outputs.dtype)
            total = _Return.apply(total, hop, self)
            places = hop.sent_rows
        return _summed(total, places, sent._hops[0].rows).to(outputs.dtype)

    def _check(self, rows: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        if (
            rows.dim() != 2
            or expert_ids.dim() != 2
            or len(rows) != len(expert_ids)
            or expert_ids.shape != weights.shape
        ):
            raise ValueError(
                "rows must be [T, H], expert_ids and weights [T, k]; "
                f"they are {list(rows.shape)}, {list(expert_ids.shape)} and {list(weights.shape)}"
            )
        if expert_ids.numel() and not 0 <= int(expert_ids.min()) <= int(expert_ids.max()) < self.experts:
            low, high = int(expert_ids.min()), int(expert_ids.max())
            raise ValueError(f"expert_ids run from {low} to {high}; the experts are 0 to {self.experts - 1}")

    def _host_of(self, device: torch.device) -> Tensor:
        return torch.tensor(self.topology.host_of, device=device)

    def _entries(self, device: torch.device) -> Tensor:
        """For each rank, the rank of its host that rows from this rank enter by."""
        mine = self.topology.local_rank[self.rank]
        entries = [ranks[mine % len(ranks)] for ranks in self.topology.hosts]
        return torch.tensor(entries, device=device)[self._host_of(device)]

    def _hop(self, pairs: _Pairs, to: Tensor, rows: int) -> tuple[_Hop, Tensor]:
        """(what goes where when each pair goes to the rank `to`, the order in which pairs are sent)."""
        key, place = torch.unique(to * max(rows, 1) + pairs.row, return_inverse=True)
        taken = torch.argsort(place, stable=True)
        sent = torch.stack(
            [torch.bincount(key // max(rows, 1), minlength=self.size), torch.bincount(to, minlength=self.size)], dim=1
        )
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        (rows_out, pairs_out), (rows_in, pairs_in) = sent.T.tolist(), received.T.tolist()
        self.traffic.other_bytes += sum(self._crosses(peer) for peer in range(self.size)) * 2 * sent.element_size()
        return _Hop(rows, key % max(rows, 1), place, rows_out, rows_in, pairs_out, pairs_in), taken

    def _exchange_pairs(self, hop: _Hop, pairs: _Pairs, taken: Tensor) -> _Pairs:
        """The pairs that come with the rows that come; `row` counts among all rows received."""
        device = pairs.row.device
        # A row is named by its place in the message that it comes with, then by its place among all that came.
        starts = _starts(hop.sent, device).repeat_interleave(torch.tensor(hop.sent_pairs, device=device))
        described = torch.stack([hop.place[taken] - starts, pairs.expert[taken]], dim=1).to(torch.int32)
        arrived = self.all_to_all(described, hop.sent_pairs, hop.received_pairs).long()
        starts = _starts(hop.received, device).repeat_interleave(torch.tensor(hop.received_pairs, device=device))
        return _Pairs(arrived[:, 0] + starts, arrived[:, 1])

    def _grouped(self, rows: Tensor, pairs: _Pairs, values: Tensor, hops: tuple[_Hop, ...]) -> Dispatched:
        local = pairs.expert - self.rank * self.local_experts
        order = torch.argsort(local, stable=True)
        origin = pairs.row[order]
        counts = torch.bincount(local, minlength=self.local_experts).tolist()
        return Dispatched(rows.index_select(0, origin), counts, values.index_select(0, order), origin, hops)

    def all_to_all(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int], *, rows: bool = False) -> Tensor:
        """``sent[r]`` elements of the first dimension go to rank r, ``received[r]`` come from it; counted in `traffic`."""
        result = tensor.new_empty((sum(received), *tensor.shape[1:]))
        dist.all_to_all_single(result, tensor.contiguous(), list(received), list(sent), group=self.group)
        width = tensor.element_size() * (tensor[0].numel() if len(tensor) else 0)
        crossing = width * sum(number for peer, number in enumerate(sent) if self._crosses(peer))
        if rows:
            self.traffic.row_bytes += crossing
        else:
            self.traffic.other_bytes += crossing
        return result

    def _crosses(self, peer: int) -> bool:
        return not self.topology.is_local(self.rank, peer)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Which row goes to which expert; a row stands here once for each of its experts."""

    row: Tensor
    expert: Tensor


@dataclass(frozen=True, slots=True)
class _Hop:
    """One exchange: of `rows` rows, `sent_rows` are sent, in order of the rank that they go to.

    `place` says for each pair which of the sent rows it goes with. The lists count rows, and pairs, by rank.
    """

    rows: int
    sent_rows: Tensor
    place: Tensor
    sent: list[int]
    received: list[int]
    sent_pairs: list[int]
    received_pairs: list[int]

    def crossing(self, dispatcher: Dispatcher) -> list[int]:
        """The rows that go to each rank of other hosts."""
        topology = dispatcher.topology
        return [number for peer, number in enumerate(self.sent) if not topology.is_local(dispatcher.rank, peer)]


class _Exchange(torch.autograd.Function):
    """Rows and the weights of their pairs to other ranks; gradients come back the same way.

    One function for both: so the backward pass makes its two collective calls in the same order on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, hop: _Hop, dispatcher: Dispatcher) -> tuple[Tensor, Tensor]:
        ctx.hop, ctx.dispatcher = hop, dispatcher
        moved = dispatcher.all_to_all(rows, hop.sent, hop.received, rows=True)
        return moved, dispatcher.all_to_all(weights, hop.sent_pairs, hop.received_pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, weights: Tensor) -> tuple[Tensor | None, ...]:
        hop, back = ctx.hop, ctx.dispatcher.all_to_all
        for_rows = back(rows, hop.received, hop.sent, rows=True) if ctx.needs_input_grad[0] else None
        for_weights = back(weights, hop.received_pairs, hop.sent_pairs) if ctx.needs_input_grad[1] else None
        return for_rows, for_weights, None, None


class _Return(torch.autograd.Function):
    """Rows back to where a hop took them from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, hop: _Hop, dispatcher: Dispatcher) -> Tensor:
        ctx.hop, ctx.dispatcher = hop, dispatcher
        return dispatcher.all_to_all(rows, hop.received, hop.sent, rows=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.dispatcher.all_to_all(gradient, ctx.hop.sent, ctx.hop.received, rows=True), None, None


def _summed(values: Tensor, places: Tensor, number: int) -> Tensor:
    """`number` rows in at least float32, of which each is the sum of the `values` whose place it is."""
    wide = torch.promote_types(values.dtype, torch.float32)
    total = torch.zeros((number, values.shape[1]), dtype=wide, device=values.device)
    return total.index_add(0, places, values.to(wide))


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return ends - torch.tensor(lengths, device=device)


def _topology_of(group: dist.ProcessGroup | None) -> Topology:
    """Ranks with the same host identity are on one host."""
    names = gather_json(host_id(os.environ), group)
    seen = list(dict.fromkeys(names))
    return Topology(tuple(seen.index(name) for name in names))
