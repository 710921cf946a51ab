"""A cluster on one machine: hosts are network namespaces, links are shaped, ranks are started as torchrun starts them.

    with Cluster(hosts=[4, 4], rate="200mbit", rails=1) as cluster:
        outcome = cluster.run(["script.py", "--steps", "3"])        # or ["-m", "module", …]
        outcome.status                                              # 0, or the first failing rank's exit status

Needs root and iproute2; raises EmulationError otherwise. Leaving the block removes everything, and the next start removes what
a launcher that was killed left behind. ``ncclx launch emulate`` is this on the command line.

Each host has a network and a name of its own (host0, host1, …) and shares the machine's files, memory and processes. The
rates are told to the ranks as a topology file (`NCCLX_TOPOLOGY`), unless the caller names one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from ncclx_py.launch.network import EmulationError, Network
from ncclx_py.launch.ranks import Outcome, Process, Show, prefixed, run_ranks
from ncclx_py.launch.shape import DEFAULT_BURST, Shape, parse_rates

from ncclx_py.plans.spec import VARIABLE
from ncclx_py.units import parse_bandwidth

__all__ = ["Cluster", "EmulationError"]

MASTER_PORT = 29500  # always free: the hosts are new


class Cluster:
    """Emulated hosts, there from ``__enter__`` to ``__exit__``.

    `hosts` is the number of ranks on each host, or a whole `Shape`, which needs nothing else. `rate` and `spine` are as on
    the command line ("200mbit", or one rate per rail as in "200mbit,100mbit"; None: links are not shaped), `burst` is in
    bytes. Raises ValueError for an impossible shape.
    """

    def __init__(
        self,
        hosts: Sequence[int] | Shape,
        rate: str | None = None,
        rails: int | None = None,
        spine: str | None = None,
        burst: int = DEFAULT_BURST,
        placement: str = "block",
    ) -> None:
        if isinstance(hosts, Shape):
            self.shape = hosts
        else:
            middle = None if spine is None else parse_bandwidth(spine)
            self.shape = Shape(tuple(hosts), parse_rates(rate, rails), middle, burst, placement)
        self.network = Network(self.shape)

    def __enter__(self) -> Cluster:
        self.network.build()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.network.remove()
        except BaseException:  # an interrupt: what it asks for is to be gone, and that is nearly done
            self.network.remove()
            raise

    def run(
        self,
        program: Sequence[str],
        env: Mapping[str, str] | None = None,
        show: Show = prefixed,
        timeout: float | None = None,
    ) -> Outcome:
        """Runs `program` (a script or ``-m module``, and its arguments) on every rank and waits for the end.

        Ranks inherit this process's environment, changed by `env`. `show` gets every line of output. Raises TimeoutError
        after `timeout` seconds.
        """
        inherited = {**os.environ, **(env or {})}
        ranks = [
            Process(
                rank,
                [*self.network.enter(host), sys.executable, *program],
                {**inherited, **self.environment(rank, inherited)},
            )
            for rank, host in enumerate(self.shape.host_of)
        ]
        return run_ranks(ranks, show, timeout)

    def environment(self, rank: int, inherited: Mapping[str, str]) -> dict[str, str]:
        """What `rank` gets on top of `inherited`: torchrun's variables, and the names of the NICs for each library."""
        shape, host = self.shape, self.shape.host_of[rank]
        interfaces = self.network.interfaces
        numbers = {
            "RANK": rank,
            "ROLE_RANK": rank,
            "LOCAL_RANK": shape.local_rank[rank],
            "GROUP_RANK": host,
            "WORLD_SIZE": shape.size,
            "ROLE_WORLD_SIZE": shape.size,
            "LOCAL_WORLD_SIZE": shape.ranks[host],
            "GROUP_WORLD_SIZE": shape.hosts,
            "MASTER_PORT": MASTER_PORT,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
        }
        defaults = {"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PYTHONUNBUFFERED": "1"}
        return {
            **{name: str(number) for name, number in numbers.items()},
            "ROLE_NAME": "default",
            "MASTER_ADDR": self.network.address(shape.host_of[0]),
            "TORCHELASTIC_RUN_ID": self.network.name,
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "GLOO_SOCKET_IFNAME": interfaces[0],
            "TP_SOCKET_IFNAME": interfaces[0],
            "NCCL_SOCKET_IFNAME": ",".join(interfaces),
            "NCCL_HOSTID": self.network.host(host),
            "NCCLX_RAILS": ",".join(interfaces),
            **self._topology(inherited),
            **{name: value for name, value in defaults.items() if name not in inherited},
        }

    def _topology(self, inherited: Mapping[str, str]) -> dict[str, str]:
        known = None not in self.shape.rates and VARIABLE not in inherited
        return {VARIABLE: str(self.network.topology_file)} if known else {}
