"""``ncclx simulate``: what a collective would take on a cluster that is not there, up to 131,072 ranks and more.

ncclx simulate all_reduce --hosts 16384 --gpus-per-host 8 --bytes 1GiB
ncclx simulate all_to_all --topology cluster.toml --bytes 64MiB --fail link=3.0 --straggler rank=5,factor=3 --png timeline.png
ncclx simulate startup --hosts 16384 --gpus-per-host 8 --groups 8
ncclx simulate --workload outputs/run/trace --hosts 128 --gpus-per-host 8
ncclx simulate all_reduce --gpus-per-host 8 --sweep-hosts 2,16,128,1024 --sweep-bytes 1MiB,64MiB,1GiB --plot sweep.png

Nothing is sent. α, bandwidths and tiers of switches are those of the topology file (docs/collectives.md); without one, of a cluster
with NVLink inside hosts and a 400 Gbit/s NIC per GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ncclx_py.plans.algorithms.registry import ALGORITHMS
from ncclx_py.plans.spec import VARIABLE
from ncclx_py.plans.spec_file import Spec, place, read_spec
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.simulate import sweep, timeline
from ncclx_py.simulate.chakra import is_chakra, read_chakra
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.path import critical_path
from ncclx_py.simulate.predict import Prediction, predict
from ncclx_py.simulate.start_report import MODES, startup_facts, startup_text
from ncclx_py.simulate.workload import replay, workload_text
from ncclx_py.units import format_size, format_time, parse_size, parse_time
from ncclx_py.watch.reading import dump_files, read_job

NAME = "simulate"
HELP = "predict a collective at a scale that is not there: time, bound, busiest links, critical path"

# Of the worked figures in NCCL's own model: latencies of its Simple protocol, NVLink of an H100, a 400 Gbit/s NIC per GPU.
GPU_INTRA, GPU_INTER = Link(3.4e-6, 370e9), Link(14e-6, 50e9)
_HOPS = 12
STARTUP = "startup"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "collective",
        nargs="?",
        choices=[*ALGORITHMS, STARTUP],
        metavar="COLLECTIVE",
        help=", ".join(ALGORITHMS) + f"; or {STARTUP}: time and memory of a start, beside what is published",
    )
    parser.add_argument("--bytes", default="64MiB", metavar="SIZE", help="the whole vector, or all blocks of one rank")
    parser.add_argument("--itemsize", type=int, default=4, metavar="N", help="bytes of an element (default 4)")
    parser.add_argument("--hosts", type=int, metavar="N", help="number of hosts (default: the topology file's)")
    parser.add_argument("--gpus-per-host", type=int, metavar="G", help="ranks per host")
    parser.add_argument("--rails", type=int, metavar="N", help="NICs per host (default: the file's, else one per rank)")
    parser.add_argument("--topology", metavar="FILE", help=f"a topology file (not {VARIABLE}: it describes this job)")
    parser.add_argument("--algorithm", default="", metavar="A", help="this one, and not the best")
    parser.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="link=HOST.NIC[,share=X]",
        help="a NIC that is down, or has a share left",
    )
    parser.add_argument(
        "--straggler",
        action="append",
        default=[],
        metavar="rank=R[,factor=X][,delay=T]",
        help="a rank that is slow or late",
    )
    parser.add_argument("--every-rank", action="store_true", help="play all ranks, not one of each class")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the timeline")
    parser.add_argument("--sweep-bytes", metavar="SIZE,…", help="several sizes")
    parser.add_argument("--sweep-hosts", metavar="N,…", help="several numbers of hosts")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep")
    parser.add_argument(
        "--workload",
        type=Path,
        metavar="DIR",
        help="instead of COLLECTIVE: the traces of a job (ours, or Chakra's as JSON), at the scale of this cluster",
    )
    parser.add_argument("--groups", type=int, default=0, metavar="N", help=f"{STARTUP}: sub-groups of each rank")
    mode = parser.add_mutually_exclusive_group()
    for name, what in (("eager", "everything made at once"), ("lazy", "what is needed when it is needed")):
        mode.add_argument(f"--{name}", action="store_const", dest="mode", const=name, help=f"{STARTUP}: {what}, alone")


def run(args: argparse.Namespace) -> int:
    if (args.collective is None) == (args.workload is None):
        raise ValueError("Name what to simulate: a COLLECTIVE, or the traces of a job with --workload.")
    if args.workload is not None:
        return _workload(args)
    if args.collective == STARTUP:
        return _startup(args)
    if args.itemsize < 1:
        raise ValueError(f"--itemsize {args.itemsize}: an element has at least one byte.")
    if args.sweep_bytes or args.sweep_hosts:
        return _sweep(args)
    if args.plot is not None:
        raise ValueError("--plot draws a sweep: give --sweep-bytes or --sweep-hosts, or use --png for one prediction.")
    cluster = cluster_of(args, args.hosts)
    prediction = predict(
        args.collective, cluster, _size(args.bytes), args.itemsize, args.algorithm, args.every_rank, _tell(args)
    )
    if args.png is not None:
        timeline.draw(prediction, args.png)
    if args.json:
        print(json.dumps(facts(prediction), indent=2))
    else:
        print(_report(prediction, cluster))
    return 0


def _startup(args: argparse.Namespace) -> int:
    if args.hosts is None or args.gpus_per_host is None:
        raise ValueError(f"{STARTUP} needs --hosts and --gpus-per-host.")
    found = startup_facts(args.hosts, args.gpus_per_host, args.groups, [args.mode] if args.mode else list(MODES))
    print(json.dumps(found, indent=2) if args.json else startup_text(found))
    return 0


def _workload(args: argparse.Namespace) -> int:
    cluster = cluster_of(args, args.hosts)
    chakra = is_chakra(args.workload) and not dump_files(args.workload)
    job = read_chakra(args.workload, cluster.topology.widest) if chakra else read_job(args.workload)
    for complaint in job.complaints:
        print(f"ncclx simulate: {complaint}", file=sys.stderr)
    rows, left_out = replay(job, cluster, _tell(args))
    if args.json:
        found = {"recorded_ranks": job.world_size, "missing_ranks": job.missing, "left_out": left_out}
        print(json.dumps({**found, "calls": [row._asdict() for row in rows]}, indent=2))
    else:
        print(workload_text(rows, left_out))
    return 0


def cluster_of(args: argparse.Namespace, hosts: int | None) -> Cluster:
    """The cluster that the command line and its topology file describe. Raises ValueError for what cannot be."""
    spec = read_spec(args.topology) if args.topology else Spec("")
    if hosts is None and args.gpus_per_host is None and spec.host_of:
        host_of = spec.host_of
    elif hosts is None or args.gpus_per_host is None:
        raise ValueError(
            "--hosts and --gpus-per-host say how large the cluster is; or name a --topology file with hosts."
        )
    elif hosts < 1 or args.gpus_per_host < 1:
        raise ValueError(f"--hosts {hosts} --gpus-per-host {args.gpus_per_host}: both are at least 1.")
    else:
        host_of = place([args.gpus_per_host] * hosts, "block")
    rails = args.rails if args.rails is not None else spec.rails or max(1, args.gpus_per_host or 1)
    if rails < 1:
        raise ValueError(f"--rails {rails}: a host has at least one NIC.")
    intra = Link(_or(spec.intra_alpha, GPU_INTRA.alpha), _or(spec.intra_bandwidth, GPU_INTRA.bandwidth))
    inter = Link(_or(spec.inter_alpha, GPU_INTER.alpha), _or(spec.inter_bandwidth, GPU_INTER.bandwidth))
    topology = Topology(host_of, rails, intra, inter, memory=spec.memory, gamma=spec.gamma)
    if spec.nics:
        count = len(topology.hosts)
        nics = tuple(
            tuple(spec.nics.get((host, rail), inter.bandwidth) for rail in range(rails)) for host in range(count)
        )
        topology = replace(topology, nics=nics)
    shares = dict(_link(text) for text in args.fail)
    delays, slowness = _stragglers(args.straggler)
    return Cluster(topology, spec.tiers, shares, delays, slowness)


def facts(prediction: Prediction) -> dict[str, Any]:
    """What ``--json`` prints: the names are kept, as programs read them."""
    found: dict[str, Any] = {
        "collective": prediction.collective,
        "bytes": prediction.size,
        "ranks": prediction.ranks,
        "algorithm": prediction.algorithm,
        "parameters": prediction.parameters,
        "predicted_s": prediction.seconds,
        "bound_s": prediction.bound.seconds,
        "bound": prediction.bound.name,
        "method": prediction.method,
        "note": prediction.note,
        "plan_s": prediction.plan_s,
        "play_s": prediction.play_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "estimates_s": prediction.estimates,
        "played_s": prediction.played,
    }
    if prediction.outcome is not None:
        found["busiest"] = [
            {"link": name, "bytes": moved, "share": share} for name, moved, share in prediction.outcome.busiest(8)
        ]
        path = critical_path(prediction.outcome)
        found["critical_path"] = {"hops": len(path), "last": [hop._asdict() for hop in path[-_HOPS:]]}
    return found


def _report(prediction: Prediction, cluster: Cluster) -> str:
    bound = prediction.bound
    values = "".join(f" {name}={value}" for name, value in prediction.parameters.items())
    lines = [
        f"cluster    {len(cluster.topology.hosts)} hosts, {prediction.ranks} ranks, {cluster.topology.rails} NICs per host"
        + "".join(f", {tier.name}s of {tier.hosts} hosts ({tier.oversubscription:g}:1)" for tier in cluster.tiers),
        f"predicted  {format_time(prediction.seconds)} by {prediction.algorithm}{values} ({prediction.method})",
        f"bound      {format_time(bound.seconds)} ({bound.name}): {_times(prediction.seconds, bound.seconds)}",
    ]
    if prediction.note:
        lines.append(f"note       {prediction.note}")
    lines.append(
        "estimates  " + ", ".join(f"{name} {format_time(value)}" for name, value in prediction.estimates.items())
    )
    if prediction.outcome is not None:
        lines.append(
            "played     " + ", ".join(f"{name} {format_time(value)}" for name, value in prediction.played.items())
        )
        lines.append("busiest links")
        for name, moved, share in prediction.outcome.busiest(6):
            lines.append(f"  {name:<28} {format_size(int(moved)):>10}  {100 * share:4.0f} % of the time")
        path = critical_path(prediction.outcome)
        lines.append(f"critical path, the last of {len(path)} steps")
        for hop in path[-_HOPS:]:
            span = f"{format_time(hop.start_s)} to {format_time(hop.end_s)}"
            lines.append(f"  rank {hop.rank:<6} {hop.what:<22} {format_size(hop.bytes):>10}  {span}")
    lines.append(f"worked out in {prediction.plan_s + prediction.play_s:.1f} s")
    return "\n".join(lines)


def _sweep(args: argparse.Namespace) -> int:
    sizes = [_size(part) for part in (args.sweep_bytes or args.bytes).split(",")]
    if args.sweep_hosts:
        hosts: list[int | None] = [_whole("--sweep-hosts", part) for part in args.sweep_hosts.split(",")]
    else:
        hosts = [args.hosts]
    clusters = [cluster_of(args, count) for count in hosts]
    points = sweep.run(args.collective, clusters, sizes, args.itemsize, args.algorithm, _tell(args))
    if args.plot is not None:
        sweep.draw(points, args.plot)
    if args.json:
        print(json.dumps({"collective": args.collective, "points": points}, indent=2))
    else:
        print(sweep.table(points))
    return 0


def _tell(args: argparse.Namespace) -> Callable[[str], None] | None:
    return None if args.json else lambda text: print(f"… {text}", file=sys.stderr, flush=True)


def _times(seconds: float, bound: float) -> str:
    return f"the prediction is {seconds / bound:.2f} times that" if bound else "there is nothing to move"


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _size(text: str) -> int:
    size = parse_size(text)
    if size < 1:
        raise ValueError(f"--bytes {text}: at least one byte.")
    return size


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} {text}: give whole numbers, as in 2,16,128.") from None


def _fields(option: str, text: str, known: tuple[str, ...]) -> dict[str, str]:
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    if unknown := [name for name in parts if name not in known]:
        raise ValueError(f"{option} {text}: {unknown[0]!r} is none of {', '.join(known)}.")
    if known[0] not in parts:
        raise ValueError(f"{option} {text}: begin with {known[0]}=…")
    return parts


def _link(text: str) -> tuple[tuple[int, int], float]:
    parts = _fields("--fail", text, ("link", "share"))
    try:
        host, rail = (int(part) for part in parts["link"].split("."))
        share = float(parts.get("share", "0"))
    except ValueError:
        raise ValueError(f"--fail {text}: write link=HOST.NIC, as in link=3.0, and share=0.5 for half of it.") from None
    if not 0 <= share < 1:
        raise ValueError(f"--fail {text}: share is what is left, from 0 to below 1.")
    return (host, rail), share


def _stragglers(texts: list[str]) -> tuple[dict[int, float], dict[int, float]]:
    delays: dict[int, float] = {}
    slowness: dict[int, float] = {}
    for text in texts:
        parts = _fields("--straggler", text, ("rank", "factor", "delay"))
        try:
            rank, factor = int(parts["rank"]), float(parts.get("factor", "1"))
            delay = parse_time(parts["delay"]) if "delay" in parts else 0.0
        except ValueError:
            raise ValueError(f"--straggler {text}: write rank=R,factor=3 or rank=R,delay=10ms.") from None
        if factor < 1 or ("factor" not in parts and "delay" not in parts):
            raise ValueError(f"--straggler {text}: give a factor of at least 1, or a delay.")
        slowness[rank], delays[rank] = factor, delay
    return delays, {rank: factor for rank, factor in slowness.items() if factor > 1}
