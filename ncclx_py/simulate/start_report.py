"""What ``ncclx simulate startup`` prints: time and memory of a start, the published figures, and all that was assumed."""

from __future__ import annotations

from typing import Any

from ncclx_py.simulate.figures import Figure, named, table
from ncclx_py.simulate.memory import PUBLISHED_MEMORY, MemoryFigures, communicators, gpu_memory, host_memory
from ncclx_py.simulate.startup import StartFigures, fitted_figures, predict_start, published_starts
from ncclx_py.units import format_size, format_time

MODES = {"eager": True, "lazy": False}


def startup_facts(hosts: int, per_host: int, groups: int, modes: list[str]) -> dict[str, Any]:
    """What ``--json`` prints. Raises ValueError for a cluster that cannot be."""
    if hosts < 1 or per_host < 1:
        raise ValueError(f"--hosts {hosts} --gpus-per-host {per_host}: both are at least 1.")
    ranks = hosts * per_host
    starts: dict[str, Any] = {}
    for mode in modes:
        start = predict_start(ranks, groups, MODES[mode])
        memory = host_memory(ranks, per_host, groups, MODES[mode])
        gpu = gpu_memory(ranks, MODES[mode])
        starts[mode] = {
            "predicted_s": start.seconds,
            "server_s": start.server_s,
            "rank_s": start.rank_s,
            "requests_per_rank": start.requests_per_rank,
            "bytes_per_rank": start.bytes_per_rank,
            "connections_per_rank": start.connections_per_rank,
            "host_memory_bytes": {**memory.parts, "total": memory.total},
            "gpu_memory_bytes": {**gpu.parts, "total": gpu.total},
        }
    of, eager, lazy = PUBLISHED_MEMORY
    return {
        "ranks": ranks,
        "groups": groups,
        "starts": starts,
        "published_starts": [{**row._asdict(), "error": row.error} for row in published_starts()],
        "published_memory": [
            {
                "ranks": of,
                "mode": mode,
                "published_bytes": published,
                "model_bytes": gpu_memory(of, MODES[mode]).total,
                "fitted": mode == "eager",
                "error": gpu_memory(of, MODES[mode]).total / published - 1,
            }
            for mode, published in (("eager", eager), ("lazy", lazy))
        ],
        "assumptions": {name: vars(figure) for name, figure in _figures().items()},
    }


def startup_text(facts: dict[str, Any]) -> str:
    """The same, to be read."""
    lines = [f"start of {facts['ranks']} ranks with {facts['groups']} sub-groups each, this backend"]
    for mode, start in facts["starts"].items():
        lines += [
            f"  {mode:<6} {format_time(start['predicted_s'])}: the store {format_time(start['server_s'])}, each rank "
            f"{format_time(start['rank_s'])}",
            f"         per rank {start['requests_per_rank']:,.0f} keys asked of the store, "
            f"{format_size(int(start['bytes_per_rank']))}, {start['connections_per_rank']:,} connections",
            f"         memory of a rank {_parts(start['host_memory_bytes'])}; of a GPU with a library of NCCL's kind "
            f"{format_size(int(start['gpu_memory_bytes']['total']))}",
        ]
    lines += ["", "published start of NCCL (eager) and NCCLX (lazy)    published      model   error"]
    for row in facts["published_starts"]:
        times = f"{row['published_s']:>8.2f} s {row['model_s']:>8.2f} s"
        lines.append(f"  {row['ranks']:>6} GPUs {row['mode']:<6} {'':<28} {times}  {_error(row)}")
    lines.append("published memory of a GPU")
    for row in facts["published_memory"]:
        lines.append(
            f"  {row['ranks']:>6} GPUs {row['mode']:<6} {'':<28} {row['published_bytes'] / 1e9:>7.2f} GB "
            f"{row['model_bytes'] / 1e9:>7.2f} GB  {_error(row)}"
        )
    lines += ["", "what this rests on", *table(_figures())]
    return "\n".join(lines)


def _figures() -> dict[str, Figure]:
    return {**named(StartFigures()), **fitted_figures(), **named(MemoryFigures()), "communicators": communicators()}


def _parts(memory: dict[str, float]) -> str:
    parts = ", ".join(
        f"{name} {format_size(int(value))}" for name, value in memory.items() if name != "total" and value
    )
    return f"{format_size(int(memory['total']))} ({parts})"


def _error(row: dict[str, Any]) -> str:
    return "fitted" if row["fitted"] else f"{100 * row['error']:+.0f} % (predicted)"
