"""``ncclx plan``: which algorithm would run, why, what it costs and what it does; and a check of plan files.

ncclx plan all_reduce --bytes 64MiB --hosts 4 --ranks-per-host 8
ncclx plan all_reduce --bytes 1MiB --topology cluster.toml --print --rank 0 --json plan.json
ncclx plan --check plan.json

Nothing is sent: a plan is made and costed here for any topology. The table, the rules and the forced algorithms of the
environment (``NCCLX_TABLE``, ``NCCLX_RULES``, ``NCCLX_ALGO``, ``NCCLX_DETERMINISTIC``) count as they do in a job.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ncclx_py.environment import read_launch
from ncclx_py.plans.algorithms.registry import ALGORITHMS, build
from ncclx_py.plans.bounds import lower_bound
from ncclx_py.plans.files import check_plan, load_plan, write_plan
from ncclx_py.plans.plan import Plan, Problem
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.replay import replay
from ncclx_py.plans.rules import forced_rules
from ncclx_py.plans.spec import VARIABLE, resolve
from ncclx_py.plans.spec_file import place, read_spec
from ncclx_py.plans.text import phases_text, rank_text
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.tuner import Candidate, Choice, Tuner
from ncclx_py.plans.verify import verify
from ncclx_py.units import format_size, format_time, parse_size

NAME = "plan"
HELP = "show which algorithm would run a collective, why, its steps and its cost; or check a plan file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collective", nargs="?", choices=ALGORITHMS, metavar="COLLECTIVE", help=", ".join(ALGORITHMS))
    parser.add_argument(
        "--bytes", default="1MiB", metavar="SIZE", help="the whole vector, or all blocks of one rank (default 1MiB)"
    )
    parser.add_argument("--itemsize", type=int, default=4, metavar="N", help="bytes of an element (default 4)")
    parser.add_argument("--root", type=int, default=0, metavar="R", help="of broadcast and reduce (default 0)")
    parser.add_argument("--topology", metavar="FILE", help=f"a topology file (default: {VARIABLE})")
    parser.add_argument("--hosts", type=int, metavar="N", help="instead of what the launcher says")
    parser.add_argument("--ranks-per-host", metavar="G", help="one number, or one per host: 4,4,2")
    parser.add_argument("--placement", choices=("block", "cyclic"), default="block", help="of ranks (default block)")
    parser.add_argument("--rails", type=int, default=0, metavar="N", help="NICs per host")
    parser.add_argument(
        "--algorithm", metavar="A", help="this one, as ring or pipelined(chunks=8), and not the tuner's choice"
    )
    parser.add_argument(
        "--print", action="store_true", help="print the plan's phases and the steps of --rank, or of all"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="whose steps to print (with --print)")
    parser.add_argument(
        "--replay", action="store_true", help="play the plan's messages on the links, one by one, and print the time"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan of all ranks")
    parser.add_argument("--facts", action="store_true", help="print one JSON object with choice, bound and candidates")
    parser.add_argument("--check", type=Path, metavar="FILE", help="verify a plan file and say what it is")


def run(args: argparse.Namespace) -> int:
    if args.check is not None:
        if args.collective is not None:
            raise ValueError("--check verifies a file: leave the collective out.")
        return _check(args)
    if args.collective is None:
        raise ValueError("Name a collective, or a plan file with --check.")
    topology, sources = _topology(args, os.environ)
    if args.rank is not None and not 0 <= args.rank < topology.size:
        raise ValueError(f"--rank {args.rank}: there are ranks 0 to {topology.size - 1}.")
    if not 0 <= args.root < topology.size:
        raise ValueError(f"--root {args.root}: there are ranks 0 to {topology.size - 1}.")
    if args.itemsize < 1:
        raise ValueError(f"--itemsize {args.itemsize}: an element has at least one byte.")
    problem = uniform(args.collective, topology.size, parse_size(args.bytes), args.itemsize, args.root)
    tuner = _tuner(topology, args)
    choice = tuner.choose(problem, args.itemsize)
    candidates = tuner.candidates(problem, args.itemsize)
    if args.facts:
        print(json.dumps(_facts(topology, sources, problem, args.itemsize, choice, candidates), indent=2))
    else:
        print(_report(topology, sources, problem, args.itemsize, choice, candidates))
    if args.print or args.json is not None or args.replay:
        _show(build(problem, topology, choice.algorithm, choice.parameters), topology, args)
    return 0


def _show(plan: Plan, topology: Topology, args: argparse.Namespace) -> None:
    verify(plan, topology)
    if args.print:
        ranks = range(topology.size) if args.rank is None else [args.rank]
        print("\n".join(["", phases_text(plan), *(rank_text(plan.ranks[rank]) for rank in ranks)]))
    if args.replay:
        played = replay(plan, topology, args.itemsize)
        print(f"\nreplayed: {format_time(played.seconds)}")
        for (host, rail), count in sorted(played.nic_bytes.items()):
            print(f"  host {host}, NIC {rail}: {format_size(count)} out")
    if args.json is not None:
        write_plan(plan, args.json)
        print(f"\nwrote {args.json}")


def _check(args: argparse.Namespace) -> int:
    plan = load_plan(args.check)
    topology = _topology(args, os.environ)[0] if args.topology or args.hosts else None
    check_plan(plan, args.check, plan.problem.size, topology)
    print(f"{args.check}: correct")
    print(phases_text(plan))
    return 0


def _topology(args: argparse.Namespace, env: Mapping[str, str]) -> tuple[Topology, Mapping[str, str]]:
    """From --hosts, else the file, else the launcher; and where each part comes from."""
    path = args.topology or env.get(VARIABLE)
    spec = read_spec(path) if path else None
    if (args.hosts is None) != (args.ranks_per_host is None):
        raise ValueError("--hosts and --ranks-per-host belong together.")
    if args.rails < 0:
        raise ValueError(f"--rails {args.rails}: a host has at least one NIC.")
    world: tuple[int, ...] = ()
    source = "command line"
    if args.hosts is not None:
        world = place(_counts(args.hosts, args.ranks_per_host), args.placement)
    elif spec is None or not spec.host_of:
        launch = read_launch(env)
        world, source = launch.host_of(), "one process" if launch.launcher == "none" else launch.launcher
    found = resolve(world, args.rails, spec, world=source)
    return found.topology, found.sources


def _counts(hosts: int, per_host: str) -> list[int]:
    if hosts < 1:
        raise ValueError(f"--hosts {hosts}: there is at least one.")
    try:
        counts = [int(part) for part in per_host.split(",")]
    except ValueError:
        raise ValueError(f"--ranks-per-host {per_host}: give one number, or one per host as in 4,4,2.") from None
    counts = counts * hosts if len(counts) == 1 else counts
    if len(counts) != hosts or min(counts) < 1:
        raise ValueError(f"--ranks-per-host {per_host}: give one number, or {hosts} of them, each at least 1.")
    return counts


def _tuner(topology: Topology, args: argparse.Namespace) -> Tuner:
    tuner = Tuner.from_environment(topology, os.environ)
    if args.algorithm is None:
        return tuner
    forced = forced_rules(f"{args.collective}={args.algorithm}", f"--algorithm {args.algorithm}")
    return Tuner(topology, tuner.table, forced, False)


def _facts(
    topology: Topology,
    sources: Mapping[str, str],
    problem: Problem,
    itemsize: int,
    choice: Choice,
    candidates: list[Candidate],
) -> dict[str, Any]:
    bound = lower_bound(problem, topology, itemsize)
    return {
        "collective": problem.collective,
        "host_of": list(topology.host_of),
        "rails": topology.rails,
        "sources": dict(sources),
        "choice": {
            "algorithm": choice.algorithm,
            "parameters": choice.parameters,
            "reason": choice.reason,
            "predicted_s": choice.predicted_s,
        },
        "bound": {"seconds": bound.seconds, "name": bound.name, "parts": bound.parts},
        "candidates": [
            {
                "algorithm": one.algorithm,
                "parameters": one.parameters,
                "predicted_s": one.predicted_s,
                "source": one.source,
                "why_not": one.why_not,
            }
            for one in candidates
        ],
    }


def _report(
    topology: Topology,
    sources: Mapping[str, str],
    problem: Problem,
    itemsize: int,
    choice: Choice,
    candidates: list[Candidate],
) -> str:
    bound = lower_bound(problem, topology, itemsize)
    counts = "+".join(str(len(ranks)) for ranks in topology.hosts)
    parts = ", ".join(f"{name} {format_time(value)}" for name, value in bound.parts.items() if value)
    values = "".join(f" {name}={value}" for name, value in choice.parameters.items())
    lines = [
        f"topology   {len(topology.hosts)} hosts ({counts} ranks), {topology.rails} rails; hosts from {sources['hosts']}, "
        f"intra bandwidth {sources['intra.bandwidth']}, inter bandwidth {sources['inter.bandwidth']}",
        f"bound      {format_time(bound.seconds)} ({bound.name}){f': {parts}' if parts else ''}",
        f"choice     {choice.algorithm}{values}",
        f"because    {choice.reason}",
        "candidates",
    ]
    for one in candidates:
        if one.predicted_s is None:
            lines.append(f"  {one!s:<28} {'-':>10}            {one.why_not}")
            continue
        percent = f"{100 * bound.seconds / one.predicted_s:4.0f} % of bound" if one.predicted_s else ""
        lines.append(f"  {one!s:<28} {format_time(one.predicted_s):>10}  {percent:<16}  {one.why_not or one.source}")
    return "\n".join(lines)
