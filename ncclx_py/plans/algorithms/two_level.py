"""All-to-all over two levels, rail-aligned: few and long messages between hosts, each on its own rail.

(1) Inside a host, local rank g gathers what the host has for local rank g of every other host. (2) It sends each of
them one message, which holds the blocks of all ranks of its host. A rank sends N − 1 messages between hosts and G − 1
sets inside instead of P − 1 between ranks: a gain for small blocks, and where crossing between rails is dear. The bytes
between hosts are the same as for pairwise rounds. (Hierarchical all-to-all of Tutel and DeepSpeed-MoE; NCCL's PXN.)
"""

from __future__ import annotations

from ncclx_py.plans.algorithms.host_rounds import HostRounds
from ncclx_py.plans.algorithms.layout import INSIDE, merged, owner
from ncclx_py.plans.plan import Problem, RankPlan, Span
from ncclx_py.plans.topology import Topology


def two_level(problem: Problem, topology: Topology, rank: int, window: int) -> RankPlan:
    """See above; of the messages between hosts, at most `window` of a rank are under way."""
    return _TwoLevel(problem, topology, rank).plan(window)


class _TwoLevel(HostRounds):
    def _proxy(self, target: int) -> int:
        """The local rank that sends to `target` what this host has for it."""
        return owner(self.topology, self.host, self.topology.local_rank[target])

    def send_to(self, there: int, lane: int) -> None:
        targets = self.topology.hosts[there]
        for target in targets:
            if self._proxy(target) != self.rank:
                self.script.send(self.inputs[target], self._proxy(target), INSIDE)
        for target in targets:
            if self._proxy(target) == self.rank:
                self.script.send(self._gathered(target), target, lane)

    def _gathered(self, target: int) -> Span:
        """What the host has for `target`, in the order of ranks."""
        counts = [self.problem.matrix[source][target] for source in self.locals]
        if sum(counts) == self.inputs[target].length:
            return self.inputs[target]  # nobody else has any
        area = self.script.scratch(sum(counts))
        position = area.start
        for source, count in zip(self.locals, counts):
            piece = Span("scratch", position, position + count)
            if source == self.rank:
                self.script.copy(self.inputs[target], piece, INSIDE)
            else:
                self.script.recv(piece, source, INSIDE)
            position += count
        return area

    def receive_from(self, there: int, lane: int) -> None:
        """Takes the message of another host and puts its blocks in their places."""
        sender = owner(self.topology, there, self.topology.local_rank[self.rank])
        places = merged([self.outputs[source] for source in self.topology.hosts[there]])
        if len(places) == 1:
            self.script.recv(places[0], sender, lane)
            return
        area = self.script.scratch(sum(place.length for place in places))
        self.script.recv(area, sender, lane)
        position = area.start
        for place in places:
            self.script.copy(Span("scratch", position, position + place.length), place, lane)
            position += place.length
