"""The frame of an all-to-all in rounds between hosts: which host is sent to, and received from, when.

Round k of host h sends to host h + k and receives from h − k, so that the rounds are permutations of hosts; at most `window`
rounds are sent ahead, and the exchange inside the host runs meanwhile. What crosses in a round is the subclass's.
"""

from __future__ import annotations

from ncclx_py.plans.algorithms.layout import INSIDE, blocks, round_lane
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.plan import Problem, RankPlan
from ncclx_py.plans.topology import Topology


class HostRounds:
    """One rank's part. `inputs` and `outputs` are the blocks for and from each rank, `locals` the ranks of this host."""

    def __init__(self, problem: Problem, topology: Topology, rank: int) -> None:
        self.script = Script(topology, rank)
        self.problem, self.topology, self.rank = problem, topology, rank
        self.host = topology.host_of[rank]
        self.locals = topology.hosts[self.host]
        self.inputs = blocks("input", problem.matrix[rank])
        self.outputs = blocks("output", [row[rank] for row in problem.matrix])

    def plan(self, window: int) -> RankPlan:
        hosts = len(self.topology.hosts)
        for turn in range(1, min(window + 1, hosts)):
            self.send_to((self.host + turn) % hosts, round_lane(turn, window))
        self._inside()
        for turn in range(1, hosts):
            lane = round_lane(turn, window)
            self.receive_from((self.host - turn) % hosts, lane)
            if turn + window < hosts:
                self.send_to((self.host + turn + window) % hosts, lane)
        return self.script.finish()

    def send_to(self, there: int, lane: int) -> None:
        """This rank's part in what its host sends to the host `there`, on the round's `lane`."""
        raise NotImplementedError

    def receive_from(self, there: int, lane: int) -> None:
        """This rank's part in what its host receives from the host `there`, on the round's `lane`."""
        raise NotImplementedError

    def _inside(self) -> None:
        me = self.topology.local_rank[self.rank]
        for shift in range(1, len(self.locals)):
            to = self.locals[(me + shift) % len(self.locals)]
            self.script.send(self.inputs[to], to, INSIDE)
        self.script.copy(self.inputs[self.rank], self.outputs[self.rank], INSIDE)
        for shift in range(1, len(self.locals)):
            source = self.locals[me - shift]
            self.script.recv(self.outputs[source], source, INSIDE)
