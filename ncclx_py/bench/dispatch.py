"""Counts what de-duplicated dispatch sends between hosts, beside the expectation for evenly chosen experts.

    ncclx launch emulate 4x2 --rate 200mbit -- -m ncclx_py.bench.dispatch [--experts 64 --top 8 --rows 4096 --width 64]

Any torchrun-like start will do. Expected copies per row, with E experts on N hosts and k chosen at random: the N − 1 other hosts
are each needed with probability 1 − C(E − E/N, k) / C(E, k). One line of JSON on rank 0; exit status 1 when the rows that
came back are wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

import ncclx_py  # noqa: F401  (registers the backend)
from ncclx_py.dispatch import Dispatcher


def main() -> int:
    """Runs one dispatch and combine on each rank of this launch."""
    parser = argparse.ArgumentParser(prog="python -m ncclx_py.bench.dispatch", description=__doc__)
    for name, value in {"experts": 64, "top": 8, "rows": 4096, "width": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options = parser.parse_args()
    dist.init_process_group("ncclx")
    try:
        return _measure(options.experts, options.top, options.rows, options.width)
    finally:
        dist.destroy_process_group()


def _measure(experts: int, top: int, rows: int, width: int) -> int:
    torch.manual_seed(dist.get_rank())
    ids = torch.stack([torch.randperm(experts)[:top] for _ in range(rows)])
    weights, data = torch.rand(rows, top), torch.randn(rows, width)
    dispatcher = Dispatcher(None, None, experts)
    began = time.perf_counter()
    sent = dispatcher.dispatch(data, ids, weights)
    seconds, there = time.perf_counter() - began, dispatcher.traffic.row_bytes
    result = dispatcher.combine(sent.rows, sent)  # every expert is the identity
    wrong = not torch.allclose(result, data * weights.sum(1, keepdim=True), atol=1e-3)
    topology = dispatcher.topology
    totals = _summed(there, rows, wrong, dispatcher.traffic.copies)
    if dist.get_rank() == 0:
        needed = 1 - math.comb(experts - experts // len(topology.hosts), top) / math.comb(experts, top)
        expected = totals[1] * (len(topology.hosts) - 1) * needed * width * data.element_size()
        figures = {
            "hosts": len(topology.hosts),
            "ranks": topology.size,
            "row_bytes": totals[0],
            "expected_bytes": expected,
            "ratio": totals[0] / expected if expected else 1.0,
            "without_dedup_bytes": totals[3] * width * data.element_size(),
            "dispatch_s": seconds,
            "correct": not totals[2],
        }
        print(json.dumps(figures), flush=True)
    return int(totals[2] > 0)


def _summed(*values: float) -> list[float]:
    total: Tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


if __name__ == "__main__":
    sys.exit(main())
